// The page: what the server offers decides what is shown; each task is a form, a request and a result.

import { $, FileField, Problem, ask, comparison, facts, key, make, size, testChart } from "./widgets.js";

const PICTURE_TASKS = {
  upscale: { title: "Upscale a picture", lead: "A picture in, a larger one out, by the model that its gate let through.", verb: "Upscale", done: "upscaled" },
  restore: { title: "Restore a picture", lead: "Noise, blur, scratches or holes in; the same picture without them out.", verb: "Restore", done: "restored" },
  burst: { title: "Merge a burst", lead: "Several shifted frames of one scene in, one larger picture out.", verb: "Merge", done: "merged" },
};
const REFRESH_MS = 15_000;
const FILLING = new Set(["method:telea", "method:navier_stokes"]);
const offered = { models: [], held: {}, defaults: {}, routes: new Set(), methods: {} };
const urls = new Map(); // section -> of its result

// --- tasks: a form and what its submission does

/** Wire a section: `run(form, signal)` returns the nodes of its result. One at a time; Stop ends it, here and there. */
function task(section, run) {
  const form = $("form.panel", section), button = $(".primary", form), stop = $('[data-act="stop"]', form);
  const error = $(".error", form), progress = $(".progress", section), result = $(".result", section);
  let running = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    error.hidden = true;
    button.setAttribute("aria-disabled", "true");
    stop.hidden = false;
    section.classList.add("busy");
    progress.textContent = "Working …";
    try {
      const nodes = await run(form, running.signal);
      $(".empty", section).hidden = true;
      result.replaceChildren(...nodes);
      result.hidden = false;
      progress.textContent = "Done.";
      if (result.getBoundingClientRect().top > 0.6 * innerHeight) result.scrollIntoView({ behavior: motion(), block: "nearest" });
    } catch (caught) {
      progress.textContent = "";
      if (running.signal.aborted) progress.textContent = "Stopped."; // whatever came of it
      else {
        clear(section); // what is shown is of an earlier try
        tell(error, caught);
      }
    } finally {
      running = null;
      button.removeAttribute("aria-disabled");
      if (document.activeElement === stop) button.focus(); // it goes, and the focus with it
      stop.hidden = true;
      section.classList.remove("busy");
    }
  });
  stop.addEventListener("click", () => running?.abort());
}

const motion = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");

function clear(section) {
  $(".result", section).hidden = true;
  $(".empty", section).hidden = false;
  $(".error", section).hidden = true;
  $(".progress", section).textContent = "";
}

function tell(place, error) {
  if (!(error instanceof Problem)) console.error(error);
  place.replaceChildren(error instanceof Problem ? error.message : `Something of this page failed: ${error.message}`);
  if (error.retryAfter) place.append(make("span", { class: "aside" }, `Try again in ${error.retryAfter} s.`));
  if (error.id) place.append(make("span", { class: "aside" }, `Request ${error.id}`));
  place.hidden = false;
  if (error.status === 401) openKey(error.message);
}

/** URLs of what a section shows from now on; those of what it showed are given back. */
function keep(section, ...blobs) {
  (urls.get(section) ?? []).forEach((url) => URL.revokeObjectURL(url));
  urls.set(section, blobs.map((blob) => URL.createObjectURL(blob)));
  return urls.get(section);
}

const dimensions = async (blob) => {
  const url = URL.createObjectURL(blob), image = make("img", { src: url });
  await new Promise((resolve) => (image.onload = image.onerror = resolve));
  URL.revokeObjectURL(url);
  return image.naturalWidth ? `${image.naturalWidth}\u00a0×\u00a0${image.naturalHeight}` : "";
};

// --- upscale, restore and burst: one section, three names

const picture = $("#picture");
const image = new FileField($('[data-drop="image"]', picture));
const mask = new FileField($('[data-drop="mask"]', picture));

task(picture, async (form, signal) => {
  const { file, files, bytes } = image, now = picture.dataset.task; // another may be chosen before the answer is here
  if (!file) throw new Problem("Choose a picture first.");
  const path = `v1/${now}?`, query = new URLSearchParams();
  const [, method, model] = form.model.value.match(/^method:(.*)|(.*)$/s);
  if (method ?? model) query.set(method ? "method" : "model", method ?? model);
  for (const name of ["contrast", "sharpen"]) if (form[name].value !== form[name].defaultValue) query.set(name, form[name].value);
  let body = file;
  const headers = { Accept: form.accept.value };
  const filled = mask.file && !mask.label.hidden;
  if (filled || now === "burst") {
    body = new FormData();
    for (const frame of files) body.append("image", frame);
    if (filled) body.append("mask", mask.file);
  } else headers["Content-Type"] = file.type || "application/octet-stream";
  const started = performance.now();
  const response = await ask(path + query, { method: "POST", body, headers, signal });
  const blob = await response.blob();
  const took = performance.now() - started;
  const [was, is] = await Promise.all([dimensions(file), dimensions(blob)]);
  signal.throwIfAborted(); // what is shown, of an earlier try, keeps its URLs
  const [before, after] = keep(picture, file, blob);
  const name = `${file.name.replace(/\.\w+$/, "") || "picture"}-${PICTURE_TASKS[now].done}.${blob.type.split("/")[1]}`;
  const rows = [["Size", was ? `${was} → ${is}` : is], ["File", `${size(bytes)} → ${size(blob.size)}`]];
  return [comparison(before, after, { download: name }), ...facts(response, took, rows)];
});

$('[data-act="chart"]', picture).addEventListener("click", async () => image.take(await testChart()));
picture.addEventListener("input", ({ target }) => {
  const shown = target.form?.[`${target.name}-shown`];
  if (shown) shown.value = Number(target.value).toFixed(2);
  if (target.name === "model") showMask();
});

/** The mask's field, for a model or a method that fills in. */
async function showMask() {
  const chosen = $("form", picture).model.value;
  let fills = FILLING.has(chosen);
  if (current() === "restore" && chosen && !chosen.startsWith("method:")) {
    const detail = await ask(`v1/models/${encodeURIComponent(chosen)}`).then((r) => r.json()).catch(() => ({}));
    fills = Boolean(detail.versions?.[0]?.card?.spec?.inputs?.some((input) => input.name === "mask"));
    if ($("form", picture).model.value !== chosen) return; // chosen anew meanwhile
  }
  mask.label.hidden = !(fills && current() === "restore");
}

addEventListener("dragover", (event) => event.preventDefault()); // beside a field the browser would leave the page
addEventListener("drop", (event) => {
  event.preventDefault();
  if (!picture.hidden) image.take(...event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
  if (file) (current() === "compare" ? (a.file ? b : a) : image).take(file);
});

// --- generate

const generate = $("#generate");

task(generate, async (form, signal) => {
  const wanted = { model: form.model.value, seed: Number(form.seed.value), n: Number(form.n.value) };
  if (form.truncation.value !== form.truncation.max) wanted.truncation = Number(form.truncation.value);
  if (form.to_seed.value) wanted.to_seed = Number(form.to_seed.value);
  if (!$("[data-classes]", form).hidden && form.class.value) wanted.class = form.class.value;
  const started = performance.now();
  const headers = { "Content-Type": "application/json", Accept: "application/json" };
  const response = await ask("v1/generate", { method: "POST", body: JSON.stringify(wanted), headers, signal });
  const answer = await response.json();
  const took = performance.now() - started;
  const gallery = make("ul", { class: "gallery" });
  answer.data.forEach((entry, i) => {
    const url = `data:image/${answer.output_format ?? "png"};base64,${entry.b64_json}`;
    const words = wanted.to_seed === undefined ? `Seed ${wanted.seed}, no. ${entry.index ?? i}` : `Step ${i + 1} of ${wanted.n}`;
    const download = `seed-${wanted.seed}-${entry.index ?? i}.${answer.output_format ?? "png"}`;
    gallery.append(make("li", {}, make("a", { href: url, download }, make("img", { src: url, alt: "" }), make("span", {}, words))));
  });
  return [gallery, ...facts(response, took)];
});

generate.addEventListener("input", (event) => {
  const { name, value, max, form } = event.target;
  if (name === "truncation") form["truncation-shown"].value = value === max ? "off" : Number(value).toFixed(1);
  if (name === "model") showClasses();
});
$('[data-act="dice"]', generate).addEventListener("click", (event) => {
  const form = event.target.form;
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  form.requestSubmit($(".primary", form));
});

function showClasses() {
  const form = $("form", generate), chosen = offered.models.find((m) => route(m) === form.model.value);
  const classes = chosen?.classes ?? [];
  $("[data-classes]", form).hidden = classes.length === 0;
  form.class.replaceChildren(make("option", { value: "" }, "any"), ...classes.map((c) => make("option", { value: c }, c)));
}

// --- compare

const [a, b] = ["a", "b"].map((name) => new FileField($(`[data-drop="${name}"]`)));

task($("#compare"), async (form, signal) => {
  const files = [a.file, b.file]; // others may be chosen before the answer is here
  if (!files.every(Boolean)) throw new Problem("Choose two pictures first.");
  const body = new FormData();
  body.append("a", files[0]);
  body.append("b", files[1]);
  const started = performance.now();
  const query = form.model.value ? `?model=${encodeURIComponent(form.model.value)}` : "";
  const response = await ask(`v1/similarity${query}`, { method: "POST", body, headers: { Accept: "application/json" }, signal });
  const answer = await response.json();
  const took = performance.now() - started;
  return [measures(answer.data[0]), comparison(...keep(form, ...files), { names: ["First", "Second"] }), ...facts(response, took)];
});

const MEASURES = { // group -> measure -> [its name, what it says]
  Pixels: { psnr: ["PSNR", "dB, higher is closer"], mse: ["Mean squared error", "lower is closer"], euclidean: ["Euclidean distance", "lower is closer"] },
  Structure: { ssim: ["SSIM", "1 is equal"], ms_ssim: ["MS-SSIM", "1 is equal"], sift: ["SIFT matches", "share of key points found again"] },
  Meaning: { cosine: ["Cosine", "of the model's vectors, 1 is equal"] },
};

/** Cards of the measures that the answer has, by what they look at. */
function measures(found) {
  const groups = make("div", { class: "measures" });
  for (const [group, names] of Object.entries(MEASURES)) {
    const list = make("dl");
    for (const [name, [words, hint]] of Object.entries(names)) {
      if (!(name in found)) continue;
      const value = found[name] === null ? (name === "psnr" ? "∞" : "none") : String(Number(found[name].toPrecision(4)));
      list.append(make("div", {}, make("dt", {}, words, make("small", {}, hint)), make("dd", {}, value)));
    }
    if (list.children.length) groups.append(make("section", {}, make("h2", {}, group), list));
  }
  return groups;
}

// --- what is offered

const route = (model) => `${model.name}@${model.aliases[0]}`;
const is = {
  upscale: (model) => (model.role ?? model.kind) === "upscale" || (!model.role && model.scale > 1),
  restore: (model) => model.role === "restore",
  burst: (model) => model.role === "burst",
  generate: (model) => model.kind === "generate",
  embed: (model) => model.kind === "embed",
};

const option = (value, ...words) => make("option", { value }, words.filter(Boolean).join(" · "));

/** The models of a select, then the classical methods to compare them with; what was chosen stays so. */
function fill(select, models, { methods = [], preferred = "" } = {}) {
  const chosen = select.value || preferred;
  const named = models.map((m) =>
    option(route(m), m.name, m.scale > 1 && `×${m.scale}`, `version ${m.version}`, m.aliases[0] !== "champion" && m.aliases[0]));
  const group = make("optgroup", { label: "Classical methods" }, ...methods.map((m) => option(`method:${m}`, m.replaceAll("_", " "))));
  const fresh = [...named, ...(methods.length ? [group] : [])];
  if (!fresh.length) fresh.push(option("", "no model is ready"));
  if (fresh.map((node) => node.outerHTML).join("") === select.innerHTML) return; // it may be open just now
  select.replaceChildren(...fresh);
  if ([...select.options].some((o) => o.value === chosen)) select.value = chosen;
}

/** Read what is served. `asked`: somebody waits for it, and is asked for a key where one is missing or wrong. */
async function refresh(asked = false) {
  const health = $(".health");
  try {
    const list = await (await ask("v1/models")).json();
    offered.models = list.models.filter((model) => model.ready && model.aliases.length);
    Object.assign(offered, { held: list.held, defaults: list.defaults ?? { upscale: list.default } });
    health.dataset.state = offered.models.length ? "ready" : "waiting";
    $(".words", health).textContent = offered.models.length ? "ready" : "no model yet";
  } catch (error) {
    health.dataset.state = "away";
    $(".words", health).textContent = error.status === 401 ? "key needed" : "no answer";
    if (error.status === 401 && asked) openKey(key.get() && error.message);
  }
  show();
}

async function readRoutes() {
  const page = await ask("openapi.json").then((r) => r.json()).catch(() => ({ paths: {} }));
  for (const [path, { post }] of Object.entries(page.paths)) {
    if (!path.startsWith("/v1/") || !post) continue;
    offered.routes.add(path.slice(4));
    const schema = post.parameters?.find((p) => p.name === "method")?.schema;
    offered.methods[path.slice(4)] = (schema?.anyOf ?? [schema ?? {}]).flatMap((part) => part.enum ?? []);
  }
}

// --- which task is shown

function current() {
  const named = location.hash.slice(1);
  return ["upscale", "restore", "burst", "generate", "compare"].includes(named) ? named : shown || "upscale"; // #main is no task
}

let shown = "";

function show() {
  const now = current();
  const has = { compare: offered.routes.has("similarity") };
  for (const [name, fits] of Object.entries(is)) has[name] = offered.routes.has(name) && (offered.models.some(fits) || offered.methods[name].length > 0);
  for (const link of document.querySelectorAll("nav a")) {
    const name = link.hash.slice(1);
    link.hidden = !has[name] && name !== "upscale" && name !== now;
    if (name === now) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  picture.hidden = !(now in PICTURE_TASKS);
  generate.hidden = now !== "generate";
  $("#compare").hidden = now !== "compare";
  if (now in PICTURE_TASKS) {
    const words = PICTURE_TASKS[now], form = $("form", picture);
    $("h1", picture).textContent = words.title;
    $(".lead p", picture).textContent = words.lead;
    $(".primary", picture).textContent = words.verb;
    fill(form.model, offered.models.filter(is[now]), { methods: offered.methods[now], preferred: offered.defaults[now] });
    if (picture.dataset.task && picture.dataset.task !== now) { // a task without this section leaves it at its work
      $('[data-act="stop"]', picture).click();
      clear(picture); // it was the other task's
    }
    picture.dataset.task = now;
    image.input.multiple = now === "burst";
    if (now !== "burst" && image.files.length > 1) image.take(image.file);
    showMask();
  }
  fill($("form", generate).model, offered.models.filter(is.generate), { preferred: offered.defaults.generate });
  if ($("form", generate).class.options.length < 2) showClasses();
  const embedders = offered.models.filter(is.embed);
  fill($("#compare form").model, embedders, { preferred: offered.defaults.embed });
  $("[data-embedders]").hidden = embedders.length === 0;
  const held = Object.values(offered.held), note = $("[data-held]", picture);
  note.hidden = held.length === 0;
  note.textContent = held.join(" ");
  document.title = `Rayscale · ${$(`nav a[href="#${now}"]`).textContent}`;
  shown = now;
}

// --- the key

const dialog = $("dialog");

function openKey(why = "") {
  if (dialog.open) return;
  const error = $(".error", dialog);
  error.textContent = why;
  error.hidden = !why;
  $('[name="key"]', dialog).value = key.get();
  dialog.showModal();
}

$('[data-act="key"]').addEventListener("click", () => openKey());
dialog.addEventListener("close", async () => {
  if (dialog.returnValue !== "save") return;
  key.set($('[name="key"]', dialog).value.trim());
  await start();
});

async function start() {
  await Promise.all([readRoutes(), refresh(true)]);
  show();
}

addEventListener("hashchange", show);
show();
await start();
setInterval(() => document.visibilityState === "visible" && refresh(), REFRESH_MS);
