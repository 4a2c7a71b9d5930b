// Models to talk to: which there are, and that one is loaded when it is first needed.

import { get, post } from "../api.js";
import { h, newId, replace, setText } from "../dom.js";
import { bytes, duration, number } from "../format.js";
import { button } from "../ui.js";
import { waitingWords } from "./waiting.js";

const loaded = new Map(); // path -> what POST /api/llm/load said: {id, context, parameters, has_chat, seconds}

let choosing = 0; // choices of a model that are not loaded yet

/** Whether a model has been chosen that is still being loaded: until then the one before it would answer. */
export const isChoosing = () => choosing > 0;

/** The models that can be talked to, the newest first. */
export async function loadableModels() {
  const found = await get("api/models");
  return found.filter((model) => model.loadable).sort((one, other) => (other.updated ?? 0) - (one.updated ?? 0));
}

/** Loads a model where it is not loaded yet, and answers its figures. Throws ApiError. */
export async function ready(path) {
  const found = await post("api/llm/load", { path });
  loaded.set(path, found);
  return found;
}

export const contextOf = (path) => loaded.get(path)?.context ?? null;

/** A choice of a model with a line about it. onchoose(path) is called once it is loaded. {element, say(), update(models),
 * ready()}: ready loads the chosen model where it is not loaded yet. */
export function modelChoice({ label, path, models, onchoose, onerror }) {
  const id = newId("model");
  const said = h("p", { class: "help model-said", role: "status" });
  let loading = null; // the path of the model that was chosen and is not here yet
  const select = h("select", { id, onchange: () => choose(select.value) });
  const free = button("Unload", async () => {
    await post("api/llm/unload", { path: select.value });
    loaded.delete(select.value);
    say();
  }, { kind: "quiet", title: "Give its memory back; it is loaded again when it is asked something" });
  const element = h("div", { class: "model-choice" }, h("label", { for: id }, label), select, h("div", { class: "model-line" }, said, free));

  function update(all) {
    const rest = path && !all.some((model) => model.path === path) ? [{ path, name: path }] : [];
    replace(select, [...all, ...rest].map((model) => h("option", { value: model.path, selected: model.path === path },
      model.parameters ? `${model.path} (${number(model.parameters, { short: true })})` : model.path)));
    say();
  }

  function say() {
    const model = models().find((each) => each.path === select.value);
    const found = loaded.get(select.value);
    free.hidden = !found;
    if (loading) return setText(said, waitingWords() || `Loading ${loading} …`);
    const facts = [
      model?.parameters ?? found?.parameters ? `${number(model?.parameters ?? found.parameters, { short: true })} parameters` : "",
      model?.size_bytes ? bytes(model.size_bytes) : "",
      model?.context ?? found?.context ? `context of ${number(model?.context ?? found.context)} tokens` : "",
      found ? `loaded in ${duration(found.seconds)}` : "loaded when it is first asked",
    ];
    return setText(said, facts.filter(Boolean).join(" · "));
  }

  async function choose(next) {
    choosing += 1;
    loading = next;
    say();
    select.disabled = true;
    try {
      const found = await ready(next);
      path = next;
      onchoose(next, found);
    } catch (error) {
      if (path) select.value = path;
      onerror(error);
    } finally {
      choosing -= 1;
      select.disabled = false;
      loading = null;
      say();
    }
  }

  async function loadChosen() {
    loading = select.value;
    say();
    try {
      return await ready(select.value);
    } finally {
      loading = null;
      say();
    }
  }

  update(models());
  return { element, say, update, ready: loadChosen };
}
