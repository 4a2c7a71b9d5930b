// The Home tab: the first steps, what runs now, the machine, runs and models.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, number } from "../format.js";
import { firstSteps } from "../home/first_steps.js";
import { followJobs, isEnded, jobCard } from "../jobs.js";
import { modelTable } from "../models/list.js";
import { link } from "../route.js";
import { followRuns, runTable } from "../training/runs.js";
import { empty, facts, spinner } from "../ui.js";

export const title = "Home";

export function mount(panel) {
  const leaving = new AbortController();
  const steps = firstSteps();
  const machine = h("div", {}, spinner());
  const now = h("div", { class: "grid" });
  const nowCard = h("section", { class: "stack", "aria-labelledby": "now-title" }, h("h2", { id: "now-title" }, "Running now"), now);
  const runs = runTable();
  const models = modelTable();
  replace(panel,
    h("h1", {}, title), steps.element, nowCard,
    h("section", { class: "card", "aria-labelledby": "home-runs" }, h("div", { class: "head" }, h("h2", { id: "home-runs" }, "Runs"), h("a", { href: link("training") }, "Start a training")), runs),
    h("section", { class: "card", "aria-labelledby": "home-models" }, h("div", { class: "head" }, h("h2", { id: "home-models" }, "Models"), h("a", { href: link("models") }, "Export, import, average")), models),
    h("section", { class: "card", "aria-labelledby": "machine-title" }, h("h2", { id: "machine-title" }, "This machine"), machine));

  const cards = new Map();
  const endJobs = followJobs((jobs) => {
    const active = jobs.filter((job) => !isEnded(job));
    for (const id of [...cards.keys()]) if (!active.some((job) => job.id === id)) cards.delete(id);
    for (const job of active) {
      if (cards.has(job.id)) cards.get(job.id).update(job);
      else {
        cards.set(job.id, jobCard(job));
        if (job.run) cards.get(job.id).element.append(h("a", { href: link("training", job.run) }, `Watch ${job.run}`));
      }
    }
    const wanted = active.map((job) => cards.get(job.id).element);
    replace(now, wanted.length ? wanted : empty("Nothing runs at the moment."));
    steps.jobs(jobs);
  });
  const endRuns = followRuns((list) => {
    runs.update(list);
    steps.runs(list);
    get("api/models", null, { signal: leaving.signal }).then((all) => models.update(all), () => {});
  });
  get("api/machine", null, { signal: leaving.signal }).then((about) => replace(machine, machineFacts(about)), (error) => {
    if (error.name !== "AbortError") replace(machine, h("p", { class: "error" }, error.message));
  });
  return () => {
    leaving.abort();
    endJobs();
    endRuns();
  };
}

function machineFacts(about) {
  const { fp32, bf16, copy_bytes_per_second: copying } = about.peak ?? {};
  const peak = [fp32 && `${number(fp32, { short: true })}FLOP/s in fp32`, bf16 && `${number(bf16, { short: true })}FLOP/s in bf16`, copying && `${bytes(copying)}/s copying`].filter(Boolean).join(", ");
  return facts([
    ["Workspace", about.workspace], ["Device", about.device], ["Processor", about.cpu !== about.device ? about.cpu : null], ["Cores", number(about.cores)],
    ["Memory", `${bytes(about.memory_bytes)}, ${bytes(about.memory_free_bytes)} free`], ["Disk", `${bytes(about.disk_free_bytes)} free`],
    ...(about.gpus ?? []).map((gpu) => ["GPU", typeof gpu === "string" ? gpu : [gpu.name, gpu.memory_bytes ? bytes(gpu.memory_bytes) : ""].filter(Boolean).join(", ")]),
    ["Measured peak", peak || "measured at the first training"], ["CLLM", about.version],
  ]);
}
