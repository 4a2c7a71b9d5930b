// What stands under the curves of a run: gradients of the layers, samples, faults, the tree of threads, rounds, checkpoints, settings.

import { get } from "../api.js";
import { heatmap } from "../chart.js";
import { h, replace } from "../dom.js";
import { bytes, duration, loss, number, percent } from "../format.js";
import { link } from "../route.js";
import { empty, facts, table } from "../ui.js";
import { choice } from "./axis.js";

const WAIT = 1500; // milliseconds: what new rows announce is fetched at most this often
const SAMPLES = 20;

/** {element, show(detail), load(), add(rows), unmount()} */
export function details(run, signal) {
  const sections = [layersOf(), samplesOf(), faultsOf(), treeOf(), roundsOf(), checkpointsOf(), settingsOf()];
  const element = h("div", { class: "plots" }, sections.map((section) => section.element));
  const waiting = new Map();

  const fetchOne = (section) => {
    clearTimeout(waiting.get(section));
    waiting.delete(section);
    if (!section.path || signal.aborted) return;
    get(section.path, { run, ...section.params }, { signal }).then((found) => {
      if (!signal.aborted) section.show(found);
    }, () => {}); // a run that has none of it yet
  };
  const soon = (section) => {
    if (!waiting.has(section)) waiting.set(section, setTimeout(() => fetchOne(section), WAIT));
  };
  return {
    element,
    show: (about) => sections.forEach((section) => section.about?.(about)),
    load: () => sections.forEach(fetchOne),
    add(rows) {
      for (const section of sections) if (section.wakes && rows.some((row) => section.wakes.includes(row.kind))) soon(section);
    },
    unmount() {
      for (const timer of waiting.values()) clearTimeout(timer);
      sections.forEach((section) => section.unmount?.());
    },
  };
}

const card = (title, ...children) => h("section", { class: "card", "aria-label": title, hidden: true }, h("h2", {}, title), children);

function layersOf() {
  const canvas = h("canvas", { class: "heatmap" });
  const words = h("p", { class: "help heat-words" });
  const map = heatmap(canvas, { words, label: "Gradient norm of each layer over the steps" });
  let found = null;
  let key = "gradient_norms";
  const draw = () => {
    const names = found.names;
    map.update({ names, columns: found.steps, values: found[key], label: key === "gradient_norms" ? "Gradient norm of each layer" : "Update by size of each layer" });
  };
  const kinds = choice("What is shown", { gradient_norms: "Gradient norm", update_ratios: "Update / weight" }, key, (value) => {
    key = value;
    if (found) draw();
  });
  const ends = h("p", { class: "help" });
  const element = card("Layers", kinds, canvas, words, ends);
  element.classList.add("whole");
  return {
    element, path: "api/runs/layers", params: { points: 200 }, wakes: ["layers"],
    show(next) {
      found = next;
      element.hidden = !next.steps.length;
      if (element.hidden) return;
      replace(ends, `From top to bottom: ${next.names[0]} to ${next.names[next.names.length - 1]}; from left to right: step ${number(next.steps[0])} to ${number(next.steps[next.steps.length - 1])}.`);
      draw();
    },
    unmount: () => map.destroy(),
  };
}

function samplesOf() {
  const list = h("div", { class: "stack samples", tabindex: "0", role: "region", "aria-label": "Samples, the newest first" });
  const element = card("Samples", list);
  return {
    element, path: "api/runs/samples", wakes: ["train", "eval", "final"],
    show(samples) {
      element.hidden = !samples.length;
      const shown = samples.slice(0, SAMPLES);
      if (list.getAttribute("data-step") === String(shown[0]?.step)) return;
      list.setAttribute("data-step", String(shown[0]?.step));
      replace(list, shown.map((sample) => h("figure", {}, h("figcaption", {}, `Step ${number(sample.step)}`), h("pre", {}, sample.text))));
    },
  };
}

function faultsOf() {
  const list = table([
    { key: "step", title: "Step", align: "right", cell: (each) => number(each.step) },
    { key: "event", title: "What", cell: (each) => each.event },
    { key: "action", title: "Done", cell: (each) => each.action },
    { key: "text", title: "In words", wide: true, cell: (each) => h("div", { class: "stack" }, each.text, each.documents?.length ? h("details", {}, h("summary", {}, `Documents of the step (${each.documents.length})`), h("ul", {}, each.documents.map((name) => h("li", {}, name)))) : null) },
  ], [], { caption: "Faults and events", empty: empty("Nothing went wrong.") });
  const element = card("Faults", list);
  return {
    element, path: "api/runs/faults", wakes: ["event", "machine"],
    show(faults) {
      element.hidden = false;
      list.update(faults.map((each, index) => ({ ...each, index })));
    },
  };
}

function treeOf() {
  const place = h("div", { class: "stack" });
  const element = card("Threads", place);
  return {
    element, path: "api/runs/tree", wakes: ["layers"],
    show(found) {
      element.hidden = !found.workers && !found.levels.length;
      const total = Object.values(found.parts).reduce((sum, value) => sum + value, 0);
      const levels = [...found.levels].reverse().reduce((inner, level) => h("ul", { class: "tree" }, h("li", {}, h("strong", {}, level.name), ` – ${number(level.nodes)} ${level.nodes === 1 ? "sum" : "sums"} in each step`, inner)), null);
      replace(place,
        facts([["Workers", found.workers ? number(found.workers) : null], ["Device", found.devices?.map((each) => each.name).join(", ") || found.device || null], ["Children of a node", found.levels.length ? `at most ${number(found.fanout)}` : null]]),
        total ? h("ul", { class: "split", "aria-label": "What the newest step did" }, Object.entries(found.parts).map(([name, value]) => h("li", {}, `${name} ${duration(value)} (${percent(value / total)})`))) : null,
        found.threads.length ? h("div", {}, h("h3", {}, "At work now"), h("ul", { class: "bars" }, found.threads.map((each, index) => h("li", {}, h("span", {}, each.main ? "main thread" : `thread ${number(index)}`), h("meter", { min: 0, max: 1, value: each.share, "aria-hidden": "true" }), h("span", { class: "bar-count" }, percent(each.share)))))) : null,
        levels ? [h("p", { class: "help" }, "Sums over the gradient are added up in this fixed tree, so that any number of threads gives the same bits."), levels] : null);
    },
  };
}

function roundsOf() {
  const list = table([
    { key: "round", title: "Round", align: "right", cell: (each) => number(each.round) },
    { key: "documents", title: "New documents", align: "right", cell: (each) => number(each.documents) },
    { key: "bytes", title: "Text", align: "right", cell: (each) => bytes(each.bytes) },
    { key: "accepted", title: "Accepted", cell: (each) => (each.accepted ? "yes" : "no") },
    { key: "new", title: "New text: loss", cell: (each) => `${loss(each.new_before)} → ${loss(each.new_after)}` },
    { key: "old", title: "Old text: loss", cell: (each) => `${loss(each.old_before)} → ${loss(each.old_after)}` },
    { key: "reason", title: "Why", wide: true, cell: (each) => each.reason },
  ], [], { caption: "Rounds", key: (each) => each.round });
  const element = card("Rounds", list);
  element.classList.add("whole");
  return {
    element, path: "api/runs/rounds", wakes: ["final"],
    show(rounds) {
      element.hidden = !rounds.length;
      list.update(rounds);
    },
  };
}

function checkpointsOf() {
  const list = table([
    { key: "step", title: "Step", align: "right", cell: (each) => number(each.step) },
    { key: "val_loss", title: "Validation loss", align: "right", cell: (each) => loss(each.val_loss) },
    { key: "bytes", title: "Size", align: "right", cell: (each) => bytes(each.bytes) },
    { key: "marks", title: "Note", cell: (each) => [each.best && "best", each.latest && "newest", each.kept && !each.best && "kept", each.damaged].filter(Boolean).join(", ") || "–" },
  ], [], { caption: "Checkpoints", key: (each) => each.path });
  const element = card("Checkpoints", list);
  return {
    element,
    about(about) {
      element.hidden = !about.checkpoints?.length;
      list.update(about.checkpoints ?? []);
    },
  };
}

function settingsOf() {
  const place = h("div", { class: "stack" });
  const element = card("Settings and origin", place);
  let shown = "";
  return {
    element,
    about(about) {
      const text = JSON.stringify([about.settings, about.data, about.parent, about.environment]);
      if (text === shown) return;
      shown = text;
      const sections = Object.entries(about.settings ?? {});
      element.hidden = !sections.length;
      const devices = about.environment?.devices?.map((each) => each.name).join(", ");
      replace(place,
        facts([["Data", about.data?.path ?? null], ["Parameters", about.parameters ? number(about.parameters, { short: true }) : null], ["Trained from", about.parent ? h("a", { href: link("models", about.parent) }, about.parent) : null], ["Device", devices || null], ["Starts", about.starts ? number(about.starts) : null]]),
        sections.map(([name, values]) => h("details", {}, h("summary", {}, name), h("dl", { class: "pairs" }, Object.entries(values).map(([key, value]) => [h("dt", { title: about.sources?.[`${name}.${key}`] ?? null }, key), h("dd", {}, typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value))])))));
    },
  };
}
