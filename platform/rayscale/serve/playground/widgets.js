// What the page is made of: requests, file fields, the before/after slider, the facts of an answer.

export const $ = (selector, root = document) => root.querySelector(selector);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// --- requests

export class Problem extends Error {
  constructor(line, { status = 0, id = "", retryAfter = "" } = {}) {
    super(line);
    Object.assign(this, { status, id, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (value) => (value ? sessionStorage.setItem("key", value) : sessionStorage.removeItem("key")),
};

/** fetch, with the key, whose every failure is a Problem in one line. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const authorization = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer; check that it runs, then try again.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Problem(problem.detail ?? `${response.status} ${response.statusText}`, {
    status: response.status,
    id: problem.request_id ?? response.headers.get("x-request-id") ?? "",
    retryAfter: response.headers.get("retry-after") ?? "",
  });
}

// --- file fields

/** A label with a file input that also takes drops; `files` are what it holds, several where its input is `multiple`. */
export class FileField {
  files = [];

  get file() {
    return this.files[0];
  }

  get bytes() {
    return this.files.reduce((sum, one) => sum + one.size, 0);
  }

  constructor(label, changed = () => {}) {
    this.label = label;
    this.changed = changed;
    this.words = $(".drop-words", label);
    this.invitation = [...this.words.childNodes].map((node) => node.cloneNode(true));
    const input = (this.input = $("input", label));
    input.addEventListener("change", () => {
      this.take(...input.files);
      input.value = ""; // the same file again is a change again
    });
    for (const kind of ["dragenter", "dragover"]) {
      label.addEventListener(kind, (event) => {
        event.preventDefault();
        label.classList.add("over");
      });
    }
    label.addEventListener("dragleave", () => label.classList.remove("over"));
    label.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      label.classList.remove("over");
      this.take(...event.dataTransfer.files);
    });
  }

  take(...files) {
    if (!files.length) return;
    this.files = this.input.multiple ? files : files.slice(0, 1);
    const file = this.file, count = this.files.length;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(file);
    const thumbnail = make("img", { src: this.url, alt: "" });
    thumbnail.addEventListener("error", () => thumbnail.remove()); // a format that browsers do not show
    const name = make("b", {}, count > 1 ? `${count} pictures` : file.name || "pasted picture");
    this.words.replaceChildren(thumbnail, make("span", { class: "file" }, name, make("span", {}, size(this.bytes))));
    this.label.classList.add("full");
    this.changed();
  }
}

export const size = (bytes) =>
  bytes < 1024 ? `${bytes} B` : bytes < 2 ** 20 ? `${(bytes / 1024).toFixed(0)} KB` : `${(bytes / 2 ** 20).toFixed(1)} MB`;

/** A picture to try things with: fine rings, hard edges, small type and a soft ramp, drawn here. */
export function testChart(side = 192) {
  const canvas = make("canvas", { width: side * 1.5, height: side });
  const draw = canvas.getContext("2d");
  const image = draw.createImageData(side * 1.5, side);
  for (let y = 0, i = 0; y < side; y++) {
    for (let x = 0; x < side * 1.5; x++, i += 4) {
      const dx = x - side / 2, dy = y - side / 2;
      const wave = 0.5 + 0.5 * Math.cos((dx * dx + dy * dy) / (side * 0.62));
      const hue = Math.atan2(dy, dx);
      for (let c = 0; c < 3; c++) image.data[i + c] = 255 * (0.25 + 0.75 * wave * (0.7 + 0.3 * Math.cos(hue + 2.1 * c)));
      image.data[i + 3] = 255;
    }
  }
  draw.putImageData(image, 0, 0);
  const ramp = draw.createLinearGradient(side, 0, side * 1.5, side);
  ramp.addColorStop(0, "#fdf6e3");
  ramp.addColorStop(1, "#0b6e69");
  draw.fillStyle = ramp;
  draw.fillRect(side, 0, side / 2, side);
  draw.fillStyle = "#1c2526";
  [16, 13, 10, 8, 6].forEach((px, i) => {
    draw.font = `600 ${px}px system-ui, sans-serif`;
    draw.fillText("Rayscale", side + 8, 28 + i * 23);
  });
  for (let i = 0; i < 9; i++) draw.fillRect(side + 8 + i * (i + 1), side - 44, i / 2 + 1, 34);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(new File([blob], "test-chart.png", { type: "image/png" }))));
}

// --- before and after

/** Two pictures, one over the other, and how much of the upper one is seen. */
export function comparison(before, after, { names = ["Before", "After"], download = "" } = {}) {
  const figure = $("#comparison").content.firstElementChild.cloneNode(true);
  const [pair, slider, upper, lower] = [".pair", ".pair input", ".before", ".after"].map((s) => $(s, figure));
  lower.src = after;
  lower.alt = names[1];
  upper.src = before;
  upper.alt = names[0];
  $('[data-side="before"]', figure).textContent = names[0];
  $('[data-side="after"]', figure).textContent = names[1];
  slider.setAttribute("aria-label", `${names[0]} on the left, ${names[1].toLowerCase()} on the right`);
  const show = () => {
    pair.style.setProperty("--at", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${Math.round(slider.value)} % ${names[0].toLowerCase()}`);
  };
  slider.addEventListener("input", show);
  show();
  lower.addEventListener("load", () => {
    pair.style.setProperty("--w", lower.naturalWidth);
    pair.style.setProperty("--h", lower.naturalHeight);
  });
  upper.addEventListener("error", () => figure.classList.add("alone")); // the browser cannot show what was sent
  $('[name="actual"]', figure).addEventListener("change", ({ target }) => {
    figure.classList.toggle("actual", target.checked);
    $(".frame", figure).tabIndex = target.checked ? 0 : -1; // arrow keys scroll what is larger than it
  });
  const link = $(".download", figure);
  if (download) Object.assign(link, { href: after, download });
  else link.remove();
  return figure;
}

// --- the facts of an answer

const SPANS = {
  decode: "Decoding", latents: "Noise", queue: "Waiting", infer: "Model", filter: "Method", compare: "Comparing",
  encode: "Encoding", network: "Network and page",
};

/** `Server-Timing: decode;dur=1.2, ...` -> [["decode", 1.2], ...] */
export const timings = (header) =>
  [...(header ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);

const ms = (value) => (value < 1000 ? `${value.toFixed(value < 10 ? 1 : 0)} ms` : `${(value / 1000).toFixed(2)} s`);

/** Who answered and where the time went. `more` are further rows, [label, text]. */
export function facts(response, tookMs, more = []) {
  const said = (name) => response.headers.get(name);
  const digest = said("x-rayscale-digest");
  const rows = [
    ["Model", said("x-rayscale-model")],
    ...more,
    ["Digest", digest && make("code", { title: digest }, digest.slice(0, 12))],
    ["Tiles", said("x-rayscale-tiling")],
    ["Runs on", said("x-rayscale-provider")?.replace("ExecutionProvider", "")],
    ["Request", said("x-request-id") && make("code", {}, said("x-request-id").slice(0, 12))],
  ];
  const list = make("dl", { class: "facts" });
  for (const [label, value] of rows) if (value) list.append(make("div", {}, make("dt", {}, label), make("dd", {}, value)));
  const spans = timings(said("server-timing"));
  const elsewhere = tookMs - spans.reduce((sum, [, value]) => sum + value, 0);
  const all = [...spans, ["network", Math.max(0, elsewhere)]];
  const bar = make("div", { class: "bar-of-time", "aria-hidden": "true" });
  const legend = make("ul", { class: "legend" });
  for (const [name, value] of all) {
    const part = make("span", { "data-span": name });
    part.style.flexGrow = value;
    bar.append(part);
    legend.append(make("li", { "data-span": name }, `${SPANS[name] ?? name} ${ms(value)}`));
  }
  return [list, make("div", { class: "time" }, make("p", {}, `Answered in ${ms(tookMs)}`), bar, legend)];
}
