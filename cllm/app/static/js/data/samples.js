// Kept and dropped documents side by side, to judge the rules by.

import { get } from "../api.js";
import { h, newId, replace } from "../dom.js";
import { number } from "../format.js";
import { button, empty, toast } from "../ui.js";
import { ruleWords } from "./bars.js";

const AT_ONCE = 5;

/** The view for a data set with so many documents; reasons: [[why documents were dropped, how many]]. */
export function samplesView(path, kept, dropped, reasons) {
  return h("section", { class: "card" }, h("h2", {}, "Samples"), h("div", { class: "two" }, column(path, "kept", kept, []), column(path, "dropped", dropped, reasons)));
}

function column(path, kind, total, reasons) {
  const id = newId("reason");
  const list = h("div", { class: "stack" });
  const more = button("More", load, { kind: "quiet", name: `More ${kind} documents` });
  const select = h("select", { id, onchange: begin }, h("option", { value: "" }, "every reason"), reasons.map(([reason, count]) => h("option", { value: reason }, `${ruleWords(reason)} (${number(count)})`)));
  const choice = kind === "dropped" && reasons.length ? h("div", { class: "field" }, h("label", { for: id }, "Dropped because of"), select) : null;
  let shown = 0;
  let waiting = []; // fetched and not shown yet
  let turn = 0;

  async function load() {
    const mine = ++turn;
    if (!waiting.length) {
      const found = await get("api/datasets/samples", { path, kind, reason: select.value || null, offset: shown });
      if (mine !== turn) return;
      waiting = found;
    }
    if (!shown) replace(list, waiting.length ? null : empty(kind === "kept" ? "No document was kept." : "No document was dropped."));
    const next = waiting.splice(0, AT_ONCE);
    list.append(...next.map(sample));
    shown += next.length;
    const all = reasons.find(([reason]) => reason === select.value)?.[1] ?? total;
    more.hidden = !next.length || shown >= all;
  }

  function begin() {
    shown = 0;
    waiting = [];
    load().catch((error) => toast(error.message, { kind: "error" }));
  }

  begin();
  return h("div", { class: "stack" }, h("h3", {}, kind === "kept" ? "Kept" : "Dropped"), choice, list, more);
}

function sample({ name, reason, text, source }) {
  return h("article", { class: "sample" }, h("p", { class: "sample-name" }, name || source), source && source !== name ? h("p", { class: "help" }, source) : null,
    reason ? h("p", { class: "help" }, ruleWords(reason)) : null, h("pre", { tabindex: "0" }, text));
}
