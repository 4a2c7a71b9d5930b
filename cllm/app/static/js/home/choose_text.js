// The first step: text from this computer, from a folder of the workspace, or from a web site.

import { get } from "../api.js";
import { uploads } from "../data/upload.js";
import { h, newId, replace, setText } from "../dom.js";
import { bytes, plural } from "../format.js";
import { isEnded, isFailed, start } from "../jobs.js";
import { link } from "../route.js";
import { button, pathPicker, progress, toast } from "../ui.js";

// Files from which text has to be extracted before anything can learn from them.
const DOCUMENTS = /\.(pdf|docx|pptx|xlsx|od[tsp]|epub|rtf|eml|mbox|msg|x?html?|srt|vtt|ipynb|zip|tar|t?gz|bz2|xz|zst|warc)$/i;

/** {children, jobs(list)}: what the step shows. onchoose(path) is called with the text to train on, null while there is none. */
export function textChoice(onchoose) {
  let reading = null; // the job that extracts the text of documents
  let bar = null;
  const said = h("p", { class: "help", role: "status" });
  const fault = h("p", { class: "error", role: "alert", hidden: true });
  const work = h("div", {});
  const sending = uploads();
  const fileId = newId("own");
  const file = h("input", { id: fileId, type: "file", multiple: true, class: "visually-hidden", tabindex: "-1", onchange: () => {
    own([...file.files]);
    file.value = "";
  } });
  const addressId = newId("address");
  const address = h("input", { id: addressId, type: "url", placeholder: "https://docs.example.org/", autocomplete: "off", "aria-describedby": `${addressId}-error` });
  const addressFault = h("p", { id: `${addressId}-error`, class: "error", role: "alert", hidden: true });

  const wrong = (text) => {
    setText(fault, text);
    fault.hidden = !text;
  };

  async function choose(path) {
    wrong("");
    onchoose(path);
    said.textContent = `Chosen: ${path === "." ? "the whole workspace" : path}`;
    const inside = await get("api/browse", { path }).catch(() => null);
    if (inside && inside.files.length) said.textContent += ` (${plural(inside.files.length, "file")}, ${bytes(inside.files.reduce((sum, each) => sum + each.bytes, 0))})`;
  }

  async function folder() {
    const path = await pathPicker({ title: "Choose a folder of text" });
    if (path !== null) await choose(path);
  }

  async function own(files) {
    if (!files.length) return;
    wrong("");
    onchoose(null);
    said.textContent = "";
    try {
      const name = await freeName(files[0].name.replace(/\.[^.]*$/, "").replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-+|-+$/g, "") || "texts");
      const { paths, fault: problem } = await sending.send(files, `uploads/${name}`);
      if (paths.some((path) => DOCUMENTS.test(path))) {
        reading = await start("prepare", { sources: [`uploads/${name}`], out: `data/${name}`, "no-filter": true });
        show(reading);
      } else if (paths.length) await choose(`uploads/${name}`);
      wrong(problem);
    } catch (error) {
      wrong(error.message);
    }
  }

  // A name that no folder of uploads has, so that what came earlier is not learnt as well.
  async function freeName(wanted) {
    const taken = new Set();
    const top = await get("api/browse", { path: "" });
    for (const { path } of top.folders.filter((each) => ["uploads", "data"].includes(each.name)))
      for (const each of (await get("api/browse", { path })).folders) taken.add(each.name);
    let name = wanted;
    for (let count = 2; taken.has(name); count += 1) name = `${wanted}-${count}`;
    return name;
  }

  function show(job) {
    if (isEnded(job)) {
      reading = bar = null;
      replace(work);
      if (job.state === "done") choose(job.options.out);
      else wrong(isFailed(job) ? job.error : "Stopped before all was read.");
      return;
    }
    bar ??= progress(job);
    bar.update(job);
    replace(work, h("p", { class: "help" }, "The text of these documents is extracted …"), bar.element);
  }

  async function collect() {
    addressFault.hidden = true;
    address.removeAttribute("aria-invalid");
    try {
      const url = new URL(address.value.includes("://") ? address.value : `https://${address.value}`);
      const job = await start("crawl", { urls: [url.href], out: `crawls/${url.hostname.replaceAll(/[^\w.-]+/g, "-")}` });
      location.hash = link("crawler", job.options.out);
      toast(`${job.title} has begun. Stop it when there are enough pages, and train on them.`);
    } catch (error) {
      addressFault.textContent = error instanceof TypeError ? "This is no web address. It should look like https://docs.example.org/." : error.message;
      addressFault.hidden = false;
      address.setAttribute("aria-invalid", "true");
      address.focus();
    }
  }

  return {
    children: [
      h("div", { class: "row" }, button("Choose files of this computer", () => file.click(), { kind: "primary" }), button("Choose a folder", folder, { title: "A folder of the workspace" })),
      h("label", { for: fileId, class: "visually-hidden" }, "Files of this computer"), file,
      sending.element, work, said, fault,
      h("form", { novalidate: true, onsubmit: (event) => {
        event.preventDefault();
        collect();
      } }, h("label", { for: addressId }, "or collect a web site"), h("div", { class: "control" }, address, button("Collect", null, { type: "submit" })), addressFault)],
    jobs(list) {
      const now = reading && list.find((job) => job.id === reading.id);
      if (now) show(now);
    },
  };
}
