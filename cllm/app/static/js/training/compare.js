// Several runs on one chart, and what is different between them.

import { events, get } from "../api.js";
import { chart } from "../chart.js";
import { h, replace } from "../dom.js";
import { loss, number, percent, scientific } from "../format.js";
import { link } from "../route.js";
import { empty, spinner, toast } from "../ui.js";
import { AXES, choice } from "./axis.js";

const KEYS = {
  loss: ["Training loss", "nats per token", loss], val_loss: ["Validation loss", "nats per token", loss], gradient_norm: ["Gradient norm", "", scientific],
  learning_rate: ["Learning rate", "", scientific], tokens_per_second: ["Speed", "tokens/s", (value) => number(value, { short: true })], share_of_peak: ["Share of peak", "", percent],
};
const MOST = 8; // as many as there are colours
const EVERY = 3000;

/** {element, unmount} of runs by their paths. */
export function compareView(names) {
  let runs = names.slice(0, MOST);
  const leaving = new AbortController();
  let [axis, key, log, timer] = ["step", "loss", false, 0];
  const place = h("div");
  const note = h("p", { class: "help" });
  const differences = h("div", { class: "stack" }, spinner());
  const drawn = chart(place, { series: [], x: AXES.step, y: {}, height: 400, name: "Comparison of runs" });
  const keyChoice = h("select", { "aria-label": "What is drawn", class: "short", onchange: () => {
    key = keyChoice.value;
    draw();
  } }, Object.entries(KEYS).map(([value, [label]]) => h("option", { value }, label)));
  const element = h("div", { class: "stack" },
    h("div", { class: "row" }, h("a", { href: link("training") }, "All trainings")),
    h("h1", {}, "Compare runs"),
    names.length > MOST ? h("p", { class: "notice warning" }, `Only the first ${MOST} of ${names.length} runs are shown.`) : null,
    h("section", { class: "card", "aria-label": "Curves" },
      h("div", { class: "row" }, keyChoice,
        choice("Curves over", { step: "Steps", tokens: "Tokens", time: "Time" }, axis, (value) => {
          axis = value;
          draw();
        }),
        choice("Scale", { linear: "Linear", log: "Logarithmic" }, "linear", (value) => {
          log = value === "log";
          draw();
        })), place, note),
    h("section", { class: "card", "aria-label": "Differences" }, h("h2", {}, "What is different"), differences));

  async function draw() {
    const wanted = [axis, key];
    const found = await Promise.all(runs.map((run) => get("api/runs/series", { run, x: axis, keys: key === "val_loss" ? "loss" : key, points: 1500 }, { signal: leaving.signal }).catch((error) => error)));
    if (leaving.signal.aborted || wanted[0] !== axis || wanted[1] !== key) return;
    const series = [];
    const problems = [];
    found.forEach((each, index) => {
      if (each instanceof Error) problems.push(`${runs[index]}: ${each.message}`);
      else if (key === "val_loss") {
        const known = each.evaluations.filter((one) => typeof one.loss === "number");
        series.push({ label: runs[index], x: known.map((one) => one[axis]), y: known.map((one) => one.loss), points: true, colour: index });
      } else series.push({ label: runs[index], x: each.x, y: each.series[key].mean, min: each.series[key].min, max: each.series[key].max, colour: index });
    });
    const [, unit, format] = KEYS[key];
    replace(note, problems.join(" "));
    drawn.update({ series, x: AXES[axis], y: { label: unit, format }, log });
  }

  async function compare() {
    const found = await Promise.all(runs.map((run) => get("api/runs/detail", { run }, { signal: leaving.signal }).catch(() => null)));
    if (leaving.signal.aborted) return;
    const known = found.map((each, index) => ({ run: runs[index], about: each })).filter((each) => each.about);
    const rows = [
      ["state", (about) => about.state], ["validation loss", (about) => loss(about.val_loss)], ["loss", (about) => loss(about.loss)],
      ["parameters", (about) => number(about.parameters, { short: true })], ["tokens", (about) => number(about.tokens, { short: true })],
    ].map(([name, read]) => ({ name, values: known.map(({ about }) => read(about)) }));
    const keys = new Set(known.flatMap(({ about }) => Object.entries(about.settings).flatMap(([section, values]) => Object.keys(values).map((each) => `${section}.${each}`))));
    for (const each of keys) {
      const [section, name] = each.split(".", 2);
      const values = known.map(({ about }) => plain(about.settings[section]?.[name]));
      if (new Set(values).size > 1) rows.push({ name: each, values });
    }
    replace(differences, known.length ? h("div", { class: "table-box", tabindex: "0", role: "region", "aria-label": "Differences of the runs" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), known.map(({ run }) => h("th", { scope: "col" }, h("a", { href: link("training", run) }, run))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, h("th", { scope: "row" }, row.name), row.values.map((value) => h("td", {}, value))))))) : empty("None of these runs could be read."));
  }

  const soon = () => {
    if (!timer) timer = setTimeout(() => {
      timer = 0;
      draw().catch(() => {});
    }, EVERY);
  };
  const ends = [events.subscribe("runs", soon), ...runs.map((run) => events.subscribe(`run:${run}`, soon))];
  const begin = async () => {
    const here = new Set((await get("api/runs", null, { signal: leaving.signal })).map((each) => each.run));
    const gone = runs.filter((run) => !here.has(run));
    runs = runs.filter((run) => here.has(run));
    if (gone.length) element.children[1].after(h("p", { class: "notice warning" }, `No longer here: ${gone.join(", ")}`));
    await Promise.all([draw(), compare()]);
  };
  begin().catch((error) => error.name !== "AbortError" && toast(error.message, { kind: "error" }));
  return {
    element,
    unmount() {
      leaving.abort();
      clearTimeout(timer);
      ends.forEach((end) => end());
      drawn.destroy();
    },
  };
}

const plain = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value ?? "–"));
