// Pages of web sites: crawls are begun, watched, paused and gone on with.

import { get, post } from "../api.js";
import { crawlForm } from "../crawler/begin.js";
import { detail } from "../crawler/detail.js";
import { h, replace } from "../dom.js";
import { bytes, number } from "../format.js";
import { followJobs, isEnded, jobButtons } from "../jobs.js";
import { link } from "../route.js";
import { badge, fetchedTab, table } from "../ui.js";

const LOOK = 3000; // milliseconds between two looks at the list while a crawl runs

export const title = "Crawler";

/** The address: #/crawler is the list, #/crawler/PATH one crawl. */
export const mount = (panel, route) => fetchedTab(panel, title, (ends) => (route.path ? one(panel, route.path, ends) : all(panel, ends)));

async function one(panel, path, ends) {
  const view = await detail(path);
  ends.push(view.end);
  replace(panel, view.element);
}

async function all(panel, ends) {
  const jobs = new Map(); // path of a crawl -> its job that has not ended
  let timer = 0;
  const jobOf = (row) => jobs.get(row.path);
  const list = table([
    { key: "name", title: "Name", wide: true, cell: (row) => h("a", { href: link("crawler", row.path) }, row.name), sort: (row) => row.name },
    { key: "state", title: "State", cell: (row) => badge(jobOf(row)?.state ?? row.state) },
    { key: "pages", title: "Pages", cell: (row) => number(row.pages), sort: (row) => row.pages, align: "right" },
    { key: "bytes", title: "Size", cell: (row) => bytes(row.bytes), sort: (row) => row.bytes, align: "right" },
    { key: "queued", title: "Queue", cell: (row) => number(row.queued), sort: (row) => row.queued, align: "right" },
    { key: "errors", title: "Errors", cell: (row) => number(row.errors), sort: (row) => row.errors, align: "right" },
    { key: "do", title: "", cell: (row) => h("div", { class: "row", "data-job": jobOf(row)?.id },
      jobOf(row) ? jobButtons(jobOf(row), (verb) => () => post(`api/jobs/${encodeURIComponent(jobOf(row).id)}/${verb}`)) : null,
      h("a", { class: "button quiet", href: link("data", "", { sources: row.path }), "aria-label": `Prepare the pages of ${row.name}` }, "Prepare")) },
  ], [], { caption: "Crawls", key: (row) => row.path, empty: "There is no crawl yet. Write an address below to begin one." });

  async function refresh() {
    clearTimeout(timer);
    list.update(await get("api/crawls"));
    if (jobs.size) timer = setTimeout(() => refresh().catch(() => {}), LOOK); // a lost connection is told by the banner; the next change of a job looks again
  }

  const made = await crawlForm((job) => {
    location.hash = link("crawler", job.options.out);
  });
  await refresh();
  ends.push(() => clearTimeout(timer), followJobs((found) => {
    jobs.clear();
    for (const job of found) if (job.command === "crawl" && !isEnded(job) && job.options.out) jobs.set(job.options.out.replace(/\/+$/, ""), job);
    refresh().catch(() => {}); // likewise
  }));
  replace(panel, h("h1", {}, title), h("section", { class: "card" }, h("h2", {}, "Crawls"), list), made.element);
}
