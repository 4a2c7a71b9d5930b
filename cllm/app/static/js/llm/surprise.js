// How well a model knows a text: every token coloured by how surprising it was, and the figures of the whole.

import { post } from "../api.js";
import { h, newId, replace } from "../dom.js";
import { number, plural } from "../format.js";
import { button, facts, spinner } from "../ui.js";
import { modelChoice } from "./models.js";
import { legend, tokenText } from "./tokens.js";
import { followWaiting } from "./waiting.js";

let kept = { text: "", model: null }; // what was typed outlives a look at another tab

/** {element, end()}; `models()` are those that can be talked to, `model` the one to begin with. */
export function surpriseView({ models, model }) {
  kept.model ??= model;
  const id = newId("surprise");
  const box = h("textarea", { id, rows: 8, value: kept.text, placeholder: "Paste a text here", oninput: () => {
    kept.text = box.value;
  } });
  const fault = h("p", { class: "error", role: "alert" });
  const result = h("div", { class: "surprise-result", "aria-live": "polite" });
  const choice = modelChoice({ label: "Model", path: kept.model, models, onerror: show, onchoose: (path) => {
    kept.model = path;
  } });

  function show(error) {
    replace(fault, error?.message ?? "");
  }

  async function measure() {
    show(null);
    if (!box.value) {
      show(new Error("There is no text yet. Paste one above."));
      return box.focus();
    }
    replace(result, spinner("Reading the text …"));
    try {
      await choice.ready();
      const found = await post("api/llm/surprise", { model: kept.model, text: box.value });
      const tokens = found.tokens.map((token) => [token.text, token.logprob, (token.top ?? []).map((each) => [each.text, each.logprob]), token.rank]);
      replace(result,
        facts([["Perplexity", number(found.perplexity)], ["Bits per byte", number(found.bits_per_byte)], ["Length", plural(tokens.length, "token")]]),
        h("p", { class: "help" }, "Perplexity: among how many equally likely tokens the model chose on average; lower is better."),
        legend(), tokenText(tokens, { label: "The text token by token" }).element);
    } catch (error) {
      replace(result);
      show(error);
    }
    return undefined;
  }

  const element = h("div", { class: "surprise" }, choice.element, h("label", { for: id }, "Text"), box, h("div", { class: "actions" }, button("Measure", measure, { kind: "primary" })), fault, result);
  return { element, end: followWaiting(choice.say) };
}
