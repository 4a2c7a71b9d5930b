// Jobs: what the app does in processes of its own. Started from a form, followed as they go on, stopped and resumed.

import { events, get, post } from "./api.js";
import { h, replace, setText } from "./dom.js";
import { ago, duration } from "./format.js";
import { link } from "./route.js";
import { badge, button, progress } from "./ui.js";

const ENDED = new Set(["done", "failed", "stopped", "lost"]);
const PAUSABLE = new Set(["train", "crawl"]);

export const isEnded = (job) => ENDED.has(job.state);
export const isFailed = (job) => job?.state === "failed" || job?.state === "lost";

/** Starts a command with its declared options. Throws ApiError with the option that is wrong as `param`. */
export const start = (command, options) => post("api/jobs", { command, options });

/** A link to the form of a training, filled in as it was for this one. */
export function retryLink(job) {
  const single = Object.entries(job.options).filter(([, value]) => typeof value !== "object");
  return h("a", { class: "button", href: link("training", "", Object.fromEntries(single)) }, "Change and try again");
}

/** Calls `listener(jobs)` now and whenever one changes. Answers a function that ends it. */
export function followJobs(listener) {
  let ended = false;
  const take = (jobs) => !ended && listener(jobs);
  const fetchAll = () => get("api/jobs").then(take, () => {}); // the banner says that the connection is lost; the next event brings the list
  const end = events.subscribe("jobs", (event) => (event.kind === "jobs" && event.jobs ? take(event.jobs) : fetchAll()));
  fetchAll();
  return () => {
    ended = true;
    end();
  };
}

/** A job as a card: state, progress, what went wrong, and what can be done with it. `next(job)` is a link to what a job that is done has made;
 * `onforget(job)` is called when it is taken off the list. {element, update(job)} */
export function jobCard(job, { onforget = null, next = null } = {}) {
  const state = h("span");
  const when = h("span", { class: "help" });
  const bar = progress(job);
  const fault = h("pre", { class: "job-error", hidden: true });
  const tools = h("div", { class: "row" });
  const element = h("article", { class: "card job", "aria-label": job.title }, h("div", { class: "head" }, h("h3", {}, job.title), state), when, bar.element, fault, tools);
  let shown = "";

  const act = (verb) => async () => update(await post(`api/jobs/${encodeURIComponent(job.id)}/${verb}`));

  function update(now) {
    job = now?.id ? now : job;
    bar.update(job);
    setText(when, timeOf(job));
    setText(fault, isFailed(job) ? job.error : "");
    fault.hidden = !fault.textContent;
    bar.element.hidden = isEnded(job) && !job.progress?.text;
    if (job.state === shown) return;
    shown = job.state;
    replace(state, badge(job.state));
    replace(tools, job.state === "done" ? next?.(job) : null, job.command === "train" && isFailed(job) ? retryLink(job) : null, jobButtons(job, act), h("a", { class: "button quiet", href: link("system", "", { job: job.id }) }, "Log"),
      isEnded(job) && onforget ? button("Forget", async () => {
        await post(`api/jobs/${encodeURIComponent(job.id)}/forget`);
        onforget(job);
      }, { kind: "quiet", title: "Take it off the list; what it made stays" }) : null);
  }

  update(job);
  return { element, update };
}

/** The buttons that a job's state allows; act(verb) answers what one of them does. */
export function jobButtons(job, act) {
  const buttons = [];
  if (job.state === "running" && PAUSABLE.has(job.command)) buttons.push(button("Pause", act("pause")));
  if (job.state === "paused") buttons.push(button("Resume", act("resume"), { kind: "primary" }));
  if (["running", "queued", "paused"].includes(job.state)) buttons.push(button("Stop", act("stop"), { kind: "danger" }));
  return buttons;
}

function timeOf(job) {
  if (job.state === "queued") return job.command === "train" ? `waits until the device is free, since ${ago(job.created)}` : `waiting since ${ago(job.created)}`;
  if (!job.started) return `asked for ${ago(job.created)}`;
  const where = job.device?.startsWith("cuda:") ? `, on GPU ${job.device.slice(5)}` : ""; // told where there are several
  return job.ended ? `${ago(job.ended)}, took ${duration(job.ended - job.started)}${where}` : `began ${ago(job.started)}${where}`;
}
