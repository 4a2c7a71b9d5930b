// Buttons, messages, progress: the small parts.

import { h, newId, replace, setText } from "../dom.js";
import { duration, number, percent, UNKNOWN, bytes } from "../format.js";

/** A button. While the promise of `onclick` is open it is busy and does nothing; what it rejects with becomes a message.
 * kind: "primary", "danger", "quiet" or "". `name` is what a screen reader says instead of a text that is not enough alone. */
export function button(text, onclick, { kind = "", title = null, name = null, disabled = false, type = "button", icon = null } = {}) {
  const element = h("button", { type, class: `button ${kind}`.trim(), title, "aria-label": name, disabled }, icon && h("span", { "aria-hidden": "true" }, icon), text);
  if (onclick) element.addEventListener("click", async (event) => {
    if (element.getAttribute("aria-busy") === "true") return event.preventDefault();
    const result = onclick(event);
    if (!(result instanceof Promise)) return;
    element.setAttribute("aria-busy", "true");
    try {
      await result;
    } catch (error) {
      if (error?.name !== "AbortError") toast(error.message, { kind: "error" });
    } finally {
      element.removeAttribute("aria-busy");
    }
  });
  return element;
}

/** What stands where there is nothing yet: a sentence and what to do about it (a node, or none). */
export const empty = (text, action = null) => h("div", { class: "empty" }, h("p", {}, text), action);

/** "Loading ..." for what takes long enough to be noticed; after some seconds it tells how many. */
export function spinner(text = "Loading …") {
  const passed = h("span", { "aria-hidden": "true" });
  const element = h("p", { class: "spinner", role: "status" }, text, passed);
  const began = performance.now();
  const timer = setInterval(() => {
    const seconds = (performance.now() - began) / 1000;
    if (!element.isConnected) clearInterval(timer);
    else if (seconds > 3) setText(passed, ` ${duration(Math.round(seconds))}`);
  }, 1000);
  return element;
}

const KINDS = { running: "good", training: "good", done: "done", finished: "done", failed: "bad", lost: "bad", queued: "wait", pausing: "wait", stopping: "wait", paused: "wait" };
/** The state of a job or run as a small label; its colour only repeats the word. */
export const badge = (state, text = state) => h("span", { class: `badge ${KINDS[state] ?? ""}` }, text);

/** Pairs of name and value as a description list; pairs without a value (null) are left out. */
export const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== UNKNOWN)
  .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

/** A polite live region that says at most one thing in `seconds`, so that it does not chatter. {element, say(text)} */
export function liveText(seconds = 5) {
  const element = h("p", { class: "visually-hidden", role: "status", "aria-live": "polite" });
  let latest = "", last = -Infinity, waiting = null;
  const show = () => {
    waiting = null;
    last = performance.now();
    setText(element, latest);
  };
  return {
    element,
    say(text) {
      latest = text;
      waiting ??= setTimeout(show, Math.max(0, last + seconds * 1000 - performance.now()));
    },
  };
}

/** The progress of a job: a bar, or a moving one where nobody knows how much there is, and words. {element, update(job)}; `element.update` is the same. */
export function progress(job) {
  const bar = h("progress", { max: 1, "aria-label": `Progress of ${job?.title ?? "the work"}` });
  const words = h("span", { class: "progress-words" });
  const element = h("div", { class: "progress" }, bar, words);
  const update = (next) => {
    const { text = "", done, total, unit, eta_seconds: eta } = next?.progress ?? {};
    const share = total > 0 && done !== null && done !== undefined ? Math.min(1, done / total) : null;
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
    bar.hidden = !next || !["running", "pausing", "stopping"].includes(next.state);
    const amount = (value) => (unit === "bytes" ? bytes(value) : number(value));
    const count = share === null ? "" : `${amount(done)} of ${amount(total)}${unit && unit !== "bytes" ? ` ${unit}` : ""} (${percent(share)})`;
    const parts = [text, count && !text?.includes(String(done)) ? count : share !== null && text ? percent(share) : "", eta > 0 ? `${duration(eta)} left` : ""];
    setText(words, parts.filter(Boolean).join(" · "));
  };
  update(job);
  element.update = update;
  return { element, update };
}

const SHOWN = 4; // messages at a time; older ones go first

/** A message at the edge of the page. kind: "" or "error"; action: {label, run}. Errors and messages with an action stay until they are closed or
 * `seconds` are over; a pointer or the focus on one keeps it. */
export function toast(text, { kind = "", action = null, seconds = kind === "error" ? 20 : action ? 10 : 6 } = {}) {
  const place = document.getElementById("toasts");
  const words = h("p", { id: newId("toast") });
  const element = h("div", { class: kind === "error" ? "toast bad" : "toast", role: kind === "error" ? "alert" : "status" }, words);
  let timer;
  const close = () => {
    clearTimeout(timer);
    element.remove();
  };
  const start = () => {
    clearTimeout(timer);
    timer = setTimeout(close, seconds * 1000);
  };
  if (action) element.append(button(action.label, async () => {
    await action.run();
    close();
  }, { kind: "quiet" }));
  element.append(h("button", { type: "button", class: "close", "aria-label": "Close the message", onclick: close }, "×"));
  element.addEventListener("pointerenter", () => clearTimeout(timer));
  element.addEventListener("pointerleave", start);
  element.addEventListener("focusin", () => clearTimeout(timer));
  element.addEventListener("focusout", start);
  for (const old of [...place.children]) if (old.firstChild.textContent === text) old.remove();
  place.append(element);
  while (place.children.length > SHOWN) place.firstChild.remove();
  replace(words, text); // after it stands in the page, so that it is announced
  start();
  return close;
}
