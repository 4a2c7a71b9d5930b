// The curves of one run: what the server has put into buckets, and behind it the rows that came since. When the rows become many, the server is asked
// again for buckets, so that a page that is open for weeks holds a bounded number of points.

import { get } from "../api.js";

export const KEYS = ["loss", "learning_rate", "gradient_norm", "tokens_per_second", "share_of_peak", "memory_bytes", "data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"];
export const POINTS = 1500;
const MOST_NEW = 600; // rows behind the buckets

const AT = { step: "step", tokens: "tokens", time: "seconds" };

/** The curves of a run over "step", "tokens" or "time". `changed()` is called when there is something new to draw. */
export class Curves {
  x = [];
  series = {};
  evaluations = [];
  lastStep = -1;
  newest = null; // the newest row of kind "train"
  #added = 0;
  #loading = null;
  #again = false;

  constructor(run, changed, signal) {
    this.run = run;
    this.axis = "step";
    this.range = null;
    this.changed = changed;
    this.signal = signal;
  }

  /** Asks the server for everything again. */
  async load() {
    if (this.#loading) {
      this.#again = true;
      return this.#loading;
    }
    this.#loading = this.#fetch();
    try {
      await this.#loading;
    } finally {
      this.#loading = null;
    }
    if (this.#again) {
      this.#again = false;
      await this.load();
    }
  }

  async #fetch() {
    const [from, to] = this.range ?? [null, null];
    const found = await get("api/runs/series", { run: this.run, x: this.axis, keys: KEYS.join(","), points: POINTS, from, to }, { signal: this.signal });
    this.x = found.x;
    this.series = Object.fromEntries(KEYS.map((key) => [key, found.series[key] ?? { min: [], max: [], mean: [] }]));
    this.evaluations = found.evaluations;
    this.lastStep = found.last_step;
    this.#added = 0;
    this.changed();
  }

  /** Takes new rows of metrics.jsonl. */
  add(rows) {
    let drawn = false;
    let tokens = this.newest?.tokens ?? 0;
    let time = this.newest?.seconds ?? 0;
    for (const row of rows) {
      if (row.kind === "train") {
        this.newest = row;
        [tokens, time] = [row.tokens, row.seconds];
        if (row.step <= this.lastStep) {
          if (row.step < this.lastStep - 1) this.#again = true; // it went back to a checkpoint
          continue;
        }
        this.lastStep = row.step;
        if (this.range) continue; // a part is looked at: what is new lies behind it
        this.x.push(row[AT[this.axis]]);
        for (const key of KEYS) {
          const value = typeof row[key] === "number" ? row[key] : null;
          const each = this.series[key];
          if (!each) continue;
          each.mean.push(value);
          each.min.push(value);
          each.max.push(value);
        }
        this.#added += 1;
        drawn = true;
      } else if (row.kind === "eval" && !this.evaluations.some((each) => each.step === row.step)) {
        this.evaluations.push({ ...row, tokens, time });
        drawn = true;
      }
    }
    if (this.#added > MOST_NEW || this.#again) {
      this.#again = false;
      this.load().catch(() => {});
    } else if (drawn) this.changed();
  }

  /** One curve with its envelope, for a chart. */
  line(key, label, more = {}) {
    const { mean = [], min, max } = this.series[key] ?? {};
    return { label, x: this.x, y: mean, min, max, ...more };
  }

  /** The evaluations as a curve of points. */
  validation(label, more = {}) {
    const known = this.evaluations.filter((each) => typeof each.loss === "number");
    return { label, x: known.map((each) => each[this.axis]), y: known.map((each) => each.loss), points: true, ...more };
  }

  /** The loss of a model that knows only how often each token occurs, as a line over the whole chart; null where it is not known. */
  unigram(label, more = {}) {
    const value = this.evaluations.findLast((each) => typeof each.unigram_loss === "number")?.unigram_loss;
    if (value === undefined || !this.x.length) return null;
    return { label, x: [this.x[0], this.x[this.x.length - 1]], y: [value, value], dash: [6, 4], ...more };
  }
}
