// Elements from values. Strings become text nodes and nothing is ever parsed as HTML, so no name or text can become markup.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "readOnly", "multiple", "required", "indeterminate", "innerText"]);

/** An element. `attributes`: `onclick` and the like are listeners, `style` is an object of CSS properties, null and false leave an attribute out. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Puts `children` in the place of what the node holds. What it holds already stays where it is: a press of the mouse or a focus in it is not lost. */
export function replace(node, ...children) {
  const next = nodes(children);
  const kept = new Set(next);
  for (const each of [...node.childNodes]) if (!kept.has(each)) each.remove();
  next.forEach((each, index) => {
    const here = node.childNodes[index] ?? null;
    if (here !== each) node.insertBefore(each, here);
  });
  return node;
}

/** Writes a text only where it differs, so that a live region and a reader of the page are not disturbed for nothing. */
export function setText(node, text) {
  const next = text ?? "";
  if (node.textContent !== next) node.textContent = next;
}

let count = 0;
/** A new id for labels and descriptions. */
export const newId = (start = "e") => `${start}-${++count}`;

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  const given = children.flat(Infinity).filter((each) => each !== null && each !== undefined && each !== false);
  return given.flatMap((each) => {
    if (each instanceof DocumentFragment) return [...each.childNodes];
    return each instanceof Node ? each : document.createTextNode(String(each));
  });
}
