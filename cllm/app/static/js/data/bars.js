// Counts as bars with their numbers, the largest first.

import { h } from "../dom.js";
import { number } from "../format.js";

const SHOWN = 12;

/** A reason as words: the name of a rule without its underscores, and no number of the document that another one is equal to. */
export const ruleWords = (reason) => reason.replace(/^[a-z0-9_]+(?=$|:)/, (name) => name.replaceAll("_", " ")).replace(/(?<=^(exact|near) duplicate of )[0-9a-f]{16}/, "one that was kept");

/** pairs: [[name, count]]; names are shown as they are, those of rules as words. */
export function bars(label, pairs) {
  const ordered = [...pairs].sort((one, other) => other[1] - one[1]);
  const most = Math.max(1, ...ordered.map(([, count]) => count));
  const row = ([name, count]) => h("li", {}, h("span", { class: "bar-name" }, ruleWords(name)), h("meter", { min: 0, max: most, value: count, "aria-hidden": "true" }), h("span", { class: "bar-count" }, number(count)));
  const rest = ordered.slice(SHOWN);
  return h("div", {}, h("ul", { class: "bars", "aria-label": label }, ordered.slice(0, SHOWN).map(row)),
    rest.length ? h("details", {}, h("summary", {}, `${number(rest.length)} more`), h("ul", { class: "bars" }, rest.slice(0, 200).map(row))) : null);
}
