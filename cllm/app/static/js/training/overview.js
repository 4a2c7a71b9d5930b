// What stands on the Training tab first: the form, what trains and waits, and the runs.

import { h, replace } from "../dom.js";
import { followJobs, isEnded, jobCard } from "../jobs.js";
import { link } from "../route.js";
import { button, toast } from "../ui.js";
import { followRuns, runTable } from "./runs.js";
import { startCard } from "./start.js";

const FAILED_SHOWN = 3; // newest trainings that failed, with the reason; those that ended well stand among the runs

/** {element, unmount}. params: of the address; each fills in the option of its name. */
export function overview(params) {
  const queue = h("div", { class: "grid" });
  const queueCard = h("section", { class: "stack", "aria-label": "Queue", hidden: true }, h("h2", {}, "Running and waiting"), queue);
  const chosen = new Set();
  const compare = button("Compare", () => {
    if (chosen.size < 2) return toast("Tick at least two runs to compare them.");
    location.hash = link("training", "", [...chosen].map((run) => ["compare", run]));
  }, { title: "Draw the curves of the ticked runs on one chart" });
  const runs = runTable({ chosen });
  const start = startCard(params);
  const element = h("div", { class: "stack" }, h("h1", {}, "Training"), queueCard, start.element,
    h("section", { class: "card", "aria-labelledby": "runs-title" }, h("div", { class: "head" }, h("h2", { id: "runs-title" }, "Runs"), compare), runs));

  const cards = new Map();
  const endJobs = followJobs((jobs) => {
    const own = jobs.filter((job) => job.command === "train");
    const active = own.filter((job) => !isEnded(job));
    const failed = own.filter((job) => ["failed", "lost"].includes(job.state)).sort((a, b) => b.created - a.created).slice(0, FAILED_SHOWN);
    const shown = [...active, ...failed];
    for (const id of [...cards.keys()]) if (!shown.some((job) => job.id === id)) cards.delete(id);
    for (const job of shown) {
      if (cards.has(job.id)) cards.get(job.id).update(job);
      else cards.set(job.id, cardOf(job));
    }
    replace(queue, shown.map((job) => cards.get(job.id).element));
    queueCard.hidden = !shown.length;
  });
  const endRuns = followRuns((list) => runs.update(list));
  return {
    element,
    unmount() {
      endJobs();
      endRuns();
      start.unmount();
    },
  };
}

function cardOf(job) {
  const card = jobCard(job, { onforget: () => {} });
  if (job.run) card.element.append(h("a", { href: link("training", job.run) }, `Watch ${job.run}`));
  return card;
}
