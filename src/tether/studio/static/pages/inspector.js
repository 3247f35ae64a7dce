// Everything about one step: state, action, probabilities old, new and of the reference, credit, alternatives.

import { h, fill } from "../dom.js";
import { fixed, percent, signed } from "../format.js";
import { tokenNodes, visible } from "../text.js";
import { Film } from "./film.js";

const credit = (value) => (Math.abs(value) < 5e-4 ? "0.000" : signed(value));

const ROWS = [
  ["log_prob", "log π old", "when it was drawn", fixed],
  ["new_log_prob", "log π new", "when the update last saw it", fixed],
  ["reference_log_prob", "log π reference", "", fixed],
  ["ratio", "ratio", "π new ÷ π old", fixed],
  ["kl", "KL", "log π old − log π reference", credit],
  ["entropy", "entropy", "nats", fixed],
  ["value", "value", "V(s) before it", credit],
  ["reward", "reward", "penalties included", credit],
  ["return", "return", "what the critic learns", credit],
  ["advantage", "advantage", "", credit],
];

export class Inspector {
  /** `walk(step)` chooses a step for the whole page. */
  constructor(episode, walk) {
    this.episode = episode;
    this.steps = episode.steps;
    const cut = episode.details?.film;
    this.film = episode.film && cut ? new Film(episode.film, cut, this.steps.action.length, walk) : null;
    this.body = h("div", { class: "facts-of-step" });
    this.element = h("div", {}, this.film?.element ?? null, this.body);
  }

  show(step) {
    const { steps } = this;
    this.film?.show(step);
    fill(this.body,
      h("p", { class: "step-title" }, h("span", {}, `step ${step}`), h("span", { class: "faint" }, `of ${steps.action.length}`),
        steps.clipped?.[step] ? h("span", { class: "tag warn" }, "clipped") : null),
      h("p", { class: "action" }, h("span", { class: "token big" }, tokenNodes(cut(steps.action[step]), { edges: true })), idOf(steps.action_id?.[step], steps.action[step])),
      this.alternatives(step),
      h("dl", { class: "numbers" }, ROWS.filter(([name]) => steps[name]).map(([name, label, words, show]) => h("div", { dataset: { number: name } },
        h("dt", {}, label, words ? h("small", {}, words) : null), h("dd", {}, show(steps[name][step]))))),
      h("div", { class: "state-of-step" }, h("h3", {}, "State"), h("p", { class: "text", dir: "auto" }, this.state(step))));
  }

  /** What was observed; in the language world the prompt and the tokens so far, of which the end is shown. */
  state(step) {
    if (this.steps.state) return visible(cut(this.steps.state[step] ?? "", 600));
    let before = "";
    for (let i = step - 1; i >= 0 && before.length < 160; i -= 1) before = this.steps.action[i] + before;
    const prompt = this.episode.prompt;
    const end = before.length < 160 ? prompt.slice(-(160 - before.length)) : "";
    const left = prompt.length > end.length || before.length > 160 ? "…" : "";
    return [h("span", { class: "faint" }, left, visible(end)), visible(before.slice(-160))];
  }

  alternatives(step) {
    const list = this.steps.alternatives?.[step];
    if (!list?.length) return null;
    const action = this.steps.action[step];
    const shown = list.some(([text]) => text === action) || !Number.isFinite(this.steps.log_prob?.[step]) ? list : [...list, [action, Math.exp(this.steps.log_prob[step])]];
    const top = Math.max(...shown.map(([, probability]) => probability), 1e-9);
    return h("div", { class: "alternatives" }, h("h3", {}, "What it could have done"), h("ol", {}, shown.map(([text, probability]) =>
      h("li", { class: text === action ? "taken" : null, style: { "--p": `${((100 * probability) / top).toFixed(1)}%` } },
        h("span", { class: "what" }, tokenNodes(cut(text, 60), { edges: true })), h("span", { class: "bar", "aria-hidden": "true" }), h("span", { class: "p" }, percent(probability)),
        text === action ? h("span", { class: "hidden" }, "taken") : null))));
  }
}

function cut(text, limit = 200) {
  return text.length > limit ? `${text.slice(0, limit)}…` : text;
}

function idOf(id, action) {
  if (id === null || id === undefined || String(id) === action) return null;
  const text = Array.isArray(id) ? id.map((x) => fixed(x, 2)).join(", ") : String(id);
  return h("small", { class: "faint" }, Array.isArray(id) ? text : `id ${text}`);
}
