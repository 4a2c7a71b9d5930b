// The options of an answer: the settings of sampling as the server declares them, and those that only the API has.

import { h } from "../dom.js";
import { form } from "../ui.js";

const ANSWER = [
  { name: "max-tokens", type: "integer", unit: "tokens", min: 1, optional: true, default: null, default_text: "200; in a chat until the context is full", help: "The most tokens of an answer" },
  { name: "min-tokens", type: "integer", unit: "tokens", min: 0, optional: true, default: 0, help: "An answer does not end before it has this many" },
  { name: "n", type: "integer", unit: "answers", min: 1, max: 16, optional: true, default: 1, help: "Answers to each question; they stand beside each other as versions" },
  { name: "seed", type: "integer", optional: true, default: null, default_text: "another each time", help: "The same seed gives the same answer again" },
  { name: "stop", type: "list", optional: true, default: null, help: "Texts before which an answer ends, one a line" },
  { name: "logit-bias", type: "list", optional: true, default: null, help: "Makes single tokens likelier or less likely: a token's id and a number from -100 to 100, as in 262: -100, one a line" },
  { name: "form", type: "choice", choices: ["any text", "json", "json schema", "regular expression", "grammar"], optional: true, default: "any text", help: "What an answer has to look like" },
  { name: "form-text", type: "list", optional: true, default: null, help: "The schema, the expression or the grammar (Lark) for it" },
  { name: "probabilities", type: "boolean", optional: true, default: true, help: "Keep how likely each token was, and the likeliest ones in its place" },
];
const PLAIN = ["temperature", "top-p", "max-tokens", "seed"];
const FORM = ["form", "form-text"];

const declared = (option) => ({ ...option, name: option.name.replaceAll("_", "-"), key: option.name.replaceAll("-", "_") });

/** sampling: the options that GET /api/llm declares; onchange(values) is called with what differs from the defaults. {element, set(values), error(param, text)} */
export function optionsForm(sampling, onchange) {
  const options = [...sampling, ...ANSWER].map(declared);
  const rest = (names) => names.map((option) => declared(option).name).filter((name) => !PLAIN.includes(name) && !FORM.includes(name));
  const groups = [
    { title: null, names: PLAIN },
    { title: "More about sampling", names: rest(sampling) },
    { title: "The form of an answer", names: FORM },
    { title: "More about answers", names: rest(ANSWER) },
  ];
  const made = form(options, groups);
  const values = () => Object.fromEntries(Object.entries(made.values()).map(([name, value]) => [name.replaceAll("-", "_"), value]));
  made.element.addEventListener("input", () => onchange(values()));
  made.element.addEventListener("change", () => onchange(values()));
  return {
    element: h("div", { class: "llm-options-form" }, made.element),
    set: (given) => made.set(given),
    clear: () => made.clear(),
    error: (param, text) => made.error(param, text),
  };
}
