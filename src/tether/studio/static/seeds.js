// Runs that are the same but for their seed, as one line with a band. Knows configurations and columns of numbers.

import { flatten } from "./format.js";

/** Settings that change where and how fast a run is computed, or which seed it has, and not what it is. */
const ASIDE = new Set([
  "seed", "output", "overwrite", "device", "threads", "compile", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints",
  "learner.microbatch_size", "sampling.batch_size", "environments.vectorization",
]);

/** Groups of runs whose other settings are equal, in their order; a run without a configuration is alone. */
export function seedGroups(runs) {
  const groups = new Map();
  for (const run of runs) {
    const settings = flatten(run.config ?? {}).filter(([name]) => !ASIDE.has(name)).sort(([a], [b]) => (a < b ? -1 : 1));
    const key = settings.length ? JSON.stringify(settings) : run.run;
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  return [...groups.values()];
}

/** A name for a group: the whole words and numbers that the names of its runs begin with, folders left out if they differ. */
export function groupName(runs) {
  if (runs.length === 1) return runs[0].name;
  const paths = runs.map((run) => run.name.split("/"));
  const together = new Set(paths.map((parts) => parts.slice(0, -1).join("/"))).size === 1;
  const names = paths.map((parts) => (together ? parts.join("/") : parts.at(-1)).match(/[a-z]+|\d+|[^a-z\d]/gi) ?? []);
  const end = names[0].findIndex((word, i) => names.some((name) => name[i] !== word));
  const start = names[0].slice(0, end < 0 ? undefined : end).join("").replace(/([-_./ ]*seed)?[-_./ ]*$/i, "");
  return `${start || runs[0].name}, mean of ${runs.length}`;
}

/**
 * The mean of several lines over `grid`, with the lowest and the highest; only where all of them go. Between the points
 * of a line it is straight. `lines`: [{x, values}], x rising.
 */
export function averaged(grid, lines) {
  const columns = lines.map(({ x, values }) => interpolated(grid, x, values));
  const across = (of) => grid.map((_, i) => (columns.every((column) => column[i] !== null) ? of(columns.map((column) => column[i])) : null));
  return {
    values: across((all) => all.reduce((sum, value) => sum + value, 0) / all.length),
    low: across((all) => Math.min(...all)),
    high: across((all) => Math.max(...all)),
  };
}

function interpolated(grid, x, values) {
  const known = x.flatMap((at, i) => (Number.isFinite(values[i]) ? [[at, values[i]]] : []));
  let next = 0;
  return grid.map((at) => {
    while (next < known.length && known[next][0] < at) next += 1;
    const right = known[next];
    if (!right) return null;
    if (right[0] === at) return right[1];
    const left = known[next - 1];
    return left ? left[1] + ((at - left[0]) / (right[0] - left[0])) * (right[1] - left[1]) : null;
  });
}
