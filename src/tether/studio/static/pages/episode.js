// An episode as a trajectory: its actions coloured by a quantity, value and return under them, everything about the
// step that is pointed at, and the other responses to the same prompt beside it.

import { h, fill, button, announce, told } from "../dom.js";
import { get, address, exportAddress } from "../api.js";
import { ChartGroup } from "../charts.js";
import { QUANTITIES, makeScale, legendLabels, rampKind } from "../colours.js";
import { runHeader } from "../parts.js";
import { nats, signed, count, plural, setting, flatten } from "../format.js";
import { longText } from "../text.js";
import { promptView } from "../turns.js";
import { TokenStrip, stillTokens } from "../tokens.js";
import { Inspector } from "./inspector.js";
import { go, rename } from "../router.js";
import { keys } from "../keys.js";

export async function show(page) {
  const [name, id] = [page.query.get("run") ?? "", page.query.get("id") ?? ""];
  const [run, episode] = await Promise.all([get("run", { run: name }, page.signal), get("episode", { run: name, id }, page.signal)]);
  document.title = `Episode ${episode.id} of ${run.name} · Tether studio`;
  const control = run.kind === "control";
  const inspector = new Inspector(episode, (step) => strip.select(step));
  const group = new ChartGroup(page.signal, { name: "step", label: "step", whole: true });
  const strip = new TokenStrip(episode.steps, {
    label: control ? "Actions" : "Response, token by token", chips: control, step: Number(page.query.get("step") ?? 0),
    onLook: (step) => {
      inspector.show(step);
      group.point(step);
    },
  });
  strip.onSelect = (step) => rename({ step: step || null });
  const chart = group.add({
    title: "Value and return", unit: "", height: 150,
    series: [{ label: "value", colour: "c1" }, { label: "return", colour: "c2", dashed: true }, { label: "reward", colour: "c3" }],
    onPoint: (step) => strip.look(step ?? strip.selected),
  });
  const colouring = new Colouring(page, episode, strip);
  fill(page.main, runHeader(run, "episodes"), heading(page, run, episode),
    h("div", { class: "trajectory" },
      h("div", { class: "left" },
        h("section", { class: "panel" }, h("h2", { class: "small" }, control ? "First observation" : "Prompt"), promptView(episode.prompt, episode.messages)),
        h("section", { class: "panel" }, h("div", { class: "section-head" }, h("h2", { class: "small" }, control ? "Actions" : "Response"), colouring.picker), colouring.legend, strip.element,
          control ? h("p", { class: "hint" }, episode.response) : null),
        h("section", { class: "panel" }, chart.element)),
      h("aside", { class: "panel inspector", "aria-label": "The step that is pointed at" }, inspector.element)),
    siblings(page, run, episode, colouring), details(episode));
  chart.update(episode.steps.action.map((_, i) => i), ["value", "return", "reward"].map((column) => ({ values: episode.steps[column] ?? [] })));
  colouring.choose(page.query.get("by") ?? "advantage");
  if (strip.count) strip.look(strip.selected);
  bindKeys(page, run, episode, strip, colouring);
}

function bindKeys(page, run, episode, strip, colouring) {
  const to = (id) => id && go(address("/episode", { run: run.run, id, by: colouring.quantity.name === "advantage" ? null : colouring.quantity.name }));
  keys(page.signal, [
    ["ArrowRight", "next step", () => strip.select(strip.selected + 1)],
    ["ArrowLeft", "step before", () => strip.select(strip.selected - 1)],
    ["Home", "first step", () => strip.select(0)],
    ["End", "last step", () => strip.select(strip.count - 1)],
    ["n", "next episode", () => to(episode.next)],
    ["p", "episode before", () => to(episode.previous)],
    ...QUANTITIES.map((quantity, i) => [String(i + 1), `colour by ${quantity.label.toLowerCase()}`, () => colouring.choose(quantity.name)]),
  ]);
}

function heading(page, run, episode) {
  const fact = (label, value) => h("div", {}, h("dt", {}, label), h("dd", {}, value));
  const link = (id, label, words) => (id ? h("a", { class: "button icon", href: address("/episode", { run: run.run, id }), "aria-label": words, title: words }, label) : h("span", { class: "button icon off", "aria-hidden": "true" }, label));
  const ended = episode.truncated ? "cut off" : episode.terminated ? "by itself" : "–";
  const copy = async () => {
    await navigator.clipboard.writeText(location.href);
    announce("The link to this episode is copied");
  };
  return h("div", { class: "episode-head" },
    h("div", { class: "turn" }, link(episode.previous, "←", "Episode before (p)"), h("h2", {}, `Episode ${count(episode.id)}`), link(episode.next, "→", "Next episode (n)")),
    h("dl", { class: "facts" }, fact("score", signed(episode.score)), fact("reward", signed(episode.reward)), episode.kl === null ? null : fact("KL", nats(episode.kl)),
      fact("steps", count(episode.length)), fact("iteration", count(episode.iteration)), fact("ended", ended)),
    h("div", { class: "actions" },
      run.kind === "control" ? null : h("a", { class: "button", href: address("/episodes", { run: run.run, same: episode.id }) }, "Same prompt"),
      navigator.clipboard ? button("Copy link", () => told(copy())) : null,
      h("a", { class: "button", href: exportAddress("episode.html", { run: run.run, id: episode.id }), download: "", "aria-label": "This episode as one HTML file" }, "HTML"),
      h("a", { class: "button", href: exportAddress("steps.csv", { run: run.run, id: episode.id }), download: "", "aria-label": "Its steps as CSV" }, "CSV")));
}

/** Which quantity colours the tokens: a choice, a legend, and the scale that all responses of the group share. */
class Colouring {
  constructor(page, episode, strip) {
    Object.assign(this, { episode, strip, others: [] });
    const radio = (quantity, i) => h("label", { title: `${quantity.words} (${i + 1})` },
      h("input", { type: "radio", name: "quantity", value: quantity.name, disabled: !this.known(quantity), onchange: () => this.choose(quantity.name) }), h("span", {}, quantity.label));
    this.picker = h("div", { class: "segments", role: "radiogroup", "aria-label": "Colour by" }, QUANTITIES.map(radio));
    this.legend = h("div", { class: "legend" });
  }

  known(quantity) {
    return (this.episode.steps[quantity.name] ?? []).some(Number.isFinite);
  }

  choose(name) {
    const wanted = QUANTITIES.find((quantity) => quantity.name === name && this.known(quantity));
    this.quantity = wanted ?? QUANTITIES.find((quantity) => this.known(quantity)) ?? QUANTITIES[0];
    rename({ by: this.quantity.name === "advantage" ? null : this.quantity.name });
    for (const input of this.picker.querySelectorAll("input")) input.checked = input.value === this.quantity.name;
    this.draw();
  }

  draw() {
    const column = (episode) => episode.steps[this.quantity.name];
    const scale = makeScale(this.quantity, [this.episode, ...this.others.map((other) => other.episode)].map(column));
    this.strip.colour(scale, column(this.episode));
    for (const { episode, place } of this.others) fill(place, stillTokens(episode.steps, scale, column(episode)));
    const [left, middle, right] = legendLabels(scale);
    fill(this.legend,
      h("span", {}, h("span", { class: "ramp", dataset: { kind: rampKind(this.quantity) }, "aria-hidden": "true" }),
        h("span", { class: "ends" }, h("span", {}, left), h("span", {}, middle), h("span", {}, right))),
      h("span", { class: "words" }, this.quantity.words));
  }

  add(episode, place) {
    this.others.push({ episode, place });
    this.draw();
  }
}

const TOGETHER = 12;

/** The other responses that were sampled for the same prompt in the same iteration. */
function siblings(page, run, episode, colouring) {
  const all = (episode.siblings ?? []).filter((other) => other.id !== episode.id);
  if (!all.length) return null;
  const shown = all.slice(0, TOGETHER);
  const cards = shown.map((other) => {
    const place = h("div", {}, longText(other.response));
    const load = async () => colouring.add(await get("episode", { run: run.run, id: other.id }, page.signal), place);
    return { other, place, load };
  });
  const loadAll = async () => {
    for (const { load } of cards) await load();
  };
  told(loadAll());
  return h("section", { class: "group" }, h("h2", {}, `Its group: ${plural(all.length, "other response")} to the same prompt`),
    h("div", { class: "columns scroll", tabindex: "0", role: "region", "aria-label": "Other responses to the same prompt" }, cards.map(({ other, place }) => h("article", { class: "answer" },
      h("header", {}, h("h3", {}, h("a", { class: "open", href: address("/episode", { run: run.run, id: other.id }) }, `Episode ${count(other.id)}`)),
        h("span", { class: "score-chip", dataset: { shade: other.score < 0 ? "worse" : "better" }, style: { "--shade": "35%" } }, signed(other.score))),
      place, h("footer", {}, `KL ${nats(other.kl)} · ${plural(other.length, "step")}${other.truncated ? " · cut off" : ""}`)))),
    all.length > TOGETHER ? h("p", { class: "hint" }, `${all.length - TOGETHER} more are in the list of episodes.`) : null);
}

function details(episode) {
  const fields = flatten(episode.details ?? {});
  if (!fields.length) return null;
  return h("details", { class: "picker" }, h("summary", {}, "What else the world said of it"),
    h("dl", { class: "settings-list" }, fields.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, longText(setting(value)))))));
}
