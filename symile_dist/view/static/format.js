// Numbers, times and words as the page shows them.

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** The value as a number where it is one; the history's words for NaN and infinity are numbers. */
export function numeric(value) {
  if (typeof value === "number") return value;
  return { NaN, Infinity, "-Infinity": -Infinity }[value] ?? null;
}

function odd(value) {
  return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
}

const minus = (text) => text.replace("-", "−");

/** Four significant digits. */
export function decimal(value, digits = 4) {
  if (!Number.isFinite(value)) return odd(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(Math.max(0, digits - 2)).split("e");
    return minus(`${mantissa.replace(/\.?0+$/, "")}e${Number(exponent)}`);
  }
  if (Number.isInteger(value)) return minus(value.toLocaleString("en-US"));
  if (size >= 10 ** (digits - 1)) return minus(Math.round(value).toLocaleString("en-US"));
  return minus(String(Number(value.toPrecision(digits))));
}

export function whole(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

function prefixed(value, unit, digits) {
  const size = Math.abs(value);
  const [factor, prefix] = PREFIXES.find(([each]) => size >= each) ?? [1, ""];
  return `${decimal(value / factor, digits)} ${prefix}${unit}`.trimEnd();
}

export function seconds(value, digits = 3) {
  if (!Number.isFinite(value)) return odd(value);
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1e-3) return `${decimal(value * 1e6, digits)} µs`;
  if (size < 1) return `${decimal(value * 1e3, digits)} ms`;
  if (size < 120) return `${decimal(value, digits)} s`;
  return duration(value);
}

/** In the two largest units: 3 d 4 h. */
export function duration(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  let left = Math.max(0, Math.round(value));
  const parts = [];
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count || (parts.length && parts.length < 2)) parts.push(`${count} ${unit}`);
    if (parts.length === 2) break;
  }
  return parts.filter((part) => !part.startsWith("0 ")).join(" ") || "0 s";
}

export function percent(value, digits = 3) {
  return Number.isFinite(value) ? `${decimal(100 * value, digits)}%` : odd(value);
}

export function bytes(value, digits = 3) {
  return Number.isFinite(value) ? prefixed(value, "B", digits) : odd(value);
}

/** A value of a panel's unit, in words. */
export function inUnit(value, unit, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return odd(value);
  switch (unit) {
    case "seconds": return seconds(value, Math.min(digits, 3));
    case "bytes": return bytes(value, Math.min(digits, 3));
    case "bytes/second": return prefixed(value, "B/s", Math.min(digits, 3));
    case "flops/second": return prefixed(value, "FLOP/s", Math.min(digits, 3));
    case "samples/second": return Math.abs(value) >= 1e5 ? prefixed(value, "samples/s", 4) : `${decimal(value, 4)} samples/s`;
    case "ratio": return percent(value, Math.min(digits, 3));
    case "nats": return `${decimal(value, digits)} nats`;
    case "steps": case "samples": return `${decimal(value, digits)}`;
    default: return decimal(value, digits);
  }
}

/** A label of an axis: short, and without the unit's words where they would repeat. */
export function axisLabel(value, unit) {
  if (unit === "flops/second") return prefixed(value, "", 3);
  if (unit === "samples/second" || unit === "nats") return Math.abs(value) >= 1e4 ? prefixed(value, "", 3) : decimal(value, 3);
  if (unit === "seconds") return value === 0 ? "0" : seconds(value, 3);
  if (value === 0) return "0";
  if (unit === "" || unit === "steps" || unit === "samples") {
    return Math.abs(value) >= 1e4 && Math.abs(value) < 1e15 ? prefixed(value, "", 3).replace(" ", "") : decimal(value, 3);
  }
  return inUnit(value, unit, 3);
}

export function stepLabel(value) {
  if (Math.abs(value) < 1e5) return whole(value);
  return prefixed(value, "", 4).replace(" ", "");
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export function moment(unix) {
  if (unix === null || unix === undefined) return "–";
  const date = new Date(unix * 1000);
  return `${day.format(date)}, ${clock.format(date)}`;
}

export function fullMoment(unix) {
  return unix === null || unix === undefined ? "" : full.format(new Date(unix * 1000));
}

export function ago(unix, now) {
  if (unix === null || unix === undefined) return "–";
  const passed = now - unix;
  return passed < 2 ? "just now" : `${duration(passed)} ago`;
}

/** A key of the history for people. */
export function words(key) {
  return String(key).replaceAll("_", " ");
}

/** "image_from_text+audio" as "image ← text + audio". */
export function direction(name) {
  const [target, queries] = String(name).split("_from_");
  return queries === undefined ? words(name) : `${target} ← ${queries.replaceAll("+", " + ").replaceAll("_", " + ")}`;
}
