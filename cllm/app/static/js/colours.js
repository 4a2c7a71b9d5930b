// The colours of the page, for canvases.

import { h } from "./dom.js";

const NUM_COLOURS = 8;

/** The colour of a CSS variable, as a canvas understands it. */
export function colour(name, near = document.body) {
  const probe = h("span", { hidden: true, style: { color: `var(${name})` } });
  near.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

/** The CSS variable of the colour number `index`. */
export const seriesColour = (index) => `--series-${(index % NUM_COLOURS) + 1}`;
