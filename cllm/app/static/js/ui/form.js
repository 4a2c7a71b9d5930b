// Fields and forms made of declarations, as GET /api/commands gives them: {name, key, help, type, default, default_text, unit, choices, min, max, ...}.

import { h, newId } from "../dom.js";
import { button } from "./base.js";
import { pathPicker } from "./picker.js";

/** A field of one declared option: {element, name, option, input, value(), set(value), error(text), matches(words)}. value() is undefined where nothing was
 * entered, so that the command's own default holds. The label is the option's name, and its unit stands behind the field. */
export function field(option, { help = true, pick = null } = {}) {
  const id = newId("field");
  const input = control(option, id);
  const fault = h("p", { class: "error", id: `${id}-error`, hidden: true });
  const explanation = h("p", { class: "help", id: `${id}-help`, hidden: !help }, [sentence(option.help), shownDefault(option)].filter(Boolean).join(" "));
  const unit = option.unit ? h("span", { class: "unit", id: `${id}-unit` }, option.unit) : null;
  const described = [unit ? `${id}-unit` : "", `${id}-help`].filter(Boolean).join(" ");
  input.setAttribute("aria-describedby", described);
  const label = h("label", { for: id }, option.name);
  const extra = option.type === "path" ? browse(option, input, pick) : null;
  const isBox = option.type === "boolean" && !isOpen(option);
  const element = h("div", { class: `field ${isBox ? "boolean" : isOpen(option) ? "choice" : option.type}` }, isBox ? [input, label] : [label, h("div", { class: "control" }, input, unit, extra)], fault, explanation);
  const error = (text) => {
    fault.textContent = text ?? "";
    fault.hidden = !text;
    input.toggleAttribute("aria-invalid", Boolean(text));
    if (text) input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", text ? `${id}-error ${described}` : described);
  };
  input.addEventListener("input", () => error(null));
  const searched = `${option.name} ${option.key ?? ""} ${option.help ?? ""}`.toLowerCase();
  return {
    element, input, option, name: option.name, error,
    value: () => read(option, input),
    set: (value) => write(option, input, value),
    matches: (words) => words.every((word) => searched.includes(word)),
  };
}

// A yes or no whose default follows from other values: a box could not show that nothing was chosen.
const isOpen = (option) => option.type === "boolean" && typeof option.default !== "boolean";

function control(option, id) {
  const shared = { id, name: option.name, required: !option.optional && option.type !== "boolean" && option.default === null };
  if (isOpen(option)) return h("select", shared, h("option", { value: "" }, option.default_text || "default"), h("option", { value: "true" }, "yes"), h("option", { value: "false" }, "no"));
  if (option.type === "boolean") return h("input", { ...shared, type: "checkbox", checked: option.default === true });
  if (option.choices?.length) {
    const none = option.default === null || option.default === undefined ? h("option", { value: "" }, option.default_text || "default") : null;
    const chosen = String(option.default ?? "");
    return h("select", shared, none, option.choices.map((each) => h("option", { value: String(each), selected: String(each) === chosen }, String(each))));
  }
  if (option.type === "list") return h("textarea", { ...shared, rows: 2, spellcheck: "false", placeholder: "one a line" });
  const numeric = option.type === "integer" || option.type === "number";
  return h("input", {
    ...shared, type: "text", inputmode: numeric ? (option.type === "integer" ? "numeric" : "decimal") : null, autocomplete: "off", spellcheck: "false",
    placeholder: placeholder(option),
  });
}

function placeholder(option) {
  if (option.default_text) return option.default_text;
  return option.default === null || option.default === undefined || option.default === "" ? null : String(option.default);
}

function shownDefault(option) {
  if (/default:/i.test(option.help ?? "")) return "";
  if (option.type === "boolean" && !isOpen(option)) return "";
  const shown = option.default_text || (option.default === null || option.default === undefined || option.default === "" ? "" : String(option.default));
  const limit = (value, exclusive, words, or) => (value === null || value === undefined ? "" : `${exclusive ? words : or} ${value}`);
  const limits = [limit(option.min, option.exclusive_min, "more than", "at least"), limit(option.max, option.exclusive_max, "less than", "at most")].filter(Boolean).join(", ");
  return [shown && `Default: ${shown}.`, limits && `Allowed: ${limits}.`].filter(Boolean).join(" ");
}

const sentence = (text) => (!text || /[.!?]$/.test(text.trim()) ? text : `${text}.`);

function browse(option, input, pick) {
  return button("Choose …", async () => {
    const path = await pathPicker({ title: `Choose ${option.name}`, pick: pick ?? "any", start: input.value.includes("/") ? input.value.replace(/\/[^/]*$/, "") : "" });
    if (path === null) return;
    input.value = path;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, { name: `Choose ${option.name} in the workspace` });
}

function read(option, input) {
  if (isOpen(option)) return input.value ? input.value === "true" : undefined;
  if (option.type === "boolean") return input.checked === (option.default === true) ? undefined : input.checked;
  const text = input.value.trim();
  if (!text || (option.choices?.length && text === String(option.default ?? ""))) return undefined;
  if (option.type === "list") return text.split("\n").map((each) => each.trim()).filter(Boolean);
  if (option.type === "integer" || option.type === "number") {
    const plain = Number(text.replaceAll(/(?<=\d)[,_ ](?=\d{3}(?!\d))/g, ""));
    return Number.isNaN(plain) ? text : plain; // what is no number is sent as it is: the server says what is wrong with it
  }
  return text;
}

function write(option, input, value) {
  if (isOpen(option)) input.value = value === undefined || value === null ? "" : String(value);
  else if (option.type === "boolean") input.checked = value ?? option.default === true;
  else if (option.type === "list") input.value = (value ?? []).join("\n");
  else input.value = value === undefined || value === null ? (option.choices?.length ? String(option.default ?? "") : "") : String(value);
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

/** A form of declared options. groups: [{title, names: [...], open}] come first, in their order; a group without a title stands open without a frame.
 * All other options follow by their own group, in sections that open; options in `leave` are left out. {element, fields, field(name), values(), set(values),
 * error(param, text), clear(), filter(text)} */
export function form(options, groups = [], { leave = [], onsubmit = null, pick = {} } = {}) {
  const byName = new Map(options.filter((option) => !leave.includes(option.name)).map((option) => [option.name, field(option, { pick: pick[option.name] ?? null })]));
  const sections = [];
  const placed = new Set();
  const add = (title, names, open) => {
    const members = names.filter((name) => byName.has(name) && !placed.has(name));
    members.forEach((name) => placed.add(name));
    if (!members.length) return;
    const fields = h("div", { class: "fields" }, members.map((name) => byName.get(name).element));
    const element = title ? h("details", { class: "section", open: Boolean(open) }, h("summary", {}, title), fields) : fields;
    sections.push({ element, members, open: Boolean(open) });
  };
  for (const group of groups) add(group.title, group.names, group.open);
  const rest = new Map();
  for (const name of byName.keys()) if (!placed.has(name)) {
    const group = byName.get(name).option.group || "More";
    rest.set(group, [...(rest.get(group) ?? []), name]);
  }
  for (const [title, names] of rest) add(groups.length ? `More: ${title}` : title, names, false);

  const element = h("form", { novalidate: true, onsubmit: (event) => {
    event.preventDefault();
    onsubmit?.();
  } }, sections.map((section) => section.element));
  const plain = (name) => String(name ?? "").replace(/^--/, "").replaceAll("_", "-");
  const find = (name) => byName.get(plain(name)) ?? [...byName.values()].find((each) => each.option.key === name) ?? byName.get(plain(String(name ?? "").split(".").pop()));
  return {
    element,
    fields: [...byName.values()],
    field: find,
    values() {
      const pairs = [...byName].map(([name, each]) => [name, each.value()]);
      return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
    },
    set(values) {
      for (const each of byName.values()) each.set(undefined);
      for (const [name, value] of Object.entries(values)) find(name)?.set(value);
    },
    clear: () => byName.forEach((each) => each.error(null)),
    /** Puts the error beside its field, opens its section, and moves the focus there. False where no field is concerned. */
    error(param, text) {
      const each = param ? find(param) : null;
      if (!each) return false;
      each.error(text);
      const section = each.element.closest("details");
      if (section) section.open = true;
      each.input.focus();
      return true;
    },
    /** Shows only what has all the words of `text`, with its sections open. Answers how many fields are shown. */
    filter(text) {
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const section of sections) {
        const found = section.members.filter((name) => byName.get(name).matches(words));
        for (const name of section.members) byName.get(name).element.hidden = !found.includes(name);
        section.element.hidden = !found.length;
        if (section.element.matches("details")) section.element.open = words.length ? found.length > 0 : section.open;
        shown += found.length;
      }
      return shown;
    },
  };
}
