// One run as it trains, or as it went: figures, curves, layers, samples, faults, checkpoints.

import { events, get, post } from "../api.js";
import { chart } from "../chart.js";
import { h, replace, setText } from "../dom.js";
import { bytes, duration, loss, number, percent, scientific, UNKNOWN } from "../format.js";
import { followJobs, isEnded, isFailed, jobButtons, retryLink } from "../jobs.js";
import { link } from "../route.js";
import { badge, button, liveText, progress, toast } from "../ui.js";
import { AXES, choice } from "./axis.js";
import { Curves } from "./curves.js";
import { details } from "./details.js";

const REDRAW = 250; // milliseconds between drawings, however fast the rows come

/** {element, unmount} of the run at this path of the workspace. */
export function runView(run) {
  const leaving = new AbortController();
  const curves = new Curves(run, () => soon(), leaving.signal);
  const state = h("span");
  const tools = h("div", { class: "row" });
  const figures = h("dl", { class: "figures" });
  const workPlace = h("div", {});
  const said = liveText(30);
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const bar = h("progress", { max: 1, "aria-label": "Progress of the training", hidden: true });
  const plots = PLOTS.map((plot) => {
    const place = h("div");
    const card = h("section", { class: `card ${plot.wide ? "whole" : ""}`, "aria-label": plot.title, hidden: true }, h("h2", {}, plot.title), place);
    const drawn = chart(place, { series: [], x: AXES.step, y: { label: plot.unit, format: plot.format }, height: plot.wide ? 320 : 200, name: plot.title, onzoom: zoom });
    return { ...plot, card, drawn };
  });
  const more = details(run, leaving.signal);
  let about = null; // what GET /api/runs/detail says
  let job = null;
  let jobsKnown = false;
  let isMissing = false; // whether there is no folder, as far as was looked
  let work = null;
  let axis = "step";
  let log = false;
  let timer = 0;

  const newest = h("section", { class: "card", "aria-label": "Newest figures" }, workPlace, bar, figures);
  const settings = h("div", { class: "row" },
    choice("Curves over", { step: "Steps", tokens: "Tokens", time: "Time" }, axis, (value) => {
      axis = curves.axis = value;
      zoom(null);
    }),
    choice("Scale of the loss", { linear: "Linear", log: "Logarithmic" }, "linear", (value) => {
      log = value === "log";
      draw();
    }));
  const element = h("div", { class: "stack" },
    h("div", { class: "row" }, h("a", { href: link("training") }, "All trainings")),
    h("div", { class: "head" }, h("h1", {}, run), state, tools),
    problem, newest, said.element, settings,
    h("div", { class: "plots" }, plots.map((plot) => plot.card)), more.element);

  function zoom(range) {
    curves.range = range;
    if (about) curves.load().catch(failed);
  }

  function soon() {
    if (!timer && !leaving.signal.aborted) timer = setTimeout(draw, REDRAW);
  }

  function draw() {
    clearTimeout(timer);
    timer = 0;
    if (leaving.signal.aborted) return;
    for (const plot of plots) {
      const series = plot.series(curves);
      const empty = series.every((each) => !each.y.some((value) => value !== null));
      plot.card.hidden = empty;
      plot.drawn.update({ series, x: AXES[axis], log: plot.log === true && log, zoom: curves.range });
    }
    sayFigures();
    sayWork();
    sayState();
  }

  function sayFigures() {
    const row = curves.newest;
    const evaluation = curves.evaluations[curves.evaluations.length - 1];
    const last = (key) => (row ? row[key] : lastOf(curves.series[key]?.mean));
    const step = Math.max(curves.lastStep, about?.step ?? 0, 0);
    const steps = about?.steps;
    const training = about?.state === "training";
    const left = training && steps && row?.seconds && row.step ? ((steps - step) * row.seconds) / row.step : about?.eta_seconds;
    const pairs = [
      ["Step", steps ? `${number(step)} of ${number(steps)}` : number(step)],
      ["Loss (nats/token)", loss(last("loss"))],
      ["Validation loss", loss(evaluation?.loss ?? about?.val_loss)],
      ["Bits per byte", evaluation?.bits_per_byte ? evaluation.bits_per_byte.toFixed(3) : UNKNOWN],
      ["Learning rate", scientific(last("learning_rate"))],
      ["Gradient norm", scientific(last("gradient_norm"))],
      ["Speed (tokens/s)", number(last("tokens_per_second"), { short: true })],
      ["Share of peak", percent(last("share_of_peak"))],
      ["Memory", bytes(last("memory_bytes"))],
      ["Tokens learnt", number(row?.tokens ?? about?.tokens, { short: true })],
      ["Trained for", duration(row?.seconds)],
      ["Time left", training ? duration(left) : UNKNOWN],
    ].filter(([, value]) => value !== UNKNOWN);
    if (figures.children.length !== pairs.length) replace(figures, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    pairs.forEach(([name, value], index) => {
      setText(figures.children[index].firstChild, name);
      setText(figures.children[index].lastChild, value);
    });
    bar.hidden = !(training && steps && step);
    if (steps) bar.value = Math.min(1, step / steps);
    if (training) said.say(`Step ${number(step)}, loss ${loss(last("loss"))}`);
  }

  // While text is read and tokens are made there are no figures yet, but the job tells how far it is.
  function sayWork() {
    const shown = job && !isEnded(job) && curves.lastStep < 1;
    if (!work && shown) work = progress(job);
    work?.update(job);
    replace(workPlace, shown ? work.element : null);
  }

  function sayState() {
    const word = job && !isEnded(job) ? job.state : about?.state ?? job?.state;
    if (word && state.textContent !== word) replace(state, badge(word));
    const act = (verb) => async () => {
      job = await post(`api/jobs/${encodeURIComponent(job.id)}/${verb}`);
      sayState();
    };
    const ready = job && isEnded(job) ? null : job;
    const fault = isFailed(job) ? job.error : about?.damaged ?? (isMissing && jobsKnown && !ready ? missing() : "");
    setText(problem, fault);
    problem.hidden = !fault;
    newest.hidden = isMissing && !ready;
    settings.hidden = newest.hidden || curves.lastStep < 1 || Number.isInteger(about?.rounds); // the curves are those of the rounds
    const shown = `${job?.id} ${job?.state} ${Boolean(about?.checkpoints?.length)} ${about?.newest} ${isMissing}`;
    if (tools.getAttribute("data-shown") === shown) return;
    tools.setAttribute("data-shown", shown);
    const hasModel = about?.checkpoints?.length;
    replace(tools, ready ? jobButtons(ready, act) : null,
      !ready && about && about.steps && about.step < about.steps && hasModel ? button("Continue", () => resume(), { kind: "primary", title: "Go on from its last checkpoint" }) : null,
      about?.newest ? h("a", { class: "button", href: link("training", about.newest) }, "Training of the newest round") : null,
      hasModel ? [h("a", { class: "button", href: link("llm", run) }, "Talk to it"), h("a", { class: "button", href: link("models", run) }, "Model and export")] : null,
      isMissing && isFailed(job) ? retryLink(job) : null,
      job ? h("a", { class: "button quiet", href: link("system", "", { job: job.id }) }, "Log") : null);
  }

  const missing = () => (job?.state === "stopped" ? "This training was stopped before it had begun, so that there is nothing to see of it." : `There is no run in ${run}. The list of all trainings has those that there are.`);

  async function resume() {
    job = await post("api/jobs", { command: "train", options: { out: run, resume: true } });
    toast(`${job.title} goes on.`);
    sayState();
  }

  // A run begins some time after its job: until its folder stands there, only the job is shown.
  async function exists() {
    if (about) return true;
    const runs = await get("api/runs", null, { signal: leaving.signal });
    isMissing = !runs.some((each) => each.run === run);
    if (isMissing) sayState();
    return !isMissing;
  }

  async function look() {
    about = await get("api/runs/detail", { run }, { signal: leaving.signal });
    more.show(about);
    sayState();
    sayFigures();
  }

  const failed = (error) => {
    if (error.name !== "AbortError" && error.status) toast(error.message, { kind: "error" });
  };

  async function everything() {
    if (!await exists()) return;
    look().catch(failed);
    curves.load().catch(failed);
    more.load();
  }
  const again = () => everything().catch(failed);

  const endRun = events.subscribe(`run:${run}`, (event) => {
    if (event.kind === "reset" || !about) return again();
    const rows = event.rows ?? [];
    curves.add(rows);
    more.add(rows);
    const changed = event.state && event.state !== about?.state;
    if (changed) more.load();
    if (changed || rows.some((row) => row.kind === "eval" || row.kind === "final")) look().catch(failed);
    sayFigures();
  });
  const endRuns = events.subscribe("runs", () => Number.isInteger(about?.rounds) && again()); // one in rounds has another one
  const endJobs = followJobs((jobs) => {
    const before = jobsKnown ? job?.state : undefined;
    jobsKnown = true;
    job = jobs.filter((each) => each.run === run && each.command === "train").sort((a, b) => b.created - a.created)[0] ?? null;
    if (!about || before !== job?.state) again();
    sayWork();
    sayState();
  });
  return {
    element,
    unmount() {
      leaving.abort();
      clearTimeout(timer);
      endRun();
      endRuns();
      endJobs();
      more.unmount();
      for (const plot of plots) plot.drawn.destroy();
    },
  };
}

const seconds = (value) => duration(value);
const PLOTS = [
  { title: "Loss", unit: "nats per token", format: (value) => (Math.abs(value) < 10 ? value.toFixed(2) : value.toFixed(1)), wide: true, log: true,
    series: (curves) => [curves.line("loss", "training", { colour: 0 }), curves.validation("validation", { colour: 1 }), curves.unigram("unigram model", { colour: 6 })].filter(Boolean) },
  { title: "Learning rate", unit: "", format: scientific, series: (curves) => [curves.line("learning_rate", "learning rate", { colour: 2 })] },
  { title: "Gradient norm", unit: "", format: scientific, log: true, series: (curves) => [curves.line("gradient_norm", "gradient norm", { colour: 3 })] },
  { title: "Speed", unit: "tokens/s", format: (value) => number(value, { short: true }), series: (curves) => [curves.line("tokens_per_second", "tokens per second", { colour: 5 })] },
  { title: "Share of peak", unit: "of the fastest product", format: percent, series: (curves) => [curves.line("share_of_peak", "share of peak", { colour: 0 })] },
  { title: "Time of a step", unit: "", format: seconds,
    series: (curves) => [["data_seconds", "data", 6], ["forward_seconds", "forward", 0], ["backward_seconds", "backward", 3], ["optimizer_seconds", "optimizer", 2]]
      .map(([key, label, colour]) => curves.line(key, label, { colour })).filter((each) => each.y.some((value) => value !== null)) },
  { title: "Memory", unit: "", format: bytes, series: (curves) => [curves.line("memory_bytes", "memory", { colour: 7 })] },
];

function lastOf(values) {
  return values?.findLast((value) => value !== null);
}
