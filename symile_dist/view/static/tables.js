// Ranks, checkpoints, events, evaluation and config.

import { eventColour } from "./chart.js";
import { byId, h, say } from "./dom.js";
import { ago, bytes, decimal, direction, fullMoment, moment, numeric, percent, seconds, whole, words } from "./format.js";

// -- Ranks -------------------------------------------------------------------------------------------------------------

const ROW_PIXELS = 34;
const MAP_FROM = 16; // ranks
const COLUMNS = [
  { key: "rank", title: "Rank", value: (row) => row.rank, text: (row) => String(row.rank) },
  { key: "host", title: "Host", value: (row) => row.host ?? "", text: (row) => row.host ?? "–", wide: true },
  { key: "step", title: "Step", value: (row) => row.step, text: (row) => whole(row.step), desk: true },
  { key: "step_seconds", title: "Step time", value: (row) => row.step_seconds, text: (row) => (row.step_seconds === null ? "–" : seconds(row.step_seconds)), desk: true },
  { key: "own_seconds", title: "Own work", value: (row) => row.own_seconds, text: (row) => (row.own_seconds === null ? "–" : seconds(row.own_seconds)) },
  { key: "ratio", title: "× median", value: (row) => row.ratio, text: (row) => (row.ratio === null ? "–" : `${row.ratio.toFixed(2)}×`) },
  { key: "memory_bytes", title: "Memory", value: (row) => row.memory_bytes, text: (row) => (row.memory_bytes === null ? "–" : bytes(row.memory_bytes)), desk: true },
  { key: "phases", title: "Where its step goes", value: (row) => row.phases.data_wait ?? null, text: () => "", desk: true, wide: true },
];
const ranks = { rows: [], shown: [], sort: "rank", down: false, filter: "", phases: [], colours: null, straggler: null, longest: 1 };

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = sorted.length >> 1;
  return sorted.length ? (sorted.length % 2 ? sorted[at] : (sorted[at - 1] + sorted[at]) / 2) : null;
}

export function updateRanks(section, phases, phaseColour) {
  byId("ranks").hidden = !section.rows.length;
  const typical = median(section.rows.map((row) => row.own_seconds).filter((value) => value !== null));
  ranks.rows = section.rows.map((row) => ({ ...row, ratio: typical && row.own_seconds !== null ? row.own_seconds / typical : null }));
  ranks.phases = phases;
  ranks.longest = Math.max(...ranks.rows.map((row) => phases.reduce((sum, name) => sum + (row.phases[name] ?? 0), 0)));
  ranks.colours = phaseColour;
  const known = ranks.rows.filter((row) => row.ratio !== null);
  const worst = known.reduce((best, row) => (row.ratio > (best?.ratio ?? 0) ? row : best), null);
  ranks.straggler = worst && worst.ratio >= section.straggler_ratio ? worst.rank : null;
  const expected = section.expected ?? ranks.rows.length;
  say(
    byId("ranks-words"),
    `${whole(ranks.rows.length)} of ${whole(expected)}` +
      (worst && known.length > 1 ? `; slowest: rank ${worst.rank}, ${worst.ratio.toFixed(2)}× the median's own work` : ""),
  );
  drawHead();
  choose();
  drawMap();
}

function drawHead() {
  const head = byId("ranks-table").tHead;
  if (head.rows.length) return;
  head.append(
    h("tr", {}, COLUMNS.map((column) =>
      h("th", { scope: "col", "data-key": column.key, class: className(column), "aria-sort": "none" },
        h("button", { type: "button", onclick: () => sortBy(column.key) }, column.title)))),
  );
  byId("ranks-filter").addEventListener("input", (event) => {
    ranks.filter = event.target.value.trim().toLowerCase();
    choose();
  });
  byId("ranks-scroll").addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  new ResizeObserver(drawRows).observe(byId("ranks-scroll"));
  new ResizeObserver(drawMap).observe(byId("rank-map"));
}

const className = (column) => [column.desk ? "desk" : "", column.wide ? "left" : "", `col-${column.key}`].filter(Boolean).join(" ");

function sortBy(key) {
  ranks.down = ranks.sort === key ? !ranks.down : key !== "rank" && key !== "host";
  ranks.sort = key;
  choose();
}

function choose() {
  const { value } = COLUMNS.find((column) => column.key === ranks.sort);
  const words = ranks.filter;
  ranks.shown = ranks.rows.filter((row) => !words || String(row.rank) === words || (row.host ?? "").toLowerCase().includes(words));
  const order = (a, b) => {
    const [first, second] = [value(a), value(b)];
    if (first === second) return a.rank - b.rank;
    if (first === null) return 1; // what is not known stands last, either way
    if (second === null) return -1;
    return (first < second ? -1 : 1) * (ranks.down ? -1 : 1);
  };
  ranks.shown.sort(order);
  for (const cell of byId("ranks-table").tHead.querySelectorAll("th")) {
    cell.setAttribute("aria-sort", cell.dataset.key !== ranks.sort ? "none" : ranks.down ? "descending" : "ascending");
  }
  say(byId("ranks-count"), words ? `${whole(ranks.shown.length)} of ${whole(ranks.rows.length)}` : "");
  byId("ranks-table").setAttribute("aria-rowcount", ranks.shown.length + 1);
  drawRows();
}

/** Only the rows in sight: a thousand ranks are as quick as ten. */
function drawRows() {
  const scroll = byId("ranks-scroll");
  const body = byId("ranks-table").tBodies[0];
  const first = Math.max(0, Math.floor(scroll.scrollTop / ROW_PIXELS) - 5);
  const last = Math.min(ranks.shown.length, first + Math.ceil((scroll.clientHeight || 400) / ROW_PIXELS) + 11);
  const spacer = (rows) => (rows ? [h("tr", { "aria-hidden": "true", class: "space", style: { height: `${rows * ROW_PIXELS}px` } }, h("td"))] : []);
  const rows = ranks.shown.slice(first, last).map((row, index) =>
    h("tr", { "aria-rowindex": first + index + 2, class: row.rank === ranks.straggler ? "straggler" : null },
      COLUMNS.map((column) => {
        if (column.key === "phases") return h("td", { class: className(column) }, phaseBar(row));
        if (column.key === "rank") {
          return h("td", { class: className(column) }, column.text(row), row.rank === ranks.straggler ? h("span", { class: "badge", "data-level": "warning" }, "straggler") : null);
        }
        return h("td", { class: className(column), title: column.key === "host" && row.pid ? `${row.host}, process ${row.pid}` : null }, column.text(row));
      })));
  body.replaceChildren(...spacer(first), ...rows, ...spacer(ranks.shown.length - last));
}

function phaseBar(row) {
  const parts = ranks.phases.filter((name) => row.phases[name] > 0);
  if (!parts.length) return null;
  return h("div", { class: "bar thin", role: "img", "aria-label": parts.map((name) => `${words(name)} ${seconds(row.phases[name])}`).join(", "), title: parts.map((name) => `${words(name)} ${seconds(row.phases[name])}`).join("\n") },
    parts.map((name) => h("span", { style: { width: `${(100 * row.phases[name]) / ranks.longest}%`, background: ranks.colours(name) } })));
}

/** One cell per rank, coloured by its own work: a slow node shows as a block. */
function drawMap() {
  const holder = byId("rank-map");
  const rows = ranks.rows;
  holder.hidden = rows.length < MAP_FROM || !rows.some((row) => row.ratio !== null);
  if (holder.hidden || !holder.clientWidth) return;
  let canvas = holder.querySelector("canvas");
  if (!canvas) {
    canvas = h("canvas", { role: "img", tabindex: "-1" });
    const told = h("p", { class: "aside", role: "status" }, "Own work of each rank against the median. Point at a cell; click to find it below.");
    holder.append(canvas, told);
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const { cell, across } = canvas.grid;
      return ranks.rows[Math.floor((event.clientY - box.top) / cell) * across + Math.min(across - 1, Math.floor((event.clientX - box.left) / cell))];
    };
    canvas.addEventListener("pointermove", (event) => {
      const row = at(event);
      if (row) say(told, `Rank ${row.rank}${row.host ? ` on ${row.host}` : ""}: ${row.own_seconds === null ? "not known" : `${seconds(row.own_seconds)} of own work, ${row.ratio?.toFixed(2)}× the median`}`);
    });
    canvas.addEventListener("click", (event) => {
      const row = at(event);
      if (!row) return;
      ranks.filter = byId("ranks-filter").value = String(row.rank);
      choose();
    });
  }
  const width = holder.clientWidth;
  const cell = Math.max(8, Math.min(22, Math.floor(Math.sqrt((width * 110) / rows.length))));
  const across = Math.floor(width / cell);
  canvas.grid = { cell, across };
  const height = Math.ceil(rows.length / across) * cell;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const [low, high, none] = ["--map-low", "--map-high", "--grid"].map((name) => style.getPropertyValue(name).trim());
  const bad = style.getPropertyValue("--warning").trim();
  rows.forEach((row, index) => {
    const [x, y] = [(index % across) * cell, Math.floor(index / across) * cell];
    pen.globalAlpha = 1;
    if (row.ratio === null) pen.fillStyle = none;
    else if (row.rank === ranks.straggler) pen.fillStyle = bad;
    else {
      pen.fillStyle = low;
      pen.fillRect(x, y, cell - 1.5, cell - 1.5);
      pen.fillStyle = high;
      pen.globalAlpha = Math.min(1, Math.max(0, (row.ratio - 0.85) / 0.45));
    }
    pen.fillRect(x, y, cell - 1.5, cell - 1.5);
  });
  canvas.setAttribute("aria-label", `Own work of ${rows.length} ranks against the median; the table below has the same`);
}

// -- Checkpoints -------------------------------------------------------------------------------------------------------

const STATES = { complete: "good", "left behind": "", incomplete: "warning", damaged: "bad" };
const KEPT = { newest: "newest", best: "best", keep_every: "protected" };

export function updateCheckpoints(section, now) {
  byId("checkpoints").hidden = !section.rows.length;
  const complete = section.rows.filter((row) => row.state === "complete");
  const size = complete.reduce((sum, row) => sum + (row.bytes ?? 0), 0);
  say(byId("checkpoints-words"), `${complete.length} complete, ${bytes(size)}` + (section.mirrored_step ? `; mirrored up to step ${whole(section.mirrored_step)}` : ""));
  const heads = ["Step", "State", "Kept as", "Saved", "Size", "Ranks", "Checksums compared"];
  const label = (index) => ({ "data-label": heads[index] });
  byId("checkpoints-body").replaceChildren(
    h("table", { class: "cards-on-phones" },
      h("thead", {}, h("tr", {}, heads.map((head, index) => h("th", { scope: "col", class: [1, 2, 3, 6].includes(index) ? "left" : null }, head)))),
      h("tbody", {}, section.rows.map((row) =>
        h("tr", {},
          h("td", label(0), h("b", {}, whole(row.step))),
          h("td", { ...label(1), class: "left" }, h("span", { class: "badge", "data-level": STATES[row.state] ?? "", title: row.problem ?? null }, row.state), row.problem ? h("span", { class: "problem" }, row.problem) : null),
          h("td", { ...label(2), class: "left" }, row.kept_as.map((reason) => h("span", { class: "badge", "data-level": reason === "best" ? "accent" : "" }, KEPT[reason] ?? reason)), row.kept_as.length ? null : "–"),
          h("td", { ...label(3), class: "left", title: fullMoment(row.saved) }, h("time", { "data-since": row.saved ?? null }, ago(row.saved ?? null, now))),
          h("td", label(4), row.bytes === undefined ? "–" : bytes(row.bytes)),
          h("td", label(5), row.world_size ? whole(row.world_size) : "–"),
          h("td", { ...label(6), class: "left", title: fullMoment(row.verified) }, row.verified ? h("time", { "data-since": row.verified }, ago(row.verified, now)) : "not since it was saved"))))),
    h("p", { class: "note" }, "Complete: the manifest is whole, and every file has its size. ", h("code", {}, "symile-dist checkpoints verify RUN"), " compares all bytes."),
  );
}

// -- Events ------------------------------------------------------------------------------------------------------------

const FIRST_EVENTS = 12;
const SORT_WORDS = { restart: "restarts", resume: "resumes", rollback: "rollbacks", skip: "skipped steps", spike: "spikes", checkpoint: "checkpoints", data: "data", end: "ends", other: "others" };
const events = { hidden: new Set(), most: FIRST_EVENTS, rows: [], counts: {} };

export function updateEvents(section, now) {
  events.rows = [...section.rows].reverse();
  events.counts = section.counts;
  byId("events").hidden = !events.rows.length;
  const total = Object.values(section.counts).reduce((sum, count) => sum + count, 0);
  say(byId("events-words"), total > events.rows.length ? `${whole(total)}, of which the last ${whole(events.rows.length)} are here` : whole(total));
  drawEvents(now);
}

function drawEvents(now) {
  const sorts = Object.keys(SORT_WORDS).filter((sort) => events.counts[sort]);
  byId("events-sorts").replaceChildren(
    ...sorts.map((sort) =>
      h("button", { type: "button", "aria-pressed": String(!events.hidden.has(sort)), onclick: () => {
        if (!events.hidden.delete(sort)) events.hidden.add(sort);
        drawEvents(now);
      } }, SORT_WORDS[sort], h("b", {}, whole(events.counts[sort])))),
  );
  const shown = events.rows.filter((row) => !events.hidden.has(row.sort));
  const list = shown.slice(0, events.most).map((row) =>
    h("li", { "data-level": row.level },
      h("span", { class: "dot", "aria-hidden": "true", style: { background: eventColour(row) } }),
      h("span", { class: "when", title: fullMoment(row.time) }, moment(row.time)),
      h("span", { class: "at" }, row.step === null ? "" : `step ${whole(row.step)}`),
      h("span", { class: "message" }, row.level === "info" ? null : h("span", { class: "hidden" }, `${row.level}: `), row.message)));
  if (shown.length > events.most) {
    list.push(h("li", { class: "more" }, h("button", { type: "button", class: "button", onclick: () => {
      events.most = events.most === FIRST_EVENTS ? 100 : events.most + 200;
      drawEvents(now);
    } }, `Show more of ${whole(shown.length)}`)));
  }
  byId("events-list").replaceChildren(...list);
}

// -- Evaluation --------------------------------------------------------------------------------------------------------

const number = (value, digits = 3) => (value === null || value === undefined || numeric(value) === null ? "–" : decimal(numeric(value), digits));
const share = (value) => (value === null || value === undefined || numeric(value) === null ? "–" : percent(numeric(value)));

function table(heads, rows) {
  return h("div", { class: "sideways", tabindex: "0", role: "region", "aria-label": heads[0] },
    h("table", {},
      h("thead", {}, h("tr", {}, heads.map((head, index) => h("th", { scope: "col", class: index ? null : "left" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, index) => h(index ? "td" : "th", index ? {} : { scope: "row", class: "left" }, cell)))))));
}

function accuracyBar(row) {
  const accuracy = numeric(row.accuracy);
  if (accuracy === null) return "–";
  const error = numeric(row.bootstrap_standard_error);
  const chance = numeric(row.chance);
  return h("div", { class: "meter", role: "img", "aria-label": `${percent(accuracy)}${error === null ? "" : `, standard error ${percent(error)}`}${chance === null ? "" : `, chance ${percent(chance)}`}` },
    h("span", { class: "fill", style: { width: `${100 * Math.min(1, Math.max(0, accuracy))}%` } }),
    chance === null ? null : h("span", { class: "chance", title: `chance ${percent(chance)}`, style: { left: `${100 * Math.min(1, chance)}%` } }));
}

export function updateEvaluation(section) {
  byId("evaluation").hidden = !section.rows.length;
  byId("evaluation-body").replaceChildren(...section.rows.map(resultCard));
}

function resultCard(result) {
  const retrieval = Object.entries(object(result.retrieval));
  const parts = [];
  if (retrieval.length) {
    const depths = Object.keys(object(retrieval[0][1].recall));
    parts.push(table(
      ["Retrieval", "", "Accuracy", "± SE", "Chance", ...depths.map((depth) => `R@${depth}`), "Median rank"],
      retrieval.map(([name, row]) => [
        row.target ? `${row.target} ← ${(row.queries ?? []).join(" + ")}` : direction(name), accuracyBar(row), h("b", {}, share(row.accuracy)),
        share(row.bootstrap_standard_error), share(row.chance), ...depths.map((depth) => share(object(row.recall)[depth])), number(row.median_rank),
      ])));
  }
  const zeroShot = Object.entries(object(result.zero_shot));
  if (zeroShot.length) {
    parts.push(table(["Zero-shot", "", "Accuracy", "± SE", "Top 5", "Per class"],
      zeroShot.map(([name, row]) => [name, accuracyBar(row), h("b", {}, share(row.accuracy)), share(row.bootstrap_standard_error), share(row.top5), share(row.mean_per_class)])));
  }
  const probe = Object.entries(object(result.probe));
  if (probe.length) {
    parts.push(table(["Linear probe", "", "Accuracy", "± SE", "Validation"],
      probe.map(([name, row]) => [name, accuracyBar(row), h("b", {}, share(row.accuracy)), share(row.bootstrap_standard_error), share(row.validation_accuracy)])));
  }
  const embeddings = Object.entries(object(object(result.statistics).embeddings));
  if (embeddings.length) {
    parts.push(table(["Embedding", "Dimension", "Effective rank", "Uniformity"],
      embeddings.map(([name, row]) => [name, number(row.dimension), number(row.effective_rank), number(row.uniformity)])));
  }
  const facts = [
    result.samples ? `${whole(result.samples)} samples` : null,
    result.classes ? `${whole(result.classes)} classes` : null,
    numeric(result.loss) === null ? null : `loss ${number(result.loss, 4)}`,
    numeric(result.total_correlation_bound) === null ? null : `total correlation ≥ ${number(result.total_correlation_bound, 4)} nats`,
  ].filter(Boolean);
  return h("article", { class: "card" },
    h("header", {}, h("h3", {}, `Step ${whole(result.step)}, ${result.split ?? ""} split`), h("p", { class: "aside" }, facts.join(" · "))), ...parts);
}

const object = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});

// -- Config ------------------------------------------------------------------------------------------------------------

let configLines = [];

export function updateConfig(section) {
  byId("config").hidden = !section.text;
  configLines = (section.text ?? "").replace(/\n$/, "").split("\n");
  const filter = byId("config-filter");
  if (!filter.dataset.ready) {
    filter.dataset.ready = "yes";
    filter.addEventListener("input", drawConfig);
  }
  drawConfig();
}

/** Lines that hold the words, each below the keys that it belongs to. */
function drawConfig() {
  const words = byId("config-filter").value.trim().toLowerCase();
  const indent = (line) => line.length - line.trimStart().length;
  const chosen = new Set();
  let found = 0;
  if (words) {
    const parents = [];
    configLines.forEach((line, index) => {
      while (parents.length && indent(configLines[parents[parents.length - 1]]) >= indent(line)) parents.pop();
      if (line.toLowerCase().includes(words)) {
        found += 1;
        parents.forEach((parent) => chosen.add(parent));
        chosen.add(index);
      }
      if (line.trim()) parents.push(index);
    });
  }
  say(byId("config-count"), words ? `${found} ${found === 1 ? "line" : "lines"}` : "");
  const lines = configLines.map((line, index) => [line, index]).filter(([, index]) => !words || chosen.has(index));
  byId("config-text").replaceChildren(...lines.flatMap(([line]) => [...highlighted(line, words), "\n"]));
}

function highlighted(line, words) {
  const at = words ? line.toLowerCase().indexOf(words) : -1;
  if (at >= 0) return [line.slice(0, at), h("mark", {}, line.slice(at, at + words.length)), line.slice(at + words.length)];
  const key = /^(\s*(?:- )?)([^:\s][^:]*)(:.*)$/.exec(line);
  return key ? [key[1], h("span", { class: "key" }, key[2]), key[3]] : [line];
}
