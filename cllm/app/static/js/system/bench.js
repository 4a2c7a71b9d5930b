// Benchmarks of this machine against PyTorch: measured here and now by a job, and shown as they are.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { number } from "../format.js";
import { followJobs, isEnded, jobCard, start } from "../jobs.js";
import { button, form, table, toast } from "../ui.js";

const LONG = 40; // characters of a text that may take the room that is left

/** {element, end()} */
export async function benchView() {
  const { bench } = await get("api/commands");
  const named = bench.arguments.map((option) => ({ ...option, default: option.default ?? option.choices[0] ?? null }));
  const fields = form([...named, ...bench.options], [{ title: null, names: bench.arguments.map((option) => option.name) }], { leave: ["json"], onsubmit: begin });
  const list = h("div", { class: "stack" });
  const cards = new Map(); // id of a job -> {card, figures, state}

  async function begin() {
    fields.clear();
    try {
      await start("bench", { ...Object.fromEntries(named.map(({ name }) => [name, fields.field(name).input.value])), ...fields.values() });
    } catch (error) {
      if (!fields.error(error.param, error.message)) toast(error.message, { kind: "error" });
    }
  }

  const end = followJobs((jobs) => {
    const mine = jobs.filter((job) => job.command === "bench").sort((one, other) => other.created - one.created);
    for (const [id, each] of [...cards]) if (!mine.some((job) => job.id === id)) {
      each.element.remove();
      cards.delete(id);
    }
    for (const job of mine) {
      if (!cards.has(job.id)) {
        const card = jobCard(job, { onforget: () => {} });
        const figures = h("div");
        cards.set(job.id, { card, figures, element: h("div", { class: "stack" }, card.element, figures), drawn: false });
      }
      const each = cards.get(job.id);
      each.card.update(job);
      if (isEnded(job) && job.result?.rows && !each.drawn) {
        each.drawn = true;
        replace(each.figures, results(job.result));
      }
    }
    replace(list, mine.map((job) => cards.get(job.id).element));
  });

  return {
    element: h("section", { class: "card" }, h("h2", {}, "Benchmarks"), h("p", { class: "help" }, "Measures this machine now, the same work by CLLM and by PyTorch. It takes minutes, on a busy machine more. Other programs that run meanwhile, training included, change the figures."),
      fields.element, h("div", { class: "actions" }, button("Measure", begin, { kind: "primary" })), list),
    end,
  };
}

// Rows of any benchmark: their keys are the columns, in the order in which they come.
function results({ benchmark, rows }) {
  const all = (Array.isArray(rows) ? rows : Object.values(rows)).filter((row) => row && typeof row === "object");
  const keys = [...new Set(all.flatMap((row) => Object.keys(row).filter((key) => typeof row[key] !== "object")))];
  return table(keys.map((key) => ({
    key, title: key.replaceAll("_", " ").replace("peer", "PyTorch").replace("ours", "CLLM"), align: all.some((row) => typeof row[key] === "number") ? "right" : undefined,
    wide: all.some((row) => String(row[key] ?? "").length > LONG),
    cell: (row) => (typeof row[key] === "number" ? number(row[key], { short: row[key] >= 1e5 }) : row[key] === undefined || row[key] === null ? "–" : String(row[key])),
  })), all, { caption: `Figures of ${benchmark}`, empty: "The benchmark gave no figures. Its log says why." });
}
