// The run's page: asks the server what is new and shows it.

import { allCharts, curveSections, levelOf, makeCards, setEvents, showTooltip, updateCharts } from "./curves.js";
import { Chart, FROM_ZERO, STATES, colourOf, readColours, shared, sparkline } from "./chart.js";
import { Run } from "./data.js";
import { byId, h, remember, remembered, say, stackedBar } from "./dom.js";
import { ago, bytes, decimal, direction, duration, fullMoment, inUnit, numeric, percent, seconds, whole, words } from "./format.js";
import { updateCheckpoints, updateConfig, updateEvaluation, updateEvents, updateRanks } from "./tables.js";

const TABLES = [["ranks", "Ranks"], ["checkpoints", "Checkpoints"], ["events", "Events"], ["evaluation", "Evaluation"], ["config", "Config"]];
const STATE_WORDS = { productive: "productive", pending: "since the last save", init: "start", checkpoint: "saving", eval: "validation", restart: "restarts", lost: "lost" };
const SILENT_SECONDS = 120;

const run = new Run(changed, connected);
let firstAnswer = false;
let panelsByKey = {};

function changed(names) {
  firstAnswer = true;
  const { sections } = run;
  if (names.has("panels")) {
    panelsByKey = Object.fromEntries(sections.panels.rows.map((panel) => [panel.key, panel]));
    makeCards(sections.panels.rows);
  }
  if (names.has("events")) {
    setEvents(sections.events.rows);
    updateEvents(sections.events, run.now);
  }
  if (names.has("curves") || names.has("panels")) {
    updateCharts(run);
    updateZoom();
  } else if (names.has("events")) allCharts().forEach((chart) => chart.changed());
  if (names.has("ranks") || names.has("panels")) updateRanks(sections.ranks, sections.panels.phases, colourOf);
  if (names.has("checkpoints")) updateCheckpoints(sections.checkpoints, run.now);
  if (names.has("evaluation")) updateEvaluation(sections.evaluation);
  if (names.has("config")) updateConfig(sections.config);
  updateHead();
  updateTiles();
  updateGoodput();
  updateBreakdown();
  updateNotices();
  updateNavigation();
  document.body.dataset.ready = "yes";
}

function connected(well, why) {
  document.body.dataset.connected = well ? "yes" : "no";
  const words = why === "token" ? "The server asks for a token" : "No connection, trying again";
  say(byId("connection"), well ? "" : words);
  if (!well && !firstAnswer) say(byId("state-word"), "no answer");
  updateNotices(why);
}

// -- Head --------------------------------------------------------------------------------------------------------------

function updateHead() {
  const { run: told, progress } = run.sections;
  if (!told) return;
  say(byId("name"), told.name);
  byId("state").dataset.state = told.status;
  say(byId("state-word"), told.status);
  const step = progress.step === null ? "no step yet" : `step ${whole(progress.step)}`;
  const parts = [progress.total ? `${step} of ${whole(progress.total)}` : step];
  if (progress.fraction !== null) parts.push(percent(progress.fraction, 3));
  if (told.live && progress.eta_seconds !== null) parts.push(`${duration(progress.eta_seconds)} left`);
  say(byId("progress-words"), parts.join(" · "));
  const share = Math.round(1000 * (progress.fraction ?? 0)) / 10;
  byId("progress").setAttribute("aria-valuenow", share);
  byId("progress-bar").style.width = `${share}%`;
  byId("progress").dataset.state = told.status;
  const of = progress.total ? `/${whole(progress.total)}` : "";
  document.title = `${told.status}, ${step}${of} · ${told.name}`;
  const facts = [
    told.objective, told.modalities.length ? `${told.modalities.join(", ")}` : null, told.global_batch_size ? `global batch ${whole(told.global_batch_size)}` : null,
    told.precision, told.zero_stage === null ? null : `ZeRO ${told.zero_stage}`, told.world_size ? `${whole(told.world_size)} ranks` : null,
    told.launch?.backend ? `on ${told.launch.backend}` : null, told.created ? `since ${fullMoment(told.created)}` : null,
  ].filter(Boolean);
  byId("footer").replaceChildren(h("p", {}, facts.join(" · ")), h("p", {}, `symile_dist ${run.code ?? ""}, ${told.directory}; ${whole(progress.records)} records`));
}

function updateNotices(why) {
  const { run: told, progress, latest, ranks } = run.sections;
  const notices = [];
  const add = (level, title, text) => notices.push(h("div", { class: "notice", "data-level": level }, h("b", {}, title), " ", h("span", {}, text)));
  if (document.body.dataset.connected === "no") {
    if (why === "token") add("bad", "This run asks for a token.", "Open the address that was printed with the token in it.");
    else add("warning", "The run's server does not answer.", firstAnswer ? "What is shown is as of the last answer. This page comes back by itself: the driver may be starting again." : "Trying again.");
  }
  if (told) {
    if (progress.read < 1) add("info", "Reading the history", `${Math.floor(100 * progress.read)}%`);
    const ends = { failed: "failed", stopped: "stopped itself", refused: "been refused" };
    if (ends[told.status]) add("bad", `The run has ${ends[told.status]}.`, told.message);
    else if (["preempted", "interrupted"].includes(told.status)) add("info", `The run was ${told.status}.`, told.message);
    const silent = progress.heard === null ? 0 : run.now - progress.heard;
    if (told.live && silent > Math.max(SILENT_SECONDS, 20 * (progress.step_seconds ?? 0))) {
      add("warning", `Nothing has been heard of the run for ${duration(silent)}.`, "Its driver may have died: symile-dist status RUN tells.");
    }
    const loss = numeric(latest.records.train?.loss);
    if (told.live && loss !== null && !Number.isFinite(loss)) add("bad", "The loss is not finite.", "See the events.");
    const slow = latest.records.train?.slowest ?? ranks.slowest;
    const ratio = numeric(slow?.ratio);
    if (told.live && ratio !== null && ratio >= ranks.straggler_ratio && Number.isFinite(ratio)) {
      add("warning", `Rank ${slow.rank} is slow:`, `${ratio.toFixed(2)}× the median rank's own work, most of it in ${words(slow.phase)}; all others wait for it.`);
    }
  }
  const holder = byId("notices");
  const text = notices.map((notice) => notice.textContent).join("\n");
  if (holder.dataset.text !== text) {
    holder.dataset.text = text;
    holder.replaceChildren(...notices);
  }
}

// -- Tiles -------------------------------------------------------------------------------------------------------------

function tileList() {
  const { run: told, latest, ranks, checkpoints, goodput } = run.sections;
  const train = latest.records.train ?? {};
  const validation = latest.records.validation ?? {};
  const value = (key) => numeric(train[key]);
  const tiles = [];
  const add = (title, text, note, extra = {}) => tiles.push({ title, text, note, ...extra });
  const measured = (title, key, unit, note, panel) => {
    if (value(key) === null) return;
    add(title, inUnit(value(key), unit), note, { kind: "train", key, unit, level: levelOf(panelsByKey[panel], value(key)), panel });
  };
  const best = latest.best.loss;
  measured("Loss", "loss", "", best === undefined ? "training" : `best in validation ${decimal(best)}`, "loss");
  const accuracies = Object.entries(validation).filter(([key, each]) => key.startsWith("accuracy/") && numeric(each) !== null);
  if (accuracies.length) {
    const mean = accuracies.reduce((sum, [, each]) => sum + numeric(each), 0) / accuracies.length;
    const [name, top] = accuracies.reduce((high, each) => (numeric(each[1]) > numeric(high[1]) ? each : high));
    add("Validation accuracy", percent(mean), accuracies.length > 1 ? `mean of ${accuracies.length}; ${direction(name.slice(9))} ${percent(numeric(top))}` : direction(name.slice(9)),
      { kind: "validation", key: accuracies.length === 1 ? name : null, panel: "validation_accuracy" });
  }
  measured("Throughput", "samples_per_second", "samples/second", value("samples_seen") === null ? "" : `${whole(value("samples_seen"))} seen`, "throughput");
  measured("Step time", "step_seconds", "seconds", value("data_wait_fraction") === null ? "" : `${percent(value("data_wait_fraction"), 2)} of it waiting for data`, "step_time");
  if (value("mfu") !== null) measured("MFU", "mfu", "ratio", value("flops_per_second") === null ? "" : inUnit(value("flops_per_second"), "flops/second"), "mfu");
  measured("Gradient norm", "grad_norm", "", value("learning_rate") === null ? "" : `learning rate ${decimal(value("learning_rate"), 3)}`, "grad_norm");
  measured("Total correlation", "total_correlation_bound", "nats", "lower bound, of the batch", "total_correlation");
  if (value("memory_bytes")) measured("Memory", "memory_bytes", "bytes", "of the fullest rank", "memory");
  const expected = told.world_size;
  const up = ranks.rows.length;
  const ratio = numeric(train.slowest?.ratio);
  if (up || expected) {
    add("Ranks", expected && up ? `${whole(up)} / ${whole(expected)}` : whole(up || expected), ratio === null ? "" : `slowest: rank ${train.slowest.rank}, ${ratio.toFixed(2)}×`,
      { level: told.live && up && expected && up < expected ? "warning" : "", href: up ? "#ranks" : null });
  }
  const skipped = value("skipped_steps");
  if (skipped !== null) add("Skipped steps", whole(skipped), value("loss_scale") === null ? "since the start" : `loss scale ${decimal(value("loss_scale"))}`, { kind: "train", key: "skipped_steps", level: levelOf(panelsByKey.skipped_steps, skipped), panel: "skipped_steps" });
  const causes = Object.entries(goodput.restarts).filter(([, count]) => count).map(([cause, count]) => `${words(cause)} ${count}`);
  add("Restarts", whole(told.restarts), causes.join(", ") || (told.restarts ? "see the events" : "none"), { level: told.restarts >= 3 ? "warning" : "", href: told.restarts ? "#events" : null });
  const saved = checkpoints.rows.find((row) => row.state === "complete");
  const recorded = latest.records.checkpoint;
  if (saved) add("Last checkpoint", ago(saved.saved, run.now), `step ${whole(saved.step)}, ${bytes(saved.bytes)}`, { since: saved.saved, href: "#checkpoints" });
  else if (recorded) add("Last checkpoint", ago(recorded.time, run.now), `step ${whole(recorded.step)}`, { since: recorded.time });
  return tiles;
}

const tileElements = new Map();

function updateTiles() {
  if (!run.sections.latest) return;
  const tiles = tileList();
  const holder = byId("tiles");
  const titles = tiles.map((tile) => tile.title).join("|");
  if (holder.dataset.titles !== titles) {
    holder.dataset.titles = titles;
    tileElements.clear();
    holder.replaceChildren(...tiles.map(({ title, href, panel }) => {
      const parts = { value: h("p", { class: "value" }), note: h("p", { class: "tile-note" }), canvas: h("canvas", { "aria-hidden": "true" }) };
      const target = href ?? (panel && panelsByKey[panel] ? `#title-${panel}` : null);
      parts.element = h(target ? "a" : "div", { class: "tile", href: target }, h("p", { class: "tile-title" }, title), parts.value, parts.note, parts.canvas);
      tileElements.set(title, parts);
      return parts.element;
    }));
  }
  for (const { title, text, note, level, kind, key, unit: of, since } of tiles) {
    const parts = tileElements.get(title);
    const [, figure, unit] = /^(.*\d) ([^\d]+)$/.exec(text) ?? [null, text, ""];
    if (parts.value.textContent !== text) parts.value.replaceChildren(figure, unit ? h("small", {}, ` ${unit}`) : "");
    say(parts.note, note);
    if (since) parts.value.dataset.since = since;
    parts.element.dataset.level = level ?? "";
    const grid = run.whole.kinds[kind];
    const column = grid?.columns[key];
    parts.canvas.hidden = !column;
    if (column) sparkline(parts.canvas, { steps: grid.steps, mean: column.mean }, getComputedStyle(document.documentElement).getPropertyValue("--accent").trim(), FROM_ZERO.includes(of));
  }
}

function updateGoodput() {
  const { goodput } = run.sections;
  if (!goodput) return;
  const names = [...STATES, ...Object.keys(goodput.seconds).filter((name) => !STATES.includes(name))];
  const total = Object.values(goodput.seconds).reduce((sum, value) => sum + value, 0);
  const parts = names.filter((name) => goodput.seconds[name] > 0).map((name, index) => ({
    label: STATE_WORDS[name] ?? words(name), value: goodput.seconds[name], colour: colourOf(name, index), text: `${duration(goodput.seconds[name])}, ${percent(goodput.seconds[name] / total, 3)}`,
  }));
  byId("goodput").closest(".card").hidden = !parts.length;
  say(byId("goodput-words"), goodput.goodput === null ? "" : `${percent(goodput.goodput, 3)} of ${duration(total)} productive`);
  byId("goodput").replaceChildren(...stackedBar(parts, "Goodput"));
}

function updateBreakdown() {
  const { latest, panels } = run.sections;
  const phases = latest?.records.train?.phases;
  const card = byId("breakdown").closest(".card");
  card.hidden = !phases || typeof phases !== "object";
  if (card.hidden) return;
  const names = [...panels.phases, ...Object.keys(phases).filter((name) => !panels.phases.includes(name))];
  const total = names.reduce((sum, name) => sum + (numeric(phases[name]) || 0), 0);
  const parts = names.filter((name) => numeric(phases[name]) > 0).map((name, index) => ({
    label: words(name), value: numeric(phases[name]), colour: colourOf(name, index), text: `${seconds(numeric(phases[name]))}, ${percent(numeric(phases[name]) / total, 2)}`,
  }));
  say(byId("breakdown-words"), `${seconds(total)}, mean over ranks, last record`);
  byId("breakdown").replaceChildren(...stackedBar(parts, "A step's time"));
}

// -- Navigation --------------------------------------------------------------------------------------------------------

function updateNavigation() {
  const links = [
    ["overview", "Overview"],
    ...curveSections().filter(({ section }) => !section.hidden).map(({ id, title }) => [id, title.split(" ")[0]]),
    ...TABLES.filter(([id]) => !byId(id).hidden),
  ];
  const nav = byId("nav");
  const told = links.map(([id]) => id).join();
  if (nav.dataset.links === told) return;
  nav.dataset.links = told;
  nav.replaceChildren(...links.map(([id, title]) => h("a", { href: `#${id}` }, title)));
  followScrolling();
}

let scrolling = null;

function followScrolling() {
  scrolling?.disconnect();
  const links = new Map([...byId("nav").children].map((link) => [link.hash.slice(1), link]));
  scrolling = new IntersectionObserver(
    () => {
      const line = window.innerHeight * 0.3;
      let current = null;
      for (const [id, link] of links) {
        const target = byId(id);
        if (target && target.getBoundingClientRect().top < line) current = link;
      }
      if (window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 4 && window.scrollY > 0) current = [...links.values()].pop();
      for (const link of links.values()) {
        if (link === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
      const nav = byId("nav");
      if (current && nav.scrollWidth > nav.clientWidth) nav.scrollTo({ left: current.offsetLeft - nav.clientWidth / 2 + current.offsetWidth / 2, behavior: "smooth" });
    },
    { threshold: [0, 0.05, 0.2, 0.5, 0.8, 1], rootMargin: "-10% 0px -60% 0px" },
  );
  for (const id of links.keys()) if (byId(id)) scrolling.observe(byId(id));
}

// -- What a person sets ------------------------------------------------------------------------------------------------

function zoomTo(range) {
  run.show(range);
  updateCharts(run);
  updateZoom();
}

function updateZoom() {
  const [first, last] = shared.range;
  for (const [id, step] of [["first", first], ["last", last]]) {
    const field = byId(id);
    field.placeholder = whole(step).replaceAll(",", "");
    const free = !run.zoom || step === shared.whole[id === "first" ? 0 : 1];
    if (document.activeElement !== field) field.value = free ? "" : Math.round(step);
  }
  byId("reset").hidden = !run.zoom;
  document.body.dataset.zoomed = run.zoom ? "yes" : "no";
}

shared.onZoom = zoomTo;
shared.onHover = showTooltip;
byId("reset").addEventListener("click", () => zoomTo(null));
byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  const step = (id, otherwise) => {
    const digits = byId(id).value.replace(/[^0-9]/g, "").slice(0, 15);
    return digits ? Number(digits) : otherwise;
  };
  const [low, high] = shared.whole;
  // Without a last step it grows with the run.
  const [first, last] = [step("first", low), step("last", Infinity)].sort((a, b) => a - b);
  zoomTo(first < high && (first > low || last < high) ? [Math.max(first, low), last < high ? last : Infinity] : null);
});
for (const id of ["first", "last"]) {
  byId(id).addEventListener("change", () => byId("controls").requestSubmit());
  byId(id).addEventListener("focus", (event) => event.target.select());
}

for (const [id, key] of [["smooth", "smooth"], ["marks", "marks"]]) {
  const box = byId(id);
  box.checked = remembered(key, box.checked);
  shared[key] = box.checked;
  box.addEventListener("change", () => {
    shared[key] = box.checked;
    remember(key, box.checked);
    allCharts().forEach((chart) => chart.changed());
  });
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").dataset.theme = theme;
  byId("theme").title = `Theme: ${theme === "system" ? "as the system" : theme}`;
  byId("theme").setAttribute("aria-label", byId("theme").title);
  redraw();
}

function redraw() {
  readColours();
  if (!firstAnswer) return;
  updateCharts(run);
  updateTiles();
  updateGoodput();
  updateBreakdown();
  updateRanks(run.sections.ranks, run.sections.panels.phases, colourOf);
  updateEvents(run.sections.events, run.now);
}

byId("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("color-scheme").includes("dark");
  const now = remembered("theme", "system");
  // From the system's to the other one first: a click that shows nothing looks broken.
  const next = now === "system" ? (dark ? "light" : "dark") : now === (matchMedia("(prefers-color-scheme: dark)").matches ? "light" : "dark") ? "system" : THEMES[0];
  remember("theme", next);
  setTheme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// Ages grow while nothing is new.
setInterval(() => {
  for (const element of document.querySelectorAll("[data-since]")) say(element, ago(Number(element.dataset.since), run.now));
  updateNotices();
}, 1000);

setTheme(remembered("theme", "system"));
run.ask();

export { Chart, run };
