// What stands on the Models tab first: all models, what is done with them now, and the trash.

import { events, get, post } from "../api.js";
import { h, replace } from "../dom.js";
import { ago, bytes } from "../format.js";
import { followJobs, isEnded, jobCard } from "../jobs.js";
import { link } from "../route.js";
import { button, table, toast } from "../ui.js";
import { averageModels, deleteModel, exportModel, outcome } from "./actions.js";
import { bringModel } from "./bring.js";
import { modelTable } from "./list.js";
import { sampleButton } from "./sample.js";

const COMMANDS = new Set(["export", "checkpoint verify", "checkpoint average"]);
const SHOWN = 6; // newest jobs

/** {element, unmount} */
export function overview() {
  const leaving = new AbortController();
  const chosen = new Set();
  const average = button("Average", () => {
    if (!chosen.size) return toast("Tick a run, whose newest checkpoints are then averaged, or several models of the same shape.");
    return averageModels([...chosen]);
  }, { title: "The mean of the weights of several checkpoints, often better than the last one" });
  const models = modelTable({ chosen, tools: (model) => [
    model.loadable ? h("a", { class: "button quiet", href: link("llm", model.path), "aria-label": `Talk to ${model.path}` }, "Talk") : null,
    model.loadable ? button("Export", () => exportModel(model.path), { kind: "quiet", name: `Export ${model.path}` }) : null,
    button("Delete", () => deleteModel(model.path, load), { kind: "quiet", name: `Delete ${model.path}` }),
  ] });
  const work = h("div", { class: "grid" });
  const workCard = h("section", { class: "stack", "aria-labelledby": "work-title", hidden: true }, h("h2", { id: "work-title" }, "Exports and checks"), work);
  const trash = table([
    { key: "path", title: "Model", wide: true, cell: (each) => each.path },
    { key: "when", title: "Deleted", align: "right", cell: (each) => ago(each.deleted ?? each.time) },
    { key: "bytes", title: "Size", align: "right", cell: (each) => bytes(each.bytes ?? each.size_bytes) },
    { key: "tools", title: "", cell: (each) => button("Take back", async () => {
      await post("api/models/restore", { trash: each.trash ?? each.id });
      toast(`${each.path} is back.`);
      load();
    }, { kind: "quiet", name: `Take back ${each.path}` }) },
  ], [], { caption: "Trash", key: (each) => each.trash ?? each.id });
  const trashCard = h("details", { class: "card", hidden: true }, h("summary", {}, "Trash"), trash);
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", {}, "Models"), sampleButton(), average, button("Import", () => bringModel(load), { title: "A .cllm file or a Hugging Face folder from this computer" })),
    workCard, h("section", { class: "card", "aria-label": "Models" }, models), trashCard);

  async function load() {
    try {
      const [all, thrown] = await Promise.all([get("api/models", null, { signal: leaving.signal }), get("api/trash", null, { signal: leaving.signal })]);
      for (const path of [...chosen]) if (!all.some((model) => model.path === path)) chosen.delete(path);
      models.update(all);
      trash.update(thrown);
      trashCard.hidden = !thrown.length;
    } catch (error) {
      if (error.status) toast(error.message, { kind: "error" });
      else if (!["AbortError", "ApiError"].includes(error.name)) throw error; // without an answer the banner says that the connection is lost
    }
  }

  const cards = new Map();
  let ended = 0;
  const endJobs = followJobs((jobs) => {
    const own = jobs.filter((job) => COMMANDS.has(job.command)).sort((a, b) => b.created - a.created).slice(0, SHOWN);
    for (const id of [...cards.keys()]) if (!own.some((job) => job.id === id)) cards.delete(id);
    for (const job of own) {
      if (!cards.has(job.id)) cards.set(job.id, jobCard(job, { onforget: () => {}, next: outcome }));
      else cards.get(job.id).update(job);
    }
    replace(work, own.map((job) => cards.get(job.id).element));
    workCard.hidden = !own.length;
    const done = own.filter(isEnded).length;
    if (done !== ended) load();
    ended = done;
  });
  const endRuns = events.subscribe("runs", () => load());
  window.addEventListener("modelschange", load);
  load();
  return {
    element,
    unmount() {
      leaving.abort();
      endJobs();
      endRuns();
      window.removeEventListener("modelschange", load);
    },
  };
}
