// From curves of any length to as many columns as the screen has: for each curve the mean, the smallest and the largest value of each column.

/** series: [{x, y, min, max}] with rising x; zoom: [from, to] or null; width in pixels; log: leave out what has no logarithm.
 * Answers {data: [x, mean, min, max, mean, min, max, ...], range: {min, max}}: curves that are short keep their own points exactly. */
export function columnsOf(series, zoom, width, log) {
  const range = zoom ? { min: zoom[0], max: zoom[1] } : rangeOf(series);
  if (range.max <= range.min) range.max = range.min + 1;
  const parts = series.map((each) => [lower(each.x, range.min), lower(each.x, range.max, true)]);
  const points = parts.reduce((sum, [from, to]) => sum + to - from, 0);
  return { data: points > 4 * width ? columns(series, parts, range, Math.max(16, width), log) : exact(series, parts, log), range };
}

function rangeOf(series) {
  let [min, max] = [Infinity, -Infinity];
  for (const { x } of series) {
    if (!x.length) continue;
    min = Math.min(min, x[0]);
    max = Math.max(max, x[x.length - 1]);
  }
  return min <= max ? { min, max } : { min: 0, max: 1 };
}

// The first index whose x is at least `value` (`after`: above it), with one more point on either side so that lines run to the edge.
function lower(x, value, after = false) {
  let [low, high] = [0, x.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (after ? x[middle] <= value : x[middle] < value) low = middle + 1;
    else high = middle;
  }
  return after ? Math.min(x.length, low + 1) : Math.max(0, low - 1);
}

function columns(series, parts, range, width, log) {
  const step = (range.max - range.min) / width;
  const data = [Array.from({ length: width }, (_, index) => range.min + (index + 0.5) * step)];
  series.forEach(({ x, y, min, max }, index) => {
    const sum = new Float64Array(width);
    const count = new Uint32Array(width);
    const low = new Float64Array(width).fill(Infinity);
    const high = new Float64Array(width).fill(-Infinity);
    const [from, to] = parts[index];
    for (let at = from; at < to; at += 1) {
      const value = y[at];
      if (value === null || !(log ? value > 0 : value === value)) continue; // unequal to itself: not a number
      const column = Math.max(0, Math.min(width - 1, ((x[at] - range.min) / step) | 0));
      sum[column] += value;
      count[column] += 1;
      const below = min?.[at] ?? value;
      const above = max?.[at] ?? value;
      if (below < low[column]) low[column] = log && below <= 0 ? value : below;
      if (above > high[column]) high[column] = above;
    }
    const known = (values) => Array.from(values, (value, column) => (count[column] ? value : null));
    data.push(known(sum.map((value, column) => value / count[column])), known(low), known(high));
  });
  return data;
}

function exact(series, parts, log) {
  const all = new Set();
  series.forEach(({ x }, index) => {
    for (let at = parts[index][0]; at < parts[index][1]; at += 1) all.add(x[at]);
  });
  const xs = [...all].sort((a, b) => a - b);
  const place = new Map(xs.map((value, index) => [value, index]));
  const data = [xs];
  const usable = (value) => (value === null || value === undefined || !(log ? value > 0 : value === value) ? null : value);
  series.forEach(({ x, y, min, max }, index) => {
    const rows = [new Array(xs.length).fill(null), new Array(xs.length).fill(null), new Array(xs.length).fill(null)];
    for (let at = parts[index][0]; at < parts[index][1]; at += 1) {
      const to = place.get(x[at]);
      rows[0][to] = usable(y[at]);
      rows[1][to] = usable(min?.[at] ?? y[at]);
      rows[2][to] = usable(max?.[at] ?? y[at]);
    }
    data.push(...rows);
  });
  return data;
}
