// One data set: what was read, what was left out and why, and samples of both.

import { get } from "../api.js";
import { h } from "../dom.js";
import { bytes, moment, number, percent, plural } from "../format.js";
import { link } from "../route.js";
import { facts, table } from "../ui.js";
import { bars } from "./bars.js";
import { followView } from "./follow.js";
import { samplesView } from "./samples.js";

/** {element, end()} for the data set at `path`. Throws ApiError. */
export async function detail(path) {
  const found = await get("api/datasets/detail", { path });
  const follow = followView(path, found.following);
  const reasons = pairsOf(found.reasons, "reason");
  const languages = pairsOf(found.languages, "language");
  const head = h("div", { class: "head" }, h("h1", {}, found.name ?? path),
    h("a", { class: "button primary", href: link("training", "", { data: path }) }, "Train on it"),
    h("a", { class: "button", href: link("data", "", { sources: path }) }, "Prepare it again …"));
  const whole = facts([
    ["Folder", path],
    ["Files read", number(found.files)],
    ["Documents", number(found.documents)],
    ["Kept", `${number(found.kept)} (${percent(found.kept / Math.max(1, found.documents))})`],
    ["Left out", number(found.dropped)],
    ["Text kept", found.kept_chars === undefined ? null : plural(found.kept_chars, "character")],
    ["On the disk", bytes(found.bytes)],
    ["Duplicates", duplicates(found.duplicates)],
    ["Changed", moment(found.updated)],
  ]);
  const card = (title, ...content) => h("section", { class: "card" }, h("h2", {}, title), content);
  const element = h("div", { class: "stack" },
    h("a", { href: link("data") }, "← All data sets"), head, h("section", { class: "card" }, whole),
    h("div", { class: "grid" },
      card("Left out and why", reasons.length ? bars("Documents by reason", reasons) : h("p", { class: "muted" }, "Nothing was left out.")),
      languages.length ? card("Languages of what was kept", bars("Documents by language", languages)) : null,
      personal(found.personal_data, card)),
    sourcesCard(found.sources, card), unreadable(found.unreadable, card), follow.element, samplesView(path, found.kept, found.dropped, reasons));
  return { element, end: follow.end };
}

// Counts come as a list of objects or as an object of numbers.
function pairsOf(value, name) {
  if (Array.isArray(value)) return value.map((each) => [each[name], each.count]);
  return Object.entries(value ?? {});
}

const duplicates = (found) => (found ? `${number(found.exact)} equal, ${number(found.near)} nearly equal` : null);

function personal(found, card) {
  const pairs = pairsOf(found, "kind");
  return pairs.length ? card("Personal data and secrets", h("p", { class: "help" }, "What was found and replaced in the texts."), bars("Places by kind", pairs)) : null;
}

function sourcesCard(found, card) {
  if (!found?.length) return null;
  return card("What came", table([
    { key: "name", title: "Source", sort: (row) => row.name, wide: true },
    { key: "documents", title: "Documents", cell: (row) => number(row.documents), sort: (row) => row.documents, align: "right" },
    { key: "kept", title: "Kept", cell: (row) => number(row.kept), sort: (row) => row.kept, align: "right" },
    { key: "dropped", title: "Left out", cell: (row) => number(row.dropped), sort: (row) => row.dropped, align: "right" },
  ], found, { caption: "Sources", key: (row) => row.name }));
}

function unreadable(found, card) {
  if (!found?.length) return null;
  return card("Files without text", table([
    { key: "file", title: "File", cell: (row) => [row.source, row.path].filter(Boolean).join("/"), wide: true },
    { key: "reason", title: "Why", wide: true },
  ], found, { caption: "Files without text", key: (row) => `${row.source}/${row.path}` }));
}
