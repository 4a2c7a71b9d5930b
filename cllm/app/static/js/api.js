// The app's own API: requests, errors that are shown to people, and the live events.

import { Connection } from "./live.js";

/** What the server refused, in its own words: `message` for people, `param` the field concerned or null, `status` of HTTP, 0 without an answer. */
export class ApiError extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    this.name = "ApiError";
    this.param = param;
    this.status = status;
  }
}

export const get = (path, params, { signal } = {}) => request("GET", address(path, params), undefined, signal);
export const post = (path, body, { signal } = {}) => request("POST", path, body ?? {}, signal);
export const put = (path, body, { signal } = {}) => request("PUT", path, body ?? {}, signal);
export const remove = (path, { signal } = {}) => request("DELETE", path, {}, signal);

/** A path with its parameters; null and undefined are left out. */
export function address(path, params) {
  const given = Object.entries(params ?? {}).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** Sends a POST and calls `onEvent` with the object of each event of the answer, until "[DONE]" or the end. `signal` aborts it. */
export async function stream(path, body, onEvent, signal) {
  const answer = await send("POST", path, body, signal);
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const object = JSON.parse(data);
      if (object.error && object.error.message) throw new ApiError(object.error.message, object.error.param ?? null, answer.status);
      onEvent(object);
    }
  }
}

/** Sends a file as it is; `onProgress(sent, total)` in bytes. Answers the server's object. Only XMLHttpRequest tells how much is sent. */
export function upload(path, file, { onProgress, signal } = {}) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    const stop = () => sending.abort();
    sending.open("POST", path.replace(/^\//, ""));
    sending.setRequestHeader("Content-Type", "application/octet-stream");
    sending.responseType = "text";
    if (onProgress) sending.upload.onprogress = (event) => onProgress(event.loaded, event.lengthComputable ? event.total : file.size);
    sending.onload = () => {
      const object = parsed(sending.responseText);
      if (sending.status >= 200 && sending.status < 300) resolve(object);
      else reject(errorOf(object, sending.status));
    };
    sending.onerror = () => reject(lost());
    sending.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    sending.onloadend = () => signal?.removeEventListener("abort", stop);
    signal?.addEventListener("abort", stop);
    sending.send(file);
  });
}

/** Live events. `subscribe("run:runs/demo", (event) => ...)` -> a function that ends it; `onState((problem) => ...)` likewise. A `reset` event means:
 * fetch everything again. The page has one connection for all topics. */
export const events = new Connection("api/events");

async function request(method, path, body, signal) {
  const answer = await send(method, path, body, signal);
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : parsed(await answer.text());
}

async function send(method, path, body, signal) {
  const json = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  try {
    return await fetch(path.replace(/^\//, ""), { method, signal, credentials: "same-origin", cache: "no-store", ...json });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost();
  }
}

async function refusal(answer) {
  return errorOf(parsed(await answer.text().catch(() => "")), answer.status);
}

function errorOf(object, status) {
  const error = object?.error ?? {};
  const text = typeof error === "string" ? error : error.message;
  if (status === 401) return new ApiError("This page is not signed in. Open the address that cllm app printed when it started.", null, 401);
  return new ApiError(text || `The app answered with status ${status}. Its log is on the System tab.`, error.param ?? null, status);
}

const lost = () => new ApiError("The app does not answer. Is cllm app still running? This page goes on by itself when it is back.", null, 0);

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
