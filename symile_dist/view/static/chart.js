// A chart over steps: curves with an envelope, or stacked areas, on plain canvas.
//
// All charts share one range of steps and one crosshair, which `shared` holds; whoever makes charts listens to it.

import { axisLabel, inUnit, moment, stepLabel, whole } from "./format.js";

const MARGIN = { top: 10, right: 10, bottom: 22 };
const LEFT = [34, 78]; // room for the labels of the axis, least and most
export const FROM_ZERO = ["seconds", "bytes", "bytes/second", "samples/second", "flops/second", "ratio"];
const DOTTED = 60; // up to so many points a curve shows each
const SMOOTHING = 0.08; // of all points: what a smoothed value mostly hangs on
const OUTLYING = 5; // times the range of nearly all values: what reaches so far is left outside, and marked
const DRAG = 5; // pixels that make a drag of a click
const MOST_TOLD = 14; // series in a tooltip

export const shared = {
  range: [0, 1], // what is shown
  whole: [0, 1], // what there is
  hover: null, // a step
  smooth: false,
  marks: true,
  events: [], // {step, sort, level, message, time}
  now: 0,
  onZoom: () => {},
  onHover: () => {},
};

let colours = {};

/** Reads the theme's colours; to be called again when it changes. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(name).trim();
  colours = {
    text: named("--text"), muted: named("--muted"), line: named("--grid"), axis: named("--axis"), surface: named("--surface"),
    accent: named("--accent"), bad: named("--bad"), warning: named("--warning"), good: named("--good"),
    envelope: Number(named("--envelope")) || 0.16,
    series: Array.from({ length: 8 }, (_, index) => named(`--series-${index + 1}`)),
  };
  for (const name of PHASES) colours[`phase-${name}`] = named(`--phase-${name}`);
  for (const name of STATES) colours[`state-${name}`] = named(`--state-${name}`);
  return colours;
}

const PHASES = ["data_wait", "h2d", "forward", "gather", "loss", "backward", "optimizer", "checkpoint", "eval", "other"];
export const STATES = ["productive", "pending", "init", "checkpoint", "eval", "restart", "lost"];

/** The colour of the series called so, which is the same everywhere. */
export function colourOf(label, index) {
  return colours[`phase-${label}`] || colours[`state-${label}`] || colours.series[index % 8];
}

export function eventColour(event) {
  if (event.level === "error" || event.sort === "restart") return colours.bad;
  if (event.sort === "rollback" || event.sort === "skip" || event.sort === "spike") return colours.warning;
  return colours.axis;
}

export const marksOf = (events) => events.filter((event) => event.step !== null && !["other", "end", "stop", "profile"].includes(event.sort) || event.level === "error");

/**
 * One curve: `steps`, `times` and `width` of its grid; `mean` and, where points stand for several records, `min` and
 * `max`; `odd`: Map of point -> "NaN" | "Infinity" | "-Infinity".
 */
export function curve(label, grid, column, extra = {}) {
  return {
    label, steps: grid.steps, times: grid.times, width: grid.width,
    mean: column.mean, min: column.min ?? null, max: column.max ?? null, odd: column.odd ?? new Map(), ...extra,
  };
}

const middle = (series, index) => series.steps[index] + (series.width ? (series.width - 1) / 2 : 0);

/** Index of the point that holds a step, or lies next to it; -1 where there is none. */
function nearest(series, step) {
  const { steps } = series;
  if (!steps.length) return -1;
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const at = (low + high + 1) >> 1;
    if (steps[at] <= step) low = at;
    else high = at - 1;
  }
  if (low + 1 < steps.length && Math.abs(middle(series, low + 1) - step) < Math.abs(middle(series, low) - step)) low += 1;
  return low;
}

function smoothed(values, odd) {
  const span = Math.max(2, values.length * SMOOTHING / 2);
  const keep = Math.exp(-1 / span);
  const pass = (from, to, by, out) => {
    let sum = 0;
    let weight = 0;
    for (let at = from; at !== to; at += by) {
      if (values[at] === null || values[at] === undefined) continue;
      sum = sum * keep + values[at];
      weight = weight * keep + 1;
      out[at] = [sum, weight];
    }
    return out;
  };
  // Both ways, so that nothing moves along the axis.
  const forth = pass(0, values.length, 1, new Array(values.length));
  const back = pass(values.length - 1, -1, -1, new Array(values.length));
  return values.map((value, at) => {
    if (value === null || value === undefined || odd.has(at)) return null;
    return (forth[at][0] + back[at][0] - value) / (forth[at][1] + back[at][1] - 1);
  });
}

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough) * power;
  const ticks = [];
  for (let at = Math.ceil(low / size - 1e-9); at * size <= high + size * 1e-9; at += 1) ticks.push(Number((at * size).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / count));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : niceTicks(low, high, count).filter((tick) => tick > 0);
}

export class Chart {
  /**
   * @param {HTMLElement} holder where it is drawn
   * @param {{title: string, unit: string, shape: string, thresholds: object[], logarithmic: boolean}} panel
   */
  constructor(holder, panel) {
    this.holder = holder;
    this.panel = panel;
    this.series = [];
    this.hiddenLabels = new Set();
    this.logarithmic = Boolean(panel.logarithmic);
    this.fitted = null; // whether the axis fits most values and leaves the rest outside; null: where a few would flatten all
    this.fits = false;
    this.onDrawn = () => {};
    this.share = false;
    this.visible = false;
    this.stale = true;
    this.drag = null;
    this.left = LEFT[0];
    holder.classList.add("chart");
    holder.tabIndex = 0;
    holder.setAttribute("role", "img");
    holder.setAttribute("aria-roledescription", "chart");
    this.canvas = document.createElement("canvas");
    this.overlay = document.createElement("canvas");
    this.overlay.className = "overlay";
    holder.append(this.canvas, this.overlay);
    this._listen();
  }

  set(series) {
    this.series = series;
    this.changed();
  }

  changed() {
    this.stale = true;
    delete this.holder.dataset.drawn;
    if (this.visible) Chart.soon(this);
  }

  /** Charts are drawn together, at the next frame. */
  static soon(chart) {
    Chart.waiting.add(chart);
    if (Chart.frame) return;
    Chart.frame = requestAnimationFrame(() => {
      Chart.frame = 0;
      const drawn = [...Chart.waiting];
      Chart.waiting.clear();
      for (const each of drawn) each.draw();
    });
  }

  get shown() {
    return this.series.filter((series) => !this.hiddenLabels.has(series.label));
  }

  // Geometry

  x(step) {
    const [first, last] = shared.range;
    return this.left + (this.inner.width * (step - first)) / Math.max(last - first, 1e-9);
  }

  step(x) {
    const [first, last] = shared.range;
    return first + ((x - this.left) / this.inner.width) * (last - first);
  }

  y(value) {
    const [low, high] = this.domain;
    const at = this.log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    return MARGIN.top + this.inner.height * (1 - at);
  }

  _domain() {
    const [first, last] = shared.range;
    const stacked = this.panel.shape === "stacked";
    let values = []; // with the ends of envelopes
    let means = [];
    if (stacked) {
      values = this._stack().flatMap((layer) => layer.high).filter((value) => value !== null);
      values.push(0);
    } else {
      for (const series of this.shown) {
        for (let at = 0; at < series.steps.length; at += 1) {
          const step = series.steps[at];
          if (step + Math.max(series.width, 1) <= first || step > last) continue;
          const mean = series.mean[at] ?? null;
          if (mean === null) continue;
          means.push(mean);
          values.push(series.min ? series.min[at] : mean, series.max ? series.max[at] : mean);
        }
      }
    }
    this.log = this.logarithmic && !stacked;
    if (this.log) {
      [values, means] = [values, means].map((each) => each.filter((value) => value > 0));
      if (!values.length) this.log = false;
    }
    this.fits = false;
    if (!values.length) return [0, 1];
    values.sort((a, b) => a - b);
    let [low, high] = [values[0], values[values.length - 1]];
    if (!stacked && means.length > 20) {
      means.sort((a, b) => a - b);
      const cut = Math.ceil(means.length * 0.01);
      const [usual, most] = [means[cut], means[means.length - 1 - cut]];
      this.fits = this.fitted ?? (!this.log && most > usual && high - low > OUTLYING * (most - usual));
      if (this.fits) {
        const room = (most - usual) * (this.fitted ? 0.05 : 0.5) || Math.abs(most) * 0.1;
        if (this.log) [low, high] = [Math.max(low, usual), Math.min(high, most)];
        else [low, high] = [Math.max(low, usual - room), Math.min(high, most + room)];
      }
    } else this.fits = Boolean(this.fitted);
    if (this.log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.06];
    if (stacked) return [0, this.share ? 1 : high * 1.05 || 1];
    if (low === high) {
      const room = Math.abs(low) * 0.1 || 1;
      if (low > 0 && !this.fitted && FROM_ZERO.includes(this.panel.unit)) return [0, high + room];
      return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
    }
    // A size begins at zero, so that a ripple does not look like a storm; whoever wants to see the ripple fits it in.
    if (low >= 0 && !this.fitted && (low < 0.35 * high || FROM_ZERO.includes(this.panel.unit))) low = 0;
    if (this.panel.unit === "ratio" && high > 0.7 && high <= 1) return [low === 0 ? 0 : low - (high - low) * 0.06, 1];
    return [low === 0 ? 0 : low - (high - low) * 0.06, high + (high - low) * 0.08];
  }

  _stack() {
    const layers = this.shown;
    if (!layers.length) return [];
    const grid = layers[0].steps;
    const below = new Array(grid.length).fill(0);
    const sums = grid.map((_, at) => layers.reduce((sum, series) => sum + (series.mean[at] ?? 0), 0));
    const empty = grid.map((_, at) => layers.every((series) => (series.mean[at] ?? null) === null));
    return layers.map((series) => {
      const low = [...below];
      const high = low.map((value, at) => {
        if (empty[at]) return null;
        const share = this.share ? (sums[at] ? (series.mean[at] ?? 0) / sums[at] : 0) : series.mean[at] ?? 0;
        below[at] = value + share;
        return below[at];
      });
      return { series, low, high };
    });
  }

  // Drawing

  draw() {
    const box = this.holder.getBoundingClientRect();
    if (!box.width || !box.height) return;
    this.stale = false;
    const scale = window.devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.overlay]) {
      const [width, height] = [Math.round(box.width * scale), Math.round(box.height * scale)];
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    pen.font = `11px ${getComputedStyle(this.holder).fontFamily}`;
    this.inner = { width: 0, height: box.height - MARGIN.top - MARGIN.bottom };
    this.domain = this._domain();
    const labels = this._ticks().map((tick) => pen.measureText(axisLabel(tick, this.axisUnit)).width);
    this.left = Math.ceil(Math.min(Math.max(...labels, LEFT[0]), LEFT[1])) + 8;
    this.inner.width = Math.max(1, box.width - this.left - MARGIN.right);
    this._axes(pen, box);
    pen.save();
    pen.beginPath();
    pen.rect(this.left, MARGIN.top - 1, this.inner.width, this.inner.height + 2);
    pen.clip();
    this._thresholds(pen);
    if (shared.marks) this._marks(pen);
    if (this.panel.shape === "stacked") this._areas(pen);
    else for (const series of this.shown) this._curve(pen, series);
    pen.restore();
    this._outside(pen);
    this._odd(pen);
    this._label();
    this.drawOverlay();
    this.holder.dataset.drawn = "yes";
    this.onDrawn();
  }

  get axisUnit() {
    return this.share ? "ratio" : this.panel.unit;
  }

  _ticks() {
    const [low, high] = this.domain;
    const size = this.axisUnit === "seconds" && !this.log ? [86400, 3600, 60].find((each) => high - low >= 2 * each) ?? 1 : 1;
    if (size > 1) return niceTicks(low / size, high / size, Math.max(2, Math.floor(this.inner.height / 36))).map((tick) => tick * size);
    return this.log ? logTicks(...this.domain, 5) : niceTicks(...this.domain, Math.max(2, Math.floor(this.inner.height / 36)));
  }

  _axes(pen, box) {
    const { inner } = this;
    const unit = this.axisUnit;
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of this._ticks()) {
      const y = Math.round(this.y(tick)) + 0.5;
      pen.strokeStyle = colours.line;
      pen.beginPath();
      pen.moveTo(this.left, y);
      pen.lineTo(this.left + inner.width, y);
      pen.stroke();
      pen.fillStyle = colours.muted;
      pen.fillText(axisLabel(tick, unit), this.left - 8, y);
    }
    pen.textBaseline = "alphabetic";
    pen.textAlign = "center";
    const bottom = MARGIN.top + inner.height;
    const [first, last] = shared.range;
    let right = -Infinity;
    for (const tick of niceTicks(first, last, Math.max(2, Math.floor(inner.width / 76)))) {
      if (!Number.isInteger(tick)) continue;
      const text = stepLabel(tick);
      const half = pen.measureText(text).width / 2;
      const x = Math.min(Math.max(this.x(tick), this.left + half - 12), box.width - half - 2);
      if (x - half < right + 12) continue;
      right = x + half;
      pen.fillText(text, x, box.height - 6);
    }
    pen.strokeStyle = colours.axis;
    pen.beginPath();
    pen.moveTo(this.left, Math.round(bottom) + 0.5);
    pen.lineTo(this.left + inner.width, Math.round(bottom) + 0.5);
    pen.stroke();
  }

  _thresholds(pen) {
    for (const threshold of this.panel.thresholds ?? []) {
      const [low, high] = this.domain;
      if (threshold.value <= low || threshold.value >= high || this.share) continue;
      const y = Math.round(this.y(threshold.value)) + 0.5;
      pen.strokeStyle = colours[threshold.level];
      pen.globalAlpha = 0.55;
      pen.setLineDash([2, 4]);
      pen.beginPath();
      pen.moveTo(this.left, y);
      pen.lineTo(this.left + this.inner.width, y);
      pen.stroke();
      pen.setLineDash([]);
      pen.globalAlpha = 1;
    }
  }

  _marks(pen) {
    const [first, last] = shared.range;
    const taken = new Set();
    for (const event of shared.events) {
      if (event.step < first || event.step > last) continue;
      const x = Math.round(this.x(event.step)) + 0.5;
      const colour = eventColour(event);
      if (taken.has(`${x}${colour}`)) continue; // of a thousand skips a screen shows a few
      taken.add(`${x}${colour}`);
      const grave = event.sort === "restart" || event.sort === "rollback" || event.level === "error";
      pen.strokeStyle = pen.fillStyle = colour;
      pen.globalAlpha = grave ? 0.5 : 0.28;
      pen.setLineDash(grave ? [] : [1, 3]);
      pen.beginPath();
      pen.moveTo(x, MARGIN.top);
      pen.lineTo(x, MARGIN.top + this.inner.height);
      pen.stroke();
      pen.setLineDash([]);
      pen.globalAlpha = 0.9;
      pen.beginPath();
      pen.moveTo(x - 3.5, MARGIN.top - 1);
      pen.lineTo(x + 3.5, MARGIN.top - 1);
      pen.lineTo(x, MARGIN.top + 4);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  /** Stretches of points between gaps; what a curve lacks at some points is no gap, what is not finite there is. */
  *_stretches(series, values) {
    const [first, last] = shared.range;
    let stretch = [];
    for (let at = 0; at < series.steps.length; at += 1) {
      const step = series.steps[at];
      // One more on either side, so that lines leave the picture instead of ending.
      if (at + 1 < series.steps.length && series.steps[at + 1] + series.width < first) continue;
      const value = values[at];
      const usable = value !== null && value !== undefined && (!this.log || value > 0);
      if (usable) stretch.push(at);
      // A bucket that holds NaN beside numbers goes on; one with nothing else interrupts.
      else if (series.odd.has(at) && stretch.length) {
        yield stretch;
        stretch = [];
      }
      if (step > last) break;
    }
    if (stretch.length) yield stretch;
  }

  _line(pen, series, values, dots) {
    for (const stretch of this._stretches(series, values)) {
      pen.beginPath();
      for (const at of stretch) pen.lineTo(this.x(middle(series, at)), this.y(values[at]));
      pen.stroke();
      if (dots || stretch.length === 1) {
        for (const at of stretch) {
          pen.beginPath();
          pen.arc(this.x(middle(series, at)), this.y(values[at]), dots ? 2.2 : 1.6, 0, 2 * Math.PI);
          pen.fill();
        }
      }
    }
  }

  _curve(pen, series) {
    pen.strokeStyle = pen.fillStyle = series.colour;
    pen.lineJoin = pen.lineCap = "round";
    if (series.min) {
      pen.globalAlpha = colours.envelope;
      for (const stretch of this._stretches(series, series.mean)) {
        pen.beginPath();
        const low = (at) => (this.log && !(series.min[at] > 0) ? this.domain[0] : series.min[at]);
        for (const at of stretch) pen.lineTo(this.x(middle(series, at)), this.y(series.max[at]));
        for (const at of [...stretch].reverse()) pen.lineTo(this.x(middle(series, at)), this.y(low(at)));
        pen.closePath();
        pen.fill();
        // A lone spike would be a sliver that nobody sees.
        pen.lineWidth = 1;
        pen.stroke();
      }
      pen.globalAlpha = 1;
    }
    const inside = series.steps.filter((step) => step >= shared.range[0] && step <= shared.range[1]).length;
    const smooth = shared.smooth && series.mean.length > 8;
    if (smooth) pen.globalAlpha = 0.25;
    pen.lineWidth = smooth ? 1 : 1.6;
    this._line(pen, series, series.mean, inside <= DOTTED && !smooth);
    pen.globalAlpha = 1;
    if (smooth) {
      pen.lineWidth = 2;
      this._line(pen, series, smoothed(series.mean, series.odd), false);
    }
  }

  _areas(pen) {
    const layers = this._stack();
    const [first, last] = shared.range;
    for (const { series, low, high } of layers) {
      pen.fillStyle = series.colour;
      const present = high.map((value, at) => at).filter((at) => high[at] !== null);
      if (series.width === 0 && present.length <= DOTTED && this.panel.bars) {
        const inside = present.filter((at) => series.steps[at] >= first && series.steps[at] <= last).length;
        const width = Math.max(4, Math.min(18, (0.6 * this.inner.width) / Math.max(inside, 1)));
        for (const at of present) {
          // Within the picture also at its ends.
          const x = Math.min(Math.max(this.x(series.steps[at]) - width / 2, this.left), this.left + this.inner.width - width);
          if (series.steps[at] < first || series.steps[at] > last) continue;
          pen.fillRect(x, this.y(high[at]), width, Math.max(0, this.y(low[at]) - this.y(high[at])));
        }
        continue;
      }
      pen.globalAlpha = 0.88;
      pen.beginPath();
      for (const at of present) pen.lineTo(this.x(middle(series, at)), this.y(high[at]));
      for (const at of present.reverse()) pen.lineTo(this.x(middle(series, at)), this.y(low[at]));
      pen.closePath();
      pen.fill();
      pen.globalAlpha = 1;
    }
  }

  /** Small arrows where a curve goes beyond the axis. */
  _outside(pen) {
    if (this.panel.shape === "stacked") return;
    const [first, last] = shared.range;
    const [low, high] = this.domain;
    pen.lineWidth = 1.5;
    for (const series of this.shown) {
      pen.strokeStyle = series.colour;
      let taken = -Infinity;
      for (let at = 0; at < series.steps.length; at += 1) {
        const [least, largest] = series.min ? [series.min[at], series.max[at]] : [series.mean[at], series.mean[at]];
        const above = largest !== null && largest > high * (1 + 1e-9);
        const below = least !== null && !this.log && least < low - 1e-9 * Math.abs(low);
        const step = middle(series, at);
        if ((!above && !below) || step < first || step > last) continue;
        const x = this.x(step);
        if (x - taken < 7) continue;
        taken = x;
        const y = above ? MARGIN.top + 8 : MARGIN.top + this.inner.height - 5;
        const tip = above ? y - 4 : y + 4;
        pen.beginPath();
        pen.moveTo(x - 3.5, y);
        pen.lineTo(x, tip);
        pen.lineTo(x + 3.5, y);
        pen.stroke();
      }
    }
  }

  /** NaN and infinity, which have no place on the axis, along its edges. */
  _odd(pen) {
    const [first, last] = shared.range;
    const top = MARGIN.top + 9;
    const bottom = MARGIN.top + this.inner.height - 5;
    pen.strokeStyle = pen.fillStyle = colours.bad;
    pen.lineWidth = 1.6;
    for (const series of this.shown) {
      for (const [at, kind] of series.odd) {
        const step = middle(series, at);
        if (step < first || step > last) continue;
        const x = this.x(step);
        pen.beginPath();
        if (kind === "NaN") {
          pen.moveTo(x - 3, top - 3);
          pen.lineTo(x + 3, top + 3);
          pen.moveTo(x + 3, top - 3);
          pen.lineTo(x - 3, top + 3);
          pen.stroke();
        } else {
          const [tip, base] = kind === "Infinity" ? [top - 4, top + 3] : [bottom + 4, bottom - 3];
          pen.moveTo(x, tip);
          pen.lineTo(x - 4, base);
          pen.lineTo(x + 4, base);
          pen.fill();
        }
      }
    }
  }

  _label() {
    const parts = this.shown.slice(0, 6).map((series) => `${series.label} ${inUnit(lastOf(series), this.panel.unit)}`);
    const [first, last] = shared.range;
    this.holder.setAttribute(
      "aria-label",
      `${this.panel.title}, steps ${whole(first)} to ${whole(last)}: ${parts.join(", ") || "nothing yet"}. ` +
        "Arrow keys move along the steps, plus and minus zoom, Escape shows all.",
    );
  }

  drawOverlay() {
    if (!this.inner) return;
    const scale = window.devicePixelRatio || 1;
    const pen = this.overlay.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (this.drag?.moved) {
      const [from, to] = [Math.min(this.drag.from, this.drag.to), Math.max(this.drag.from, this.drag.to)];
      pen.fillStyle = pen.strokeStyle = colours.accent;
      pen.globalAlpha = 0.14;
      pen.fillRect(from, MARGIN.top, to - from, this.inner.height);
      pen.globalAlpha = 0.7;
      pen.strokeRect(from + 0.5, MARGIN.top + 0.5, to - from, this.inner.height - 1);
      pen.globalAlpha = 1;
      return;
    }
    if (shared.hover === null) return;
    const x = Math.round(this.x(shared.hover)) + 0.5;
    if (x < this.left || x > this.left + this.inner.width + 1) return;
    pen.strokeStyle = colours.axis;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, MARGIN.top);
    pen.lineTo(x, MARGIN.top + this.inner.height);
    pen.stroke();
    if (this.panel.shape === "stacked") return;
    for (const series of this.shown) {
      const at = nearest(series, shared.hover);
      const value = at < 0 ? null : series.mean[at];
      if (value === null || value === undefined || (this.log && value <= 0)) continue;
      if (Math.abs(this.x(middle(series, at)) - x) > 14) continue;
      pen.fillStyle = series.colour;
      pen.strokeStyle = colours.surface;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(this.x(middle(series, at)), this.y(value), 4, 0, 2 * Math.PI);
      pen.fill();
      pen.stroke();
    }
  }

  /** What stands at a step: {heading, time, rows: [{label, colour, text}], events}. */
  told(step) {
    let heading = `Step ${whole(step)}`;
    let time = null;
    let best = Infinity;
    const rows = [];
    for (const series of this.shown) {
      const at = nearest(series, step);
      if (at < 0) continue;
      const distance = Math.abs(middle(series, at) - step);
      if (distance < best) {
        best = distance;
        const from = series.steps[at];
        heading = series.width > 1 ? `Steps ${whole(from)} – ${whole(from + series.width - 1)}` : `Step ${whole(from)}`;
        time = series.times[at];
      }
      const odd = series.odd.get(at);
      const value = series.mean[at];
      if (odd === undefined && (value === null || value === undefined)) continue;
      let text = value === null || value === undefined ? "" : inUnit(value, this.panel.unit);
      if (series.min && series.max[at] > series.min[at]) {
        text += `  (${inUnit(series.min[at], this.panel.unit)} … ${inUnit(series.max[at], this.panel.unit)})`;
      }
      if (odd) text = [text, odd === "NaN" ? "NaN" : odd === "Infinity" ? "∞" : "−∞"].filter(Boolean).join(", ");
      const away = series.width <= 1 && series.steps[at] !== Math.round(step) && distance > (shared.range[1] - shared.range[0]) / 50;
      rows.push({ label: series.label, colour: series.colour, text: away ? `${text} at ${whole(series.steps[at])}` : text });
    }
    if (this.panel.shape === "stacked" && rows.length > 1) {
      const sum = this.shown.reduce((total, series) => total + (series.mean[nearest(series, step)] ?? 0), 0);
      rows.reverse();
      rows.push({ label: "sum", colour: null, text: inUnit(sum, this.panel.unit) });
    }
    const near = (6 * (shared.range[1] - shared.range[0])) / this.inner.width;
    const events = shared.marks ? shared.events.filter((event) => Math.abs(event.step - step) <= near).slice(-3) : [];
    const hidden = rows.length - MOST_TOLD;
    if (hidden > 0) rows.splice(MOST_TOLD, hidden, { label: `and ${hidden} more`, colour: null, text: "" });
    return { heading, time: time === null ? "" : moment(time), rows, events };
  }

  // Pointer and keys

  _listen() {
    const place = (event) => {
      const box = this.holder.getBoundingClientRect();
      return [Math.min(Math.max(event.clientX - box.left, this.left), this.left + (this.inner?.width ?? 0)), event.clientY - box.top];
    };
    this.holder.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.inner) return;
      const [x] = place(event);
      if (event.pointerType === "touch") {
        this.hover(x, event);
        return;
      }
      this.drag = { from: x, to: x, moved: false };
      this.holder.setPointerCapture(event.pointerId);
    });
    this.holder.addEventListener("pointermove", (event) => {
      if (!this.inner) return;
      const [x] = place(event);
      if (this.drag) {
        this.drag.to = x;
        this.drag.moved ||= Math.abs(x - this.drag.from) > DRAG;
        if (this.drag.moved) shared.onHover(null);
        this.drawOverlay();
        return;
      }
      this.hover(x, event);
    });
    const end = () => {
      const { drag } = this;
      this.drag = null;
      if (drag?.moved) {
        const [first, last] = [drag.from, drag.to].sort((a, b) => a - b).map((x) => Math.round(this.step(x)));
        if (last > first) shared.onZoom([first, last]);
      }
      this.drawOverlay();
    };
    this.holder.addEventListener("pointerup", end);
    this.holder.addEventListener("pointercancel", () => {
      this.drag = null;
      this.drawOverlay();
    });
    this.holder.addEventListener("pointerleave", (event) => {
      if (!this.drag && event.pointerType !== "touch") shared.onHover(null);
    });
    this.holder.addEventListener("dblclick", () => shared.onZoom(null));
    this.holder.addEventListener("blur", () => shared.onHover(null));
    this.holder.addEventListener("keydown", (event) => this._key(event));
  }

  hover(x, event) {
    shared.onHover(this.step(x), this, event);
  }

  _key(event) {
    if (!this.inner || event.ctrlKey || event.metaKey || event.altKey) return;
    const [first, last] = shared.range;
    const at = shared.hover ?? last;
    const span = last - first;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      const longest = this.shown.reduce((best, series) => (series.steps.length > (best?.steps.length ?? 0) ? series : best), null);
      if (longest) {
        const next = nearest(longest, at) + (shared.hover === null ? 0 : move * (event.shiftKey ? 10 : 1));
        const step = middle(longest, Math.min(Math.max(next, 0), longest.steps.length - 1));
        shared.onHover(Math.min(Math.max(step, first), last), this, null);
      }
    } else if (event.key === "Home" || event.key === "End") shared.onHover(event.key === "Home" ? first : last, this, null);
    else if (event.key === "+" || event.key === "=") zoomAround(at, span / 2);
    else if (event.key === "-") zoomAround(at, span * 2);
    else if (event.key === "Escape" || event.key === "0") shared.onZoom(null);
    else return;
    event.preventDefault();
  }
}
Chart.waiting = new Set();
Chart.frame = 0;

function zoomAround(step, span) {
  const [first, last] = shared.whole;
  if (span >= last - first) shared.onZoom(null);
  else if (span >= 2) {
    const begin = Math.round(Math.min(Math.max(step - span / 2, first), last - span));
    shared.onZoom([begin, Math.round(begin + span)]);
  }
}

/** The last value of a curve that is a number, or what stands in its place. */
export function lastOf(series) {
  for (let at = series.mean.length - 1; at >= 0; at -= 1) {
    const odd = series.odd.get(at);
    if (odd && (series.mean[at] === null || series.mean[at] === undefined)) return Number(odd);
    if (series.mean[at] !== null && series.mean[at] !== undefined) return series.mean[at];
  }
  return null;
}

/** A curve without axes, for a tile. */
export function sparkline(canvas, series, colour, fromZero) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !series) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const values = series.mean;
  const known = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
  if (known.length < 2) return;
  // The ends are cut: one spike must not flatten all else in so little room.
  const cut = Math.floor(known.length * 0.01);
  const [low, high] = [fromZero ? Math.min(0, known[cut]) : known[cut], known[known.length - 1 - cut]];
  const [first, last] = [series.steps[0], series.steps[series.steps.length - 1]];
  const y = (value) => height - 2 - ((Math.min(Math.max(value, low), high) - low) / (high - low || 1)) * (height - 4);
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.4;
  pen.lineJoin = "round";
  pen.beginPath();
  let begun = false;
  values.forEach((value, at) => {
    if (value === null || value === undefined) return;
    const x = 1 + ((series.steps[at] - first) / (last - first || 1)) * (width - 2);
    if (begun) pen.lineTo(x, y(value));
    else pen.moveTo(x, y(value));
    begun = true;
  });
  pen.stroke();
  pen.lineTo(width - 1, height);
  pen.lineTo(1, height);
  pen.closePath();
  pen.globalAlpha = 0.1;
  pen.fill();
}

