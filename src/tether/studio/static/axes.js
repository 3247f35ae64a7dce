// What the horizontal axis of a run's charts counts: iterations, or what they add up to: episodes, tokens, time.
// A choice that a run's metrics do not bear out is not offered: an axis is never guessed.

import { h } from "./dom.js";
import { count } from "./format.js";

const UNITS = [["seconds", 1, 120], ["minutes", 60, 7200], ["hours", 3600, Infinity]];

/** Sums over the iterations so far; or why there are none. `of(row)`: what one iteration adds. */
function sums(rows, of, what) {
  let sum = 0;
  const values = [];
  for (const [i, row] of rows.entries()) {
    if (row.iteration !== i + 1) return { reason: `iteration ${i + 1} is missing` };
    const added = of(row);
    if (!Number.isFinite(added)) return { reason: `iteration ${row.iteration} has no ${what}` };
    sum += added;
    values.push(sum);
  }
  return { values };
}

/** Each: {name, label, of: (rows) => {values} or {reason}}. The label of steps is that of a controller's world. */
const AXES = [
  { name: "iteration", label: "iteration", whole: true, of: (rows) => ({ values: rows.map((row) => row.iteration) }) },
  { name: "episodes", label: "episodes", whole: true, of: (rows) => sums(rows, (row) => row.episodes, "number of episodes") },
  { name: "tokens", label: "tokens", whole: true, of: (rows) => sums(rows, (row) => row.tokens, "number of tokens") },
  { name: "steps", label: "steps", whole: true, of: stepsOf },
  { name: "time", label: "time", of: (rows) => sums(rows, (row) => row["time/iteration"], "time") },
];

/** A controller's metrics have the steps as a sum already. */
function stepsOf(rows) {
  const without = rows.find((row) => !Number.isFinite(row.steps));
  return without ? { reason: `iteration ${without.iteration} has no number of steps` } : { values: rows.map((row) => row.steps) };
}

/** The axes for these runs, each with `values` per run or the reason why it cannot be; `runs`: [{name, kind, rows}]. */
export function axesOf(runs) {
  const control = runs.some((run) => run.kind === "control");
  const language = runs.some((run) => run.kind !== "control");
  const there = AXES.filter(({ name }) => (name === "tokens" ? language : name === "steps" ? control : true));
  return there.map(({ of, ...axis }) => {
    const found = runs.map((run) => of(run.rows));
    const failed = found.findIndex(({ reason }) => reason);
    if (failed >= 0) return { ...axis, reason: (runs.length > 1 ? `${runs[failed].name}: ` : "") + found[failed].reason };
    const values = found.map((one) => one.values);
    return axis.name === "time" ? inUnit(axis, values) : { ...axis, values };
  });
}

/** Time in the unit that suits the longest run. */
function inUnit(axis, values) {
  const longest = Math.max(0, ...values.map((list) => list.at(-1) ?? 0));
  const [unit, seconds] = UNITS.find(([, , limit]) => longest < limit);
  return { ...axis, unit, label: `${unit} of training`, values: values.map((list) => list.map((value) => value / seconds)) };
}

/** The axis that is asked for; the iteration, with a line that says why, where it cannot be had. */
export function chosenAxis(axes, name) {
  const wanted = axes.find((axis) => axis.name === name);
  if (wanted?.values) return { axis: wanted, fault: "" };
  const why = wanted ? wanted.reason : "these runs do not count them";
  return { axis: axes[0], fault: name && name !== "iteration" ? `Not by ${name}: ${why}. The charts are by iteration.` : "" };
}

/** The choice; those that cannot be are there with their reason, and cannot be chosen. */
export function axisSelect(axes, chosen, onchange) {
  const title = ({ name, unit, reason }) => `By ${name}${unit ? `, ${unit}` : ""}${reason ? ` (${reason})` : ""}`;
  return h("select", { "aria-label": "Horizontal axis", class: "axis", onchange: (event) => onchange(event.target.value) },
    axes.map((axis) => h("option", { value: axis.name, selected: axis.name === chosen, disabled: Boolean(axis.reason) }, title(axis))));
}

/** A place on the axis in words: `iteration 12`, `3.5 minutes of training`. */
export function placeOnAxis(axis, value) {
  if (axis.name === "time") return `${count(Number(value.toPrecision(3)))} ${axis.label}`;
  return axis.name === "iteration" || axis.name === "step" ? `${axis.label} ${count(value)}` : `${count(value)} ${axis.label}`;
}

const SMOOTHINGS = [["0", "Not smoothed"], ["0.6", "Smoothed a little"], ["0.9", "Smoothed much"]];

/** The choice of smoothing: a weight of the average so far. */
export function smoothingSelect(chosen, onchange) {
  return h("select", { "aria-label": "Smoothing", onchange: (event) => onchange(event.target.value) },
    SMOOTHINGS.map(([value, label]) => h("option", { value, selected: value === chosen }, label)));
}

/** A weight that the address asks for, where it is one of the choices. */
export function smoothingOf(text) {
  return SMOOTHINGS.some(([value]) => value === text) ? text : "0";
}
