// Models as a table.

import { h } from "../dom.js";
import { ago, bytes, loss, number } from "../format.js";
import { link } from "../route.js";
import { badge, empty, table } from "../ui.js";

export const KINDS = { run: "run", file: ".cllm file", hf: "Hugging Face folder", gguf: "GGUF file" };

/** A table of models with update(models). tools(model): nodes for a last column; chosen: a set of paths that boxes fill. */
export function modelTable({ tools = null, chosen = null, onchosen = null } = {}) {
  const columns = [
    chosen && { key: "chosen", title: "Average", cell: (model) => (["run", "file"].includes(model.kind) ? h("input", { type: "checkbox", "aria-label": `Average ${model.path}`, checked: chosen.has(model.path), onchange: (event) => {
      if (event.target.checked) chosen.add(model.path);
      else chosen.delete(model.path);
      onchosen?.();
    } }) : "") },
    { key: "path", title: "Model", wide: true, cell: (model) => h("a", { href: link("models", model.path) }, model.path), sort: (model) => model.path },
    { key: "kind", title: "Kind", cell: (model) => (model.damaged ? h("div", { class: "why" }, badge("failed", "damaged"), h("p", { class: "help" }, model.damaged)) : KINDS[model.kind] ?? model.kind), sort: (model) => model.kind },
    { key: "parameters", title: "Parameters", align: "right", cell: (model) => number(model.parameters, { short: true }), sort: (model) => model.parameters },
    { key: "val_loss", title: "Validation loss", align: "right", cell: (model) => loss(model.val_loss), sort: (model) => model.val_loss },
    { key: "context", title: "Context", align: "right", cell: (model) => (model.context ? number(model.context, { unit: "tokens" }) : "–"), sort: (model) => model.context },
    { key: "size_bytes", title: "Size", align: "right", cell: (model) => bytes(model.size_bytes), sort: (model) => model.size_bytes },
    { key: "updated", title: "Changed", align: "right", cell: (model) => ago(model.updated), sort: (model) => model.updated },
    tools && { key: "tools", title: "", cell: (model) => h("div", { class: "row" }, tools(model)) },
  ].filter(Boolean);
  return table(columns, [], { caption: "Models of the workspace", key: (model) => model.path, sorted: { key: "updated", descending: true }, empty: empty("No model yet. A training makes one with its first checkpoint; one from elsewhere can be imported.") });
}
