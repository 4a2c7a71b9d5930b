// From nothing to a model that answers, in three steps. What was reached is read from the workspace, so that a reload forgets nothing.

import { h, newId, replace } from "../dom.js";
import { loss, number } from "../format.js";
import { isEnded, start } from "../jobs.js";
import { sampleButton } from "../models/sample.js";
import { link } from "../route.js";
import { button, progress } from "../ui.js";
import { textChoice } from "./choose_text.js";

const QUICK = { "embed-dim": 64, "num-layers": 2, "num-heads": 2, "seq-len": 64, "batch-size": 4, "vocab-size": 512, steps: 30, "sample-every": 10 };
const TIMES = [
  ["Some seconds, to see how it works", QUICK],
  ["5 minutes", { minutes: 5 }],
  ["20 minutes", { minutes: 20 }],
  ["1 hour", { hours: 1 }],
  ["2 hours", { hours: 2 }],
  ["8 hours, a night", { hours: 8 }],
];

/** {element, jobs(list), runs(list)} */
export function firstSteps() {
  let chosen = null;
  let begun = null; // the path of the run that was started here
  let bar = null;
  let known = [];
  let talked = ""; // what the third step shows
  const fault = h("p", { class: "error", role: "alert", hidden: true });
  const timeId = newId("time");
  const time = h("select", { id: timeId }, TIMES.map(([label], index) => h("option", { value: String(index) }, label)));
  const go = button("Train", train, { kind: "primary", disabled: true });
  const more = h("a", { href: link("training") }, "All options");
  const talk = h("div", { class: "stack" });
  const running = h("div", { class: "stack" });
  const text = textChoice((path) => {
    chosen = path;
    fault.hidden = true;
    go.disabled = path === null;
    more.href = link("training", "", path === null ? null : { data: path });
    if (path !== null) go.focus();
  });

  async function train() {
    fault.hidden = true;
    try {
      const job = await start("train", { data: chosen, out: freeName(chosen), ...TIMES[Number(time.value)][1] });
      begins(job.run);
      show(job);
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
  }

  // From here on the third step is about this run, not about one that was there before.
  function begins(run) {
    begun = run;
    talked = "";
    replace(talk, h("p", { class: "help" }, h("strong", {}, run), " is learning. It can be talked to here after its first evaluation, and gets better until its end."));
    sayTalk();
  }

  function sayTalk() {
    const ready = known.filter((run) => run.val_loss !== null || ["finished", "stopped", "paused"].includes(run.state)).filter((run) => !run.damaged);
    const newest = ready.find((run) => run.run === begun) ?? (begun ? null : ready[0]);
    const shown = newest ? `${newest.run} ${newest.val_loss}` : "";
    if (!newest || shown === talked) return;
    talked = shown;
    replace(talk, h("p", {}, h("strong", {}, newest.run), newest.parameters ? `: ${number(newest.parameters, { short: true })} parameters` : "", newest.val_loss ? `, validation loss ${loss(newest.val_loss)}` : ""),
      h("div", { class: "row" }, h("a", { class: "button primary", href: link("llm", newest.run) }, "Talk to it"), h("a", { href: link("models", newest.run) }, "Export it")));
  }

  function freeName(path) {
    const base = `runs/${path.split("/").pop().replace(/\.[^.]+$/, "").replaceAll(/[^\w.-]+/g, "-").replace(/^[-.]+/, "") || "first"}`;
    let name = base;
    for (let count = 2; known.some((run) => run.run === name); count += 1) name = `${base}-${count}`;
    return name;
  }

  function show(job) {
    if (!job || isEnded(job)) {
      bar = null;
      replace(running, job && job.state === "failed" ? [h("p", { class: "error" }, `It failed: ${job.error || "see its log"}`), h("a", { href: link("system", "", { job: job.id }) }, "Log")] : null);
      return;
    }
    if (bar) return bar.update(job);
    bar = progress(job);
    replace(running, bar.element, h("a", { href: link("training", job.run) }, "Watch it learn"));
  }

  const step = (index, title, ...children) => h("li", { class: "step" }, h("h3", {}, h("span", { class: "count", "aria-hidden": "true" }, String(index)), title), h("div", { class: "stack" }, children));
  const element = h("section", { class: "card", "aria-labelledby": "first-title" },
    h("h2", { id: "first-title" }, "From text to a model that answers"),
    h("ol", { class: "steps" },
      step(1, "Choose text", ...text.children),
      step(2, "Train", h("div", { class: "field" }, h("label", { for: timeId }, "How long may it take?"), time, h("p", { class: "help" }, "The size of the model and everything else is chosen for that time. The longer, the better it writes.")), h("div", { class: "row" }, go, more), fault, running),
      step(3, "Talk", talk)));
  replace(talk, h("p", { class: "help" }, "When a model has learnt, you can talk to it here. A small one that comes with CLLM shows at once how that is."),
    h("div", { class: "row" }, sampleButton()));
  return {
    element,
    jobs(list) {
      text.jobs(list);
      const own = list.filter((job) => job.command === "train" && job.run && (begun ? job.run === begun : !isEnded(job)));
      const [newest] = own.sort((a, b) => b.created - a.created);
      if (newest && !begun) begins(newest.run);
      show(newest);
    },
    runs(list) {
      known = list;
      sayTalk();
    },
  };
}
