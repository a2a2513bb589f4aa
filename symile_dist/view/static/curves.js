// The panels' charts, section by section.

import { Chart, STATES, colourOf, curve, lastOf, marksOf, shared } from "./chart.js";
import { byId, h, say } from "./dom.js";
import { direction, inUnit, words } from "./format.js";

const SECTIONS = [
  ["training", "Training"], ["performance", "Performance"], ["data", "Data"], ["reliability", "Reliability"], ["contrastive", "Contrastive learning"],
];
const charts = new Map(); // panel's key -> {card, chart, legend, last, panel}
let sections = [];
let inView = null;

export const curveSections = () => sections;
export const allCharts = () => [...charts.values()].map(({ chart }) => chart);

/** The curves of a panel that there are: a `*` stands for every key that begins so. */
export function seriesOf(panel, curves, order) {
  const found = [];
  for (const { kind, key, label } of panel.curves) {
    const grid = curves.kinds[kind];
    if (!grid) continue;
    const prefix = key.endsWith("*") ? key.slice(0, -1) : null;
    let keys = prefix === null ? [key] : Object.keys(grid.columns).filter((each) => each.startsWith(prefix));
    if (prefix !== null) {
      const known = kind === "goodput" ? STATES : order;
      const place = (each) => {
        const at = known.indexOf(each.slice(prefix.length));
        return at < 0 ? known.length : at;
      };
      keys = keys.sort((a, b) => place(a) - place(b) || a.localeCompare(b));
    }
    for (const each of keys) {
      const column = grid.columns[each];
      if (!column) continue;
      const name = prefix === null ? label || key : each.slice(prefix.length);
      const shown = prefix === null ? name : direction(name);
      found.push(curve(shown, grid, column, { kind, colour: colourOf(name, found.length) }));
    }
  }
  return found;
}

const hasValues = (series) => series.some((each) => each.odd.size || each.mean.some((value) => value !== null && value !== undefined));

/** Makes the cards of a list of panels, anew. */
export function makeCards(panels) {
  charts.clear();
  inView?.disconnect();
  inView = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const entry = charts.get(target.dataset.panel);
        if (!entry) continue;
        entry.chart.visible = isIntersecting;
        if (isIntersecting && entry.chart.stale) Chart.soon(entry.chart);
      }
    },
    { rootMargin: "300px" },
  );
  const known = SECTIONS.map(([key]) => key);
  const others = [...new Set(panels.map((panel) => panel.dashboard))].filter((key) => !known.includes(key));
  sections = [];
  const made = [];
  for (const [key, title] of [...SECTIONS, ...others.map((each) => [each, words(each)])]) {
    const own = panels.filter((panel) => panel.dashboard === key);
    if (!own.length) continue;
    const cards = h("div", { class: "cards" });
    const aside = h("p", { class: "aside" });
    const section = h(
      "section", { id: `section-${key}`, "aria-labelledby": `section-${key}-title`, hidden: true },
      h("header", { class: "section-head" }, h("h2", { id: `section-${key}-title` }, title), aside), cards,
    );
    own.forEach((panel) => cards.append(makeCard(panel)));
    sections.push({ id: section.id, title, section, panels: own, aside });
    made.push(section);
  }
  byId("curves").replaceChildren(...made);
}

function makeCard(panel) {
  const description = h("p", { class: "description", id: `about-${panel.key}`, hidden: true }, panel.description);
  const holder = h("div", {});
  const legend = h("div", { class: "legend series", role: "group", "aria-label": `Series of ${panel.title}` });
  const last = h("p", { class: "last" });
  const stacked = panel.shape === "stacked";
  let wide = false;
  const chart = new Chart(holder, { ...panel, bars: stacked && panel.curves.every((each) => each.kind !== "train") });
  const presses = [];
  chart.onDrawn = () => presses.forEach((press) => press());
  const toggle = (name, title, getter, change) => {
    const button = h("button", { type: "button", class: "tiny", title, "aria-label": `${title}: ${panel.title}`, "aria-pressed": String(getter()) }, name);
    button.addEventListener("click", () => {
      change();
      chart.changed();
      press();
    });
    const press = () => button.setAttribute("aria-pressed", String(getter()));
    presses.push(press);
    return button;
  };
  const about = h("button", { type: "button", class: "tiny", title: "What this shows", "aria-label": `About ${panel.title}`, "aria-expanded": "false", "aria-controls": description.id }, "?");
  about.addEventListener("click", () => {
    description.hidden = !description.hidden;
    about.setAttribute("aria-expanded", String(!description.hidden));
  });
  const card = h(
    "article", { class: "card chart-card", "data-panel": panel.key, "data-shape": panel.shape, "data-place": charts.size, "aria-labelledby": `title-${panel.key}`, hidden: true },
    h(
      "header", {},
      h("div", { class: "titles" }, h("p", { class: "eyebrow" }, panel.row), h("h3", { id: `title-${panel.key}` }, panel.title)),
      h(
        "div", { class: "side" },
        h(
          "div", { class: "tinies" },
          stacked
            ? toggle("%", "Shares", () => chart.share, () => { chart.share = !chart.share; })
            : [
                toggle("log", "Logarithmic axis", () => chart.logarithmic, () => { chart.logarithmic = !chart.logarithmic; }),
                toggle("fit", "Fit the axis to most values", () => chart.fits, () => { chart.fitted = !chart.fits; }),
              ],
          toggle("⤢", "Wide", () => wide, () => {
            wide = !wide;
            card.classList.toggle("wide", wide);
            arrangeAll();
          }),
          about,
        ),
        last,
      ),
    ),
    description, holder, legend,
  );
  const entry = { card, chart, legend, last, panel, labels: "" };
  charts.set(panel.key, entry);
  inView.observe(card);
  new ResizeObserver(() => chart.changed()).observe(holder);
  return card;
}

/** Gives all charts their curves. */
export function updateCharts(run) {
  const extent = run.whole.extent ?? [0, 1];
  shared.whole = extent[0] === extent[1] ? [extent[0] - 1, extent[1] + 1] : extent;
  const [first, last] = run.zoom ?? shared.whole;
  shared.range = first < shared.whole[1] ? [first, Math.min(last, Math.max(shared.whole[1], first + 1))] : shared.whole;
  const order = run.sections.panels?.phases ?? [];
  for (const entry of charts.values()) {
    const whole = seriesOf(entry.panel, run.whole, order);
    const there = hasValues(whole);
    entry.card.hidden = !there;
    if (!there) continue;
    const series = run.curves === run.whole ? whole : withAll(seriesOf(entry.panel, run.curves, order), whole);
    entry.chart.set(series);
    updateLegend(entry, whole);
  }
  for (const { section, panels, aside } of sections) {
    const silent = panels.filter((panel) => charts.get(panel.key).card.hidden);
    section.hidden = silent.length === panels.length;
    arrange(section);
    say(aside, silent.length && !section.hidden ? `no data for ${silent.map((panel) => panel.title.toLowerCase()).join(", ")}` : "");
  }
}

const columns = () => (matchMedia("(min-width: 1181px)").matches ? 3 : matchMedia("(min-width: 721px)").matches ? 2 : 1);

/** Lays cards out in rows without holes: the first of a section and stacked ones are wide, the last of a row fills it. */
function arrange(section) {
  const across = columns();
  const waiting = [...section.querySelectorAll(".chart-card")].filter((card) => !card.hidden);
  waiting.sort((a, b) => Number(a.dataset.place) - Number(b.dataset.place));
  const told = `${across}:${waiting.map((card) => `${card.dataset.panel}${card.classList.contains("wide")}`).join()}`;
  if (section.dataset.arranged === told) return;
  section.dataset.arranged = told;
  const [first] = waiting;
  const count = waiting.length;
  const width = (card) => {
    if (card.classList.contains("wide")) return across;
    const broad = (card === first && count !== 3) || card.dataset.shape === "stacked";
    return Math.min(across, broad && count !== 2 ? 2 : 1);
  };
  const rows = [];
  while (waiting.length) {
    const row = [];
    let free = across;
    for (;;) {
      const next = waiting.findIndex((card) => width(card) <= free);
      if (next < 0) break;
      const [card] = waiting.splice(next, 1);
      row.push([card, width(card)]);
      free -= width(card);
    }
    if (row.length === 2 && free === 1 && across === 3) rows.push({ row, halves: true });
    else {
      row[row.length - 1][1] += free;
      rows.push({ row, halves: false });
    }
  }
  const [before, end] = rows.slice(-2);
  if (across === 3 && end?.row.length === 1 && before.row.length === 3 && !end.row[0][0].classList.contains("wide")) {
    end.row.unshift(before.row.pop());
    before.halves = end.halves = true;
  }
  // In sixths, so that two cards may share a row of three.
  for (const { row, halves } of rows) {
    for (const [card, span] of row) {
      card.style.gridColumn = `span ${halves ? 3 : (6 / across) * span}`;
      card.parentElement.append(card);
    }
  }
}

matchMedia("(min-width: 1181px)").addEventListener("change", arrangeAll);
matchMedia("(min-width: 721px)").addEventListener("change", arrangeAll);

function arrangeAll() {
  for (const { section } of sections) arrange(section);
}

// A curve without points in a range keeps its colour and its place in the legend.
function withAll(series, whole) {
  return whole.map((each) => {
    const found = series.find((other) => other.label === each.label && other.kind === each.kind);
    return found ? { ...found, colour: each.colour } : { ...each, steps: [], times: [], mean: [], odd: new Map() };
  });
}

function updateLegend(entry, series) {
  const { panel, legend, chart, last } = entry;
  const single = series.length === 1 && panel.shape !== "stacked";
  const values = series.map((each) => inUnit(lastOf(each), panel.unit));
  say(last, single ? values[0] : "");
  last.dataset.level = single ? levelOf(panel, lastOf(series[0])) : "";
  legend.hidden = single;
  if (single) return;
  const labels = series.map((each) => `${each.label}${each.colour}`).join("|");
  if (labels !== entry.labels) {
    entry.labels = labels;
    legend.replaceChildren(
      ...series.map((each) => {
        const button = h(
          "button", { type: "button", "aria-pressed": String(!chart.hiddenLabels.has(each.label)), title: `Show or hide ${each.label}` },
          h("span", { class: "swatch", style: { background: each.colour } }), h("span", { class: "name" }, each.label), h("b", {}),
        );
        button.addEventListener("click", () => {
          if (!chart.hiddenLabels.delete(each.label)) chart.hiddenLabels.add(each.label);
          button.setAttribute("aria-pressed", String(!chart.hiddenLabels.has(each.label)));
          chart.changed();
        });
        return button;
      }),
    );
  }
  [...legend.children].forEach((button, index) => say(button.querySelector("b"), values[index]));
}

/** "good", "warning", "bad" or "": of the highest threshold that a value has reached. */
export function levelOf(panel, value) {
  if (!panel || value === null || value === undefined) return "";
  if (!Number.isFinite(value)) return "bad";
  const reached = (panel.thresholds ?? []).filter((threshold) => value >= threshold.value);
  return reached.length ? reached[reached.length - 1].level : "";
}

// The crosshair, of all charts at once

export function showTooltip(step, chart, event) {
  shared.hover = step;
  const tooltip = byId("tooltip");
  for (const each of allCharts()) if (each.visible) each.drawOverlay();
  if (step === null || !chart) {
    tooltip.hidden = true;
    return;
  }
  const told = chart.told(step);
  tooltip.replaceChildren(
    h("p", { class: "tip-head" }, h("b", {}, told.heading), h("span", {}, told.time)),
    ...told.rows.map((row) =>
      h("p", { class: "tip-row" }, h("span", { class: "swatch", style: { background: row.colour ?? "transparent" } }), h("span", {}, row.label), h("b", {}, row.text))),
    ...told.events.map((each) => h("p", { class: "tip-event", "data-level": each.level }, each.message.length > 160 ? `${each.message.slice(0, 160)}…` : each.message)),
  );
  tooltip.hidden = false;
  const holder = chart.holder.getBoundingClientRect();
  const x = holder.left + chart.x(step);
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const beside = x + 16 + width > document.documentElement.clientWidth - 8 ? x - width - 16 : x + 16;
  const wanted = event && event.pointerType !== "touch" ? event.clientY - height / 2 : holder.top - height - 4;
  tooltip.style.left = `${Math.max(8, Math.min(beside, document.documentElement.clientWidth - width - 8))}px`;
  tooltip.style.top = `${Math.max(8, Math.min(wanted, window.innerHeight - height - 8))}px`;
  if (!event) say(byId("spoken"), [told.heading, ...told.rows.map((row) => `${row.label} ${row.text}`)].join(", "));
}

export function setEvents(rows) {
  shared.events = marksOf(rows);
}

