// What can be done with a model: export, verify, average, delete. Each opens a form of the command's own options where it has any.

import { address, get, post } from "../api.js";
import { h } from "../dom.js";
import { start } from "../jobs.js";
import { link } from "../route.js";
import { confirm, dialog, form, toast } from "../ui.js";

const SUFFIX = { hf: "-hf", gguf: ".gguf", cllm: ".cllm" };
const LEFT_OUT = ["json"];

/** "runs/demo" -> "demo", "exports/a.cllm" -> "a". */
const baseName = (path) => path.split("/").pop().replace(/\.(cllm|gguf)$/, "") || "model";

// Names of what lies in a folder at the top of the workspace, which may not be there yet.
async function namesIn(folder) {
  const top = await get("api/browse", { path: "" });
  if (!top.folders.some((each) => each.name === folder)) return new Set();
  const { folders, files } = await get("api/browse", { path: folder });
  return new Set([...folders, ...files].map((each) => each.name));
}

/** A name for a file to write in the folder "exports" that nothing there has. there: the names that are taken. */
function freeName(stem, suffix, there) {
  for (let count = 1; ; count += 1) {
    const name = `${stem}${count > 1 ? `-${count}` : ""}${suffix}`;
    if (!there.has(name)) return `exports/${name}`;
  }
}

/** Asks how to export a model, and starts it. */
export async function exportModel(path) {
  const [commands, there] = await Promise.all([get("api/commands"), namesIn("exports")]);
  const declared = commands.export;
  const fields = form([...declared.arguments, ...declared.options], [{ names: ["checkpoint", "to", "type", "out"] }], { leave: LEFT_OUT, pick: { out: "folder" } });
  const name = (to) => freeName(baseName(path), SUFFIX[to] ?? "", there);
  fields.set({ checkpoint: path, to: "hf", out: name("hf") });
  const [to, out] = [fields.field("to"), fields.field("out")];
  to.input.addEventListener("change", () => {
    if (out.value() === undefined || Object.keys(SUFFIX).some((each) => out.value() === name(each))) out.set(name(to.input.value));
  });
  return ask("Export a model", "Export", fields, "export");
}

/** Asks how to average one run or several models, and starts it. */
export async function averageModels(paths) {
  const [commands, there] = await Promise.all([get("api/commands"), namesIn("exports")]);
  const declared = commands["checkpoint average"];
  const fields = form([...declared.arguments, ...declared.options], [{ names: ["checkpoints", "last", "out"] }], { leave: LEFT_OUT });
  fields.set({ checkpoints: paths, out: freeName(`${baseName(paths[0])}-average`, ".cllm", there) });
  return ask("Average checkpoints", "Average", fields, "checkpoint average");
}

/** Starts to read every byte of a model and compare it with its checksums. */
export async function verifyModel(path) {
  const job = await start("checkpoint verify", { checkpoint: path });
  toast(`${job.title} has begun.`);
  return job;
}

/** Moves a model into the trash, after a question, with an undo. Answers whether it is gone. */
export async function deleteModel(path, ondone) {
  if (!await confirm(`${path} goes to the trash of this workspace, from where it can be taken back.`, "Delete", { title: "Delete this model?" })) return false;
  const { trash } = await post("api/models/delete", { path });
  toast(`${path} is in the trash.`, { action: { label: "Undo", run: async () => {
    await post("api/models/restore", { trash });
    toast(`${path} is back.`);
    window.dispatchEvent(new Event("modelschange")); // whichever page is open by now
  } } });
  ondone?.();
  return true;
}

/** A link that downloads a file, or a folder as a zip. */
export const downloadLink = (path, text = "Download") => h("a", { class: "button", href: address("api/download", { path }), download: "" }, text);

/** What came of a job that is done: the verdict of a check, or what was written. */
export function outcome(job) {
  if (job.command === "checkpoint verify") return h("p", { class: "notice" }, "Every byte is as it was written.");
  const out = job.options?.out;
  return out ? [downloadLink(out), h("a", { class: "button quiet", href: link("models", out) }, "Inspect")] : null;
}

async function ask(title, action, fields, command) {
  return dialog({
    title, body: fields.element,
    actions: [{ label: action, kind: "primary", run: async () => {
      fields.clear();
      try {
        const job = await start(command, fields.values());
        toast(`${job.title} has begun.`);
        return job;
      } catch (error) {
        if (fields.error(error.param, error.message)) return undefined;
        throw error;
      }
    } }],
  });
}
