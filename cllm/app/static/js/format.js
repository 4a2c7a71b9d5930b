// Numbers for people. Every function answers "–" for what is not known (null, undefined, NaN).

export const UNKNOWN = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);
const language = "en";
const grouped = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
const three = new Intl.NumberFormat(language, { maximumSignificantDigits: 3 });

/** 1234567 -> "1,234,567"; with `short` "1.23 M". `unit` follows after a space. */
export function number(value, { short = false, unit = "", digits } = {}) {
  if (!known(value)) return UNKNOWN;
  const end = unit ? ` ${unit}` : "";
  if (short) return scaled(value, 1000, ["", "k", "M", "G", "T"], unit);
  if (digits !== undefined) return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }) + end;
  return (Number.isInteger(value) || Math.abs(value) >= 1000 ? grouped.format(value) : three.format(value)) + end;
}

/** 1536000 -> "1.54 MB". */
export const bytes = (value) => (known(value) ? scaled(value, 1000, ["B", "kB", "MB", "GB", "TB"]) : UNKNOWN);

/** 3725 -> "1 h 2 min"; under a minute with at most one decimal. */
export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (seconds <= 0) return "0 s";
  if (seconds < 0.001) return `${three.format(seconds * 1e6)} µs`;
  if (seconds < 0.1) return `${three.format(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return pair(whole, 60, "min", 1, "s");
  if (whole < 86400) return pair(whole, 3600, "h", 60, "min");
  return pair(whole, 86400, "d", 3600, "h");
}

/** Unix seconds -> "3 min ago". */
export function ago(time, now = Date.now() / 1000) {
  if (!known(time)) return UNKNOWN;
  const seconds = Math.max(0, now - time);
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  if (seconds < 30 * 86400) return `${Math.round(seconds / 86400)} d ago`;
  return new Date(time * 1000).toLocaleDateString(language, { year: "numeric", month: "short", day: "numeric" });
}

/** Unix seconds -> date and time of day here. */
export const moment = (time) => (known(time) ? new Date(time * 1000).toLocaleString(language, { dateStyle: "medium", timeStyle: "short" }) : UNKNOWN);

/** 0.4213 -> "42 %"; small shares keep a decimal. */
export const percent = (share) => (known(share) ? `${(share * 100).toFixed(Math.abs(share) < 0.0995 && share !== 0 ? 1 : 0)} %` : UNKNOWN);

/** A loss in nats per token with three decimals. */
export const loss = (value) => (known(value) ? value.toFixed(3) : UNKNOWN);

/** A learning rate or another small number: 0.0003 -> "3e-4". */
export function scientific(value) {
  if (!known(value)) return UNKNOWN;
  if (value === 0 || (Math.abs(value) >= 0.01 && Math.abs(value) < 10000)) return three.format(value);
  return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
}

/** 1 -> "1 document", 2 -> "2 documents". */
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

function scaled(value, base, units, end = "") {
  let index = 0;
  let rest = Math.abs(value);
  while (rest >= base * 0.9995 && index < units.length - 1) {
    rest /= base;
    index += 1;
  }
  const text = `${value < 0 ? "-" : ""}${index === 0 ? (Number.isInteger(rest) ? grouped.format(rest) : three.format(rest)) : three.format(rest)}`;
  return [text, `${units[index]}${end && units[index] ? " " : ""}${end}`].filter(Boolean).join(" ");
}

function pair(seconds, large, largeName, small, smallName) {
  const first = Math.floor(seconds / large);
  const second = Math.floor((seconds % large) / small);
  return second ? `${first} ${largeName} ${second} ${smallName}` : `${first} ${largeName}`;
}
