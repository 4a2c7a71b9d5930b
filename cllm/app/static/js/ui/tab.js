// A tab that fetches what it shows.

import { h, replace } from "../dom.js";
import { button, empty, spinner } from "./base.js";

/** Shows that something is coming until `fill(ends)` has put it into the panel; `ends` takes functions that end what goes on there. What it throws is
 * shown with a way to try again. Answers the function that ends the tab. */
export function fetchedTab(panel, title, fill) {
  const ends = [];
  let ended = false;
  const stop = () => ends.splice(0).forEach((end) => end());
  const begin = () => fill(ends).then(() => ended && stop());
  replace(panel, h("h1", {}, title), spinner());
  begin().catch((error) => ended || replace(panel, h("h1", {}, title), empty(error.message, button("Try again", begin))));
  return () => {
    ended = true;
    stop();
  };
}
