// What the app and its jobs wrote, as it comes.

import { events, get } from "../api.js";
import { h, newId, replace } from "../dom.js";
import { moment } from "../format.js";
import { followJobs, isEnded } from "../jobs.js";
import { button, badge } from "../ui.js";

const KEPT = 200000; // characters of a log that stay on the page

/** {element, end()}; `wanted` is the id of the job whose log is shown first, null: the app's own. */
export function logsView(wanted) {
  const id = newId("log");
  const select = h("select", { id, onchange: () => show(select.value) });
  const state = h("span");
  const text = h("pre", { class: "log", tabindex: "0", role: "region", "aria-label": "Log" });
  const earlier = h("p", { class: "help" });
  const fault = h("p", { class: "error", role: "alert" });
  const element = h("section", { class: "card", id: "logs" }, h("h2", {}, "Logs"),
    h("div", { class: "row" }, h("div", { class: "field log-choice" }, h("label", { for: id }, "Log of"), select), state, button("Look again", () => show(select.value), { kind: "quiet" })), fault, earlier, text);
  let shown = wanted ?? "";
  let jobs = [];
  let leave = () => {};
  let turn = 0;
  let at = 0; // bytes of the log that are shown or were passed over

  const endJobs = followJobs((found) => {
    jobs = found;
    const entries = [["", "the app"], ...[...jobs].sort((one, other) => other.created - one.created).map((job) => [job.id, `${job.title} (${moment(job.created)})`])];
    if (shown && !jobs.some((job) => job.id === shown)) entries.push([shown, shown]);
    const next = JSON.stringify(entries);
    if (select.dataset.entries !== next) replace(select, entries.map(([value, name]) => h("option", { value, selected: value === shown }, name)));
    select.dataset.entries = next;
    const job = jobs.find((each) => each.id === shown);
    replace(state, job ? badge(job.state) : null);
  });

  async function show(job) {
    const mine = ++turn;
    leave();
    leave = () => {};
    shown = job;
    replace(fault);
    try {
      if (!job) {
        const found = await get("api/log");
        if (mine === turn) write((found.lines ?? found).map((line) => (typeof line === "string" ? line : JSON.stringify(line))).join("\n"), false);
        return;
      }
      const whole = await get(`api/jobs/${encodeURIComponent(job)}/log`);
      const from = Math.max(0, whole.size - KEPT);
      const found = from > whole.to || whole.from < from ? await get(`api/jobs/${encodeURIComponent(job)}/log`, { from }) : whole;
      if (mine !== turn) return;
      at = found.to;
      write(found.text, found.from > 0);
      if (!isEnded(jobs.find((each) => each.id === job) ?? { state: "running" })) leave = events.subscribe(`log:${job}`, (event) => heard(event));
    } catch (error) {
      if (mine === turn) replace(fault, error.message);
    }
  }

  function heard(event) {
    if (event.kind === "reset" || event.from > at) return void show(shown);
    if (event.kind !== "log" || event.to <= at || event.from < at) return;
    at = event.to;
    write(text.textContent + event.text, false);
  }

  function write(whole, cut) {
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 20;
    replace(earlier, cut || whole.length > KEPT ? "The beginning is left out; the whole log is in the workspace." : "");
    text.textContent = whole.slice(-KEPT) || "Nothing was written yet.";
    if (atEnd) text.scrollTop = text.scrollHeight;
  }

  show(shown);
  return { element, end() {
    turn += 1;
    leave();
    endJobs();
  } };
}
