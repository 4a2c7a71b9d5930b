// Tables of records: sortable, updated in place (a row that stays keeps its element, and so the focus in it), and cards on a narrow screen.

import { h, replace } from "../dom.js";
import { UNKNOWN } from "../format.js";

/** columns: [{key, title, cell(row) -> text or node, sort(row) -> comparable, align: "right", wide: text that may take much room}].
 * options: caption (read by screen readers, shown where `showCaption`), key(row) -> identity, empty: text or node where there are no rows,
 * sorted: {key, descending}. Answers an element with update(rows). */
export function table(columns, rows = [], { caption = "", showCaption = false, key = (row) => row, empty = "Nothing yet.", sorted = null } = {}) {
  const body = h("tbody");
  const nothing = h("div", { class: "empty" }, typeof empty === "string" ? h("p", {}, empty) : empty);
  const heads = columns.map((column) => h("th", { scope: "col", class: column.align }, column.sort ? sorter(column) : column.title || h("span", { class: "visually-hidden" }, "Actions")));
  const grid = h("table", { class: "cards" }, caption && h("caption", { class: showCaption ? null : "visually-hidden" }, caption), h("thead", {}, h("tr", {}, heads)), body);
  const element = h("div", { class: "table-box" }, grid, nothing);
  const lines = new Map(); // identity -> {line, cells, values}
  let order = sorted;
  let current = rows;

  function sorter(column) {
    return h("button", { type: "button", class: "sorter", onclick: () => {
      order = { key: column.key, descending: order?.key === column.key ? !order.descending : Boolean(column.align) };
      update(current);
    } }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }));
  }

  function inOrder(all) {
    const column = order && columns.find((each) => each.key === order.key);
    if (!column) return all;
    const sign = order.descending ? -1 : 1;
    const values = new Map(all.map((row) => [row, column.sort(row)]));
    return [...all].sort((one, other) => {
      const [a, b] = [values.get(one), values.get(other)];
      if (a === b) return 0;
      if (a === null || a === undefined) return 1; // the unknown stands last either way
      if (b === null || b === undefined) return -1;
      return (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a < b ? -1 : 1) * sign;
    });
  }

  function lineOf(row) {
    const identity = key(row);
    let each = lines.get(identity);
    if (!each) {
      const cells = columns.map((column) => h("td", { class: [column.align, column.wide && "wide"].filter(Boolean).join(" ") || null, "data-label": column.title }));
      each = { line: h("tr", {}, cells), cells, shown: [] };
      lines.set(identity, each);
    }
    columns.forEach((column, index) => {
      const value = column.cell ? column.cell(row) : (row[column.key] ?? UNKNOWN);
      const text = value instanceof Node ? null : String(value ?? UNKNOWN);
      if (text !== null ? each.shown[index] === text : sameNode(each.cells[index].firstChild, value)) return;
      each.shown[index] = text;
      replace(each.cells[index], value);
    });
    return each.line;
  }

  function update(next) {
    current = next;
    const wanted = inOrder(next).map(lineOf);
    const kept = new Set(next.map(key));
    for (const identity of [...lines.keys()]) if (!kept.has(identity)) lines.delete(identity);
    wanted.forEach((line, index) => {
      if (body.children[index] !== line) body.insertBefore(line, body.children[index] ?? null);
    });
    while (body.children.length > wanted.length) body.lastChild.remove();
    columns.forEach((column, index) => {
      if (!column.sort) return;
      if (order?.key === column.key) heads[index].setAttribute("aria-sort", order.descending ? "descending" : "ascending");
      else heads[index].removeAttribute("aria-sort");
    });
    grid.hidden = !next.length;
    nothing.hidden = Boolean(next.length);
  }

  update(rows);
  element.update = update;
  return element;
}

// A cell that is made anew at each update, but looks the same, is left alone: the focus in it stays, and a reader of the page is not disturbed.
const sameNode = (old, next) => old instanceof Element && next instanceof Element && !next.matches(".fresh") && old.isEqualNode(next);
