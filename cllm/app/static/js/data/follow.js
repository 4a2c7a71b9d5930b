// The switch "go on learning": training that follows a data set or a crawl, and what became of its rounds.

import { events, get, post } from "../api.js";
import { h, newId, replace, setText } from "../dom.js";
import { bytes, loss, number, plural } from "../format.js";
import { followJobs, isEnded, isFailed, start } from "../jobs.js";
import { link } from "../route.js";
import { badge, dialog, form, progress, table, toast } from "../ui.js";

const OPTIONS = ["out", "preset", "steps", "round-bytes", "look-every", "replay", "tolerance", "keep-text"];

/** {element, end()} for the text at `path`; `following` is the training in rounds that follows it, begun here or in a shell, or null. */
export function followView(path, following) {
  const labelId = newId("follow");
  const toggle = h("button", { type: "button", class: "switch", role: "switch", "aria-checked": "false", "aria-labelledby": labelId, onclick: () => change().catch(told) }, h("span", { class: "knob", "aria-hidden": "true" }));
  const state = h("span");
  const said = h("p", { class: "help" }, "A model learns this text in rounds, and a new one begins when enough new text has come. A round is kept when the new text became easier and the old one not harder.");
  const fault = h("pre", { class: "job-error", hidden: true });
  const bar = progress(null);
  const rounds = table([
    { key: "round", title: "Round", cell: (row) => number(row.round), sort: (row) => row.round },
    { key: "came", title: "What came", cell: (row) => `${plural(row.documents, "document")}, ${bytes(row.bytes)}`, wide: true },
    { key: "replayed", title: "Learnt again", cell: (row) => bytes(row.replayed_bytes) },
    { key: "new", title: "Loss of new text", cell: (row) => fromTo(row.new_before, row.new_after), align: "right" },
    { key: "old", title: "Loss of old text", cell: (row) => fromTo(row.old_before, row.old_after), align: "right" },
    { key: "accepted", title: "Outcome", cell: (row) => h("div", {}, badge(row.accepted ? "done" : "failed", row.accepted ? "accepted" : "undone"), h("p", { class: "help" }, row.reason)), wide: true },
  ], [], { caption: "Rounds", key: (row) => row.round, empty: "No round has ended yet.", sorted: { key: "round", descending: true } });
  const links = h("div", { class: "row" });
  rounds.hidden = true;
  const element = h("section", { class: "card" }, h("div", { class: "head" }, h("h2", { id: labelId }, "Go on learning"), state, toggle), said, fault, bar.element, rounds, links);
  let job = null;
  let shown = null; // the training whose rounds stand in the table

  const endRuns = events.subscribe("runs", look); // a run has another round
  const endJobs = followJobs((jobs) => {
    const mine = jobs.filter((each) => each.command === "train" && each.options.follow && samePath(each.options.data, path));
    job = mine.find((each) => !isEnded(each)) ?? mine.sort((one, other) => other.created - one.created)[0] ?? null;
    draw();
  });

  function draw() {
    const on = Boolean(job) && !isEnded(job) && job.state !== "paused";
    toggle.setAttribute("aria-checked", String(on));
    replace(state, job ? badge(job.state) : null);
    bar.update(job ?? {});
    bar.element.hidden = !on;
    const run = job?.run ?? following;
    rounds.hidden = !run;
    if (!run) return;
    setText(fault, isFailed(job) ? job.error : "");
    fault.hidden = !fault.textContent;
    replace(links, h("a", { href: link("training", run) }, `Watch ${run}`), job ? h("a", { href: link("system", "", { job: job.id }) }, "Log") : null);
    if (run !== shown) look();
    shown = run;
  }

  function look() {
    const run = job?.run ?? following;
    if (run) roundsOf(run).then((found) => rounds.update(found), () => {}); // the banner says that the connection is lost
  }

  async function change() {
    if (job && !isEnded(job) && job.state !== "paused") return post(`api/jobs/${encodeURIComponent(job.id)}/stop`);
    if (job && ["paused", "stopped", "lost"].includes(job.state)) return post(`api/jobs/${encodeURIComponent(job.id)}/resume`); // with all its settings
    return begin();
  }

  async function begin() {
    const { train } = await get("api/commands");
    const declared = [...train.arguments, ...train.options].filter((option) => OPTIONS.includes(option.name));
    const fields = form(declared, [{ title: null, names: OPTIONS }]);
    if (job?.options) fields.set(job.options);
    else fields.field("out").set(following ?? `runs/${path.split("/").filter(Boolean).at(-1) ?? "text"}-followed`);
    await dialog({
      title: "Go on learning",
      body: h("div", { class: "stack" }, fields.element, h("p", { class: "help" }, "For the size of the model and all other settings ", h("a", { href: link("training", "", { data: path, follow: "1" }) }, "use the Training tab"), ".")),
      wide: true,
      actions: [{ label: "Start", kind: "primary", run: async () => {
        fields.clear();
        try {
          await start("train", { ...job?.options, data: path, follow: true, ...fields.values() });
          return true;
        } catch (error) {
          if (!fields.error(error.param, error.message)) throw error;
          return undefined;
        }
      } }],
    });
  }

  draw();
  return { element, end() {
    endRuns();
    endJobs();
  } };
}

// A training that has just been asked for is no run yet.
async function roundsOf(run) {
  const runs = await get("api/runs");
  return runs.some((each) => each.run === run) ? get("api/runs/rounds", { run }) : [];
}

const told = (error) => toast(error.message, { kind: "error" });
const samePath = (one, other) => String(one).replace(/\/+$/, "") === other.replace(/\/+$/, "");
const fromTo = (before, after) => (typeof before === "number" ? `${loss(before)} → ${loss(after)}` : loss(after));
