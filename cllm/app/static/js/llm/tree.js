// A conversation is a tree: nothing that was said or tried is lost. Each node is a text of the user or of the model, and `chosen` says for every node
// which of its children is shown. A thread is the tree of one model; two models side by side have a thread each.

export const newThread = (model = null) => ({ model, nodes: {}, chosen: {}, next: 1 });

/** A new node below `parent` (null: at the beginning), which is shown from now on. fields: {role: "user" | "assistant", text, ...}. */
export function add(thread, parent, fields) {
  const node = { id: `n${thread.next++}`, parent: parent?.id ?? null, text: "", created: Date.now() / 1000, ...fields };
  thread.nodes[node.id] = node;
  thread.chosen[node.parent ?? ""] = node.id;
  return node;
}

/** The nodes below `parent` (null: the beginnings), the oldest first. */
export const childrenOf = (thread, parent) => Object.values(thread.nodes).filter((node) => node.parent === (parent?.id ?? null));

/** What is shown, from the beginning to the end. */
export function shownPath(thread) {
  const found = [];
  for (let node = thread.nodes[thread.chosen[""]]; node; node = thread.nodes[thread.chosen[node.id]]) found.push(node);
  return found;
}

/** The nodes from the beginning to `node`, itself included. */
export function pathTo(thread, node) {
  const found = [];
  for (let each = node; each; each = thread.nodes[each.parent]) found.unshift(each);
  return found;
}

/** Shows another of a node's siblings: `by` places further, round and round. */
export function turn(thread, node, by) {
  const siblings = childrenOf(thread, thread.nodes[node.parent]);
  const next = siblings[(siblings.indexOf(node) + by + siblings.length) % siblings.length];
  thread.chosen[node.parent ?? ""] = next.id;
  return next;
}

/** Removes a node with all that follows it; a sibling is shown instead, where there is one. */
export function prune(thread, node) {
  for (const child of childrenOf(thread, node)) prune(thread, child);
  delete thread.nodes[node.id];
  delete thread.chosen[node.id];
  const key = node.parent ?? "";
  if (thread.chosen[key] !== node.id) return;
  const rest = childrenOf(thread, thread.nodes[node.parent]);
  if (rest.length) thread.chosen[key] = rest.at(-1).id;
  else delete thread.chosen[key];
}

/** A copy for another model: what was said until now stands in both. */
export const copyFor = (thread, model) => ({ ...structuredClone(thread), model });
