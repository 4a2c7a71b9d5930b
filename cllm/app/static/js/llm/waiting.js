// What one waits for who has asked a model something: weights are read, kernels are compiled.

import { events } from "../api.js";
import { duration } from "../format.js";

let words = "";

/** Calls `listener()` when that changes; `waitingWords` tells it. Answers a function that ends it. */
export function followWaiting(listener) {
  const end = events.subscribe("talk", (event) => {
    const now = event.kind === "talk" && event.words ? [event.path, event.words].filter(Boolean).join(": ") : "";
    words = now && `${now} … ${event.seconds > 0 ? duration(event.seconds) : ""}`.trim();
    listener();
  });
  return () => {
    words = "";
    end();
  };
}

/** In words; "" where nothing is waited for that the app knows of. */
export const waitingWords = () => words;
