// What the run's server says, kept up to date.

const LIVE_MILLISECONDS = 2000;
const ENDED_MILLISECONDS = 10000;
const RETRY_MILLISECONDS = [500, 1000, 2000, 4000, 5000];
const PATIENCE_MILLISECONDS = 15000;

/** Curves between two steps: grids by kind, columns by kind and key. */
class Curves {
  constructor() {
    this.clear();
  }

  clear() {
    this.version = "";
    this.kinds = {};
  }

  /** Takes an answer of the server; returns whether it changed anything. */
  take(answer) {
    const place = (version) => version.split(";")[0];
    if (place(answer.version) !== place(this.version)) this.kinds = {}; // another server, or a run that went back
    this.version = answer.version;
    for (const [kind, grid] of Object.entries(answer.kinds)) {
      const columns = answer.series[kind] ?? {};
      if (grid.appended && this.kinds[kind]) append(this.kinds[kind], grid, columns);
      else this.kinds[kind] = { ...grid, columns: mapped(columns, (column) => ({ ...column, odd: new Map(column.odd ?? []) })) };
    }
  }

  /** [first, last] step of all there is; null where there is nothing. */
  get extent() {
    let [first, last] = [Infinity, -Infinity];
    for (const { steps, last: end } of Object.values(this.kinds)) {
      if (!steps.length) continue;
      first = Math.min(first, steps[0]);
      last = Math.max(last, end);
    }
    return first <= last ? [first, last] : null;
  }
}

const mapped = (object, make) => Object.fromEntries(Object.entries(object).map(([key, value]) => [key, make(value)]));

function append(held, grid, columns) {
  const from = grid.steps.length ? grid.steps[0] : Infinity;
  let keep = held.steps.length;
  while (keep > 0 && held.steps[keep - 1] >= from) keep -= 1;
  held.steps = [...held.steps.slice(0, keep), ...grid.steps];
  held.last = grid.last;
  held.times = [...held.times.slice(0, keep), ...grid.times];
  const nothing = new Array(grid.steps.length).fill(null);
  for (const key of new Set([...Object.keys(held.columns), ...Object.keys(columns)])) {
    const before = held.columns[key] ?? { mean: new Array(keep).fill(null), odd: new Map() };
    const more = columns[key] ?? {};
    const joined = { odd: new Map([...before.odd].filter(([at]) => at < keep)) };
    for (const [at, kind] of more.odd ?? []) joined.odd.set(at + keep, kind);
    for (const part of grid.width ? ["mean", "min", "max"] : ["mean"]) {
      const held = before[part] ?? new Array(keep).fill(null);
      joined[part] = [...held.slice(0, keep), ...(more[part] ?? nothing)];
    }
    held.columns[key] = joined;
  }
}

/** Asks the server again and again. `changed(names)` is called with the sections, or "curves", that are new. */
export class Run {
  constructor(changed, connected) {
    this.changed = changed;
    this.connected = connected; // (whether, why not)
    this.sections = {};
    this.versions = {};
    this.offset = 0; // seconds that this machine's clock is behind the server's
    this.whole = new Curves();
    this.zoomed = new Curves();
    this.zoom = null;
    this.failures = 0;
    this.timer = null;
    this.again = false;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.soon(0);
    });
    window.addEventListener("online", () => this.soon(0));
  }

  get now() {
    return Date.now() / 1000 + this.offset;
  }

  /** The curves of what is shown, as far as they are there. */
  get curves() {
    return this.zoom && this.zoomed.version ? this.zoomed : this.whole;
  }

  show(zoom) {
    this.zoom = zoom;
    this.zoomed.clear();
    this.soon(0);
  }

  soon(milliseconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), milliseconds);
  }

  async ask() {
    if (this.asking) {
      this.again = true;
      return;
    }
    this.asking = true;
    this.again = false;
    let news = null;
    try {
      const zoom = this.zoom;
      const parts = [this.askSections(), this.askCurves(this.whole, null)];
      if (zoom) parts.push(this.askCurves(this.zoomed, zoom));
      const changed = (await Promise.all(parts)).flat();
      const restored = this.failures > 0;
      this.failures = 0;
      this.connected(true, "");
      if (changed.length || restored) news = new Set(changed);
    } catch (error) {
      this.failures += 1;
      this.connected(false, error.status === 401 ? "token" : error.status ? `${error.status}` : "");
    } finally {
      this.asking = false;
    }
    try {
      if (news) this.changed(news);
    } catch (error) {
      console.error(error); // a fault of the page is no fault of the connection
    }
    if (this.again) this.soon(0);
    else if (this.failures) this.soon(RETRY_MILLISECONDS[Math.min(this.failures, RETRY_MILLISECONDS.length) - 1]);
    else if ((this.sections.progress?.read ?? 1) < 1) this.soon(0);
    else if (!document.hidden) this.soon(this.sections.run?.live ? LIVE_MILLISECONDS : ENDED_MILLISECONDS);
  }

  async askSections() {
    const answer = await asked(`api/run?have=${Object.values(this.versions).join(",")}`);
    if (!answer) return [];
    this.offset = answer.now - Date.now() / 1000;
    this.code = answer.code;
    const changed = [];
    for (const [name, { version, data }] of Object.entries(answer.sections)) {
      if (data === undefined) continue;
      this.versions[name] = version;
      this.sections[name] = data;
      changed.push(name);
    }
    return changed;
  }

  async askCurves(curves, range) {
    const words = new URLSearchParams({ version: curves.version });
    if (range) {
      words.set("first", Math.max(0, Math.floor(range[0])));
      if (Number.isFinite(range[1])) words.set("last", Math.ceil(range[1]));
    }
    const answer = await asked(`api/curves?${words}`);
    if (!answer || this.zoom !== range && range) return [];
    curves.take(answer);
    return ["curves"];
  }
}

/** The answer's JSON; null where nothing is new. */
async function asked(path) {
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), PATIENCE_MILLISECONDS);
  try {
    const reply = await fetch(path, { signal: patience.signal, cache: "no-store", credentials: "same-origin" });
    if (reply.status === 304) return null;
    if (!reply.ok) throw Object.assign(new Error(reply.statusText), { status: reply.status });
    return await reply.json();
  } finally {
    clearTimeout(timer);
  }
}
