// Several runs over each other: the same charts as a run's own page, the last values, the settings that differ.

import { h, fill, table, button, debounce } from "../dom.js";
import { get, address, onChange } from "../api.js";
import { axesOf, axisSelect, chosenAxis, smoothingOf, smoothingSelect } from "../axes.js";
import { ChartGroup } from "../charts.js";
import { CHARTS, notice, statePill } from "../parts.js";
import { count, number, flatten, setting } from "../format.js";
import { csvButton } from "../csv.js";
import { go, rename } from "../router.js";
import { averaged, groupName, seedGroups } from "../seeds.js";

const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];
const MOST = 32; // runs; the colours come again, dashed

export async function show(page) {
  document.title = "Compare · Tether studio";
  const names = [...new Set(page.query.getAll("run"))].slice(0, MOST);
  const all = (await get("runs", {}, page.signal)).runs;
  const runs = await Promise.all(names.map((name, i) => load(name, look(i), page.signal)));
  const grid = h("div", { class: "charts" });
  const lower = h("div", { class: "lower" });
  const bar = h("div", { class: "toolbar" });
  const fault = h("p", { class: "notice", role: "status", hidden: true });
  fill(page.main,
    h("header", { class: "page-header" }, h("div", {}, h("p", { class: "crumbs" }, h("a", { href: "/" }, "Runs"), h("span", { "aria-hidden": "true" }, "/"), "Compare"), h("h1", {}, "Compare"))),
    chips(page, runs, all), bar, fault, grid, lower);
  if (!runs.length) {
    fill(grid, notice("Choose two or more runs above."));
    return;
  }
  const state = {
    runs, grid, group: new ChartGroup(page.signal), charts: [], drawn: null,
    by: page.query.get("x") ?? "iteration", mean: page.query.get("seeds") === "mean",
  };
  state.group.smooth(Number(smoothingOf(page.query.get("smooth"))));
  const redraw = () => {
    drawCharts(state);
    fault.textContent = state.fault;
    fault.hidden = !state.fault;
  };
  const draw = () => {
    redraw();
    if (!bar.contains(document.activeElement)) fill(bar, toolbar(state, redraw));
    fill(lower, lastValues(runs), differences(runs));
  };
  draw();
  onChange(runs.map((run) => run.run), debounce(async () => {
    for (const run of runs) Object.assign(run, await load(run.run, run, page.signal));
    draw();
  }, 250), page.signal);
}

/** How the line of the i-th run or group is drawn. */
function look(i) {
  return { colour: COLOURS[i % COLOURS.length], dashed: i >= COLOURS.length };
}

async function load(name, { colour, dashed }, signal) {
  const [run, { rows }] = await Promise.all([get("run", { run: name }, signal), get("metrics", { run: name, since: 0 }, signal)]);
  return { ...run, rows, colour, dashed };
}

function chips(page, runs, all) {
  const names = runs.map((run) => run.run);
  const to = (list) => {
    const now = new URLSearchParams(location.search);
    return address("/compare", { run: list, ...Object.fromEntries(["x", "smooth", "seeds"].map((name) => [name, now.get(name)])) });
  };
  const left = all.filter((run) => !names.includes(run.run));
  const add = h("select", { "aria-label": "Add a run", onchange: (event) => go(to([...names, event.target.value])) },
    h("option", { value: "" }, "Add a run…"), left.map((run) => h("option", { value: run.run }, run.run)));
  return h("ul", { class: "chips" }, runs.map((run) => h("li", {}, h("i", { class: "swatch", style: { "--c": `var(--${run.colour})` } }),
    h("a", { href: address("/run", { run: run.run }) }, run.run === "." ? run.name : run.run), statePill(run.state),
    button("×", () => go(to(names.filter((name) => name !== run.run))), { class: "quiet", "aria-label": `Leave out ${run.run}` }))),
  left.length && runs.length < MOST ? h("li", { class: "add" }, add) : null);
}

/** What the charts are drawn by: the axis, the smoothing, and whether seeds are averaged. */
function toolbar(state, redraw) {
  const by = axisSelect(state.axes, state.group.axis.name, (name) => {
    state.by = name;
    rename({ x: name === "iteration" ? null : name });
    redraw();
  });
  const smooth = smoothingSelect(String(state.group.smoothing), (value) => {
    state.group.smooth(Number(value));
    rename({ smooth: value === "0" ? null : value });
  });
  const several = seedGroups(state.runs).some((group) => group.length > 1);
  const mean = (event) => {
    state.mean = event.target.checked;
    rename({ seeds: state.mean ? "mean" : null });
    redraw();
  };
  return [
    h("label", { class: "check" }, h("input", { type: "checkbox", checked: state.mean && several, disabled: !several, onchange: mean }), h("span", {}, "Average over seeds")),
    h("p", { class: "hint" }, several ? "Mean of runs that differ in their seed alone; band: lowest to highest." : "No two of these runs differ in their seed alone."),
    h("span", { class: "spacer" }), by, smooth, button("Whole range", () => state.group.zoom(null), { class: "quiet" }),
  ];
}

/** The lines: each run by itself, or each group of seeds. */
function linesOf(state) {
  if (!state.mean) return state.runs.map((run) => ({ label: run.name, colour: run.colour, dashed: run.dashed, runs: [run] }));
  return seedGroups(state.runs).map((group, i) => ({ label: groupName(group), ...look(i), runs: group }));
}

/** One chart for each metric that any of the runs has. */
function makeCharts(state, lines) {
  for (const chart of state.charts) state.group.remove(chart);
  const there = new Set(state.runs.flatMap((run) => Object.keys(run.rows.at(-1) ?? {})));
  const series = lines.map(({ label, colour, dashed }) => ({ label, colour, dashed }));
  const band = state.mean && lines.some((line) => line.runs.length > 1);
  const unit = (spec) => (spec.title === "Score" ? "mean per episode" : spec.unit) + (band ? ", band min to max" : "");
  state.charts = CHARTS.map((spec) => ({ ...spec, metrics: spec.series.filter(([name, label]) => there.has(name) && label !== "k1" && label !== "longest" && label !== "held out").map(([name]) => name) }))
    .filter((spec) => spec.metrics.length)
    .map((spec) => state.group.add({ ...spec, unit: unit(spec), apart: true, series }));
  fill(state.grid, state.charts.map((chart) => chart.element));
}

function drawCharts(state) {
  state.axes = axesOf(state.runs);
  const { axis, fault } = chosenAxis(state.axes, state.by);
  if (state.group.axis.label !== axis.label) state.group.zoom(null);
  Object.assign(state, { fault });
  state.group.axis = axis;
  const lines = linesOf(state);
  const sign = JSON.stringify(lines.map(({ label, colour, dashed }) => [label, colour, dashed]));
  if (sign !== state.drawn) makeCharts(state, lines);
  state.drawn = sign;
  const places = new Map(state.runs.map((run, i) => [run, axis.values[i]]));
  const x = [...new Set(axis.values.flat())].sort((a, b) => a - b);
  for (const chart of state.charts) {
    const value = (row) => chart.spec.metrics.map((name) => row[name]).find((found) => found !== undefined) ?? null;
    const own = (run) => ({ x: places.get(run), values: run.rows.map(value) });
    chart.update(x, lines.map(({ runs }) => (runs.length > 1 ? averaged(x, runs.map(own)) : alone(x, own(runs[0])))));
  }
}

/** One run's points on the places of all. */
function alone(x, line) {
  const found = new Map(line.x.map((at, i) => [at, line.values[i]]));
  return { values: x.map((at) => found.get(at) ?? null) };
}

function lastValues(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.rows.at(-1) ?? {})))].filter((name) => !name.startsWith("memory/"));
  const rows = names.map((name) => [name, ...runs.map((run) => run.rows.at(-1)?.[name] ?? null)]);
  const title = ["metric", ...runs.map((run) => run.name)];
  return h("section", {}, h("div", { class: "section-head" }, h("h2", {}, "Last values"), csvButton("comparison.csv", () => [title, ...rows])),
    wide("Last values", title, rows, (value) => (Number.isInteger(value) ? count(value) : number(value)), true));
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
