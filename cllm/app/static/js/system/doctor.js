// What this machine is and what each operation runs on, as `cllm doctor` says it.

import { get } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, number } from "../format.js";
import { button, facts, spinner, table } from "../ui.js";

/** The card; it fills itself. */
export function doctorView() {
  const content = h("div", { class: "stack" }, spinner("Looking at the machine …"));
  const load = async (again) => {
    try {
      replace(content, ...described(await get("api/doctor", { again: again ? 1 : null })));
    } catch (error) {
      replace(content, h("p", { class: "error" }, error.message));
    }
  };
  load(false);
  return h("section", { class: "card" }, h("div", { class: "head" }, h("h2", {}, "This machine"), button("Look again", () => load(true), { title: "Runs cllm doctor again" })), content);
}

const flops = (billions) => `${number(billions * 1e9, { short: true })}FLOP/s`;

function described(found) {
  const { ceilings = {}, versions = {} } = found;
  const devices = (found.devices ?? []).map((device) => facts([
    [device.kind === "cpu" ? "Processor" : "GPU", device.name],
    ["Workers", device.kind === "cpu" ? number(device.workers) : null],
    ["Memory", bytes(device.memory_bytes)],
    ["Features", device.features?.join(", ") || null],
  ]));
  const peak = facts([
    ["Measured peak, fp32", ceilings.fp32_gflops ? flops(ceilings.fp32_gflops) : null],
    ["Measured peak, bf16", ceilings.bf16_gflops ? flops(ceilings.bf16_gflops) : null],
    ["Copying", ceilings.copy_gbps ? number(ceilings.copy_gbps, { unit: "GB/s" }) : null],
    ["Memory free", bytes(found.memory_available_bytes)],
    ["System", found.system],
  ]);
  const rows = Object.entries(found.operations ?? {}).map(([name, kinds]) => ({ name, fp32: kinds.float32, bf16: kinds.bfloat16 }));
  const operations = table([
    { key: "name", title: "Operation", cell: (row) => h("span", { class: "mono" }, row.name), sort: (row) => row.name },
    { key: "fp32", title: "float32", cell: (row) => row.fp32?.backend },
    { key: "bf16", title: "bfloat16", cell: (row) => row.bf16?.backend },
    { key: "why", title: "Why", cell: (row) => row.fp32?.reason, wide: true },
  ], rows, { caption: "Operations", key: (row) => row.name });
  return [
    ...devices, peak,
    ceilings.disturbed ? h("p", { class: "notice warning" }, "Other programs were busy while the peak was measured; it is at least this.") : null,
    found.missing?.length ? h("div", {}, h("h3", {}, "What would be faster"), h("ul", { class: "plain" }, found.missing.map((each) => h("li", {}, each)))) : null,
    h("details", { class: "section" }, h("summary", {}, `What each of the ${number(rows.length)} operations runs on`), operations),
    h("div", {}, h("h3", {}, "Versions"), facts(Object.entries(versions))),
  ];
}
