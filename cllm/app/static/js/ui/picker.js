// Choosing a folder or file of the workspace, without typing a path.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes } from "../format.js";
import { spinner } from "./base.js";
import { dialog } from "./dialog.js";

/** Answers the chosen path, relative to the workspace ("." is the workspace itself), or null. pick: "folder", "file" or "any"; `suffixes` limits the files. */
export function pathPicker({ title = "Choose a folder", pick = "folder", start = "", suffixes = null } = {}) {
  let here = start || "";
  let chosen = null;
  const place = h("nav", { class: "crumbs", "aria-label": "Where you are" });
  const list = h("ul", { class: "picker", "aria-label": "What is in it" });
  const said = h("p", { class: "help", role: "status" });

  async function open(path, focus = true) {
    replace(list, spinner());
    let found;
    try {
      found = await get("api/browse", { path });
    } catch (error) {
      if (path) return open("", focus); // a folder that is gone: begin at the top
      replace(list, h("li", { class: "error" }, error.message));
      return;
    }
    here = found.path === "." ? "" : (found.path ?? "");
    chosen = pick === "file" ? null : here || ".";
    const parts = here ? here.split("/") : [];
    const crumb = (text, to, last) => h("button", { type: "button", class: "crumb", "aria-current": last ? "location" : null, onclick: () => open(to) }, text);
    replace(place, crumb("Workspace", "", !parts.length), parts.map((part, index) => [" / ", crumb(part, parts.slice(0, index + 1).join("/"), index === parts.length - 1)]));
    const files = pick === "folder" ? [] : found.files.filter((file) => !suffixes || suffixes.some((end) => file.name.toLowerCase().endsWith(end)));
    const folders = found.folders.map((folder) => h("li", {}, h("button", { type: "button", onclick: () => open(folder.path) }, h("span", { "aria-hidden": "true" }, "▸ "), folder.name)));
    const items = files.map((file) => {
      const item = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
        chosen = file.path;
        for (const other of list.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", String(other === item));
        said.textContent = `Chosen: ${file.path}`;
      } }, h("span", { "aria-hidden": "true" }, "  "), file.name, h("span", { class: "size" }, bytes(file.bytes)));
      return h("li", {}, item);
    });
    const unseen = pick === "folder" && found.files.length ? h("li", { class: "help" }, `${found.files.length} ${found.files.length === 1 ? "file" : "files"} here`) : null;
    replace(list, folders, items, unseen, !folders.length && !items.length && !unseen ? h("li", { class: "help" }, "This folder is empty.") : null);
    said.textContent = chosen ? `Chosen: ${chosen === "." ? "the whole workspace" : chosen}` : "Choose a file.";
    if (focus) (list.querySelector("button") ?? place.lastChild)?.focus();
  }

  open(here, false);
  return dialog({
    title,
    body: h("div", { class: "picker-box" }, place, list, said),
    actions: [{ label: pick === "file" ? "Choose this file" : pick === "folder" ? "Choose this folder" : "Choose", kind: "primary", run: () => {
      if (chosen) return chosen;
      said.textContent = "Choose a file from the list first.";
      return undefined;
    } }],
  });
}
