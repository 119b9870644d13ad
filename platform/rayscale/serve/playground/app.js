// The page: what the server offers decides what is shown; each task is a form, a request and a result.

import { $, FileField, Problem, ask, comparison, facts, key, make, size, testChart } from "./widgets.js";

const PICTURE_TASKS = {
  upscale: { title: "Upscale a picture", lead: "A picture in, a larger one out, by the model that its gate let through.", verb: "Upscale" },
  restore: { title: "Restore a picture", lead: "Noise, blur, scratches or holes in; the same picture without them out.", verb: "Restore" },
};
const REFRESH_MS = 15_000;
const offered = { models: [], held: {}, routes: new Set() };
let urls = []; // of results shown, to be given back

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
      if (caught.name === "AbortError") progress.textContent = "Stopped.";
      else {
        clear(section); // what is shown is of an earlier try
        tell(error, caught);
      }
    } finally {
      running = null;
      button.removeAttribute("aria-disabled");
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
  if (error.status === 401) openKey();
}

function blobUrl(blob) {
  const url = URL.createObjectURL(blob);
  urls.push(url);
  return url;
}

function forget() {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
}

const dimensions = async (url) => {
  const image = make("img", { src: url });
  await image.decode().catch(() => {});
  return image.naturalWidth ? `${image.naturalWidth}\u00a0×\u00a0${image.naturalHeight}` : "";
};

// --- upscale and restore: one section, two names

const picture = $("#picture");
const image = new FileField($('[data-drop="image"]', picture));
const mask = new FileField($('[data-drop="mask"]', picture));

task(picture, async (form, signal) => {
  if (!image.file) throw new Problem("Choose a picture first.");
  const path = `v1/${current()}`, query = form.model.value ? `?model=${encodeURIComponent(form.model.value)}` : "";
  let body = image.file;
  const headers = { Accept: form.accept.value };
  if (mask.file && !mask.label.hidden) {
    body = new FormData();
    body.append("image", image.file);
    body.append("mask", mask.file);
  } else headers["Content-Type"] = image.file.type || "application/octet-stream";
  const started = performance.now();
  const response = await ask(path + query, { method: "POST", body, headers, signal });
  const blob = await response.blob();
  const took = performance.now() - started;
  forget();
  const [before, after] = [blobUrl(image.file), blobUrl(blob)];
  const [was, is] = await Promise.all([dimensions(before), dimensions(after)]);
  const name = `${image.file.name.replace(/\.\w+$/, "") || "picture"}-${current()}d.${blob.type.split("/")[1]}`;
  const rows = [["Size", was ? `${was} → ${is}` : is], ["File", `${size(image.file.size)} → ${size(blob.size)}`]];
  return [comparison(before, after, { download: name }), ...facts(response, took, rows)];
});

$('[data-act="chart"]', picture).addEventListener("click", async () => image.take(await testChart()));
picture.addEventListener("dragover", (event) => event.preventDefault());
picture.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) image.take(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
  if (file) (current() === "compare" ? (a.file ? b : a) : image).take(file);
});

// --- generate

const generate = $("#generate");

task(generate, async (form, signal) => {
  const wanted = { model: form.model.value, seed: Number(form.seed.value), n: Number(form.n.value) };
  if (Number(form.truncation.value) < 1) wanted.truncation = Number(form.truncation.value);
  if (!$("[data-classes]", form).hidden && form.class.value) wanted.class = form.class.value;
  const started = performance.now();
  const headers = { "Content-Type": "application/json", Accept: "application/json" };
  const response = await ask("v1/generate", { method: "POST", body: JSON.stringify(wanted), headers, signal });
  const answer = await response.json();
  const took = performance.now() - started;
  const gallery = make("ul", { class: "gallery" });
  answer.data.forEach((entry, i) => {
    const url = `data:image/${answer.output_format ?? "png"};base64,${entry.b64_json}`;
    const seed = entry.seed ?? wanted.seed + i;
    const download = `seed-${seed}.${answer.output_format ?? "png"}`;
    gallery.append(make("li", {}, make("a", { href: url, download }, make("img", { src: url, alt: `Picture of seed ${seed}` }),
      make("span", {}, `Seed ${seed}`))));
  });
  return [gallery, ...facts(response, took)];
});

generate.addEventListener("input", (event) => {
  const form = event.target.form;
  if (event.target.name === "truncation") form.shown.value = Number(event.target.value).toFixed(2);
  if (event.target.name === "model") showClasses();
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

task($("#compare"), async (_, signal) => {
  if (!a.file || !b.file) throw new Problem("Choose two pictures first.");
  const body = new FormData();
  body.append("a", a.file);
  body.append("b", b.file);
  const started = performance.now();
  const response = await ask("v1/similarity", { method: "POST", body, headers: { Accept: "application/json" }, signal });
  const answer = await response.json();
  const took = performance.now() - started;
  forget();
  const table = make("table", { class: "measures" }, make("caption", {}, "Measures"), measures(answer));
  return [comparison(blobUrl(a.file), blobUrl(b.file), { names: ["First", "Second"] }), table, ...facts(response, took)];
});

/** Every number of the answer, grouped as the answer groups them. */
function measures(answer, group = "") {
  const rows = make("tbody");
  for (const [name, value] of Object.entries(answer)) {
    const words = (group ? `${group}, ` : "") + name.replaceAll("_", " ");
    if (Array.isArray(value) && value.length === 1) rows.append(...measures(value[0], group).children);
    else if (value !== null && typeof value === "object" && !Array.isArray(value)) rows.append(...measures(value, words).children);
    else if (typeof value === "number")
      rows.append(make("tr", {}, make("th", { scope: "row" }, words), make("td", {}, Number.isInteger(value) ? `${value}` : value.toPrecision(5))));
  }
  return rows;
}

// --- what is offered

const route = (model) => `${model.name}@${model.aliases[0]}`;
const is = {
  upscale: (model) => model.kind === "transform" && model.scale > 1,
  restore: (model) => model.kind === "transform" && model.scale === 1,
  generate: (model) => model.kind === "generate",
};

function fill(select, models, preferred) {
  const chosen = select.value || preferred;
  const options = models.map((model) => {
    const words = [model.name, model.scale > 1 && `×${model.scale}`, `version ${model.version}`, model.aliases[0] !== "champion" && model.aliases[0]];
    return make("option", { value: route(model) }, words.filter(Boolean).join(" · "));
  });
  select.replaceChildren(...(options.length ? options : [make("option", { value: "" }, "no model is ready")]));
  if (models.some((model) => route(model) === chosen)) select.value = chosen;
}

async function refresh() {
  const health = $(".health");
  try {
    const list = await (await ask("v1/models")).json();
    offered.models = list.models.filter((model) => model.ready && model.aliases.length);
    Object.assign(offered, { held: list.held, preferred: list.default });
    health.dataset.state = offered.models.length ? "ready" : "waiting";
    $(".words", health).textContent = offered.models.length ? "ready" : "no model yet";
  } catch (error) {
    health.dataset.state = "away";
    $(".words", health).textContent = error.status === 401 ? "key needed" : "no answer";
    if (error.status === 401 && !key.get()) openKey();
  }
  show();
}

async function readRoutes() {
  const page = await ask("openapi.json").then((r) => r.json()).catch(() => ({ paths: {} }));
  for (const path of Object.keys(page.paths)) if (path.startsWith("/v1/")) offered.routes.add(path.slice(4));
}

// --- which task is shown

function current() {
  const named = location.hash.slice(1);
  return ["upscale", "restore", "generate", "compare"].includes(named) ? named : "upscale";
}

let shown = "";

function show() {
  const now = current();
  const has = { compare: offered.routes.has("similarity") };
  for (const [name, fits] of Object.entries(is)) has[name] = offered.routes.has(name) && offered.models.some(fits);
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
    fill(form.model, offered.models.filter(is[now]), offered.preferred);
    mask.label.hidden = now !== "restore";
    if (shown && shown !== now) clear(picture); // it was the other task's
  }
  fill($("form", generate).model, offered.models.filter(is.generate), offered.preferred);
  if (!$("form", generate).class.options.length) showClasses();
  const held = Object.values(offered.held), note = $("[data-held]", picture);
  note.hidden = held.length === 0;
  note.textContent = held.join(" ");
  document.title = `Rayscale · ${$(`nav a[href="#${now}"]`).textContent}`;
  shown = now;
}

// --- the key

const dialog = $("dialog");

function openKey() {
  if (dialog.open) return;
  $('[name="key"]', dialog).value = key.get();
  dialog.showModal();
}

$('[data-act="key"]').addEventListener("click", openKey);
dialog.addEventListener("close", async () => {
  if (dialog.returnValue !== "save") return;
  key.set($('[name="key"]', dialog).value.trim());
  await start();
});

async function start() {
  await Promise.all([readRoutes(), refresh()]);
  show();
}

addEventListener("hashchange", show);
show();
await start();
setInterval(() => document.visibilityState === "visible" && refresh(), REFRESH_MS);
