// Tokens as the API names them, and the text that they are. A token may be only a part of a character: its name is then "bytes:\xe2\x82".

const encoder = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const PART = /^bytes:(?:\\x[0-9a-f]{2})+$/;

/** The bytes that a name stands for. */
export function bytesOf(name) {
  if (!PART.test(name)) return encoder.encode(name);
  return Uint8Array.from(name.slice(6).split("\\x").slice(1), (each) => parseInt(each, 16));
}

/** The name of a token of these bytes. */
export function nameOf(bytes) {
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return `bytes:${bytes.map((each) => `\\x${each.toString(16).padStart(2, "0")}`).join("")}`;
  }
}

/** The text of several tokens; null where it ends in the middle of a character. */
export function textOf(names) {
  const parts = names.map(bytesOf);
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  try {
    return strict.decode(joined);
  } catch {
    return null;
  }
}

const SHOWN = new Map([[" ", "␣"], ["\n", "↵"], ["\t", "⇥"], ["\r", "␍"]]);
/** A token with its blanks made visible: at its ends all of them, and line ends everywhere. */
export function visible(name) {
  if (!name) return "(nothing)";
  return name.replace(/^ +| +$|[\n\t\r]/g, (blanks) => [...blanks].map((each) => SHOWN.get(each)).join(""));
}

/** How surprising a token was, in bits: 0 for what was certain. */
export const bits = (logprob) => Math.max(0, -logprob / Math.LN2) + 0;

export const LEVELS = [
  { below: 1, text: "under 1 bit", says: "expected" },
  { below: 3, text: "1 to 3", says: "likely" },
  { below: 6, text: "3 to 6", says: "possible" },
  { below: 10, text: "6 to 10", says: "surprising" },
  { below: Infinity, text: "10 bits and more", says: "very surprising" },
];

/** The index in LEVELS of a log-probability; null where it is not known. */
export const levelOf = (logprob) => (typeof logprob === "number" ? LEVELS.findIndex((level) => bits(logprob) < level.below) : null);
