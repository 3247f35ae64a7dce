// Numbers, times and sizes as people read them. Knows nothing of where they come from.

const MINUS = "−";

/** About `digits` significant digits; `–` where there is no number. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : `${MINUS}∞`;
  value = Math.abs(value) >= 10 ** digits ? value : Number(value.toPrecision(digits));
  const size = Math.abs(value);
  let text;
  if (value === 0) text = "0";
  else if (size >= 1e6 || size < 1e-4) text = value.toExponential(digits - 1).replace("e+", "e");
  else if (size >= 10 ** (digits - 1) || (size >= 10 && Number.isInteger(value))) text = Math.round(value).toLocaleString("en");
  else text = value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  return text.replace(/^-(?=[0.]*$)/, "").replaceAll("-", MINUS);
}

/**
 * Labels of an axis' ticks: each is the tick's true value, all with as many decimals as the finest of them needs. Very
 * large and very small numbers get an exponent where that is shorter.
 */
export function axisNumbers(values) {
  const known = values.filter((value) => value !== null);
  const largest = Math.max(0, ...known.map(Math.abs));
  const step = Math.min(largest, ...known.slice(1).map((value, i) => Math.abs(value - known[i])));
  const exact = (write) => {
    for (let digits = 0; digits < 15; digits += 1) {
      const texts = known.map((value) => write(value, digits));
      if (texts.every((text, i) => Math.abs(Number(text) - known[i]) <= step * 1e-6)) return { texts, digits };
    }
    return { texts: known.map(String), digits: 15 };
  };
  const plain = exact((value, digits) => value.toFixed(digits));
  const grouped = known.map((value) => value.toLocaleString("en", { minimumFractionDigits: plain.digits, maximumFractionDigits: plain.digits }));
  let texts = grouped;
  if (largest >= 1e6 || (largest && largest < 1e-3)) {
    const powers = exact((value, digits) => (value === 0 ? "0" : value.toExponential(digits))).texts.map((text) => text.replace("e+", "e"));
    const longest = (list) => Math.max(...list.map((text) => text.length));
    if (longest(powers) < longest(grouped)) texts = powers;
  }
  const next = texts.map((text) => text.replace(/^-(?=[0.]*$)/, "").replaceAll("-", MINUS)).values();
  return values.map((value) => (value === null ? "" : next.next().value));
}

/** A KL: below a thousandth it is rounding, not distance. */
export function nats(value) {
  return typeof value === "number" && Math.abs(value) < 5e-4 ? "0.00" : number(value);
}

/** With its sign, for what is good or bad by its sign. */
export function signed(value, digits = 3) {
  return typeof value === "number" && value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** Fixed decimals: columns of numbers line up. */
export function fixed(value, decimals = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toFixed(decimals).replace(/^-(?=[0.]*$)/, "").replace("-", MINUS);
}

export function count(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

export function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

export function percent(value) {
  if (value === null || value === undefined) return "–";
  const share = value * 100;
  if (share > 0 && share < 0.05) return "< 0.1 %";
  if (share < 100 && share >= 99.95) return "> 99.9 %";
  return `${share >= 100 || share === 0 ? Math.round(share) : share.toFixed(1)} %`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (value >= 1000 && step < units.length - 1) {
    value /= 1000;
    step += 1;
  }
  return `${step ? number(value) : value} ${units[step]}`;
}

/** How long ago, from unix seconds. */
export function ago(seconds, now = Date.now() / 1000) {
  if (!seconds) return "–";
  const past = Math.max(0, now - seconds);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (past >= size) return `${Math.floor(past / size)} ${unit} ago`;
  }
  return past < 5 ? "now" : `${Math.floor(past)} s ago`;
}

export function moment(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }) : "–";
}

/** A setting's value as it would stand in YAML. */
export function setting(value) {
  if (value === null || value === undefined) return "null";
  if (typeof value === "number") return String(Number(value.toPrecision(12)));
  return typeof value === "string" && value ? value : JSON.stringify(value);
}

/** {a: {b: 1}} → [["a.b", 1]], in the order of the fields. */
export function flatten(value, path = "") {
  const nested = value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length;
  if (!nested) return path ? [[path, value]] : [];
  return Object.entries(value).flatMap(([key, inner]) => flatten(inner, path ? `${path}.${key}` : key));
}
