// Curves and heat maps. A curve with more points than the screen has columns is shown by the smallest, the largest and the mean value of each column:
// nothing is ever thinned out, so that a single jump among a million steps still reaches its height.

import { colour, seriesColour } from "./colours.js";
import { h, newId, replace, setText } from "./dom.js";
import { number, scientific } from "./format.js";
import { columnsOf } from "./envelope.js";
import { classicScript } from "./vendor.js";

export { colour, seriesColour } from "./colours.js";
export { heatmap } from "./heatmap.js";

/** Draws curves into an element.
 * series: [{label, x: [...], y: [...], min: [...], max: [...] (optional, an envelope that the server made), colour: number, dash: [on, off], points: true}]
 * x: {label, format}, y: {label, format}; log: a logarithmic y axis; envelope: whether the range of each column is shaded; height in pixels; name for
 * screen readers; onzoom(range or null): called when a part is chosen or all is shown. Answers {update(changes), destroy()}; drag to zoom, double click or 0 to see all, arrow keys to read values. */
export function chart(element, options) {
  let state = { series: [], x: { label: "step" }, y: {}, log: false, envelope: true, height: 260, name: "Chart", ...options };
  let plot = null;
  let zoom = null;
  let dead = false;
  let width = 0;
  let drawn = null; // what the plot shows now: the columns
  const hidden = new Set();
  const box = h("div", { class: "chart-box" });
  const summary = h("p", { id: newId("chart"), class: "visually-hidden" });
  const frame = h("div", { class: "chart", role: "group", tabindex: "0", "aria-label": `${state.name}. Arrow keys read values, plus and minus zoom, 0 shows all.`, "aria-describedby": summary.id, onkeydown: keys }, box);
  const legend = h("div", { class: "legend" });
  const all = h("button", { type: "button", class: "button quiet", hidden: true, onclick: () => zoomTo(null) }, "Show all");
  replace(element, frame, h("div", { class: "row" }, legend, all), summary);

  const resized = new ResizeObserver(() => {
    const next = Math.floor(frame.clientWidth);
    if (next && next !== width) {
      width = next;
      draw();
    }
  });
  resized.observe(frame);
  const themed = () => rebuild();
  window.addEventListener("themechange", themed);
  classicScript("uPlot.iife.min.js", "uPlot").then(() => !dead && draw(), (error) => replace(box, h("p", { class: "error" }, error.message)));

  const xText = (value) => (state.x.format ?? number)(value);
  const yText = (value) => (state.y.format ?? scientific)(value);

  function draw() {
    if (dead || !window.uPlot || !width) return;
    drawn = columnsOf(state.series, zoom, width, state.log);
    const signature = JSON.stringify([state.series.map(({ label, colour: c, dash, points }) => [label, c, dash, points]), state.log, state.x.label, state.y.label, state.height, state.envelope]);
    if (plot && plot.signature === signature) {
      if (plot.width !== width) plot.setSize({ width, height: state.height });
      plot.setData(drawn.data, false);
      plot.batch(() => {
        plot.setScale("x", drawn.range);
        plot.setScale("y", { min: null, max: null });
      });
    } else {
      plot?.destroy();
      plot = new window.uPlot(settings(), drawn.data, box);
      plot.signature = signature;
      makeLegend();
    }
    all.hidden = !zoom;
    values(null);
    describe();
  }

  function rebuild() {
    plot?.destroy();
    plot = null;
    draw();
  }

  function settings() {
    const text = colour("--muted");
    const grid = { stroke: colour("--grid"), width: 1 };
    const axis = { stroke: text, grid, ticks: { ...grid, size: 4 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 18 };
    const curves = [{}];
    const bands = [];
    state.series.forEach((each, index) => {
      const stroke = colour(seriesColour(each.colour ?? index));
      const show = !hidden.has(each.label);
      const first = 1 + 3 * index;
      curves.push(
        { label: each.label, stroke, show, width: each.points ? 1.5 : 1.6, dash: each.dash, spanGaps: true, points: { show: Boolean(each.points), size: 6, fill: stroke } },
        { show: show && state.envelope, width: 0, spanGaps: true, points: { show: false } },
        { show: show && state.envelope, width: 0, spanGaps: true, points: { show: false } },
      );
      if (state.envelope) bands.push({ series: [first + 2, first + 1], fill: stroke.replace("rgb(", "rgba(").replace(")", ", 0.22)") });
    });
    return {
      width, height: state.height, series: curves, bands, legend: { show: false },
      cursor: { drag: { x: true, y: false }, points: { show: false }, bind: { dblclick: () => () => zoomTo(null) } },
      scales: { x: { time: false, range: () => [drawn.range.min, drawn.range.max] }, y: { distr: state.log ? 3 : 1, range: state.log ? undefined : spread } },
      axes: [
        { ...axis, label: state.x.label, values: (_, ticks) => ticks.map(xText), space: 70, size: 30, labelSize: 18, labelGap: 0 },
        { ...axis, label: state.y.label, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : yText(tick))), size: 58 },
      ],
      hooks: {
        setSelect: [(self) => {
          if (self.select.width < 8) return;
          const [from, to] = [self.posToVal(self.select.left, "x"), self.posToVal(self.select.left + self.select.width, "x")];
          self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          zoomTo([from, to]);
        }],
        setCursor: [(self) => values(self.cursor.idx ?? null)],
      },
    };
  }

  const spread = (_, low, high) => {
    if (low === null || high === null) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  };

  function zoomTo(range) {
    zoom = range;
    draw();
    state.onzoom?.(range);
  }

  // A mark stays the same element as long as its curve is there: new data that arrive while it is pressed must not take the press away.
  const marks = new Map();
  function makeLegend() {
    for (const label of marks.keys()) if (!state.series.some((each) => each.label === label)) marks.delete(label);
    replace(legend, state.series.map((each, index) => {
      if (!marks.has(each.label)) marks.set(each.label, makeMark(each.label));
      const { element: mark, swatch } = marks.get(each.label);
      swatch.style.background = `var(${seriesColour(each.colour ?? index)})`;
      mark.setAttribute("aria-pressed", String(!hidden.has(each.label)));
      return mark;
    }));
  }

  function makeMark(label) {
    const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
    const value = h("span", { class: "value" });
    const toggle = () => {
      if (!hidden.delete(label)) hidden.add(label);
      rebuild();
    };
    return { element: h("button", { type: "button", title: "Show or hide this curve", onclick: toggle }, swatch, label, value), swatch, value };
  }

  function values(at) {
    state.series.forEach((each, index) => {
      const column = drawn?.data[1 + 3 * index] ?? [];
      let found = at;
      if (at === null) found = lastKnown(column);
      else if (column[at] === null || column[at] === undefined) found = nearest(column, at);
      const value = column[found];
      setText(marks.get(each.label)?.value ?? summary, value === null || value === undefined ? "" : `${yText(value)}${at === null ? "" : ` at ${xText(drawn.data[0][found])}`}`);
    });
  }

  function describe() {
    setText(summary, state.series.map((each, index) => {
      const column = drawn.data[1 + 3 * index];
      const last = lastKnown(column);
      return last < 0 ? `${each.label}: nothing yet` : `${each.label}: ${yText(column[last])} at ${state.x.label ?? ""} ${xText(drawn.data[0][last])}`;
    }).join(". "));
  }

  function keys(event) {
    if (!plot || event.target !== frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const { min, max } = drawn.range;
    const middle = plot.cursor.idx === null || plot.cursor.idx === undefined ? (min + max) / 2 : drawn.data[0][plot.cursor.idx];
    const step = Math.max(1, Math.round(drawn.data[0].length / 100)) * (event.shiftKey ? 10 : 1);
    const move = (by) => {
      const to = Math.max(0, Math.min(drawn.data[0].length - 1, (plot.cursor.idx ?? (by > 0 ? -1 : drawn.data[0].length)) + by));
      plot.setCursor({ left: plot.valToPos(drawn.data[0][to], "x"), top: plot.bbox.height / devicePixelRatio / 2 });
      setText(summary, state.series.map((each) => `${each.label} ${marks.get(each.label)?.value.textContent ?? ""}`).join(", "));
    };
    const size = (max - min) / 4;
    const actions = {
      ArrowRight: () => move(step), ArrowLeft: () => move(-step), "+": () => zoomTo([Math.max(min, middle - size), Math.min(max, middle + size)]),
      "-": () => zoomTo(zoom && [middle - 4 * size, middle + 4 * size]), 0: () => zoomTo(null),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  return {
    /** Takes over what is given of {series, log, x, y, envelope, height, zoom: [from, to] or null}. */
    update(changes) {
      state = { ...state, ...changes };
      if (changes.zoom !== undefined) zoom = changes.zoom;
      draw();
    },
    destroy() {
      dead = true;
      resized.disconnect();
      window.removeEventListener("themechange", themed);
      plot?.destroy();
      plot = null;
      drawn = null;
      element.replaceChildren();
    },
  };
}

function lastKnown(column) {
  let index = column.length - 1;
  while (index >= 0 && (column[index] === null || column[index] === undefined)) index -= 1;
  return index;
}

function nearest(column, at) {
  for (let by = 1; by < column.length; by += 1) for (const index of [at - by, at + by]) if (column[index] !== null && column[index] !== undefined) return index;
  return at;
}
