// The Training tab: start and queue trainings, watch one, compare several.

import { replace } from "../dom.js";
import { compareView } from "../training/compare.js";
import { overview } from "../training/overview.js";
import { runView } from "../training/run.js";

export const title = "Training";

/** #/training, #/training?data=books (a form filled in), #/training/RUN, #/training?compare=RUN&compare=RUN */
export function mount(panel, route) {
  const compared = route.params.getAll("compare").filter(Boolean);
  const view = route.path ? runView(route.path) : compared.length ? compareView(compared) : overview(route.params);
  replace(panel, view.element);
  return view.unmount;
}
