// A text token by token, coloured by how surprising each one was. One token can be reached by Tab, the others by the arrow keys; the one that is pointed
// at or has the focus shows its probability and the likeliest tokens in its place. Where `onchoose` is given, one of these can be chosen instead.

import { h, replace } from "../dom.js";
import { number } from "../format.js";
import { LEVELS, bits, levelOf, visible } from "./pieces.js";

const HIDE_WAIT = 250; // milliseconds in which a pointer may get from a token to its panel

/** tokens: [[name, log-probability or null, [[name, log-probability], ...], rank]]. onchoose(index, name): another token in the place of this one;
 * canChoose(index, name): whether it can stand there. Answers {element, append(tokens)}. */
export function tokenText(tokens, { label, onchoose = null, canChoose = () => true } = {}) {
  const text = h("div", { class: "token-text", role: "group", "aria-label": `${label}. Arrow keys go from token to token, arrow down to the alternatives.` });
  const panel = h("div", { class: "token-panel", hidden: true, role: "group", "aria-label": "Alternatives" });
  const element = h("div", { class: "token-box" }, text, panel);
  const shown = [];
  let current = null; // index of the token whose panel is open
  let hiding = 0;

  function append(more) {
    for (const token of more) {
      const [name, logprob] = token;
      const level = levelOf(logprob);
      const words = `${visible(name)}${level === null ? "" : `, ${chance(logprob)}`}`;
      const mark = name.startsWith("bytes:") ? "�" : name.replace(/\n/g, "↵\n");
      const span = h("span", { class: `token ${level === null ? "" : `surprise-${level}`}`, role: "button", tabindex: shown.length ? "-1" : "0", "aria-label": words,
        "data-index": String(shown.length) }, mark);
      shown.push({ token, span });
      text.append(span);
    }
  }

  const indexOf = (event) => {
    const span = event.target.closest(".token");
    return span ? Number(span.dataset.index) : null;
  };

  function open(index) {
    clearTimeout(hiding);
    if (current === index && !panel.hidden) return;
    if (current !== null) shown[current].span.classList.remove("current");
    current = index;
    const { token, span } = shown[index];
    span.classList.add("current");
    replace(panel, details(token, index));
    panel.hidden = false;
    const box = element.getBoundingClientRect();
    const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
    panel.style.left = `${Math.max(0, Math.min(place.left - box.left, box.width - panel.offsetWidth))}px`;
    panel.style.top = `${place.bottom - box.top}px`;
  }

  function close() {
    clearTimeout(hiding);
    if (current !== null) shown[current].span.classList.remove("current");
    panel.hidden = true;
    current = null;
  }

  const closeSoon = () => {
    clearTimeout(hiding);
    hiding = setTimeout(() => !element.contains(document.activeElement) && close(), HIDE_WAIT);
  };

  function details([name, logprob, top, rank], index) {
    const known = typeof logprob === "number";
    const place = rank ?? (top ?? []).findIndex(([other]) => other === name) + 1;
    const facts = known ? [chance(logprob), `${number(bits(logprob), { digits: 1 })} bits`, place > 0 ? `number ${place}` : null].filter(Boolean).join(" · ") : "the first token: nothing stands before it";
    const rows = (top ?? []).map(([other, likelihood]) => {
      const same = other === name;
      const fits = onchoose && !same && canChoose(index, other);
      const cells = [h("span", { class: "token-name" }, visible(other)), h("meter", { min: 0, max: 1, value: Math.exp(likelihood), "aria-hidden": "true" }), h("span", { class: "token-share" }, chance(likelihood))];
      if (!fits) return h("li", { class: same ? "chosen" : null }, h("span", { class: "alternative" }, cells));
      return h("li", {}, h("button", { type: "button", class: "alternative", "aria-label": `Go on with ${visible(other)}, ${chance(likelihood)}`, onclick: () => {
        close();
        onchoose(index, other);
      } }, cells));
    });
    const hint = onchoose && rows.length > 1 ? h("p", { class: "help" }, "Choose one to go on from there.") : null;
    return [h("p", {}, h("strong", { class: "token-name" }, visible(name)), " ", facts), rows.length ? h("ul", {}, rows) : null, hint];
  }

  function go(index) {
    const next = Math.max(0, Math.min(shown.length - 1, index));
    for (const { span } of shown) if (span.tabIndex === 0) span.tabIndex = -1;
    shown[next].span.tabIndex = 0;
    shown[next].span.focus();
  }

  text.addEventListener("pointerover", (event) => indexOf(event) !== null && event.pointerType === "mouse" && open(indexOf(event)));
  text.addEventListener("focusin", (event) => indexOf(event) !== null && open(indexOf(event)));
  text.addEventListener("click", (event) => {
    if (indexOf(event) === null) return;
    go(indexOf(event));
    open(indexOf(event));
  });
  element.addEventListener("pointerleave", closeSoon);
  element.addEventListener("pointerenter", () => clearTimeout(hiding));
  element.addEventListener("focusout", closeSoon);
  text.addEventListener("keydown", (event) => {
    const index = indexOf(event);
    if (index === null) return;
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to !== undefined) go(to);
    else if (event.key === "ArrowDown" || event.key === "Enter" || event.key === " ") {
      open(index);
      panel.querySelector("button")?.focus();
    } else if (event.key === "Escape" && !panel.hidden) close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  panel.addEventListener("keydown", (event) => {
    const buttons = [...panel.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "ArrowDown") buttons[Math.min(at + 1, buttons.length - 1)]?.focus();
    else if (event.key === "ArrowUp" && at > 0) buttons[at - 1].focus();
    else if (event.key === "Escape" || event.key === "ArrowUp") shown[current]?.span.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  append(tokens);
  return { element, append };
}

/** What the colours mean. */
export const legend = () => h("p", { class: "surprise-legend" }, h("span", {}, "Surprise:"), LEVELS.map((level, index) => h("span", { class: `token surprise-${index}` }, level.text)));

/** A log-probability as a chance: "12 %", "0.3 %", "1 in 80,000". */
export function chance(logprob) {
  const share = Math.exp(logprob);
  if (share >= 0.0995) return `${number(share * 100, { digits: 0 })} %`;
  if (share >= 0.001) return `${number(share * 100, { digits: 1 })} %`;
  return share < 1e-12 ? "practically never" : `1 in ${number(Math.round(1 / share))}`;
}
