// The shell: the tabs, the address, light and dark, the lost connection. Each tab is a module of its own that is loaded when it is first opened.

import { ApiError, events } from "./api.js";
import { h, replace, setText } from "./dom.js";
import { link, parse } from "./route.js";
import { button, empty, toast } from "./ui.js";

const TABS = [
  ["home", "Home"],
  ["data", "Data"],
  ["training", "Training"],
  ["llm", "LLM"],
  ["models", "Models"],
  ["crawler", "Crawler"],
  ["system", "System"],
];

const bar = document.getElementById("tabs");
const main = document.getElementById("main");
const menu = document.getElementById("menu");
const narrow = window.matchMedia("(max-width: 759px)");
const tabs = new Map(TABS.map(([name, label]) => [name, makeTab(name, label)]));
let shown = null; // {name, unmount}
let turn = 0;

function makeTab(name, label) {
  const panel = h("section", { id: `panel-${name}`, class: "panel", role: "tabpanel", "aria-labelledby": `tab-${name}`, hidden: true });
  const tab = h("button", {
    id: `tab-${name}`, class: "tab", type: "button", role: "tab", "aria-controls": panel.id, "aria-selected": "false", tabindex: "-1",
    onclick: () => open(name),
  }, label);
  bar.append(tab);
  main.append(panel);
  return { label, tab, panel };
}

function open(name) {
  closeMenu();
  if (parse(location.hash).tab === name && shown?.name === name && !parse(location.hash).path) return;
  location.hash = link(name);
}

async function show() {
  const mine = ++turn;
  const route = parse(location.hash);
  const name = tabs.has(route.tab) ? route.tab : "home";
  const moved = shown?.name !== name;
  leave();
  for (const [each, { tab, panel }] of tabs) {
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
    panel.hidden = each !== name;
  }
  const { label, panel } = tabs.get(name);
  document.title = `${label} – CLLM`;
  if (moved) window.scrollTo(0, 0);
  try {
    const module = await import(`./tabs/${name}.js`);
    if (mine !== turn) return;
    shown = { name, unmount: module.mount(panel, route) };
  } catch (error) {
    if (mine !== turn) return;
    replace(panel, empty(`The ${label} tab could not be opened: ${error.message}`, button("Reload the page", () => location.reload())));
    shown = { name, unmount: null };
    console.warn(error);
  }
}

function leave() {
  if (!shown) return;
  const { name, unmount } = shown;
  shown = null;
  try {
    unmount?.();
  } finally {
    tabs.get(name).panel.replaceChildren();
  }
}

bar.addEventListener("keydown", (event) => {
  const names = [...tabs.keys()];
  const at = names.findIndex((name) => tabs.get(name).tab === document.activeElement);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: names.length - 1 }[event.key];
  if (event.key === "Escape" && narrow.matches) {
    closeMenu();
    menu.focus();
  }
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const name = names[(to + names.length) % names.length];
  tabs.get(name).tab.focus();
  if (!narrow.matches) open(name); // in the menu of a phone the arrows only move; Enter opens
});

menu.addEventListener("click", () => {
  const opened = menu.getAttribute("aria-expanded") !== "true";
  menu.setAttribute("aria-expanded", String(opened));
  bar.classList.toggle("open", opened);
  if (opened) bar.querySelector("[aria-selected=true]")?.focus();
});

document.addEventListener("click", (event) => {
  if (!menu.contains(event.target) && !bar.contains(event.target)) closeMenu();
});

function closeMenu() {
  menu.setAttribute("aria-expanded", "false");
  bar.classList.remove("open");
}

const setOrientation = () => bar.setAttribute("aria-orientation", narrow.matches ? "vertical" : "horizontal");
narrow.addEventListener("change", setOrientation);
setOrientation();

const system = window.matchMedia("(prefers-color-scheme: dark)");
const theme = document.getElementById("theme");
const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const sayTheme = () => {
  replace(theme, h("span", { "aria-hidden": "true" }, isDark() ? "☀" : "☾"));
  theme.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  theme.title = theme.getAttribute("aria-label");
  window.dispatchEvent(new Event("themechange"));
};
theme.addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("cllm-theme", next);
  } catch { /* the choice then lasts as long as the page */ }
  sayTheme();
});
system.addEventListener("change", sayTheme);
sayTheme();

const banner = document.getElementById("connection");
const PROBLEMS = {
  lost: "The connection to the app is lost. Is cllm app still running? What it does goes on; this page is trying again.",
  "signed out": "This page is no longer signed in. Open the address that cllm app printed when it started.",
};
events.onState((problem) => {
  setText(banner, PROBLEMS[problem]);
  banner.hidden = !problem;
});

// What nobody caught is told in words instead of only in the console.
window.addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") return event.preventDefault();
  if (event.reason instanceof ApiError) {
    event.preventDefault();
    toast(event.reason.message, { kind: "error" });
  }
});

window.addEventListener("hashchange", show);
show();
