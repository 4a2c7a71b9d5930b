// The conversation that is open: what is said, what is being answered, and that it is kept. It outlives the tab, so that an answer goes on while another
// tab is looked at. The page follows it by listening.

import { ApiError, get, post, put, stream } from "../api.js";
import { checkedConversation, newConversation } from "./exchange.js";
import { ready } from "./models.js";
import { readEvent, requestFor } from "./request.js";
import { textOf } from "./pieces.js";
import { add, copyFor, prune, shownPath } from "./tree.js";

const TELL_WAIT = 60; // milliseconds between two drawings of what comes, however fast it comes
const SAVE_WAIT = 1500; // milliseconds between two saves while an answer comes, and more for each token that is saved
const SAVE_WAIT_PER_TOKEN = 2;
const MOST_TOKENS = 10000; // of one answer that are kept with their alternatives
const TITLE = 60;

class Session {
  conversation = newConversation();
  #ids = new WeakMap(); // conversation -> its name on the disk, once it has one
  #listeners = new Set();
  #running = new Map(); // thread -> AbortController
  #gone = new WeakSet(); // conversations that were deleted while they were open
  #grown = new Map(); // node -> its thread: what has come and is not told yet
  #telling = 0;
  #timer = 0;
  #saving = Promise.resolve();

  /** Calls `listener(kind, thread, node)`: "opened" (another conversation), "thread" (messages came or went), "node" (a text grew), "running", "saved",
   * "error" (with an Error in the place of the thread). Answers a function that ends it. */
  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #tell(kind, thread, node) {
    for (const listener of [...this.#listeners]) listener(kind, thread, node);
  }

  /** The name of the open conversation on the disk; null before its first message. */
  get id() {
    return this.#ids.get(this.conversation) ?? null;
  }

  get threads() {
    return this.conversation.threads;
  }

  isRunning(thread) {
    return this.#running.has(thread);
  }

  get isBusy() {
    return this.#running.size > 0;
  }

  /** Begins another conversation, which is written to the disk with its first message. */
  fresh(model, mode) {
    this.stopAll();
    this.flush();
    this.conversation = newConversation(model, mode, this.conversation.options);
    this.#tell("opened");
  }

  /** Leaves a conversation that is deleted, without writing it again. */
  leave() {
    this.stopAll();
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#gone.add(this.conversation);
    this.fresh(this.threads[0].model, this.conversation.mode);
  }

  /** Opens a conversation of the disk. Throws ApiError. */
  async open(id) {
    this.stopAll();
    await this.flush();
    const found = await get(`api/conversations/${encodeURIComponent(id)}`);
    this.conversation = checkedConversation(found);
    this.#ids.set(this.conversation, id);
    this.#tell("opened");
  }

  /** Opens a conversation that is not on the disk yet, and writes it. */
  take(conversation) {
    this.stopAll();
    this.flush();
    this.conversation = conversation;
    this.#tell("opened");
    return this.save();
  }

  /** Puts a second model beside the first one, with all that was said until now; null takes it away. */
  compare(model) {
    const [first, second] = this.threads;
    if (second) this.stop(second);
    this.conversation.threads = model === null ? [first] : [first, second ? { ...second, model } : copyFor(first, model)];
    this.#tell("opened");
    this.save();
  }

  /** Says something to every model at once. `text` may be empty where a text is only gone on with. */
  send(text) {
    if (!this.conversation.title) this.conversation.title = text.replace(/\s+/g, " ").trim().slice(0, TITLE) || "Untitled";
    for (const thread of this.threads) {
      const last = shownPath(thread).at(-1) ?? null;
      const asked = text || !last ? add(thread, last, { role: "user", text }) : last;
      this.answer(thread, asked);
    }
  }

  /** A new answer below `asked`. `start`: tokens that it begins with, as when another token was chosen in the middle of an answer. */
  async answer(thread, asked, start = []) {
    this.stop(thread);
    const begun = start.length ? textOf(start.map(([name]) => name)) : "";
    const fields = { role: "assistant", model: thread.model, tokens: [...start], text: begun };
    const nodes = [add(thread, asked, structuredClone(fields))];
    const running = new AbortController();
    const clock = { began: performance.now(), first: null, last: null, count: 0 };
    this.#running.set(thread, running);
    this.#tell("thread", thread);
    this.#tell("running", thread);
    this.save();
    let usage = null;
    try {
      const { path, body } = requestFor(this.conversation, thread, nodes[0], begun);
      await ready(thread.model);
      running.signal.throwIfAborted();
      clock.began = performance.now();
      await stream(path, body, (event) => {
        const read = readEvent(event);
        usage = read.usage ?? usage;
        for (const piece of read.pieces) this.#take(thread, asked, nodes, piece, fields, clock);
        this.#later(nodes);
      }, running.signal);
    } catch (error) {
      for (const node of nodes) node.reason ??= error.name === "AbortError" ? "stopped" : "failed";
      if (error.name !== "AbortError") {
        nodes[0].error = error.message;
        this.#tell("error", error);
      }
    }
    this.#finish(thread, nodes, usage, clock, running);
  }

  #take(thread, asked, nodes, piece, fields, clock) {
    while (nodes.length <= piece.index) { // further answers to the same question stand beside the first, which stays shown
      const shown = thread.chosen[asked.id];
      nodes.push(add(thread, asked, structuredClone(fields)));
      thread.chosen[asked.id] = shown;
      this.#tell("thread", thread);
    }
    const node = nodes[piece.index];
    if (piece.text || piece.tokens.length) {
      clock.first ??= performance.now();
      clock.last = performance.now();
      clock.count += piece.tokens.length || 1;
    }
    node.text += piece.text;
    if (node.tokens.length < MOST_TOKENS) node.tokens.push(...piece.tokens);
    if (piece.reason) node.reason = piece.reason;
    node.stats = figures(clock, null);
    this.#grown.set(node, thread);
    this.#telling ||= setTimeout(() => this.#tellGrown(), TELL_WAIT);
  }

  #tellGrown() {
    clearTimeout(this.#telling);
    this.#telling = 0;
    const grown = [...this.#grown];
    this.#grown.clear();
    for (const [node, thread] of grown) this.#tell("node", thread, node);
  }

  #finish(thread, nodes, usage, clock, running) {
    for (const node of nodes) {
      node.reason ??= "ended";
      node.stats = figures(clock, usage);
      if (!node.tokens.length) delete node.tokens;
    }
    if (this.#running.get(thread) === running) this.#running.delete(thread);
    this.#tellGrown();
    this.#tell("thread", thread);
    this.#tell("running", thread);
    this.save();
  }

  /** The question with another text, as a branch of its own, and an answer to it. */
  edit(thread, node, text) {
    const parent = thread.nodes[node.parent] ?? null;
    if (node.role === "user") return this.answer(thread, add(thread, parent, { role: "user", text }));
    add(thread, parent, { role: "assistant", model: node.model, text, reason: "edited" });
    this.#tell("thread", thread);
    return this.save();
  }

  /** Takes a message away with all that follows it. */
  remove(thread, node) {
    this.stop(thread);
    prune(thread, node);
    this.#tell("thread", thread);
    this.save();
  }

  changedThread(thread) {
    this.#tell("thread", thread);
    this.save();
  }

  /** Ends an answer; what has come stays. */
  stop(thread) {
    const running = this.#running.get(thread);
    this.#running.delete(thread);
    running?.abort();
  }

  stopAll() {
    for (const thread of [...this.#running.keys()]) this.stop(thread);
  }

  rename(title) {
    this.conversation.title = title;
    this.#tell("saved");
    this.save();
  }

  // -- the disk -------------------------------------------------------------------------------------------------------

  #later(nodes) {
    this.#timer ||= setTimeout(() => this.save(), SAVE_WAIT + SAVE_WAIT_PER_TOKEN * nodes[0].tokens.length);
  }

  /** Writes the conversation, after what is being written already. Nothing is written before something was said. */
  save() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const conversation = this.conversation;
    if (this.#gone.has(conversation) || conversation.threads.every((thread) => !Object.keys(thread.nodes).length)) return this.#saving;
    this.#saving = this.#saving.then(async () => {
      if (this.#gone.has(conversation)) return;
      try {
        const id = this.#ids.get(conversation);
        if (id) await put(`api/conversations/${encodeURIComponent(id)}`, conversation);
        else this.#ids.set(conversation, (await post("api/conversations", conversation)).id);
      } catch (error) {
        this.#tell("error", new ApiError(`The conversation could not be kept: ${error.message}`, null, error.status ?? 0));
      } finally {
        this.#tell("saved");
      }
    });
    return this.#saving;
  }

  /** Writes what is still waiting to be written. */
  flush() {
    return this.#timer ? this.save() : this.#saving;
  }
}

function figures(clock, usage) {
  const seconds = clock.last === null ? 0 : (clock.last - clock.began) / 1000;
  const tokens = usage?.completion_tokens ?? clock.count;
  const writing = clock.last === null ? 0 : (clock.last - clock.first) / 1000;
  const found = { seconds, tokens };
  if (clock.first !== null) found.first_token = (clock.first - clock.began) / 1000;
  if (tokens > 1 && writing > 0.05) found.rate = (tokens - 1) / writing;
  if (usage) found.prompt_tokens = usage.prompt_tokens;
  return found;
}

export const session = new Session();
