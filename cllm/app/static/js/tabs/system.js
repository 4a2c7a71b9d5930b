// The machine, its measurements, and the logs.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, number } from "../format.js";
import { benchView } from "../system/bench.js";
import { doctorView } from "../system/doctor.js";
import { logsView } from "../system/logs.js";
import { facts, fetchedTab } from "../ui.js";

export const title = "System";

/** ?job=ID shows the log of that job. */
export const mount = (panel, route) => fetchedTab(panel, title, (ends) => all(panel, route.params.get("job"), ends));

async function all(panel, job, ends) {
  const [machine, bench] = await Promise.all([get("api/machine"), benchView()]);
  const logs = logsView(job);
  ends.push(bench.end, logs.end);
  const app = h("section", { class: "card" }, h("h2", {}, "The app"), facts([
    ["CLLM", machine.version], ["Workspace", machine.workspace], ["Cores", number(machine.cores)], ["Memory free", bytes(machine.memory_free_bytes)], ["Disk free", bytes(machine.disk_free_bytes)],
  ]));
  const rest = [app, doctorView(), bench.element];
  replace(panel, h("h1", {}, title), job ? [logs.element, rest] : [rest, logs.element]); // a log that was asked for stands first
}
