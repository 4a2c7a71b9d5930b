// Files of this computer on their way into the workspace: one after another, with progress, and cancelled by a button.

import { address, upload } from "../api.js";
import { h, setText } from "../dom.js";
import { bytes, percent, plural } from "../format.js";
import { button } from "../ui.js";

const SHOWN = 50; // faults of one upload that are told one by one

/** {element, send(files, into)}: `send` answers {paths, fault}: where the files lie that came in, and what is wrong with the others, "" for nothing. */
export function uploads() {
  const element = h("div", { class: "stack", "aria-live": "polite" });

  async function send(files, into) {
    const stopped = new AbortController();
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress of the upload" });
    const said = h("span", { class: "progress-words" });
    const box = h("div", { class: "upload" }, bar, h("div", { class: "row" }, said, button("Cancel", () => stopped.abort(), { kind: "quiet", name: "Cancel the upload" })));
    const total = files.reduce((sum, each) => sum + each.size, 0);
    const [paths, faults] = [[], []];
    let before = 0;
    element.append(box);
    for (const each of files) {
      if (stopped.signal.aborted) break;
      try {
        const found = await upload(address("api/uploads", { into, name: each.name }), each, { signal: stopped.signal, onProgress: (sent) => {
          bar.value = total ? (before + sent) / total : 1;
          setText(said, `${each.name}: ${bytes(before + sent)} of ${bytes(total)} (${percent(total ? (before + sent) / total : 1)})`);
        } });
        paths.push(found.path);
      } catch (problem) {
        if (problem.name === "AbortError") break;
        faults.push(`${each.name}: ${problem.message}`);
      }
      before += each.size;
    }
    box.remove();
    const ended = stopped.signal.aborted ? [`Stopped: ${plural(paths.length, "file")} of ${files.length} came in.`] : [];
    return { paths, fault: [...ended, ...faults.slice(0, SHOWN)].join("\n") };
  }

  return { element, send };
}
