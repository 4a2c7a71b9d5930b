// A model that is on this computer comes into the workspace: a .cllm file, or a Hugging Face folder.

import { address, upload } from "../api.js";
import { h, newId, setText } from "../dom.js";
import { bytes, percent } from "../format.js";
import { link } from "../route.js";
import { dialog, toast } from "../ui.js";

const TAKEN = /^[\w-][\w. +-]*\.(safetensors|json|txt|jinja|md)$/; // of a folder, as the app takes them (readers/folders.py)

/** Asks for a model and brings it in; ondone() is called when it is there. */
export async function bringModel(ondone) {
  const [fileId, folderId, helpId] = [newId("file"), newId("folder"), newId("help")];
  const words = h("p", { class: "help", id: helpId, role: "status" }, "It is checked when it has arrived. Weights in pickles (.bin, .pt) are not taken: they can hold programs.");
  const one = (other) => () => {
    other().value = "";
  };
  const file = h("input", { type: "file", accept: ".cllm", id: fileId, "aria-describedby": helpId, onchange: one(() => folder) });
  const folder = h("input", { type: "file", webkitdirectory: true, multiple: true, id: folderId, "aria-describedby": helpId, onchange: one(() => file) });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Sent" });
  const stop = new AbortController();
  const found = await dialog({
    title: "Import a model",
    body: h("div", { class: "stack" },
      h("div", { class: "field" }, h("label", { for: fileId }, "A .cllm file"), file),
      h("div", { class: "field" }, h("label", { for: folderId }, "or a Hugging Face folder, with config.json and .safetensors weights"), folder), bar, words),
    actions: [{ label: "Import", kind: "primary", run: async () => {
      const [path, body] = folder.files.length ? folderRequest([...folder.files]) : fileRequest(file.files);
      bar.hidden = false;
      try {
        return await upload(path, body, { signal: stop.signal, onProgress: (sent, total) => {
          bar.value = total ? sent / total : 0;
          setText(words, sent < total ? `${bytes(sent)} of ${bytes(total)} (${percent(sent / total)})` : "All has arrived and is checked …");
        } });
      } finally {
        bar.hidden = true;
      }
    } }],
  });
  stop.abort();
  if (!found) return;
  toast(`The model is here as ${found.path}.`, { action: { label: "Inspect", run: () => {
    location.hash = link("models", found.path);
  } } });
  ondone();
}

function fileRequest(files) {
  if (!files.length) throw new Error("Choose a .cllm file or a folder first.");
  return [address("api/models/import", { kind: "cllm" }), files[0]];
}

// The files at the top of the folder, behind a line that names them. The browser reads them from the disk as they are sent.
function folderRequest(files) {
  const chosen = files.filter((each) => each.webkitRelativePath.split("/").length === 2 && TAKEN.test(each.name));
  if (!chosen.some((each) => each.name === "config.json")) throw new Error("There is no config.json in this folder. Choose the folder in which it lies.");
  const names = JSON.stringify(chosen.map((each) => ({ name: each.name, bytes: each.size })));
  const name = chosen[0].webkitRelativePath.split("/")[0];
  return [address("api/models/import", { kind: "hf", name }), new Blob([`${names}\n`, ...chosen])];
}
