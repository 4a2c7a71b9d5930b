// Dialogs. The browser keeps the focus inside, closes on Escape, and gives the focus back to what had it before.

import { h, newId } from "../dom.js";
import { button } from "./base.js";

/** Shows a dialog and answers the value that it was closed with, null for Escape and "Cancel".
 * body: a node, or (close) -> node. actions: [{label, value | run, kind}]; `run` may be async, its result is the value, undefined keeps the dialog open.
 * What `run` throws is shown inside the dialog. */
export function dialog({ title, body, actions = [], wide = false, cancel = "Cancel" }) {
  const before = document.activeElement;
  return new Promise((resolve) => {
    const id = newId("dialog");
    const fault = h("p", { class: "error", role: "alert", hidden: true });
    let answer = null;
    const close = (value = null) => {
      answer = value;
      element.close();
    };
    const element = h("dialog", { "aria-labelledby": id, class: wide ? "wide" : null });
    const buttons = actions.map(({ label, value, run, kind = "" }) => button(label, async () => {
      if (!run) return close(value);
      fault.hidden = true;
      try {
        const result = await run();
        if (result !== undefined) close(result);
      } catch (error) {
        fault.hidden = false;
        fault.textContent = error.message;
      }
    }, { kind }));
    if (cancel) buttons.push(button(cancel, () => close(null), { kind: "quiet" }));
    element.append(h("h2", { id }, title), h("div", { class: "dialog-body" }, typeof body === "function" ? body(close) : body), fault, h("div", { class: "actions" }, buttons));
    const leave = () => close(null); // a link in it leads elsewhere
    window.addEventListener("hashchange", leave);
    element.addEventListener("close", () => {
      window.removeEventListener("hashchange", leave);
      element.remove();
      if (before?.isConnected) before.focus();
      resolve(answer);
    });
    element.addEventListener("click", (event) => {
      if (event.target === element) close(null); // the backdrop
    });
    document.body.append(element);
    element.showModal();
  });
}

/** Asks before something that cannot be undone; `action` is the text of the button. Answers whether it was agreed to. */
export async function confirm(text, action = "Yes", { title = "Are you sure?", kind = "danger" } = {}) {
  return (await dialog({ title, body: h("p", {}, text), actions: [{ label: action, value: true, kind }] })) === true;
}
