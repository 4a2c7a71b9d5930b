// What was said with one model: the choice of the model, its messages, and how much of its context they take.

import { h, setText } from "../dom.js";
import { number, percent } from "../format.js";
import { empty } from "../ui.js";
import { message } from "./message.js";
import { contextOf, modelChoice } from "./models.js";
import { session } from "./session.js";
import { shownPath, turn } from "./tree.js";

/** {element, update(), updateNode(node), wait(), models()}: `update` draws what changed in the tree, `updateNode` a message that grew. */
export function threadView(thread, place, { models, onmodel, onerror }) {
  const list = h("div", { class: "messages" });
  const choice = modelChoice({
    label: place ? "Second model" : "Model", path: thread.model, models, onerror,
    onchoose: (path, found) => onmodel(thread, path, found),
  });
  const meter = h("meter", { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0.2, value: 0, "aria-label": "Share of the context that is used" });
  const used = h("span", { class: "help" });
  const gauge = h("div", { class: "gauge", hidden: true }, meter, used);
  const element = h("section", { class: "thread", "aria-label": `Conversation ${place + 1}` }, choice.element, list, gauge);
  const views = new Map(); // node -> its view
  const nothing = empty(introduction());

  const actions = {
    regenerate: (node) => session.answer(thread, thread.nodes[node.parent]),
    edit: (node, text) => session.edit(thread, node, text),
    remove: (node) => session.remove(thread, node),
    fork: (node, index, name) => session.answer(thread, thread.nodes[node.parent], [...node.tokens.slice(0, index), chosen(node.tokens[index], name)]),
    turn: (node, by) => {
      turn(thread, node, by);
      session.changedThread(thread);
    },
  };

  function introduction() {
    if (session.conversation.mode === "completion") return "Write the beginning of a text below, and the model goes on with it.";
    const isTaught = models().find((model) => model.path === thread.model)?.has_chat;
    return isTaught ? "Write something below, and the model answers." : "Write something below. This model has learnt texts and no conversations: it goes on with what is said as with a text, which Completion does more plainly.";
  }

  function update() {
    const path = shownPath(thread);
    for (const [node, view] of [...views]) if (!path.includes(node)) {
      view.element.remove();
      views.delete(node);
    }
    path.forEach((node, index) => {
      let view = views.get(node);
      if (!view) {
        view = message(thread, node, session.conversation.mode, actions);
        views.set(node, view);
      }
      if (list.children[index] !== view.element) list.insertBefore(view.element, list.children[index] ?? null);
      view.update(isComing(node));
    });
    if (path.length) nothing.remove();
    else list.append(nothing);
    measure(path);
    choice.say();
  }

  const isComing = (node) => node.role === "assistant" && session.isRunning(thread) && !node.reason;

  function updateNode(node) {
    views.get(node)?.update(isComing(node));
    if (!isComing(node)) measure(shownPath(thread));
  }

  function measure(path) {
    const last = [...path].reverse().find((node) => node.stats?.prompt_tokens);
    const context = contextOf(thread.model);
    gauge.hidden = !last || !context;
    if (gauge.hidden) return;
    const tokens = last.stats.prompt_tokens + last.stats.tokens;
    meter.value = Math.min(1, tokens / context);
    const over = session.conversation.mode === "completion" ? "the model sees only the end of the text" : "the model no longer sees the oldest turns";
    setText(used, `${number(tokens)} of ${number(context)} tokens of the context (${percent(tokens / context)})${tokens >= context ? `: ${over}` : ""}`);
  }

  // What is waited for has changed: it stands at the model that is being loaded, and at an answer that has not begun.
  function wait() {
    choice.say();
    for (const [node, view] of views) if (isComing(node) && !node.text) view.update(true);
  }

  return { element, update, updateNode, wait, models: choice.update };
}

// The token that was chosen instead, with the probability that it had there.
function chosen([, , top], name) {
  return [name, top.find(([other]) => other === name)?.[1] ?? null, top];
}
