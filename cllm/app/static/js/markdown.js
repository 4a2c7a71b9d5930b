// Markdown of a model's answer as a node of the page. What a model writes is never trusted: raw HTML stays text, pictures become their
// description, and DOMPurify lets nothing through but the few tags that Markdown needs.

import { h } from "./dom.js";
import { classicScript } from "./vendor.js";

const LANGUAGES = {
  bash: "bash", sh: "bash", shell: "bash", c: "cpp", cpp: "cpp", "c++": "cpp", diff: "diff", html: "xml", xml: "xml", javascript: "javascript", js: "javascript",
  json: "json", python: "python", py: "python", rust: "rust", rs: "rust", yaml: "yaml", yml: "yaml",
};
const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "table", "thead",
    "tbody", "tr", "th", "td", "a"],
  ALLOWED_ATTR: ["href", "class", "start"],
  ALLOWED_URI_REGEXP: /^https?:/i,
  RETURN_DOM_FRAGMENT: true,
};
const LONGEST_COLOURED = 50000; // characters of one piece of code; longer ones keep one colour

let parts = null;

/** A <div class="markdown"> with the text formatted. */
export async function markdown(text) {
  parts ??= load();
  const { marked, purify } = await parts;
  const node = h("div", { class: "markdown" }, purify.sanitize(marked.parse(text), ALLOWED));
  for (const each of node.querySelectorAll("a")) {
    each.rel = "noreferrer noopener";
    each.target = "_blank";
  }
  await Promise.all([...node.querySelectorAll("pre > code")].map(colour));
  return node;
}

async function load() {
  const [{ Marked }, purify] = await Promise.all([import("../vendor/marked.esm.js"), classicScript("purify.min.js", "DOMPurify")]);
  const marked = new Marked({ gfm: true, breaks: false });
  const asText = (value) => value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  marked.use({ renderer: { html: ({ text }) => asText(text), image: ({ text }) => asText(text), checkbox: ({ checked }) => (checked ? "[x] " : "[ ] ") } });
  return { marked, purify };
}

async function colour(code) {
  const language = LANGUAGES[/language-(\S+)/.exec(code.className)?.[1]?.toLowerCase()];
  if (!language || code.textContent.length > LONGEST_COLOURED) return;
  const [core, grammar] = await Promise.all([import("../vendor/highlight/core.min.js"), import(`../vendor/highlight/${language}.min.js`)]);
  const hljs = core.default;
  if (!hljs.getLanguage(language)) hljs.registerLanguage(language, grammar.default);
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  const purify = await classicScript("purify.min.js", "DOMPurify");
  code.replaceChildren(purify.sanitize(value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
}
