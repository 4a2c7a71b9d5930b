// Talking to models: conversations with branches, one model or two side by side, every token with its alternatives, and how surprising a text is.

import { get } from "../api.js";
import { h, newId, replace } from "../dom.js";
import { composer } from "../llm/composer.js";
import { conversationList } from "../llm/conversations.js";
import { loadableModels } from "../llm/models.js";
import { optionsForm } from "../llm/options.js";
import { session } from "../llm/session.js";
import { surpriseView } from "../llm/surprise.js";
import { threadView } from "../llm/thread.js";
import { followWaiting } from "../llm/waiting.js";
import { sampleButton } from "../models/sample.js";
import { link } from "../route.js";
import { button, empty, liveText, spinner, toast } from "../ui.js";

export const title = "LLM";

/** The address: #/llm/PATH begins a conversation with that model, ?conversation=ID opens one, ?view=surprise measures a text. */
export function mount(panel, route) {
  const page = new Page(panel, route);
  page.begin().catch((error) => page.failed(error));
  return () => page.end();
}

class Page {
  #models = [];
  #threads = [];
  #ends = [];
  #ended = false;
  #failed = false;

  constructor(panel, route) {
    this.panel = panel;
    this.route = route;
    replace(panel, h("h1", { class: "visually-hidden" }, title), spinner());
  }

  failed(error) {
    if (!this.#ended) replace(this.panel, empty(error.message, button("Try again", () => this.begin())));
  }

  end() {
    this.#ended = true;
    session.flush();
    for (const end of this.#ends) end();
  }

  async begin() {
    const [models, { sampling }] = await Promise.all([loadableModels(), get("api/llm")]);
    if (this.#ended) return;
    this.#models = models;
    if (!models.length) {
      replace(this.panel, h("h1", {}, title), empty("There is no model to talk to yet. Train one, and it stands here when it has its first checkpoint.",
        h("div", { class: "row" }, button("Train a model", () => {
          location.hash = link("training");
        }, { kind: "primary" }), sampleButton())));
      return;
    }
    if (this.route.params.get("view") === "surprise") return void this.#surprise();
    await this.#open();
    if (!this.#ended) this.#talk(sampling);
  }

  // Which conversation is open: the one of the address, else the one that was open before, else a new one.
  async #open() {
    const wanted = this.route.params.get("conversation");
    const [newest] = this.#models;
    if (this.route.path) {
      const model = this.#models.find((each) => each.path === this.route.path);
      if (!model) toast(`${this.route.path} is no model that can be loaded. Choose another one.`, { kind: "error" });
      this.#fresh(model ?? newest);
    } else if (wanted && wanted !== session.id) {
      await session.open(wanted).catch((error) => toast(error.message, { kind: "error" }));
    }
    if (!session.threads[0].model) this.#fresh(newest);
  }

  #fresh(model) {
    session.fresh(model.path, model.has_chat ? "chat" : "completion");
  }

  #views(current) {
    const to = (view) => () => {
      location.hash = link("llm", "", view ? { view } : session.id ? { conversation: session.id } : null);
    };
    const each = (text, view) => h("button", { type: "button", "aria-pressed": String(current === view), onclick: to(view) }, text);
    return h("div", { class: "choices", role: "group", "aria-label": "What to do" }, each("Talk", ""), each("Surprise of a text", "surprise"));
  }

  #surprise() {
    const view = surpriseView({ models: () => this.#models, model: session.threads[0].model ?? this.#models[0].path });
    this.#ends.push(view.end);
    replace(this.panel, h("h1", {}, title), this.#views("surprise"), view.element);
  }

  #talk(sampling) {
    const wide = window.matchMedia("(min-width: 1100px)").matches;
    this.list = conversationList({ onnew: () => this.#fresh(this.#models.find((each) => each.path === session.threads[0].model) ?? this.#models[0]) });
    this.composer = composer();
    this.options = optionsForm(sampling, (values) => {
      session.conversation.options = values;
    });
    this.mode = h("div", { class: "choices", role: "group", "aria-label": "Form of the conversation" });
    this.comparing = h("span");
    this.columns = h("div", { class: "threads" });
    this.system = h("textarea", { id: newId("system"), rows: 3, placeholder: "None", oninput: () => {
      session.conversation.system = this.system.value;
    } });
    this.systemBox = h("div", { class: "field" }, h("label", { for: this.system.id }, "System prompt"), this.system, h("p", { class: "help" }, "What the model is told before a chat begins."));
    this.told = liveText(1);
    const section = (name, open, ...content) => h("details", { class: `section ${name}`, open }, content);
    replace(this.panel,
      h("h1", {}, title), h("div", { class: "llm-bar" }, this.#views(""), this.mode, this.comparing), this.told.element,
      h("div", { class: "llm" },
        section("llm-side", wide, h("summary", {}, "Conversations"), this.list.element),
        h("div", { class: "llm-main" }, this.columns, this.composer.element),
        section("llm-options", wide, h("summary", {}, "Options"), this.systemBox, this.options.element)));
    this.#ends.push(session.listen((kind, thread, node) => this.#heard(kind, thread, node)), followWaiting(() => this.#threads.forEach(({ view }) => view.wait())));
    this.#opened();
  }

  #heard(kind, thread, node) {
    if (kind === "opened") this.#opened();
    else if (kind === "thread") this.#threads.find((each) => each.thread === thread)?.view.update();
    else if (kind === "node") this.#grew(thread, node);
    else if (kind === "saved") this.#saved();
    else if (kind === "error") this.#fault(thread);
    else if (kind === "running") {
      this.composer.update();
      if (session.isBusy) this.#failed = false;
      this.told.say(session.isBusy ? "The model is writing." : this.#failed ? "There is no answer." : "The answer is complete.");
    }
  }

  #grew(thread, node) {
    const atEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 120;
    this.#threads.find((each) => each.thread === thread)?.view.updateNode(node);
    if (atEnd) window.scrollTo(0, document.documentElement.scrollHeight);
  }

  #saved() {
    if (session.id && !this.#ended) history.replaceState(null, "", link("llm", "", { conversation: session.id }));
    this.list.update();
  }

  #fault(error) {
    this.#failed = true;
    this.composer.update();
    this.#lookAgain();
    if (!this.options.error(error.param, error.message)) toast(error.message, { kind: "error" });
    else this.panel.querySelector(".llm-options").open = true;
  }

  // A model that turned out to be damaged is no longer among those that can be chosen.
  async #lookAgain() {
    const models = await loadableModels().catch(() => null);
    if (!models || this.#ended) return;
    this.#models = models;
    for (const { view } of this.#threads) view.models(models);
  }

  #opened() {
    const handlers = {
      models: () => this.#models,
      onerror: (error) => this.#fault(error),
      onmodel: (thread, path, found) => this.#chosen(thread, path, found),
    };
    this.#threads = session.threads.map((thread, place) => ({
      thread, view: threadView(thread, place, handlers),
    }));
    replace(this.columns, this.#threads.map((each) => each.view.element));
    this.columns.classList.toggle("pair", this.#threads.length > 1);
    for (const { view } of this.#threads) view.update();
    this.options.set(session.conversation.options);
    this.system.value = session.conversation.system;
    this.#modes();
    this.composer.update();
    this.list.update();
    const address = link("llm", "", session.id ? { conversation: session.id } : null);
    if (!this.#ended) history.replaceState(null, "", address);
  }

  #modes() {
    const { mode } = session.conversation;
    const each = (text, value) => h("button", { type: "button", "aria-pressed": String(mode === value), onclick: () => {
      session.conversation.mode = value;
      this.#opened();
      session.save();
    } }, text);
    replace(this.mode, each("Chat", "chat"), each("Completion", "completion"));
    this.systemBox.hidden = mode !== "chat";
    const one = session.threads.length === 1;
    const other = () => (this.#models.find((model) => model.path !== session.threads[0].model) ?? this.#models[0]).path;
    replace(this.comparing, one ? button("Compare with another model", () => session.compare(other()), { kind: "quiet" }) : button("Close the comparison", () => session.compare(null), { kind: "quiet" }));
  }

  #chosen(thread, path, found) {
    thread.model = path;
    const untouched = !Object.keys(thread.nodes).length;
    if (untouched && session.threads.length === 1) session.conversation.mode = found.has_chat ? "chat" : "completion";
    this.#opened();
    session.save();
  }
}
