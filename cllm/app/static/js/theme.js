// Runs before anything is painted, so that a page in the dark does not flash white first.
"use strict";
try {
  const chosen = localStorage.getItem("cllm-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* without storage the page follows the system */ }
