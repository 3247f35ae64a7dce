// All runs of the folder, live; choose several to compare.

import { h, fill, table, button, debounce } from "../dom.js";
import { get, address, exportAddress, onChange } from "../api.js";
import { number, ago, plural } from "../format.js";
import { statePill, kindTag, spark, progress } from "../parts.js";
import { go, rename } from "../router.js";
import { snippet, visible } from "../text.js";
import { keys } from "../keys.js";
import { tagLink } from "./notes.js";

const COLUMNS = [
  { name: "name", label: "Run", value: (run) => run.run.toLowerCase() },
  { name: "state", label: "State", value: (run) => run.state },
  { name: "score", label: "Score", value: (run) => run.score, numeric: true },
  { name: "kl", label: "KL", value: (run) => run.kl, numeric: true },
  { name: "length", label: "Length", value: (run) => run.length, numeric: true },
  { name: "speed", label: "Steps/s", value: (run) => run.tokens_per_second, numeric: true },
  { name: "alarms", label: "Alarms", value: (run) => run.alarms, numeric: true },
  { name: "updated", label: "Updated", value: (run) => run.updated, numeric: true },
];

export async function show(page) {
  document.title = "Runs · Tether studio";
  const found = await get("runs", {}, page.signal);
  const state = {
    runs: found.runs,
    leftOut: found.left_out,
    chosen: new Set(),
    search: page.query.get("search") ?? "",
    tag: page.query.get("tag") ?? "",
    order: page.query.get("order") ?? "updated",
    descending: page.query.get("descending") !== "0",
  };
  const summary = h("p", { class: "lead" });
  const body = h("div", {});
  const compare = button("Compare", () => go(address("/compare", { run: [...state.chosen] })), { class: "primary", disabled: true });
  const draw = () => {
    fill(body, state.leftOut ? h("p", { class: "notice" }, state.leftOut) : null, tagBar(state, draw), runsTable(state, draw));
    summary.textContent = summarise(state.runs);
    compare.disabled = state.chosen.size < 2;
    compare.textContent = state.chosen.size ? `Compare ${state.chosen.size}` : "Compare";
  };
  const search = h("input", {
    type: "search", placeholder: "Filter by name, tag or note", "aria-label": "Filter by name, tag or note", value: state.search,
    oninput: (event) => {
      state.search = event.target.value;
      rename({ search: state.search });
      draw();
    },
  });
  fill(page.main,
    h("header", { class: "page-header" }, h("div", {}, h("h1", {}, "Runs"), summary),
      h("div", { class: "actions" }, search, compare, h("a", { class: "button", href: exportAddress("runs.csv"), download: "runs.csv", "aria-label": "All runs as CSV" }, "CSV"))),
    body);
  draw();
  onChange(null, debounce(async () => {
    const { runs, left_out: leftOut } = await get("runs", {}, page.signal);
    Object.assign(state, { runs, leftOut });
    draw();
  }, 250), page.signal);
  keys(page.signal, [
    ["j", "next run", () => step(page.main, 1)],
    ["k", "run before", () => step(page.main, -1)],
    ["x", "choose the run for comparison", () => document.activeElement?.closest("tr")?.querySelector("input")?.click()],
    ["c", "compare the chosen runs", () => compare.click()],
    ["/", "filter", () => search.focus()],
  ]);
}

function summarise(runs) {
  if (!runs.length) return "";
  const training = runs.filter((run) => run.state === "training").length;
  const alarms = runs.filter((run) => run.alarms).length;
  return [plural(runs.length, "run"), training ? `${training} training` : null, alarms ? `${plural(alarms, "run")} with alarms` : null].filter(Boolean).join(" · ");
}

function runsTable(state, draw) {
  const column = COLUMNS.find(({ name }) => name === state.order) ?? COLUMNS.at(-1);
  const words = state.search.toLowerCase();
  const fits = (run) => (!state.tag || run.tags.includes(state.tag)) && [run.run, run.note, ...run.tags].some((text) => text.toLowerCase().includes(words));
  const shown = state.runs.filter(fits).sort((a, b) => compareValues(column.value(a), column.value(b), state.descending));
  if (!state.runs.length) return empty();
  if (!shown.length) return h("p", { class: "nothing" }, "No run fits: none has this in its name, its tags or its note.");
  const sort = (name, numeric) => {
    state.descending = state.order === name ? !state.descending : Boolean(numeric);
    state.order = name;
    rename({ order: name, descending: state.descending ? null : 0 });
    draw();
    document.querySelector(`[data-sort="${name}"]`)?.focus();
  };
  const head = [h("th", { role: "columnheader", class: "choose" }, h("span", { class: "hidden" }, "Choose"))];
  for (const { name, label, numeric } of COLUMNS) {
    const here = state.order === name;
    head.push(h("th", { role: "columnheader", class: numeric ? "number" : null, "aria-sort": here ? (state.descending ? "descending" : "ascending") : null },
      button(label, () => sort(name, numeric), { class: "sort", dataset: { sort: name } })));
  }
  return table("Runs", head, shown.map((run) => row(run, state, draw)), { class: "runs cards" });
}

/** Every tag that some run has; one of them can be chosen. */
function tagBar(state, draw) {
  const tags = [...new Set([...state.runs.flatMap((run) => run.tags), ...(state.tag ? [state.tag] : [])])].sort();
  if (!tags.length) return null;
  const choose = (tag) => {
    state.tag = state.tag === tag ? "" : tag;
    rename({ tag: state.tag });
    draw();
    [...document.querySelectorAll(".tag-list.bar button")].find((one) => one.textContent === tag)?.focus();
  };
  return h("div", { class: "tag-list bar", role: "group", "aria-label": "Tags" }, tags.map((tag) =>
    button(visible(tag), () => choose(tag), { class: "tag own", "aria-pressed": String(state.tag === tag) })));
}

function row(run, state, draw) {
  const choose = (event) => {
    state.chosen[event.target.checked ? "add" : "delete"](run.run);
    const kind = document.activeElement.matches("a.open") ? "a.open" : "input";
    draw();
    document.querySelector(`tr[data-run="${CSS.escape(run.run)}"] ${kind}`)?.focus();
  };
  const cell = (label, props, ...children) => h("td", { role: "cell", dataset: { label }, ...props }, children);
  return h("tr", { role: "row", class: state.chosen.has(run.run) ? "chosen" : null, dataset: { run: run.run } },
    cell("", { class: "choose" }, h("input", { type: "checkbox", "aria-label": `Choose ${run.run}`, checked: state.chosen.has(run.run), onchange: choose })),
    cell("", { class: "name" },
      h("div", {}, h("a", { href: address("/run", { run: run.run }), class: "open" }, run.name), kindTag(run.kind)),
      run.fault ? h("small", { class: "fault" }, run.fault) : run.run !== run.name && run.run !== "." ? h("small", {}, run.run) : null,
      run.tags.length ? h("div", { class: "tag-list" }, run.tags.map(tagLink)) : null,
      run.note ? h("small", { class: "line" }, snippet(run.note, 120)) : null),
    cell("", { class: "status" }, statePill(run.state), progress(run.iteration, run.iterations)),
    cell("Score", { class: "number score" }, spark(run.spark ?? [], ""), h("b", {}, number(run.score))),
    cell("KL", { class: "number" }, number(run.kl)),
    cell("Length", { class: "number" }, number(run.length)),
    cell("Steps/s", { class: "number" }, number(run.tokens_per_second)),
    cell("Alarms", { class: "number" }, run.alarms ? h("a", { class: "badge", href: address("/run", { run: run.run, tab: "alarms" }), "aria-label": plural(run.alarms, "alarm") }, String(run.alarms)) : h("span", { class: "ghost" }, "–")),
    cell("Updated", { class: "number updated" }, ago(run.updated)));
}

/** Numbers that are not there come last, whichever way the order goes. */
export function compareValues(a, b, descending) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = a < b ? -1 : a > b ? 1 : 0;
  return descending ? -order : order;
}

function empty() {
  return h("div", { class: "nothing" }, h("p", {}, "No run here yet. A training makes one, and this page shows it at once:"), h("pre", {}, h("code", {}, "tether demo")));
}

/** Focus the link of the row that is `by` further on. */
export function step(main, by) {
  const links = [...main.querySelectorAll("a.open")];
  const here = links.indexOf(document.activeElement?.closest("tr, li, article")?.querySelector("a.open"));
  const next = links[Math.min(links.length - 1, Math.max(0, here + by))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}
