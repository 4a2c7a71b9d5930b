// Conversations as files: JSON that can be imported again, and Markdown to read. What is imported is rebuilt field by field, because a file may hold anything.

import { newThread, shownPath } from "./tree.js";

export const VERSION = 1;
const MOST_NODES = 5000;
const MOST_TITLE = 200;

export const newConversation = (model = null, mode = "chat", options = {}) => ({
  version: VERSION, title: "", mode, system: "", options: { ...options }, threads: [newThread(model)],
});

/** The conversation in the text of a file. Throws an Error that says what is wrong. */
export function readConversation(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("This file is no conversation: it is no JSON. Choose a file that “Export as JSON” made.");
  }
  return checkedConversation(value);
}

/** A conversation rebuilt from any value. Throws an Error that says what is wrong. */
export function checkedConversation(value) {
  if (value?.version !== VERSION || !Array.isArray(value.threads) || !value.threads.length) {
    throw new Error("This is no conversation of this version of CLLM. Choose a file that “Export as JSON” made.");
  }
  return {
    version: VERSION,
    title: textOf(value.title).slice(0, MOST_TITLE),
    mode: value.mode === "completion" ? "completion" : "chat",
    system: textOf(value.system),
    options: plainOptions(value.options),
    threads: value.threads.slice(0, 2).map(checkedThread),
  };
}

const textOf = (value) => (typeof value === "string" ? value : "");
const numberOf = (value) => (Number.isFinite(value) ? value : null);

function plainOptions(value) {
  const simple = (each) => ["string", "number", "boolean"].includes(typeof each) || (Array.isArray(each) && each.every((part) => typeof part === "string"));
  return Object.fromEntries(Object.entries(value ?? {}).filter(([name, each]) => /^[a-z_]{1,40}$/.test(name) && simple(each)));
}

function checkedThread(value) {
  const thread = newThread(textOf(value?.model) || null);
  const given = Object.values(value?.nodes ?? {});
  if (given.length > MOST_NODES) throw new Error(`This conversation has more than ${MOST_NODES.toLocaleString("en")} messages, which is more than one page can hold.`);
  const names = new Map([[null, null]]); // ids of the file -> nodes of ours; parents stand before their children
  for (const each of given) {
    if (!names.has(each?.parent ?? null)) throw new Error("This conversation is damaged: a message answers one that is not there.");
    const parent = names.get(each.parent ?? null);
    const node = { id: `n${thread.next++}`, parent: parent?.id ?? null, role: each.role === "user" ? "user" : "assistant", text: textOf(each.text), created: numberOf(each.created) };
    if (each.model) node.model = textOf(each.model);
    if (Array.isArray(each.tokens)) node.tokens = each.tokens.filter(isToken);
    if (each.reason) node.reason = textOf(each.reason);
    if (each.error) node.error = textOf(each.error);
    if (each.stats) node.stats = Object.fromEntries(Object.entries(each.stats).filter(([, figure]) => Number.isFinite(figure)));
    thread.nodes[node.id] = node;
    thread.chosen[node.parent ?? ""] = node.id;
    names.set(each.id, node);
  }
  for (const [parent, child] of Object.entries(value?.chosen ?? {})) {
    const node = names.get(child);
    if (node && (names.get(parent || null)?.id ?? null) === node.parent) thread.chosen[node.parent ?? ""] = node.id;
  }
  return thread;
}

const isPair = (each) => Array.isArray(each) && typeof each[0] === "string" && (typeof each[1] === "number" || each[1] === null);
const isToken = (each) => isPair(each) && Array.isArray(each[2]) && each[2].every(isPair);

/** The shown branch to read: headings, and the texts as they are. */
export function toMarkdown(conversation) {
  const lines = [`# ${conversation.title || "Conversation"}`, ""];
  if (conversation.system) lines.push("**System**", "", conversation.system, "");
  for (const thread of conversation.threads) {
    if (conversation.threads.length > 1) lines.push(`## ${thread.model}`, "");
    const path = shownPath(thread);
    if (conversation.mode === "completion") lines.push(path.map((node) => node.text).join(""), "");
    else for (const node of path) lines.push(`**${node.role === "user" ? "You" : node.model || thread.model}**`, "", node.text, "");
  }
  return `${lines.join("\n").trimEnd()}\n`;
}

/** Gives a text to the browser as a file to keep. */
export function saveFile(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** A name for a file from a title. */
export const fileName = (title, end) => `${(title || "conversation").replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "conversation"}.${end}`;
