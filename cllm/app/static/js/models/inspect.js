// One model in all detail.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, duration, loss, moment, number } from "../format.js";
import { followJobs, jobCard } from "../jobs.js";
import { link } from "../route.js";
import { badge, button, facts, spinner, table } from "../ui.js";
import { averageModels, deleteModel, downloadLink, exportModel, outcome, verifyModel } from "./actions.js";
import { KINDS } from "./list.js";

const TENSORS = 100; // shown at first

/** {element, unmount} of the model at this path of the workspace. */
export function inspectView(path) {
  const leaving = new AbortController();
  const place = h("div", { class: "stack" }, spinner());
  const work = h("div", { class: "grid" });
  const element = h("div", { class: "stack" }, h("div", { class: "row" }, h("a", { href: link("models") }, "All models")), h("h1", {}, path), work, place);
  const cards = new Map();
  const endJobs = followJobs((jobs) => {
    const own = jobs.filter((job) => [job.options?.checkpoint, job.options?.out].includes(path) && job.command !== "train").sort((a, b) => b.created - a.created).slice(0, 3);
    for (const job of own) {
      if (!cards.has(job.id)) cards.set(job.id, jobCard(job, { next: outcome }));
      else cards.get(job.id).update(job);
    }
    replace(work, own.map((job) => cards.get(job.id).element));
  });
  get("api/models/inspect", { path }, { signal: leaving.signal }).then((model) => show(place, model, path), (error) => {
    if (error.name !== "AbortError") replace(place, h("p", { class: "notice bad", role: "alert" }, error.message));
  });
  return {
    element,
    unmount() {
      leaving.abort();
      endJobs();
    },
  };
}

function show(place, model, path) {
  const own = model.kind === "run" || model.kind === "file";
  const tokenizer = model.tokenizer ? `${model.tokenizer.kind}, ${number(model.tokenizer.vocab_size)} tokens${model.tokenizer.has_chat ? ", with a template for chats" : ""}` : null;
  const of = (part) => number(model.data?.[part]?.tokens, { short: true });
  const data = model.data?.train ? `${of("train")} tokens to learn from${model.data.val ? `, ${of("val")} held out` : ""}` : null;
  replace(place,
    h("div", { class: "row" },
      model.loadable ? h("a", { class: "button primary", href: link("llm", path) }, "Talk to it") : null,
      model.loadable ? button("Export", () => exportModel(path)) : null,
      own ? button("Verify", () => verifyModel(path), { title: "Read every byte and compare it with its checksums" }) : null,
      model.kind === "run" ? button("Average its checkpoints", () => averageModels([path])) : null,
      model.kind === "run" ? h("a", { class: "button", href: link("training", path) }, "How it was trained") : downloadLink(path),
      button("Delete", () => deleteModel(path, () => {
        location.hash = link("models");
      }), { kind: "danger" })),
    model.damaged ? h("p", { class: "notice bad" }, `It is damaged: ${model.damaged}`) : null,
    h("section", { class: "card", "aria-label": "Overview" }, facts([
      ["Kind", KINDS[model.kind] ?? model.kind], ["State", model.state ? badge(model.state) : null],
      ["Parameters", number(model.parameters)], ["Number format", model.dtype], ["Size", bytes(model.size_bytes)], ["Context", model.context ? number(model.context, { unit: "tokens" }) : null],
      ["Tokenizer", tokenizer], ["Step", model.step === null ? null : number(model.step)], ["Tokens learnt", number(model.tokens, { short: true })],
      ["Validation loss", loss(model.val_loss)], ["Bits per byte", model.bits_per_byte ? model.bits_per_byte.toFixed(3) : null], ["Trained for", duration(model.seconds)],
      ["Data", data], ["Changed", moment(model.updated)]])),
    model.lineage?.length ? h("section", { class: "card", "aria-label": "Trained from" }, h("h2", {}, "Trained from"), h("ol", { class: "lineage" },
      model.lineage.map((each) => h("li", {}, each.exists ? h("a", { href: link("models", each.path) }, each.path) : `${each.path} (no longer here)`)))) : null,
    model.model ? h("section", { class: "card", "aria-label": "Shape" }, h("h2", {}, "Shape"), h("dl", { class: "pairs" }, Object.entries(model.model).filter(([, value]) => value !== null && typeof value !== "object")
      .map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]))) : null,
    tensors(model.tensors ?? []),
    model.files?.length ? h("section", { class: "card", "aria-label": "Files" }, h("h2", {}, "Files"), table([
      { key: "name", title: "File", wide: true }, { key: "bytes", title: "Size", align: "right", cell: (file) => bytes(file.bytes) }], model.files, { caption: "Files", key: (file) => file.name })) : null);
}

function tensors(all) {
  if (!all.length) return null;
  const list = table([
    { key: "name", title: "Tensor", wide: true, sort: (each) => each.name }, { key: "shape", title: "Shape", cell: (each) => each.shape.map((size) => number(size)).join(" × ") || "one number" },
    { key: "dtype", title: "Format" }, { key: "bytes", title: "Size", align: "right", cell: (each) => bytes(each.bytes), sort: (each) => each.bytes }],
  all.slice(0, TENSORS), { caption: "Tensors", key: (each) => each.name });
  const more = all.length > TENSORS ? button(`Show all ${number(all.length)}`, () => {
    list.update(all);
    more.remove();
  }, { kind: "quiet" }) : null;
  return h("section", { class: "card", "aria-label": "Tensors" }, h("details", { open: all.length <= 30 }, h("summary", {}, `Tensors (${number(all.length)})`), list, more));
}
