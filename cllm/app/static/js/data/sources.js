// What a data set is made of: folders and files of the workspace, and files that are dropped here or chosen on this computer.

import { h, newId, replace, setText } from "../dom.js";
import { button, pathPicker } from "../ui.js";
import { uploads } from "./upload.js";

const INTO = "uploads"; // folder of the workspace

/** {element, paths(), add(path), error(text), isBusy()}: the chosen paths, relative to the workspace. `onadd(path)` is told of each. */
export function sources(onadd) {
  const paths = [];
  const inputId = newId("files");
  const list = h("ul", { class: "sources" });
  const fault = h("p", { class: "error", role: "alert" });
  const sending = uploads();
  const file = h("input", { id: inputId, type: "file", multiple: true, class: "visually-hidden", tabindex: "-1", onchange: () => {
    send([...file.files]);
    file.value = "";
  } });
  const drop = h("div", { class: "drop" }, h("p", {}, "Drop files or folders here"), h("div", { class: "row" },
    button("Choose in the workspace …", pick), button("Choose on this computer …", () => file.click())),
    h("label", { for: inputId, class: "visually-hidden" }, "Files of this computer"), file);
  const element = h("div", { class: "stack" }, drop, sending.element, list, fault);
  let coming = 0; // uploads that have not ended

  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    send(await droppedFiles(event.dataTransfer));
  });

  async function pick() {
    const path = await pathPicker({ title: "Choose a folder or a file", pick: "any" });
    if (path !== null) add(path);
  }

  function add(path) {
    error("");
    if (!paths.includes(path)) paths.push(path);
    draw();
    onadd(path);
  }

  function draw() {
    replace(list, paths.map((path) => h("li", {}, h("span", { class: "mono" }, path), button("Remove", () => {
      paths.splice(paths.indexOf(path), 1);
      draw();
    }, { kind: "quiet", name: `Remove ${path}` }))));
  }

  async function send(files) {
    if (!files.length) return;
    coming += 1;
    const { paths: arrived, fault: wrong } = await sending.send(files, INTO);
    coming -= 1;
    arrived.forEach(add);
    error(wrong);
  }

  function error(text) {
    setText(fault, text);
  }

  return { element, add, error, paths: () => [...paths], isBusy: () => coming > 0 };
}

// The files of a drop, those of dropped folders included.
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  for (const entry of entries) await collect(entry, found);
  return found;
}

async function collect(entry, found) {
  if (entry.isFile) {
    found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives a part of a folder at a time
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) return;
    for (const each of part) await collect(each, found);
  }
}
