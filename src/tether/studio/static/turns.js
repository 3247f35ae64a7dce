// A prompt: text as it is, a conversation as its turns. Roles and texts come from data sets: they are text and no more.

import { h, button } from "./dom.js";
import { longText, snippet, visible } from "./text.js";

/** A prompt in full. Of a conversation the text that the model read is a click away. */
export function promptView(prompt, messages) {
  if (!messages) return longText(prompt, { class: "prompt-block" });
  const turns = h("div", { class: "turns prompt-block" }, messages.map(({ role, content }) =>
    h("div", { class: "turn" }, h("span", { class: "role" }, visible(role)), longText(content))));
  const raw = longText(prompt, { class: "prompt-block", hidden: true });
  const toggle = button("Raw text", () => {
    raw.hidden = !raw.hidden;
    turns.hidden = !raw.hidden;
    toggle.setAttribute("aria-pressed", String(!raw.hidden));
  }, { class: "quiet raw-text", "aria-pressed": "false", title: "What the model read, the chat template applied" });
  return h("div", { class: "conversation" }, turns, raw, toggle);
}

/** A prompt on one line; of a conversation its last turn, and how many come before it. */
export function promptLine(prompt, messages) {
  if (!messages) return snippet(prompt);
  const { role, content } = messages.at(-1);
  return [h("span", { class: "role" }, visible(role)), snippet(content), messages.length > 1 ? h("small", { class: "faint" }, ` after ${messages.length - 1} more`) : null];
}
