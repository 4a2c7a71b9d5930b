// The runs of the workspace, as lists and tables.

import { events, get } from "../api.js";
import { h } from "../dom.js";
import { ago, loss, number, UNKNOWN } from "../format.js";
import { link } from "../route.js";
import { badge, empty, table, toast } from "../ui.js";

const EVERY = 2000; // milliseconds: the list is fetched at most this often, however many runs change

/** Calls `listener(runs)` now and when the list changes, the newest first. Answers a function that ends it. */
export function followRuns(listener) {
  let ended = false;
  let waiting = 0;
  let last = 0;
  const fetchNow = async () => {
    waiting = 0;
    last = performance.now();
    try {
      const runs = await get("api/runs");
      if (!ended) listener(runs.sort((a, b) => b.updated - a.updated));
    } catch (error) {
      if (error.status) toast(error.message, { kind: "error" }); // without an answer the banner says that the connection is lost
    }
  };
  const soon = () => {
    if (!waiting && !ended) waiting = setTimeout(fetchNow, Math.max(0, last + EVERY - performance.now()));
  };
  const end = events.subscribe("runs", soon);
  fetchNow();
  return () => {
    ended = true;
    clearTimeout(waiting);
    end();
  };
}

/** A table of runs with update(runs). chosen: a set of run paths that the boxes fill; none without it. */
export function runTable({ chosen = null } = {}) {
  const tick = {
    key: "chosen", title: "Compare",
    cell: (run) => h("input", { type: "checkbox", "aria-label": `Compare ${run.run}`, checked: chosen.has(run.run), onchange: (event) => {
      if (event.target.checked) chosen.add(run.run);
      else chosen.delete(run.run);
    } }),
  };
  const columns = [
    chosen && tick,
    { key: "name", title: "Run", wide: true, cell: (run) => h("a", { href: link("training", run.run) }, run.run), sort: (run) => run.run },
    { key: "state", title: "State", cell: (run) => (run.damaged ? h("span", { title: run.damaged }, badge("failed", "damaged")) : badge(run.state)), sort: (run) => run.state },
    { key: "step", title: "Step", align: "right", cell: (run) => (run.steps ? `${number(run.step)} of ${number(run.steps)}` : number(run.step)), sort: (run) => run.step },
    { key: "loss", title: "Loss", align: "right", cell: (run) => loss(run.loss), sort: (run) => run.loss },
    { key: "val_loss", title: "Validation loss", align: "right", cell: (run) => loss(run.val_loss), sort: (run) => run.val_loss },
    { key: "parameters", title: "Parameters", align: "right", cell: (run) => number(run.parameters, { short: true }), sort: (run) => run.parameters },
    { key: "speed", title: "Speed", align: "right", cell: (run) => (run.tokens_per_second ? number(run.tokens_per_second, { short: true, unit: "tokens/s" }) : UNKNOWN), sort: (run) => run.tokens_per_second },
    { key: "updated", title: "Changed", align: "right", cell: (run) => ago(run.updated), sort: (run) => run.updated },
  ].filter(Boolean);
  return table(columns, [], { caption: "Runs of the workspace", key: (run) => run.run, empty: empty("No run yet. A training needs only a folder of text.") });
}
