// Several runs over each other: the same charts as a run's own page, the last values, the settings that differ.

import { h, fill, table, button, debounce } from "../dom.js";
import { get, address, onChange } from "../api.js";
import { ChartGroup } from "../charts.js";
import { CHARTS, notice, statePill } from "../parts.js";
import { number, flatten, setting } from "../format.js";
import { csvButton } from "../csv.js";
import { go } from "../router.js";

const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];

export async function show(page) {
  document.title = "Compare · Tether studio";
  const names = [...new Set(page.query.getAll("run"))].slice(0, COLOURS.length);
  const all = (await get("runs", {}, page.signal)).runs;
  const runs = await Promise.all(names.map((name, i) => load(name, COLOURS[i], page.signal)));
  const grid = h("div", { class: "charts" });
  const lower = h("div", { class: "lower" });
  fill(page.main,
    h("header", { class: "page-header" }, h("div", {}, h("p", { class: "crumbs" }, h("a", { href: "/" }, "Runs"), h("span", { "aria-hidden": "true" }, "/"), "Compare"), h("h1", {}, "Compare"))),
    chips(runs, all), grid, lower);
  if (!runs.length) {
    fill(grid, notice("Choose two or more runs above."));
    return;
  }
  const charts = makeCharts(page, runs, grid);
  const draw = () => {
    drawCharts(charts, runs);
    fill(lower, lastValues(runs), differences(runs));
  };
  draw();
  onChange(runs.map((run) => run.run), debounce(async () => {
    for (const run of runs) Object.assign(run, await load(run.run, run.colour, page.signal));
    draw();
  }, 250), page.signal);
}

async function load(name, colour, signal) {
  const [run, { rows }] = await Promise.all([get("run", { run: name }, signal), get("metrics", { run: name, since: 0 }, signal)]);
  return { ...run, rows, colour };
}

function chips(runs, all) {
  const names = runs.map((run) => run.run);
  const to = (list) => address("/compare", { run: list });
  const left = all.filter((run) => !names.includes(run.run));
  const add = h("select", { "aria-label": "Add a run", onchange: (event) => go(to([...names, event.target.value])) },
    h("option", { value: "" }, "Add a run…"), left.map((run) => h("option", { value: run.run }, run.run)));
  return h("ul", { class: "chips" }, runs.map((run) => h("li", {}, h("i", { class: "swatch", style: { "--c": `var(--${run.colour})` } }),
    h("a", { href: address("/run", { run: run.run }) }, run.run === "." ? run.name : run.run), statePill(run.state),
    button("×", () => go(to(names.filter((name) => name !== run.run))), { class: "quiet", "aria-label": `Leave out ${run.run}` }))),
  left.length && runs.length < COLOURS.length ? h("li", { class: "add" }, add) : null);
}

/** One chart for each metric that any of the runs has. */
function makeCharts(page, runs, grid) {
  const group = new ChartGroup(page.signal);
  const there = new Set(runs.flatMap((run) => Object.keys(run.rows.at(-1) ?? {})));
  const charts = CHARTS.map((spec) => ({ ...spec, metrics: spec.series.filter(([name, label]) => there.has(name) && label !== "k1" && label !== "longest" && label !== "held out").map(([name]) => name) }))
    .filter((spec) => spec.metrics.length)
    .map((spec) => group.add({ ...spec, unit: spec.title === "Score" ? "mean per episode" : spec.unit, series: runs.map((run) => ({ label: run.name, colour: run.colour })) }));
  grid.append(...charts.map((chart) => chart.element));
  return charts;
}

function drawCharts(charts, runs) {
  const x = [...new Set(runs.flatMap((run) => run.rows.map((row) => row.iteration)))].sort((a, b) => a - b);
  for (const chart of charts) {
    chart.update(x, runs.map((run) => {
      const found = new Map(run.rows.map((row) => [row.iteration, chart.spec.metrics.map((name) => row[name]).find((value) => value !== undefined) ?? null]));
      return { values: x.map((at) => found.get(at) ?? null) };
    }));
  }
}

function lastValues(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.rows.at(-1) ?? {})))].filter((name) => !name.startsWith("memory/"));
  const rows = names.map((name) => [name, ...runs.map((run) => run.rows.at(-1)?.[name] ?? null)]);
  const title = ["metric", ...runs.map((run) => run.name)];
  return h("section", {}, h("div", { class: "section-head" }, h("h2", {}, "Last values"), csvButton("comparison.csv", () => [title, ...rows])),
    wide("Last values", title, rows, (value) => number(value), true));
}

function differences(runs) {
  const settings = runs.map((run) => new Map(flatten(run.config ?? {})));
  const names = [...new Set(settings.flatMap((map) => [...map.keys()]))];
  const rows = names.map((name) => [name, ...settings.map((map) => (map.has(name) ? setting(map.get(name)) : "–"))]).filter(([, first, ...others]) => others.some((value) => value !== first));
  const title = ["setting", ...runs.map((run) => run.name)];
  return h("section", {}, h("div", { class: "section-head" }, h("h2", {}, "Settings that differ"), rows.length ? csvButton("difference.csv", () => [title, ...rows]) : null),
    rows.length ? wide("Settings that differ", title, rows, (value) => h("code", {}, value), false) : notice(runs.length > 1 ? "All have the same settings." : "Add a run to compare with."));
}

/** A table that scrolls sideways within its own box when there are many runs. */
function wide(label, title, rows, show, numeric) {
  const cls = numeric ? "number" : null;
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table(label,
    title.map((name, i) => h("th", { role: "columnheader", scope: "col", class: i ? cls : null }, name)),
    rows.map(([name, ...values]) => h("tr", { role: "row" }, h("th", { role: "rowheader", scope: "row" }, h("code", {}, name)), values.map((value) => h("td", { role: "cell", class: cls }, show(value)))))));
}
