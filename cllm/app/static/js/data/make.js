// The form that makes a data set: what `cllm prepare` takes, as it declares it.

import { get } from "../api.js";
import { h } from "../dom.js";
import { start } from "../jobs.js";
import { button, form, toast } from "../ui.js";
import { sources } from "./sources.js";

const SUFFIX = /\.(txt|md|html?|pdf|docx|epub|jsonl?|csv|parquet|warc|tar|zip|gz|xz|zst)$/i; // of files; the name of a site is no suffix

/** {element}; `first` are paths to begin with, onstart(job) is called with the job that runs. */
export async function makeForm(first, onstart) {
  const { prepare } = await get("api/commands");
  const declared = [...prepare.arguments, ...prepare.options];
  const inputs = prepare.arguments[0].name;
  const chosen = sources(named);
  const fields = form(declared, [{ title: null, names: ["out"] }, { title: "More options", names: declared.map((option) => option.name) }], { leave: [inputs, "json", "runner"], onsubmit: begin, pick: { out: "folder" } });
  const out = fields.field("out");
  const make = button("Make the data set", begin, { kind: "primary" });
  let isNamed = false; // whether a person chose the name
  out.input.addEventListener("input", () => {
    isNamed = Boolean(out.input.value);
  });

  // A name for the data set until a person chooses one.
  function named(path) {
    if (isNamed) return;
    out.set(`data/${(path.split("/").at(-1) || "all").replace(SUFFIX, "")}`);
    isNamed = false;
  }

  async function begin() {
    chosen.error("");
    fields.clear();
    const paths = chosen.paths();
    if (chosen.isBusy()) return chosen.error("The upload is not complete yet. Wait for it, or cancel it.");
    if (!paths.length) return chosen.error("Nothing is chosen yet. Drop files above, or choose a folder.");
    try {
      onstart(await start("prepare", { [inputs]: paths, ...fields.values() }));
    } catch (error) {
      if (error.param === inputs) chosen.error(error.message);
      else if (!fields.error(error.param, error.message)) toast(error.message, { kind: "error" });
    }
    return undefined;
  }

  first.forEach(chosen.add);
  return { element: h("section", { class: "card" }, h("h2", {}, "Make a data set"), h("p", { class: "help" }, "Text is extracted from files of any kind, cleaned, filtered and deduplicated. What cannot be read is told and stops nothing."), chosen.element, fields.element, h("div", { class: "actions" }, make)) };
}
