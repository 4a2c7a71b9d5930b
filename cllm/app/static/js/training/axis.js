// What the curves of a training stand over: steps, tokens or time.

import { h } from "../dom.js";
import { duration, number } from "../format.js";

export const AXES = {
  step: { label: "step", format: (value) => number(value, { short: value >= 100000 }) },
  tokens: { label: "tokens", format: (value) => number(value, { short: true }) },
  time: { label: "time trained", format: (value) => duration(Math.max(0, value)) },
};

/** Buttons of which one is chosen: choices {value: label}. */
export function choice(name, choices, chosen, onchange) {
  const buttons = Object.entries(choices).map(([value, label]) => h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => {
    for (const [index, each] of buttons.entries()) each.setAttribute("aria-pressed", String(Object.keys(choices)[index] === value));
    onchange(value);
  } }, label));
  return h("div", { class: "choices", role: "group", "aria-label": name }, buttons);
}
