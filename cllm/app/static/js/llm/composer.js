// Where one writes: to the model, or the text that it goes on with.

import { h, newId, setText } from "../dom.js";
import { button } from "../ui.js";
import { isChoosing } from "./models.js";
import { session } from "./session.js";
import { shownPath } from "./tree.js";

let draft = ""; // what is half written outlives a look at another tab

/** {element, update(), focus()} */
export function composer() {
  const id = newId("composer");
  const label = h("label", { for: id });
  const box = h("textarea", { id, rows: 3, value: draft, oninput: () => {
    draft = box.value;
  }, onkeydown: (event) => {
    const sends = event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (!event.shiftKey && isChat()));
    if (!sends) return;
    event.preventDefault();
    say();
  } });
  const send = button("Send", say, { kind: "primary" });
  const stop = button("Stop", () => session.stopAll(), { kind: "danger" });
  const hint = h("span", { class: "help" });
  const element = h("div", { class: "composer" }, label, box, h("div", { class: "actions" }, send, stop, hint));

  const isChat = () => session.conversation.mode === "chat";

  function say() {
    const goesOn = !isChat() && session.threads.some((thread) => shownPath(thread).length);
    if (session.isBusy || (!box.value && !goesOn)) return box.focus();
    if (isChoosing()) {
      setText(hint, "The model that you chose is still being loaded. Send this once it is there.");
      return box.focus();
    }
    const text = box.value.toWellFormed(); // half of a pair of surrogates is no text
    box.value = draft = "";
    session.send(text);
    return box.focus();
  }

  function update() {
    const chat = isChat();
    setText(label, chat ? "Message" : session.threads.some((thread) => shownPath(thread).length) ? "More text of yours (or none)" : "Text to go on from");
    setText(send, chat ? "Send" : "Continue");
    setText(hint, chat ? "Enter sends, Shift+Enter is a new line." : "Ctrl+Enter goes on.");
    send.hidden = session.isBusy;
    stop.hidden = !session.isBusy;
  }

  return { element, update, focus: () => box.focus() };
}
