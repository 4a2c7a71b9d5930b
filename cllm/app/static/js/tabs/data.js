// Text to train on: data sets are made of files, looked at, and followed as they grow.

import { get } from "../api.js";
import { detail } from "../data/detail.js";
import { makeForm } from "../data/make.js";
import { h, replace } from "../dom.js";
import { ago, bytes, number } from "../format.js";
import { followJobs, isEnded, jobCard } from "../jobs.js";
import { link } from "../route.js";
import { fetchedTab, table, toast } from "../ui.js";

export const title = "Data";

/** The address: #/data is the list, #/data/PATH one data set, ?sources=PATH (several times) fills the form. */
export const mount = (panel, route) => fetchedTab(panel, title, (ends) => (route.path ? one(panel, route.path, ends) : all(panel, route.params.getAll("sources"), ends)));

async function one(panel, path, ends) {
  const view = await detail(path);
  ends.push(view.end);
  replace(panel, view.element);
}

async function all(panel, first, ends) {
  const working = h("div", { class: "grid" });
  const cards = new Map(); // id of a job -> its card
  const list = table([
    { key: "name", title: "Name", wide: true, cell: (row) => h("a", { href: link("data", row.path) }, row.name), sort: (row) => row.name },
    { key: "kept", title: "Kept", cell: (row) => (row.damaged ? h("span", { class: "error" }, row.damaged) : number(row.kept, { unit: row.kept === 1 ? "document" : "documents" })), sort: (row) => row.kept, align: "right" },
    { key: "dropped", title: "Left out", cell: (row) => number(row.dropped), sort: (row) => row.dropped, align: "right" },
    { key: "bytes", title: "Size", cell: (row) => bytes(row.bytes), sort: (row) => row.bytes, align: "right" },
    { key: "languages", title: "Languages", cell: (row) => languages(row.languages) },
    { key: "updated", title: "Changed", cell: (row) => ago(row.updated), sort: (row) => row.updated, align: "right" },
    { key: "train", title: "", cell: (row) => h("a", { class: "button quiet", href: link("training", "", { data: row.path }), "aria-label": `Train on ${row.name}` }, "Train on it") },
  ], [], { caption: "Data sets", key: (row) => row.path, empty: "There is no data set yet. Choose folders or drop files below, and make one.", sorted: { key: "updated", descending: true } });

  const refresh = async () => list.update(await get("api/datasets"));
  const made = await makeForm(first, (job) => {
    toast(`${job.title} has begun.`);
    working.scrollIntoView({ block: "nearest" });
  });
  const states = new Map();

  ends.push(followJobs((jobs) => {
    const mine = jobs.filter((job) => job.command === "prepare");
    const ids = new Set(mine.map((job) => job.id));
    for (const [id, card] of [...cards]) if (!ids.has(id)) {
      card.element.remove();
      cards.delete(id);
    }
    for (const job of mine) {
      if (states.get(job.id) && states.get(job.id) !== job.state && isEnded(job)) refresh().catch(() => {}); // the list is also fetched with the next look at the tab
      states.set(job.id, job.state);
      if (cards.has(job.id)) cards.get(job.id).update(job);
      else if (!isEnded(job) || job.state === "failed" || job.state === "lost") {
        cards.set(job.id, jobCard(job, { onforget: () => {}, next: outcome }));
        working.append(cards.get(job.id).element);
      }
    }
  }));
  await refresh();
  replace(panel, h("h1", {}, title), working, h("section", { class: "card" }, h("h2", {}, "Data sets"), list), made.element);
}

const outcome = (job) => (job.options.out ? h("a", { class: "button primary", href: link("data", job.options.out) }, "Look at it") : null);

function languages(found) {
  const names = Array.isArray(found) ? found.map((each) => each.language ?? each) : Object.entries(found ?? {}).sort((one, other) => other[1] - one[1]).map(([name]) => name);
  return names.length ? names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "") : "–";
}
