// Which numbers of a step can colour it, and how a number becomes a shade. The colours themselves are in css/base.css.

import { number, signed } from "./format.js";

/**
 * Signed quantities have two colours around 0: blue for what is better for the objective, orange for what is worse or
 * costs (KL above 0). The others have one.
 */
export const QUANTITIES = [
  { name: "advantage", label: "Advantage", signed: true, words: "better or worse than the critic expected" },
  { name: "value", label: "Value", signed: true, words: "V(s), what the critic expects from here on" },
  { name: "kl", label: "KL", signed: true, cost: true, words: "log π_old − log π_ref: liked more or less than the reference does" },
  { name: "log_prob", label: "Log-prob", signed: false, down: true, words: "log π_old(a|s): the unlikely ones stand out" },
  { name: "reward", label: "Reward", signed: true, words: "of this step, penalties included" },
  { name: "entropy", label: "Entropy", signed: false, words: "of π, nats: where the policy was undecided" },
];

const SATURATED = 0.98;

/** A scale over all columns given: its limit is the 98th percentile of the sizes, so that one outlier hides nothing. */
export function makeScale(quantity, columns) {
  const sizes = columns.flatMap((column) => column ?? []).filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const top = sizes.length ? sizes[Math.floor((sizes.length - 1) * (sizes.length >= 40 ? SATURATED : 1))] : 0;
  const limit = top || sizes.at(-1) || 1;
  return { quantity, limit, saturates: sizes.length > 0 && sizes.at(-1) > limit, known: sizes.length > 0 };
}

/** Colour an element by `value` on `scale`. */
export function shade(element, scale, value) {
  const known = Number.isFinite(value);
  const size = known ? Math.min(1, Math.abs(value) / scale.limit) : 0;
  element.dataset.shade = !known ? "none" : kindOf(scale.quantity, value);
  element.style.setProperty("--shade", `${Math.round(size * 100)}%`);
}

function kindOf(quantity, value) {
  if (!quantity.signed) return "plain";
  return value < 0 === Boolean(quantity.cost) ? "better" : "worse";
}

/** How the legend's ramp runs. */
export function rampKind(quantity) {
  if (!quantity.signed) return "plain";
  return quantity.cost ? "cost" : "signed";
}

/** What stands under the two ends and the middle of the legend. */
export function legendLabels({ quantity, limit, saturates }) {
  const more = saturates ? "≥ " : "";
  const less = saturates ? "≤ " : "";
  if (quantity.signed) return [`${less}${signed(-limit)}`, "0", `${more}${signed(limit)}`];
  if (quantity.down) return ["0", "", `${less}${number(-limit)}`];
  return ["0", "", `${more}${number(limit)}`];
}
