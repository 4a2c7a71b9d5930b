// From a conversation to a request of the API, and from the events of its answer to pieces of text.

import { nameOf } from "./pieces.js";
import { pathTo } from "./tree.js";

const ALTERNATIVES = 8; // the likeliest tokens that are asked for in each place

/** The request for the answer `node`: {path, body}. `begun` is the text that it has already. */
export function requestFor(conversation, thread, node, begun = "") {
  const before = pathTo(thread, node).slice(0, -1);
  const common = { model: thread.model, stream: true, stream_options: { include_usage: true }, ...optionFields(conversation.options) };
  const scored = conversation.options.probabilities !== false;
  if (conversation.mode === "completion") {
    const prompt = before.map((each) => each.text).join("") + begun;
    return { path: "v1/completions", body: { ...common, prompt, truncation: "auto", ...(scored ? { logprobs: ALTERNATIVES } : {}) } };
  }
  const messages = before.map((each) => ({ role: each.role, content: each.text }));
  if (conversation.system?.trim()) messages.unshift({ role: "system", content: conversation.system });
  const goesOn = begun ? { continue_final_message: true } : {};
  if (begun) messages.push({ role: "assistant", content: begun });
  const wanted = scored ? { logprobs: true, top_logprobs: ALTERNATIVES } : {};
  return { path: "v1/chat/completions", body: { ...common, messages, truncation: "auto", ...goesOn, ...wanted } };
}

/** The options of the page in the API's fields. Raises an Error that names the option (`param`) where one cannot be read. */
function optionFields(options) {
  const fields = {};
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === "" || ["probabilities", "form", "form_text", "logit_bias"].includes(name)) continue;
    fields[name] = value;
  }
  if (options.logit_bias?.length) fields.logit_bias = biases(options.logit_bias);
  const text = (options.form_text ?? []).join("\n").trim();
  if (options.form === "json") fields.response_format = { type: "json_object" };
  else if (options.form && !text) throw wrong("form_text", "Say what the text has to look like, or choose “any text” above.");
  else if (options.form === "json schema") fields.guided_json = schema(text);
  else if (options.form === "regular expression") fields.guided_regex = text;
  else if (options.form === "grammar") fields.guided_grammar = text;
  return fields;
}

function biases(lines) {
  const found = {};
  for (const line of lines) {
    const match = /^(\d+)\s*[:=\s]\s*(-?\d+(?:\.\d+)?)$/.exec(line.trim());
    if (!match) throw wrong("logit_bias", `“${line}” must be a token's id and a number, as in 262: -100.`);
    found[match[1]] = Number(match[2]);
  }
  return found;
}

function schema(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw wrong("form_text", `This is no valid JSON: ${error.message}`);
  }
}

function wrong(param, message) {
  return Object.assign(new Error(message), { param });
}

/** What an event says: {pieces: [{index, text, tokens, reason}], usage}. A token is [name, log-probability, [[name, log-probability], ...]]. */
export function readEvent(event) {
  const pieces = (event.choices ?? []).map((choice) => ({
    index: choice.index,
    text: choice.text ?? choice.delta?.content ?? "",
    tokens: choice.logprobs ? tokensOf(choice.logprobs) : [],
    reason: choice.finish_reason ?? null,
  }));
  return { pieces, usage: event.usage ?? null };
}

const rounded = (logprob) => (typeof logprob === "number" ? Math.round(logprob * 1e4) / 1e4 : null);

function tokensOf(logprobs) {
  if (logprobs.content) return logprobs.content.map((each) => [
    nameOf(each.bytes ?? []), rounded(each.logprob), each.top_logprobs.map((other) => [nameOf(other.bytes ?? []), rounded(other.logprob)]),
  ]);
  return (logprobs.tokens ?? []).map((name, index) => {
    const top = Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([other, logprob]) => [other, rounded(logprob)]);
    return [name, rounded(logprobs.token_logprobs[index]), top.sort((one, other) => other[1] - one[1])];
  });
}
