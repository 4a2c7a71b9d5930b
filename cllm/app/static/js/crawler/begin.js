// The form that begins a crawl, or gives one more addresses: what `cllm crawl` takes, as it declares it.

import { get } from "../api.js";
import { h } from "../dom.js";
import { start } from "../jobs.js";
import { button, form, toast } from "../ui.js";

const FIRST = ["out", "max-pages", "depth", "contact"];

/** {element} with the form; onstart(job) is called when the crawl runs. */
export async function crawlForm(onstart) {
  const { crawl } = await get("api/commands");
  const urls = crawl.arguments[0].name;
  const declared = [...crawl.arguments, ...crawl.options];
  const fields = form(declared, [{ title: null, names: [urls, ...FIRST] }, { title: "More options", names: declared.map((option) => option.name) }], { leave: ["json", "train"], onsubmit: begin, pick: { out: "folder" } });
  const out = fields.field("out");
  const addresses = fields.field(urls);
  let isNamed = false;
  out.input.addEventListener("input", () => {
    isNamed = Boolean(out.input.value);
  });
  addresses.input.addEventListener("input", () => {
    if (isNamed) return;
    out.set(folderFor(addresses.value()?.[0]));
    isNamed = false;
  });

  async function begin() {
    fields.clear();
    try {
      onstart(await start("crawl", fields.values()));
      fields.set({});
      isNamed = false;
    } catch (error) {
      if (!fields.error(error.param, error.message)) toast(error.message, { kind: "error" });
    }
  }

  return { element: h("section", { class: "card" }, h("h2", {}, "Begin a crawl"), h("p", { class: "help" }, "Obeys robots.txt, asks one site for one page at a time, and keeps what it has when it is stopped. The same folder goes on later, and looks again at pages that have changed."), fields.element, h("div", { class: "actions" }, button("Start", begin, { kind: "primary" }))) };
}

// A folder that is named after the site.
function folderFor(address) {
  try {
    return `crawls/${new URL(address).hostname}`;
  } catch {
    return "";
  }
}
