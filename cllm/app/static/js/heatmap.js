// A heat map on a canvas: rows by name, columns by step, colours by the logarithm of the value.

import { colour } from "./colours.js";
import { h, setText } from "./dom.js";
import { number, scientific } from "./format.js";

/** Draws values[row][column] for `names` of rows and `columns` (numbers). options: {names, columns, values, label, words: an element that says what is under
 * the pointer or the arrow keys}. Answers {update(changes), destroy()}. */
export function heatmap(canvas, options) {
  let state = { names: [], columns: [], values: [], label: "Heat map", words: h("p"), ...options };
  let at = null;
  canvas.setAttribute("role", "img");
  canvas.tabIndex = 0;

  function draw() {
    const [num, rows] = [state.columns.length, state.names.length];
    canvas.setAttribute("aria-label", `${state.label}: ${rows} rows, ${num} columns. Arrow keys read values.`);
    const ratio = devicePixelRatio || 1;
    const [width, height] = [Math.max(1, canvas.clientWidth * ratio) | 0, Math.max(1, canvas.clientHeight * ratio) | 0];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!num || !rows) return;
    let [low, high] = [Infinity, -Infinity];
    for (const row of state.values) for (const value of row) if (value > 0) [low, high] = [Math.min(low, value), Math.max(high, value)];
    const [cold, hot, bad] = ["--heat-0", "--heat-1", "--bad"].map((name) => numbers(colour(name)));
    const scale = Math.log(high / low) || 1;
    const picture = new ImageData(num, rows);
    for (let x = 0; x < num; x += 1) for (let y = 0; y < rows; y += 1) {
      const value = state.values[y]?.[x];
      const share = value > 0 ? Math.log(value / low) / scale : 0;
      const missing = value === null || value === undefined;
      const place = 4 * (y * num + x);
      for (let part = 0; part < 3; part += 1) picture.data[place + part] = missing ? bad[part] : cold[part] + share * (hot[part] - cold[part]);
      picture.data[place + 3] = missing && value === undefined ? 0 : 255;
    }
    const small = new OffscreenCanvas(num, rows);
    small.getContext("2d").putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, width, height);
    if (at) {
      context.strokeStyle = colour("--accent");
      context.lineWidth = 2 * ratio;
      context.strokeRect((at.x * width) / num, (at.y * height) / rows, width / num, height / rows);
    } else setText(state.words, low <= high ? `From ${scientific(low)} (faint) to ${scientific(high)} (strong).` : "");
  }

  function say() {
    if (!at) return draw();
    const value = state.values[at.y]?.[at.x];
    setText(state.words, `${state.names[at.y]} at step ${number(state.columns[at.x])}: ${value === null || value === undefined ? "not finite" : scientific(value)}`);
    draw();
  }

  const clamp = (value, length) => Math.max(0, Math.min(length - 1, value));
  const pointed = (event) => {
    if (!state.columns.length) return;
    const box = canvas.getBoundingClientRect();
    at = { x: clamp(Math.floor(((event.clientX - box.left) / box.width) * state.columns.length), state.columns.length), y: clamp(Math.floor(((event.clientY - box.top) / box.height) * state.names.length), state.names.length) };
    say();
  };
  const left = () => {
    at = null;
    draw();
  };
  const keys = (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by || !state.columns.length) return;
    event.preventDefault();
    at = at ? { x: clamp(at.x + by[0], state.columns.length), y: clamp(at.y + by[1], state.names.length) } : { x: state.columns.length - 1, y: 0 };
    say();
  };
  canvas.addEventListener("pointermove", pointed);
  canvas.addEventListener("pointerleave", left);
  canvas.addEventListener("blur", left);
  canvas.addEventListener("keydown", keys);
  const resized = new ResizeObserver(draw);
  resized.observe(canvas);
  window.addEventListener("themechange", draw);
  return {
    update(changes) {
      state = { ...state, ...changes };
      draw();
    },
    destroy() {
      resized.disconnect();
      window.removeEventListener("themechange", draw);
      for (const [name, listener] of [["pointermove", pointed], ["pointerleave", left], ["blur", left], ["keydown", keys]]) canvas.removeEventListener(name, listener);
    },
  };
}

const numbers = (text) => text.match(/[\d.]+/g).slice(0, 3).map(Number);
