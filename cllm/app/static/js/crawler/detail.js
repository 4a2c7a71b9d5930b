// One crawl: how far it is, what failed and why, site by site, and the newest pages with their text.

import { events, get, post } from "../api.js";
import { bars } from "../data/bars.js";
import { followView } from "../data/follow.js";
import { h, replace, setText } from "../dom.js";
import { ago, bytes, duration, number } from "../format.js";
import { followJobs, isEnded, jobButtons, start } from "../jobs.js";
import { link } from "../route.js";
import { badge, button, dialog, table } from "../ui.js";

const LOOK = 3000; // milliseconds between two looks at the whole crawl while it runs
const FIGURES = [["pages", "Pages"], ["rate", "Pages a second"], ["bytes", "Size"], ["queued", "In the queue"], ["waiting", "To be tried again"], ["failed", "Errors"]];

/** {element, end()} for the crawl at `path`. Throws ApiError. */
export async function detail(path) {
  const found = await get("api/crawls/detail", { path });
  const view = new View(path, found);
  return { element: view.element, end: () => view.end() };
}

class View {
  #ends = [];
  #timer = 0;
  #pending = false;
  #ended = false;

  constructor(path, found) {
    this.path = path;
    this.job = null;
    this.state = h("span");
    this.tools = h("div", { class: "row" });
    this.values = Object.fromEntries(FIGURES.map(([key]) => [key, h("dd")]));
    this.figures = h("dl", { class: "figures" }, FIGURES.map(([key, name]) => h("div", {}, h("dt", {}, name), this.values[key])));
    this.fault = h("pre", { class: "job-error", hidden: true });
    this.reasons = h("div", { class: "grid" });
    this.forbidden = h("div");
    this.pages = h("div", { class: "stack" });
    this.hosts = table([
      { key: "host", title: "Site", sort: (row) => row.host, wide: true },
      { key: "pages", title: "Pages", cell: (row) => number(row.pages), sort: (row) => row.pages, align: "right" },
      { key: "queued", title: "Queue", cell: (row) => number(row.queued), sort: (row) => row.queued, align: "right" },
      { key: "errors", title: "Errors", cell: (row) => number(row.errors), sort: (row) => row.errors, align: "right" },
      { key: "delay", title: "Delay", cell: (row) => duration(row.delay), sort: (row) => row.delay, align: "right" },
      { key: "closed", title: "Why not more", cell: (row) => row.closed || "–", wide: true },
    ], [], { caption: "Sites", key: (row) => row.host, empty: "No site has been asked yet.", sorted: { key: "pages", descending: true } });
    this.settings = h("dl", { class: "facts" });
    this.follow = followView(path, found.following);
    const card = (title, ...content) => h("section", { class: "card" }, h("h2", {}, title), content);
    this.element = h("div", { class: "stack" },
      h("a", { href: link("crawler") }, "← All crawls"),
      h("div", { class: "head" }, h("h1", {}, found.name ?? path), this.state, this.tools,
        h("a", { class: "button", href: link("data", "", { sources: path }) }, "Prepare these pages")),
      this.fault, h("section", { class: "card" }, this.figures), this.reasons, card("Sites", this.hosts), this.forbidden,
      this.follow.element, card("Newest pages", this.pages), h("details", { class: "section" }, h("summary", {}, "Settings of this crawl"), this.settings));
    this.#ends.push(this.follow.end, events.subscribe(`crawl:${path}`, (event) => this.#heard(event)), followJobs((jobs) => this.#jobs(jobs)));
    this.draw(found);
  }

  end() {
    this.#ended = true;
    clearTimeout(this.#timer);
    for (const end of this.#ends) end();
  }

  #jobs(jobs) {
    const mine = jobs.filter((job) => job.command === "crawl" && job.options.out?.replace(/\/+$/, "") === this.path);
    const before = this.job?.state;
    this.job = mine.find((job) => !isEnded(job)) ?? mine.sort((one, other) => other.created - one.created)[0] ?? null;
    this.#tools();
    if (before !== this.job?.state) this.#later(0);
  }

  #heard(event) {
    if (event.kind === "crawl") {
      const now = event.figures ?? event;
      this.#figures({ pages: now.pages, rate: now.pages_per_second, queued: now.queued, waiting: now.waiting, failed: now.failed });
    }
    this.#later(LOOK);
  }

  // The whole is fetched again a while after something happened, and once in that while.
  #later(wait) {
    if (this.#ended || (this.#timer && wait)) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(async () => {
      this.#timer = 0;
      if (this.#pending) return;
      this.#pending = true;
      try {
        const found = await get("api/crawls/detail", { path: this.path });
        if (!this.#ended) this.draw(found);
      } catch {
        // the banner says that the connection is lost; the next event looks again
      }
      this.#pending = false;
    }, wait);
  }

  #figures(values) {
    for (const [key, value] of Object.entries(values)) if (value !== undefined) setText(this.values[key], key === "bytes" ? bytes(value) : number(value));
  }

  #tools() {
    replace(this.state, badge(this.job && !isEnded(this.job) ? this.job.state : (this.found.state ?? "stopped")));
    setText(this.fault, this.job?.state === "failed" || this.job?.state === "lost" ? this.job.error : "");
    this.fault.hidden = !this.fault.textContent;
    const act = (verb) => () => post(`api/jobs/${encodeURIComponent(this.job.id)}/${verb}`);
    const runs = this.job && !isEnded(this.job);
    const wanted = JSON.stringify([this.job?.id, this.job?.state]);
    if (this.tools.dataset.shown === wanted) return;
    this.tools.dataset.shown = wanted;
    replace(this.tools, runs ? jobButtons(this.job, act) : [button("Go on", () => this.#begin(), { kind: "primary" }), button("Add addresses …", () => this.#add())],
      this.job ? h("a", { class: "button quiet", href: link("system", "", { job: this.job.id }) }, "Log") : null);
  }

  // The folder keeps all settings but the addresses of this network that may be asked, which a person has allowed for the crawl that was begun here.
  #begin(more = {}) {
    const allowed = this.job?.options["allow-private"];
    return start("crawl", { ...(allowed ? { "allow-private": allowed } : {}), out: this.path, ...more });
  }

  #add() {
    const box = h("textarea", { id: "more-addresses", rows: 4, placeholder: "one a line", spellcheck: "false" });
    return dialog({
      title: "Add addresses",
      body: h("div", { class: "field" }, h("label", { for: box.id }, "Addresses to begin from"), box),
      actions: [{ label: "Start", kind: "primary", run: async () => {
        const urls = box.value.split("\n").map((each) => each.trim()).filter(Boolean);
        if (!urls.length) throw new Error("There is no address yet. Write one, with https before it.");
        const { crawl } = await get("api/commands");
        await this.#begin({ [crawl.arguments[0].name]: urls });
        return true;
      } }],
    });
  }

  draw(found) {
    this.found = found;
    this.#figures({ pages: found.pages, bytes: found.bytes, queued: found.queued, waiting: found.waiting, failed: found.errors });
    if (!this.job || isEnded(this.job)) this.#figures({ rate: 0 });
    this.#tools();
    const kinds = [["failed", "Errors by reason"], ["left_out", "Left out and why"], ["not_queued", "Links not followed and why"], ["not_rendered", "Scripts not run and why"]];
    const card = (title, content) => h("section", { class: "card" }, h("h2", {}, title), content);
    replace(this.reasons, kinds.map(([key, title]) => {
      const pairs = Object.entries(found.by_reason?.[key] ?? {});
      return pairs.length ? card(title, bars(title, pairs)) : null;
    }));
    this.hosts.update(found.hosts ?? []);
    this.#forbid(found.robots_forbidden);
    this.#newest(found.newest ?? []);
    replace(this.settings, Object.entries(found.settings ?? {}).map(([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", "-")), h("dd", {}, shown(value)))));
  }

  #forbid(found) {
    const urls = (Array.isArray(found) ? found : (found?.urls ?? [])).map((each) => each.url ?? each);
    const count = found?.count ?? urls.length;
    const wanted = JSON.stringify([count, urls]);
    if (this.forbidden.dataset.shown === wanted) return;
    this.forbidden.dataset.shown = wanted;
    const open = this.forbidden.querySelector("details")?.open ?? false;
    replace(this.forbidden, count ? h("details", { class: "card", open }, h("summary", {}, `robots.txt forbids ${number(count)} ${count === 1 ? "address" : "addresses"}`),
      h("ul", { class: "plain" }, urls.map((url) => h("li", { class: "mono" }, url)))) : null);
  }

  // A page that stays keeps its element, so that one that is open stays open.
  #newest(pages) {
    const known = new Map([...this.pages.children].map((element) => [element.dataset.page, element]));
    const wanted = pages.map((page) => known.get(`${page.url} ${page.fetched}`) ?? pageView(page));
    replace(this.pages, wanted.length ? wanted : h("p", { class: "muted" }, "No page is stored yet."));
  }
}

function pageView(page) {
  return h("details", { class: "page", "data-page": `${page.url} ${page.fetched}` },
    h("summary", {}, h("span", { class: "page-title" }, page.title || page.url), h("span", { class: "help" }, [page.url, bytes(page.bytes), ago(page.fetched)].join(" · "))),
    page.text ? h("pre", { tabindex: "0" }, page.text) : h("p", { class: "help" }, "There is no text in it."));
}

function shown(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "–";
  return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}
