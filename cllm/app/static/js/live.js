// One stream of live events for a page. It is read with fetch instead of EventSource, so that the id of the last event is sent again when the
// topics change as well, and nothing is missed in between. A hidden page gives its connection back: browsers allow a host few of them, and a
// tab that nobody looks at for weeks should cost nothing. When it is seen again, the server replays what was missed, or says `reset`.

const FIRST_WAIT = 500; // milliseconds before the first new attempt; doubled up to LONGEST_WAIT
const LONGEST_WAIT = 8000;
const SILENCE = 45000; // the server says something at least every 15 s; after this long the connection is dead

export class Connection {
  #address;
  #listeners = new Map(); // topic -> set of functions
  #watchers = new Set();
  #lastId = null;
  #running = null; // the AbortController of the open stream
  #pending = 0;
  #wait = FIRST_WAIT;
  #problem = "";
  #heard = 0;

  constructor(address) {
    this.#address = address;
    document.addEventListener("visibilitychange", () => this.#changed());
    window.addEventListener("online", () => this.#changed());
    window.addEventListener("pagehide", () => this.#stop());
    window.addEventListener("pageshow", (event) => event.persisted && this.#changed());
    setInterval(() => this.#running && performance.now() - this.#heard > SILENCE && this.#again(), SILENCE / 3);
  }

  /** Calls `listener` with each event of the topic. Answers a function that ends it. */
  subscribe(topic, listener) {
    const listeners = this.#listeners.get(topic) ?? new Set();
    if (!listeners.size) {
      this.#listeners.set(topic, listeners);
      this.#changed();
    }
    listeners.add(listener);
    return () => {
      listeners.delete(listener);
      if (listeners.size || this.#listeners.get(topic) !== listeners) return;
      this.#listeners.delete(topic);
      this.#changed();
    };
  }

  /** Calls `watcher(problem)` now and at each change: "" while all is well, "lost", or "signed out". Answers a function that ends it. */
  onState(watcher) {
    this.#watchers.add(watcher);
    watcher(this.#problem);
    return () => this.#watchers.delete(watcher);
  }

  #changed() {
    clearTimeout(this.#pending);
    this.#pending = setTimeout(() => this.#again(), 30); // several topics that change at once make one new connection
  }

  #again() {
    this.#stop();
    if (document.visibilityState !== "hidden" && this.#listeners.size) this.#read();
  }

  #stop() {
    clearTimeout(this.#pending);
    this.#running?.abort();
    this.#running = null;
  }

  async #read() {
    const running = new AbortController();
    this.#running = running;
    this.#heard = performance.now();
    try {
      const topics = new URLSearchParams([...this.#listeners.keys()].map((name) => ["topic", name])); // each by itself: a name may hold commas
      const headers = { Accept: "text/event-stream", ...(this.#lastId ? { "Last-Event-ID": this.#lastId } : {}) };
      const answer = await fetch(`${this.#address}?${topics}`, { headers, signal: running.signal, cache: "no-store" });
      if (!answer.ok) throw Object.assign(new Error(), { status: answer.status });
      this.#say("");
      this.#wait = FIRST_WAIT;
      await this.#lines(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      throw new Error(); // the server ended it
    } catch (error) {
      if (this.#running !== running) return;
      this.#say(error.status === 401 ? "signed out" : "lost");
    }
    this.#running = null;
    this.#pending = setTimeout(() => this.#again(), this.#wait);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
  }

  async #lines(reader) {
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.#heard = performance.now();
      rest += value.replaceAll("\r", "");
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) this.#event(part);
    }
  }

  #event(part) {
    let data = "";
    for (const line of part.split("\n")) {
      if (line.startsWith("id:")) this.#lastId = line.slice(3).trim();
      else if (line.startsWith("data:")) data += line.slice(5).trimStart();
    }
    if (!data) return;
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      return;
    }
    const reset = event.kind === "reset";
    for (const [topic, listeners] of this.#listeners) {
      if (topic !== event.topic && !(reset && !event.topic)) continue;
      for (const listener of [...listeners]) {
        try {
          listener(event);
        } catch (error) {
          reportError(error);
        }
      }
    }
  }

  #say(problem) {
    if (problem === this.#problem) return;
    this.#problem = problem;
    for (const watcher of [...this.#watchers]) watcher(problem);
  }
}
