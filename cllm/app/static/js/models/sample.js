// The small model that comes with CLLM: a click makes it a file of the workspace like any other, and one talks to it.

import { post } from "../api.js";
import { link } from "../route.js";
import { button } from "../ui.js";

/** A button that leads to a conversation with it. */
export const sampleButton = ({ kind = "" } = {}) => button("Talk to the sample model", async () => {
  const { path } = await post("api/models/sample");
  location.hash = link("llm", path);
}, { kind, title: "A small model of Jane Austen's novels that comes with CLLM. It goes on with what you begin, and was not taught to chat" });
