// The sets of pairs to be judged: how far they are, who judged, and how well the judges agree.

import { h, fill, table } from "../dom.js";
import { get, address, exportAddress } from "../api.js";
import { progress } from "../parts.js";
import { number, count, ago, plural } from "../format.js";
import { csvButton } from "../csv.js";

export async function show(page) {
  document.title = "Labels · Tether studio";
  const { sets, left_out: leftOut } = await get("labels", {}, page.signal);
  const found = await Promise.all(sets.map((set) => set.fault ? null : get("labels/agreement", { set: set.set }, page.signal)));
  fill(page.main, h("header", { class: "page-header" }, h("div", {}, h("h1", {}, "Labels"), h("p", { class: "lead" }, sets.length ? "Pairs of answers, and which of them people find better." : ""))),
    leftOut ? h("p", { class: "notice" }, leftOut) : null,
    sets.length ? sets.map((set, i) => card(set, found[i])) : empty());
}

function card(set, agreement) {
  if (set.fault) return h("article", { class: "panel label-set" }, h("h2", {}, set.name), h("p", { class: "notice bad" }, set.fault));
  return h("article", { class: "panel label-set" },
    h("header", { class: "section-head" }, h("div", {}, h("h2", {}, set.name), h("p", { class: "faint" }, `${set.set} · ${plural(set.pairs, "pair")} · ${ago(set.updated)}`)),
      h("div", { class: "actions" }, h("a", { class: "button primary", href: address("/label", { set: set.set }) }, "Label"),
        h("a", { class: "button", href: exportAddress("preferences.jsonl", { set: set.set }), download: "", "aria-label": `Preferences of ${set.name} as JSONL` }, "JSONL"),
        agreement.annotators.length ? csvButton(`annotators-${set.name}.csv`, () => annotatorRows(agreement)) : null)),
    h("p", {}, progress(set.labelled, set.pairs), h("span", { class: "faint" }, " pairs with an answer")),
    agreementView(agreement));
}

/** Who answered what, and the two coefficients of agreement. */
export function agreementView({ annotators, cohen, krippendorff }) {
  if (!annotators.length) return h("p", { class: "faint" }, "Nobody has answered yet.");
  const [columns, ...rows] = annotatorRows({ annotators });
  const words = (key) => key.replaceAll("_", " ");
  return h("div", { class: "agreement" },
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Annotators" }, table("Annotators",
      columns.map((key, i) => h("th", { role: "columnheader", class: i ? "number" : null }, i ? words(key) : "annotator")),
      rows.map((row) => h("tr", { role: "row" }, row.map((value, i) => h("td", { role: "cell", class: i ? "number" : null }, i ? count(value) : value)))))),
    h("dl", { class: "coefficients" },
      h("div", { dataset: { coefficient: "krippendorff" } }, h("dt", {}, "Krippendorff’s α"), h("dd", {}, h("b", {}, number(krippendorff?.alpha)), h("small", {}, krippendorff?.n ? `over ${plural(krippendorff.n, "pair")} that several judged` : "needs a pair that two have judged"))),
      cohen.map((pair) => h("div", { dataset: { coefficient: "cohen" } }, h("dt", {}, "Cohen’s κ"), h("dd", {}, h("b", {}, number(pair.kappa)), h("small", {}, `${pair.a} and ${pair.b}, ${plural(pair.n, "pair")}`))))));
}

/** A line for each person: the name, how many, and of which kind; after a line that names the columns. */
function annotatorRows({ annotators }) {
  const counts = Object.keys(annotators[0]).filter((key) => key !== "name" && key !== "done" && Number.isFinite(annotators[0][key]));
  const columns = ["name", "done", ...counts];
  return [columns, ...annotators.map((one) => columns.map((key) => one[key] ?? 0))];
}

function empty() {
  return h("div", { class: "nothing" }, h("p", {}, "No pairs to judge yet. A policy and some prompts make them:"),
    h("pre", {}, h("code", {}, "tether label --policy POLICY --prompts.path prompts.jsonl --pairs 100 --output runs/first.labels.db")));
}
