"use strict";
// The page: asks the server for what is new every few seconds, or shows what the file has inside.
// Texts of a run (prompts, names, reasons) are untrusted: they get into the page as text nodes and attributes only.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") made.style.cssText = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const EXITS = { 0: "done", 1: "failed", 2: "bad usage", 3: "bad data", 75: "stopped, saved" };
const find = (id) => document.getElementById(id);
const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`);
const inside = find("data") ? JSON.parse(find("data").textContent) : null;
const board = new Board(find("charts"));
const map = new ChunkMap({ root: find("map"), legend: find("legend"), facts: find("facts") });
const previews = new PreviewPanel(find);
const shownParts = new Set();
let span = "all";

function radios(root, name, choices, chosen, changed) {
  for (const [value, text] of choices) {
    const input = element("input", { type: "radio", name, value });
    input.checked = value === chosen;
    input.addEventListener("change", () => changed(value));
    root.append(element("label", {}, input, element("span", {}, text)));
  }
}

function tile(what, value, more, share) {
  const parts = [element("div", { class: "what" }, what), element("div", { class: "value" }, value)];
  if (share !== undefined) parts.push(element("progress", { max: "1", value: String(share), "aria-label": `${what}: ${percent(share)}` }));
  if (more) parts.push(element("div", { class: "more" }, more));
  return element("div", { class: "tile" }, ...parts);
}

function showOverview(data) {
  document.title = `${percent(data.done_fraction)} ${data.title}`;
  find("title").textContent = data.title;
  find("state").textContent = data.state;
  find("state").dataset.state = data.state;
  find("sentence").textContent = `${data.run_id} · ${data.sentence}`;
  find("queue").hidden = data.queue === null;
  find("queue").textContent = `Slurm: ${data.queue}`;
  const exit = data.last_exit, chunk = data.chunk;
  find("tiles").replaceChildren(
    tile("Chunks", `${count(data.chunks_done)} / ${count(data.chunks)}`, `${percent(data.done_fraction)} of ${count(data.images + data.images_left)} images`, data.done_fraction),
    chunk
      ? tile(data.state === "running" ? "In training" : "Half trained", chunk.name, `step ${count(chunk.step)} of ${count(chunk.steps)}, saved up to ${count(chunk.saved)}`, chunk.steps ? chunk.step / chunk.steps : 0)
      : tile("Half trained", "none", ""),
    tile("Time left", data.eta_text, data.images_left ? `${count(data.images_left)} images` : ""),
    tile("Speed", data.images_per_second === null ? "–" : `${shown(data.images_per_second)} /s`, `images; ${percent(data.wait_fraction)} of it waiting for data`),
    tile("Loss", data.loss === null ? "–" : shown(data.loss), "mean of 100 steps"),
    tile("Global step", count(data.global_step), `${count(data.skipped)} skipped, ${count(data.broken)} broken images`),
    tile("GPU time", data.gpu_hours < 1 ? `${shown(60 * data.gpu_hours)} min` : `${count(data.gpu_hours)} h`, data.devices.join(", ")),
    tile("Last launch", exit ? EXITS[exit.code] ?? "failed" : "–", exit ? `code ${exit.code}, ${exit.time.replace("T", " ").replace("Z", "")}, ${exit.host}${exit.slurm_job_id ? `, job ${exit.slurm_job_id}` : ""}` : "none has ended"),
  );
  map.show(data.groups);
  showVerdict(data.verdict);
  lines = data.ledger;
  showLedger();
  find("footer").textContent = `${inside ? "Written" : "Read"} ${data.now} · ${count(data.num_lines)} ledger lines`;
}

let lines = [];
function showLedger() {
  const chosen = lines.filter((line) => find("with-saves").checked || line.event !== "state_saved").reverse();
  find("lines").replaceChildren(...chosen.map((line) => element(
    "tr", { "data-event": line.event },
    element("td", {}, count(line.number)), element("td", {}, line.time.replace("T", " ").replace("Z", "")),
    element("td", {}, line.event.replaceAll("_", " ")), element("td", {}, line.text),
  )));
}

function showVerdict(verdict) {
  find("verdict-section").hidden = !verdict;
  if (!verdict) return;
  const best = verdict.best_step === null ? "" : `; best state: step ${count(verdict.best_step)}, kept`;
  find("verdict-step").textContent = `at global step ${count(verdict.global_step)}${best}`;
  find("concepts").replaceChildren(...verdict.concepts.map((reading) => element(
    "div", { class: "concept", "data-word": reading.word }, element("h3", {}, `${reading.name}: ${reading.word}`),
    element("ul", {}, ...[
      ...reading.reasons, ...reading.unknown.map((text) => `not known: ${text}`), ...reading.remedies.map((text) => `try: ${text}`),
    ].map((text) => element("li", {}, text))),
  )));
}

function showCurves(data) {
  const notes = [];
  if (data.known < 1) notes.push(`metrics.jsonl is being read (${percent(data.known)}); the curves are drawn from a sample of it until then`);
  if (data.bad_lines) notes.push(`${count(data.bad_lines)} lines of metrics.jsonl could not be read`);
  for (const [name, number] of Object.entries(data.not_finite)) notes.push(`${count(number)} infinite values of ${name} are left out`);
  find("reading").hidden = !notes.length;
  find("reading").textContent = notes.join("; ");
  board.show(data);
}

function showDisk(data) {
  const whole = data.used + data.free, coming = Math.max((data.total ?? data.used) - data.used, 0);
  find("disk-meter").classList.toggle("short", !data.is_enough);
  find("disk-meter").querySelector(".used").style.width = `${(100 * data.used) / whole}%`;
  find("disk-meter").querySelector(".coming").style.width = `${(100 * Math.min(coming, data.free)) / whole}%`;
  find("disk-text").textContent = data.text;
}

const SHOW = { overview: showOverview, pictures: (data) => previews.show(data), disk: showDisk };

/** Get a part and show it; return it. A server that does not answer is said, and asked again later. */
async function part(name) {
  let data = inside?.[name];
  try {
    if (!data) {
      const answer = await fetch(`data/${name}`);
      if (!answer.ok) throw new Error(await answer.text());
      data = await answer.json();
    }
    if (!name.startsWith("curves-") || name === `curves-${span}`) (SHOW[name] ?? showCurves)(data);
    find("alert").hidden = true;
  } catch (error) {
    find("alert").textContent = error instanceof TypeError ? `The dashboard does not answer (${error.message}); trying again.` : String(error.message);
    find("alert").hidden = false;
    return null;
  }
  shownParts.add(name.split("-")[0]);
  if (["overview", "curves", "pictures"].every((one) => shownParts.has(one)) && !document.documentElement.dataset.complete) {
    document.documentElement.dataset.complete = String(Math.round(performance.now()));
  }
  return data;
}

/** Ask for a part again and again, seldom while nobody looks. */
async function follow(name, seconds) {
  const data = await part(name());
  if (inside) return;
  const wait = data && data.known < 1 ? 1 : data ? seconds : 5;
  setTimeout(() => {
    if (document.hidden) document.addEventListener("visibilitychange", () => follow(name, seconds), { once: true });
    else follow(name, seconds);
  }, 1000 * wait);
}

radios(find("span"), "span", [["all", "all"], ["100", "last 100"], ["10", "last 10"], ["1", "last"]], span, (value) => { span = value; part(`curves-${span}`); });
radios(find("axis"), "axis", [["step", "steps"], ["images", "images"]], "step", (value) => { board.axis = value; board.draw(); });
find("smoothing").addEventListener("input", (event) => { board.smoothing = Number(event.target.value) ** 1.5; board.draw(); });
board.smoothing = 6 ** 1.5;
find("with-saves").addEventListener("change", showLedger);
follow(() => "overview", 5);
follow(() => `curves-${span}`, 15);
follow(() => "pictures", 60);
follow(() => "disk", 120);
