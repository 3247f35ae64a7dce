// Small pieces that several pages show: the state of a run, its header with tabs, notices, tiles.

import { h, s } from "./dom.js";
import { address } from "./api.js";
import { number } from "./format.js";

export const STATES = {
  training: "a process is training it now",
  finished: "all iterations are done",
  stopped: "nobody is training it; it can be resumed",
  damaged: "something in its folder cannot be read",
  empty: "no iteration yet",
};

export function statePill(state) {
  return h("span", { class: "state", dataset: { state }, title: STATES[state] ?? null }, h("i", {}), state);
}

export function kindTag(kind) {
  return kind && kind !== "unknown" ? h("span", { class: "tag" }, kind === "ppo" ? "language" : kind) : null;
}

/** A line of numbers without axes. */
export function spark(values, label = "") {
  const known = values.filter(Number.isFinite);
  const svg = s("svg", { class: "spark", viewBox: "0 0 96 24", preserveAspectRatio: "none", "aria-hidden": "true" });
  if (label) svg.append(s("title", {}, label));
  if (known.length < 2) return svg;
  const low = Math.min(...known);
  const span = Math.max(...known) - low || 1;
  const at = values.flatMap((v, i) => (Number.isFinite(v) ? [[(i / (values.length - 1)) * 94 + 1, 22 - ((v - low) / span) * 20]] : []));
  const line = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  svg.append(s("path", { class: "area", d: `${line}L${at.at(-1)[0].toFixed(1)} 24L${at[0][0].toFixed(1)} 24Z` }), s("path", { class: "stroke", d: line }));
  return svg;
}

export function progress(done, total) {
  const share = total ? Math.min(1, (done ?? 0) / total) : 0;
  return h("span", { class: "progress" },
    h("span", { class: "bar", "aria-hidden": "true", style: { "--done": `${(share * 100).toFixed(1)}%` } }),
    h("span", {}, total ? `${done ?? 0} / ${total}` : `${done ?? "–"}`));
}

const TABS = [
  ["charts", "Charts"], ["episodes", "Episodes"], ["configuration", "Configuration"], ["difference", "Difference"],
  ["alarms", "Alarms"], ["checkpoints", "Checkpoints"], ["console", "Console"],
];

/** The top of every page about one run. `active` is the tab that is shown. */
export function runHeader(run, active) {
  const raised = raisedAlarms(run.alarms ?? []).length;
  const link = (tab) => (tab === "episodes" ? address("/episodes", { run: run.run }) : address("/run", { run: run.run, tab: tab === "charts" ? null : tab }));
  return h("header", { class: "run-header" },
    h("div", { class: "title" }, h("h1", {}, run.name), statePill(run.state), kindTag(run.kind), progress(run.iteration, run.iterations)),
    run.fault ? h("p", { class: "notice bad", role: "alert" }, run.fault) : null,
    h("nav", { class: "tabs", "aria-label": "This run" }, TABS.map(([name, label]) =>
      h("a", { href: link(name), "aria-current": name === active ? "page" : null }, label,
        name === "alarms" && raised ? h("span", { class: "badge" }, String(raised)) : null))));
}

/** The alarms that are raised now: the newest line of each kind says so. */
export function raisedAlarms(alarms) {
  const newest = new Map(alarms.map((alarm) => [alarm.kind, alarm]));
  return [...newest.values()].filter((alarm) => alarm.state === "raised");
}

export function tile(label, value, note = "") {
  return h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, h("b", {}, typeof value === "number" ? number(value) : value ?? "–"), h("small", {}, note)));
}

export function notice(text, ...more) {
  return h("p", { class: "notice" }, text, more);
}

/** Charts are a few per page and alike on the run's and the comparing page: what they draw from a metrics row. */
export const CHARTS = [
  { title: "Score", unit: "per episode, ± std", series: [["score", "score", "score_std"], ["gold", "held out"]] },
  { title: "KL", unit: "to the reference, nats per response", series: [["kl", "KL", "kl_error"], ["kl_k1", "k1"]], alarm: "kl" },
  { title: "Entropy", unit: "nats per step", series: [["entropy", "entropy"]], alarm: "entropy" },
  { title: "Clip fraction", unit: "share of steps", series: [["clip_fraction", "clip fraction"]] },
  { title: "Explained variance", unit: "of the critic, 1 is perfect", series: [["explained_variance", "explained variance"]] },
  { title: "Value loss", unit: "½ (V − R)²", series: [["value_loss", "value loss"]] },
  { title: "Length", unit: "steps per episode", series: [["response_length", "mean"], ["response_length_max", "longest"], ["episode_length", "mean"]], alarm: "length" },
  { title: "Gradient norm", unit: "before clipping", series: [["gradient_norm", "norm"]] },
  { title: "Throughput", unit: "steps per second", series: [["time/tokens_per_second_sampled", "tokens sampled"], ["time/steps_per_second_collected", "steps collected"]] },
];

/** Seconds of each phase, which add up to the iteration. */
export const isPhase = (name) => name.startsWith("time/") && !name.includes("per_second") && name !== "time/iteration";
