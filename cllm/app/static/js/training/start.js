// The form that starts a training: every option of `cllm train`, the few important ones first, and the plan before the start.

import { get, post } from "../api.js";
import { h, newId, replace, setText } from "../dom.js";
import { start } from "../jobs.js";
import { link } from "../route.js";
import { button, form, spinner, toast } from "../ui.js";
import { planView } from "./plan.js";

const FIRST = ["data", "out", "preset", "steps"];
const wide = window.matchMedia("(min-width: 760px)").matches; // on a phone the button to start would be far below
const GROUPS = [
  { names: FIRST },
  { title: "Size of the model", open: wide, names: ["embed-dim", "num-layers", "num-heads", "num-kv-heads", "ffn-dim", "vocab-size", "seq-len", "tokenizer"] },
  { title: "How it learns", open: wide, names: ["hours", "minutes", "batch-size", "learning-rate", "epochs", "grad-accum", "warmup", "schedule", "optimizer", "patience"] },
  { title: "Start from a model, fine-tune", names: ["from", "lora-rank", "lora-alpha", "lora-targets"] },
  { title: "Go on while the text grows", names: ["follow", "once", "replay", "tolerance", "round-bytes", "look-every", "keep-text"] },
  { title: "What is written, and how often", names: ["eval-every", "checkpoint-every", "sample-every", "keep", "keep-every"] },
];
const LEFT_OUT = ["plan", "find-lr", "json", "set"]; // the plan has its button; what --set reaches is a field of its own here
const RECIPES = [
  ["A quick look", "Thirty steps of a very small model: it shows in seconds whether everything works.",
    { "embed-dim": 64, "num-layers": 2, "num-heads": 2, "seq-len": 64, "batch-size": 4, "vocab-size": 512, steps: 30, "sample-every": 10 }],
  ["A small model", "1 million parameters: an hour or less on a laptop.", { preset: "cllm-1m" }],
  ["A good start", "5 million parameters, everything else as CLLM chooses it.", { preset: "cllm-5m" }],
  ["Everything by default", "Takes all entries back but data and out.", {}],
];
const TIMES = [["as long as the settings say", {}], ["5 minutes", { minutes: 5 }], ["20 minutes", { minutes: 20 }], ["1 hour", { hours: 1 }], ["2 hours", { hours: 2 }], ["8 hours", { hours: 8 }], ["24 hours", { hours: 24 }], ["as “hours” or “minutes” say", null]];

/** {element, unmount}. params: values by option name that are filled in. */
export function startCard(params = new URLSearchParams()) {
  const leaving = new AbortController();
  let end = () => {};
  const place = h("div", { class: "stack" }, spinner("Loading the options …"));
  const element = h("section", { class: "card", "aria-labelledby": "start-title" }, h("h2", { id: "start-title" }, "Start a training"), place);
  get("api/commands", null, { signal: leaving.signal }).then((commands) => {
    end = build(place, commands.train, params, leaving.signal);
  }, (error) => {
    if (error.name !== "AbortError") replace(place, h("p", { class: "error", role: "alert" }, error.message), button("Try again", () => location.reload()));
  });
  return { element, unmount() {
    leaving.abort();
    end();
  } };
}

function build(place, declared, params, signal) {
  const options = [...declared.arguments, ...declared.options];
  const fields = form(options, GROUPS, { leave: LEFT_OUT, onsubmit: () => go.click(), pick: { data: "any", out: "folder", from: "any" } });
  const shown = planView();
  const fault = h("p", { class: "error", role: "alert", hidden: true });
  const found = h("p", { class: "help", role: "status" });
  const begun = h("p", { role: "status" });
  const filterId = newId("filter");
  const filter = h("input", { id: filterId, type: "search", placeholder: "for example: learning, eval, seed", oninput: () => {
    const count = fields.filter(filter.value);
    setText(found, filter.value ? `${count} of ${fields.fields.length} options` : "");
  } });
  const timeId = newId("time");
  const time = h("select", { id: timeId }, TIMES.map(([label], index) => h("option", { value: String(index) }, label)));
  const timed = () => ({ hours: fields.field("hours").value(), minutes: fields.field("minutes").value() });
  const sayTime = () => { // what was entered in the two fields, also by hand
    const now = timed();
    const found = TIMES.findIndex(([, each]) => each && each.hours === now.hours && each.minutes === now.minutes);
    time.value = String(found < 0 ? TIMES.length - 1 : found);
  };

  const refused = (error) => {
    if (error.name === "AbortError") return;
    if (fields.error(error.param, error.message)) return;
    setText(fault, error.message);
    fault.hidden = false;
  };
  const begin = () => {
    fields.clear();
    fault.hidden = true;
    begun.className = "";
    replace(begun);
    if (fields.field("data")?.value() || fields.field("resume")?.value()) return true;
    fields.error("data", "data is needed: choose a folder or a file of text.");
    return false;
  };
  const predict = async () => {
    if (!begin()) return;
    try {
      shown.wait();
      const { plan, text } = await post("api/plan", { options: fields.values() }, { signal });
      await shown.show(plan, text);
    } catch (error) {
      shown.clear();
      refused(error);
    }
  };
  const go = button("Start", async () => {
    if (!begin()) return;
    try {
      const job = await start("train", fields.values());
      begun.className = "notice";
      replace(begun, job.state === "queued" ? `${job.title} waits until the device is free. ` : `${job.title} has started. `, job.run ? h("a", { href: link("training", job.run) }, "Watch it") : null);
    } catch (error) {
      refused(error);
    }
  }, { kind: "primary", type: "button" });
  const plan = button("Show the plan", predict, { title: "Parameters, memory, time and tokens, before anything is trained" });
  const recipes = RECIPES.map(([label, text, values]) => button(label, () => {
    const kept = Object.fromEntries(["data", "out"].map((name) => [name, fields.field(name)?.value()]).filter(([, value]) => value !== undefined));
    fields.set({ ...kept, ...values });
    shown.stale();
    toast(text);
  }, { title: text }));

  fields.element.addEventListener("input", () => {
    shown.stale();
    sayTime();
  });
  const given = Object.fromEntries([...params].filter(([name]) => fields.field(name)).map(([name, value]) => [name, fields.field(name).option.type === "boolean" ? value !== "0" && value !== "false" : value]));
  fields.set(given);
  time.addEventListener("change", () => {
    const chosen = TIMES[Number(time.value)][1];
    if (!chosen) return void fields.error("hours", "Say how many hours here, or how many minutes beside it.");
    fields.clear();
    for (const name of ["hours", "minutes"]) fields.field(name).set(chosen[name]);
    if (!Object.keys(chosen).length) return undefined;
    for (const name of ["steps", "epochs"]) fields.field(name).set(undefined); // the clock takes their place
    return fields.field("data").value() && predict();
  });

  replace(place,
    h("div", { class: "row", role: "group", "aria-label": "Ready-made settings" }, recipes),
    h("div", { class: "two start" },
      h("div", { class: "stack" },
        h("div", { class: "field" }, h("label", { for: filterId }, "Find an option"), filter, found),
        fields.element),
      h("div", { class: "stack side" },
        h("div", { class: "field" }, h("label", { for: timeId }, "How long may it take?"), time, h("p", { class: "help" }, "The training then ends in that time, and what nobody has entered is chosen for it: the size of the model, the number of steps, the learning rate.")),
        shown.element, fault, h("div", { class: "actions" }, plan, go), begun)));
  return shown.unmount;
}
