// The Models tab: what there is, and what can be done with it.

import { replace } from "../dom.js";
import { inspectView } from "../models/inspect.js";
import { overview } from "../models/overview.js";

export const title = "Models";

/** #/models, #/models/PATH */
export function mount(panel, route) {
  const view = route.path ? inspectView(route.path) : overview();
  replace(panel, view.element);
  return view.unmount;
}
