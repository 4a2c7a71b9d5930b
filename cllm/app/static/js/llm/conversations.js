// The conversations on the disk: found, opened, renamed, deleted, and taken out and in as files.

import { get, put, remove } from "../api.js";
import { h, newId, replace } from "../dom.js";
import { ago } from "../format.js";
import { button, dialog, toast } from "../ui.js";
import { checkedConversation, fileName, readConversation, saveFile, toMarkdown } from "./exchange.js";
import { session } from "./session.js";

const SEARCH_WAIT = 250; // milliseconds without a key before the disk is searched
const MOST_FILE = 64e6; // bytes of a file that is imported

/** {element, update()}; `onnew` begins another conversation. */
export function conversationList({ onnew }) {
  const searchId = newId("search");
  const search = h("input", { id: searchId, type: "search", autocomplete: "off", placeholder: "Search", oninput: () => {
    clearTimeout(timer);
    timer = setTimeout(update, SEARCH_WAIT);
  } });
  const list = h("ul", { class: "conversations" });
  const file = h("input", { type: "file", accept: ".json,application/json", class: "visually-hidden", tabindex: "-1", "aria-hidden": "true", onchange: importFile });
  const element = h("div", { class: "conversation-box" },
    h("div", { class: "actions" }, button("New conversation", onnew, { kind: "primary" }), button("Import …", () => file.click(), { kind: "quiet" }), file),
    h("label", { for: searchId, class: "visually-hidden" }, "Search the conversations"), search, list);
  let timer = 0;
  let turn = 0;

  async function update() {
    const mine = ++turn;
    const found = await get("api/conversations", { q: search.value.trim() || null });
    if (mine !== turn) return;
    const rows = found.map((each) => row(each));
    replace(list, rows.length ? rows : h("li", { class: "help" }, search.value ? "No conversation has these words." : "What you say here is kept in this list."));
  }

  function row({ id, title, updated }) {
    const open = h("button", { type: "button", class: "conversation", "aria-current": id === session.id ? "true" : null, onclick: () => session.open(id).catch(said) },
      h("span", { class: "conversation-title" }, title || "Untitled"), h("span", { class: "help" }, ago(updated)));
    const more = button("…", () => menu(id, title), { kind: "quiet", name: `More about ${title || "Untitled"}`, title: "Rename, export, delete" });
    return h("li", {}, open, more);
  }

  async function menu(id, title) {
    const field = h("input", { type: "text", value: title, maxlength: "200", id: newId("title") });
    await dialog({
      title: "Conversation",
      body: (close) => h("div", {}, h("label", { for: field.id }, "Title"), field, h("div", { class: "actions" },
        button("Export as JSON", async () => save(id, "json"), {}), button("Export as Markdown", async () => save(id, "md"), {}),
        button("Delete", async () => {
          await erase(id);
          close();
        }, { kind: "danger" }))),
      actions: [{ label: "Rename", kind: "primary", run: async () => {
        await rename(id, field.value.trim());
        return true;
      } }],
      cancel: "Close",
    });
    update().catch(said);
  }

  async function whole(id) {
    if (id === session.id) {
      await session.flush();
      return session.conversation;
    }
    return checkedConversation(await get(conversationPath(id)));
  }

  async function save(id, end) {
    const conversation = await whole(id);
    const text = end === "json" ? JSON.stringify(conversation, null, 1) : toMarkdown(conversation);
    saveFile(fileName(conversation.title, end), text, end === "json" ? "application/json" : "text/markdown");
  }

  async function rename(id, title) {
    if (id === session.id) return session.rename(title);
    return put(conversationPath(id), { ...(await whole(id)), title });
  }

  async function erase(id) {
    const conversation = structuredClone(await whole(id));
    if (id === session.id) session.leave();
    await remove(conversationPath(id));
    toast(`“${conversation.title || "Untitled"}” is deleted.`, { action: { label: "Undo", run: () => session.take(conversation) } });
  }

  async function importFile() {
    const [given] = file.files;
    if (!given) return;
    try {
      if (given.size > MOST_FILE) throw new Error("This file is too large to be a conversation.");
      await session.take(readConversation(await given.text()));
    } catch (error) {
      said(error);
    }
    file.value = "";
  }

  return { element, update: () => update().catch(said) };
}

const conversationPath = (id) => `api/conversations/${encodeURIComponent(id)}`;
const said = (error) => toast(error.message, { kind: "error" });
