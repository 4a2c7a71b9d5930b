// One message of a conversation: its text, where wanted token by token, and what can be done with it.

import { h, replace, setText } from "../dom.js";
import { duration, number } from "../format.js";
import { markdown } from "../markdown.js";
import { button, toast } from "../ui.js";
import { textOf } from "./pieces.js";
import { legend, tokenText } from "./tokens.js";
import { childrenOf } from "./tree.js";
import { waitingWords } from "./waiting.js";

const DRAW_WAIT = 150; // milliseconds between two drawings of an answer that is coming
const ENDS = { length: "the limit of tokens is reached", stopped: "stopped", failed: "failed", edited: "edited by you", ended: "the connection ended" };

/** do: {regenerate(node), edit(node, text), turn(node, by), remove(node), fork(node, index, name)}. Answers {element, update(running)}. */
export function message(thread, node, mode, actions) {
  const isAnswer = node.role === "assistant";
  const who = isAnswer ? node.model || "Model" : mode === "completion" ? "Text" : "You";
  const content = h("div", { class: "message-text" });
  const figures = h("p", { class: "message-figures" });
  const fault = h("p", { class: "error", role: "alert", hidden: true });
  const tools = h("div", { class: "message-tools" });
  const element = h("article", { class: `message ${node.role} ${mode}`, "aria-label": isAnswer ? `Answer of ${who}` : who }, h("p", { class: "message-who" }, who), content, fault, figures, tools);
  let byToken = false;
  let isRunning = false;
  let isEdited = false;
  let strip = null;
  let drawn = null; // the text that stands there as Markdown
  let timer = 0;

  const tokensShown = h("button", { type: "button", class: "button quiet", "aria-pressed": "false", onclick: () => {
    byToken = !byToken;
    tokensShown.setAttribute("aria-pressed", String(byToken));
    drawn = strip = null;
    draw();
  } }, "Probabilities");
  const siblings = h("span", { class: "siblings", role: "group", "aria-label": "Versions of this message" });

  function drawTools() {
    const all = childrenOf(thread, thread.nodes[node.parent]);
    replace(siblings, all.length > 1 ? [
      button("‹", () => actions.turn(node, -1), { kind: "quiet", name: "Earlier version" }),
      h("span", {}, `${all.indexOf(node) + 1}/${all.length}`),
      button("›", () => actions.turn(node, 1), { kind: "quiet", name: "Later version" }),
    ] : []);
    const still = !isRunning;
    replace(tools, siblings,
      isAnswer && still ? button("Regenerate", () => void actions.regenerate(node), { kind: "quiet" }) : null,
      still ? button("Edit", edit, { kind: "quiet" }) : null,
      node.text ? button("Copy", () => copy(node.text, "The text"), { kind: "quiet" }) : null,
      node.tokens?.length ? tokensShown : null,
      still ? button("Delete", () => actions.remove(node), { kind: "quiet", name: "Delete this message and what follows" }) : null);
  }

  function edit() {
    isEdited = true;
    const box = h("textarea", { class: "message-edit", rows: Math.min(12, node.text.split("\n").length + 2), value: node.text, "aria-label": "Text of the message" });
    const leave = () => {
      isEdited = false;
      drawn = strip = null;
      draw();
    };
    const keep = () => {
      leave();
      actions.edit(node, box.value.toWellFormed());
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep();
      else return;
      event.preventDefault();
    });
    replace(content, box, h("div", { class: "actions" }, button(isAnswer ? "Keep" : "Send", keep, { kind: "primary" }), button("Cancel", leave, { kind: "quiet" })));
    box.focus();
  }

  function draw() {
    if (isEdited) return;
    if (byToken && node.tokens?.length) {
      if (!strip) {
        strip = tokenText(node.tokens, {
          label: "The answer token by token",
          onchoose: (index, name) => actions.fork(node, index, name),
          canChoose: (index, name) => !isRunning && textOf([...node.tokens.slice(0, index).map(([each]) => each), name]) !== null,
        });
        strip.count = node.tokens.length;
        replace(content, legend(), strip.element);
      } else {
        strip.append(node.tokens.slice(strip.count));
        strip.count = node.tokens.length;
      }
      return;
    }
    if (!isAnswer || mode === "completion") return drawPlain();
    if (drawn !== node.text) drawMarkdown();
  }

  // Only what is new is added, so that a long text does not cost more with every token.
  function drawPlain() {
    const here = content.firstChild;
    if (drawn === null || !(here instanceof Text) || !node.text.startsWith(drawn)) replace(content, document.createTextNode(node.text));
    else here.appendData(node.text.slice(drawn.length));
    drawn = node.text;
  }

  async function drawMarkdown() {
    if (timer) return;
    timer = setTimeout(() => { // one drawing at a time, however fast tokens come
      timer = 0;
      if (drawn !== node.text) draw();
    }, DRAW_WAIT + node.text.length / 100);
    const text = node.text;
    drawn = text;
    const formatted = await markdown(text);
    if (byToken || isEdited || drawn !== text) return;
    for (const code of formatted.querySelectorAll("pre")) {
      const words = code.textContent;
      const box = h("div", { class: "code-box" });
      code.replaceWith(box);
      code.tabIndex = 0; // long lines are scrolled by the keyboard as well
      box.append(code, button("Copy", () => copy(words, "The code"), { kind: "quiet", name: "Copy the code" }));
    }
    replace(content, formatted);
  }

  function update(running) {
    const changed = running !== isRunning || !tools.firstChild;
    isRunning = running;
    element.setAttribute("aria-busy", String(running));
    element.classList.toggle("waiting", running && !node.text);
    draw();
    if (changed || !running) drawTools();
    setText(figures, described(node, running));
    setText(fault, node.error ?? "");
    fault.hidden = !node.error;
  }

  return { element, update };
}

function described(node, running) {
  if (node.role === "user") return "";
  const { tokens, rate, first_token: first } = node.stats ?? {};
  const parts = [
    tokens ? `${number(tokens)} ${tokens === 1 ? "token" : "tokens"}` : running ? waitingWords() || "reading …" : "",
    rate ? `${number(rate)} tokens/s` : "",
    first !== undefined ? `first after ${duration(first)}` : "",
    running ? "" : (ENDS[node.reason] ?? ""),
  ];
  return parts.filter(Boolean).join(" · ");
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} is copied.`);
  } catch {
    toast("The browser does not let this page copy. Select the text and copy it by hand.", { kind: "error" });
  }
}
