// Addresses within the page: #/training/runs/demo?x=tokens. A path is encoded part by part, so that any name survives.

/** "#/models/runs/my%20run" for ("models", "runs/my run"). */
export function link(tab, path = "", params = null) {
  const rest = path ? `/${path.split("/").map(encodeURIComponent).join("/")}` : "";
  const query = params ? `?${new URLSearchParams(params)}` : "";
  return `#/${tab}${rest}${query}`;
}

/** What an address means: {tab, path, params}. */
export function parse(hash) {
  const [before, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [tab, ...parts] = before.split("/");
  return { tab: tab || "home", path: parts.map(decoded).join("/"), params: new URLSearchParams(query) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
