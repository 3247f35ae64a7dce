// One prompt across the iterations: how its answer changed, side by side.

import { h, fill } from "../dom.js";
import { get, address } from "../api.js";
import { nats, signed, plural } from "../format.js";
import { longText, visible } from "../text.js";
import { promptView } from "../turns.js";

const SHOWN = 60;
const DIFFED = 400;

export async function showSamePrompt(page, run, body) {
  const id = page.query.get("same");
  const { episodes } = await get("same-prompt", { run: run.run, id }, page.signal);
  document.title = `One prompt of ${run.name} · Tether studio`;
  const shown = episodes.length > SHOWN ? spread(episodes, SHOWN) : episodes;
  fill(body,
    h("div", { class: "toolbar" }, h("h2", {}, "The same prompt across iterations"), h("span", { class: "spacer" }),
      h("a", { class: "button", href: address("/episodes", { run: run.run, prompt: episodes[0]?.prompt_hash }) }, "As a list")),
    episodes[0] ? promptView(episodes[0].prompt, episodes[0].messages) : null,
    h("p", { class: "hint apart" }, `${plural(episodes.length, "iteration")}${shown.length < episodes.length ? `, ${shown.length} of them shown` : ""}; words that the one before did not have are underlined.`),
    h("div", { class: "columns scroll", tabindex: "0", role: "region", "aria-label": "Answers by iteration" }, shown.map((episode, i) => card(episode, shown[i - 1], run, String(episode.id) === id))));
}

/** `wanted` of them, evenly, the first and the last among them. */
function spread(list, wanted) {
  return Array.from({ length: wanted }, (_, i) => list[Math.round((i * (list.length - 1)) / (wanted - 1))]);
}

function card(episode, before, run, here) {
  return h("article", { class: here ? "answer here" : "answer" },
    h("header", {}, h("h3", {}, h("a", { class: "open", href: address("/episode", { run: run.run, id: episode.id }) }, `Iteration ${episode.iteration}`)),
      h("span", { class: "score-chip", dataset: { shade: episode.score < 0 ? "worse" : "better" }, style: { "--shade": "35%" } }, signed(episode.score))),
    before ? changedText(before.response, episode.response) : longText(episode.response),
    h("footer", {}, `KL ${nats(episode.kl)} · ${plural(episode.length, "step")}${episode.truncated ? " · cut off" : ""}`));
}

/** The response with the words that are new against `before` marked; plain where it is long. */
function changedText(before, after) {
  const [old, now] = [before, after].map((text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []);
  if (!now.length || now.length > DIFFED || old.length > DIFFED) return longText(after);
  const kept = common(old, now);
  return h("div", { class: "text", dir: "auto" }, now.map((word, i) => (kept.has(i) || !word.trim() ? visible(word) : h("ins", {}, visible(word)))));
}

/** Places in `now` that belong to a longest common subsequence with `old`. */
function common(old, now) {
  const longest = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i -= 1) {
    for (let j = now.length - 1; j >= 0; j -= 1) {
      longest[i][j] = old[i] === now[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const kept = new Set();
  for (let i = 0, j = 0; i < old.length && j < now.length; ) {
    if (old[i] === now[j]) {
      kept.add(j);
      i += 1;
      j += 1;
    } else if (longest[i + 1][j] >= longest[i][j + 1]) i += 1;
    else j += 1;
  }
  return kept;
}
