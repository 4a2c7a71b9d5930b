// The plan of a training, and whether it fits this machine.

import { events, get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, duration, number } from "../format.js";
import { facts, progress, spinner } from "../ui.js";

const TIGHT = 0.9; // share of the free memory above which a training may be ended by the system

/** The place of a plan: {element, wait(), show(plan, text), stale(), clear(), unmount()}. */
export function planView() {
  const element = h("div", { class: "plan stack", role: "region", "aria-label": "Plan", "aria-live": "polite" });
  let shown = false;
  let end = () => {}; // of what is heard while a plan is made
  const hint = () => replace(element, h("p", { class: "help" }, "The plan tells parameters, memory, time and tokens before anything is trained. It reads the data and measures this machine for a moment."));
  hint();
  return {
    element,
    wait() {
      shown = false;
      const bar = progress(null);
      bar.element.hidden = true;
      replace(element, spinner("Reading the data and measuring this machine …"), bar.element);
      end();
      end = events.subscribe("plan", ({ kind, progress: now }) => {
        bar.element.hidden = kind !== "plan" || !now;
        if (!bar.element.hidden) bar.update({ state: "running", progress: now });
      });
    },
    async show(plan, text) {
      end();
      shown = true;
      const machine = await get("api/machine").catch(() => null);
      replace(element, warning(plan, machine), figures(plan), text ? h("details", { open: limitOf(plan) !== null }, h("summary", {}, "The whole plan"), h("pre", {}, text)) : null);
    },
    stale() {
      if (!shown) return;
      shown = false;
      element.prepend(h("p", { class: "notice warning" }, "The settings have changed since this plan. Show the plan again to see what they mean."));
    },
    clear() {
      end();
      shown = false;
      hint();
    },
    unmount: () => end(),
  };
}

// Seconds after which the clock ends the training; null where it has none.
function limitOf(plan) {
  const value = (name) => plan.settings?.[`train.${name}`]?.value;
  return value("hours") ? 3600 * value("hours") : value("minutes") ? 60 * value("minutes") : null;
}

function figures(plan) {
  const limit = limitOf(plan);
  const about = limit === null ? "" : "about ";
  return facts([
    ["Parameters", number(plan.parameters, { short: true })],
    ["Memory", bytes(plan.memory_bytes)],
    ["Time", limit === null ? duration(plan.total_seconds ?? plan.seconds) : `at most ${duration(limit)}, by the clock`],
    ["Speed", plan.tokens_per_second ? number(plan.tokens_per_second, { short: true, unit: "tokens/s" }) : null],
    ["Steps", about + number(plan.steps)],
    ["Tokens to learn from", about + number(plan.steps * plan.tokens_per_step, { short: true })],
    ["Tokens in the data", number(plan.train_tokens, { short: true })],
    ["Passes over the data", plan.train_tokens ? about + number((plan.steps * plan.tokens_per_step) / plan.train_tokens) : null],
  ]);
}

function warning(plan, machine) {
  const onGpu = machine?.gpus?.length && !/cpu/i.test(plan.settings?.["train.device"]?.value ?? "");
  const gpu = onGpu ? machine.gpus[0] : null;
  const room = gpu ? (gpu.memory_free_bytes ?? gpu.memory_bytes) : (machine?.memory_free_bytes ?? machine?.memory_bytes);
  if (!room || !plan.memory_bytes) return null;
  const place = gpu ? "the GPU" : "this machine";
  if (plan.memory_bytes > room) return h("p", { class: "notice bad" }, `It does not fit: it needs ${bytes(plan.memory_bytes)}, and ${place} has ${bytes(room)} free. Take a smaller batch-size, seq-len or preset.`);
  if (plan.memory_bytes > TIGHT * room) return h("p", { class: "notice warning" }, `It fits barely: it needs ${bytes(plan.memory_bytes)} of ${bytes(room)} that are free on ${place}. A smaller batch-size is safer.`);
  return h("p", { class: "notice" }, `It fits: ${bytes(plan.memory_bytes)} of ${bytes(room)} that are free on ${place}.`);
}
