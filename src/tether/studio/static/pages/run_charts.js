// A run's charts: the ones that everybody looks at, every other metric on demand, linked, and growing as it trains.

import { h, fill, button } from "../dom.js";
import { get, exportAddress } from "../api.js";
import { axesOf, axisSelect, chosenAxis, smoothingOf, smoothingSelect } from "../axes.js";
import { ChartGroup } from "../charts.js";
import { CHARTS, isPhase, tile, raisedAlarms } from "../parts.js";
import { number, plural } from "../format.js";
import { rename } from "../router.js";

const PHASE_COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];

export async function showCharts(page, run, body) {
  const state = { run, rows: [], more: (page.query.get("more") ?? "").split(",").filter(Boolean), group: new ChartGroup(page.signal), charts: [], by: page.query.get("x") ?? "iteration" };
  const tiles = h("dl", { class: "tiles" });
  const grid = h("div", { class: "charts" });
  const picker = h("div", {});
  const bar = h("div", { class: "toolbar" });
  const fault = h("p", { class: "notice", role: "status", hidden: true });
  state.group.smooth(Number(smoothingOf(page.query.get("smooth"))));
  await fetchRows(page, state, 0);
  const drawBar = () => {
    if (!bar.contains(document.activeElement)) fill(bar, toolbar(run, state, redraw));
    fault.textContent = state.fault;
    fault.hidden = !state.fault;
  };
  const redraw = () => {
    build(state, grid);
    fault.textContent = state.fault;
    fault.hidden = !state.fault;
  };
  fill(body, alarmBanner(run), tiles, bar, fault, grid, picker);
  if (!state.rows.length) fill(grid, h("p", { class: "nothing" }, "No iteration yet. The charts appear with the first one."));
  build(state, grid);
  drawBar();
  drawPicker(state, picker, grid);
  drawTiles(state, tiles);
  return async (changed) => {
    state.run = changed;
    const before = state.rows.length;
    await fetchRows(page, state, state.rows.at(-1)?.iteration ?? 0);
    if (!before && state.rows.length) fill(grid);
    if (names(state).some((name) => !state.known.has(name))) drawPicker(state, picker, grid);
    build(state, grid);
    drawBar();
    drawTiles(state, tiles);
  };
}

/** New rows after `since`; everything anew where the run was rewound, or done again, in the meantime. */
async function fetchRows(page, state, since) {
  const { rows, last, edition } = await get("metrics", { run: state.run.run, since }, page.signal);
  if (since && (last < since || edition !== state.edition)) {
    state.rows = [];
    return fetchRows(page, state, 0);
  }
  state.edition = edition;
  state.rows = since ? [...state.rows, ...rows.filter((row) => row.iteration > since)] : rows;
  return undefined;
}

function names(state) {
  const found = new Set();
  for (const row of state.rows.slice(-3)) for (const name of Object.keys(row)) if (name !== "iteration") found.add(name);
  return [...found];
}

function specs(state) {
  const there = new Set(names(state));
  const list = CHARTS.map((spec) => ({ ...spec, series: spec.series.filter(([name]) => there.has(name)) })).filter((spec) => spec.series.length);
  const phases = [...there].filter(isPhase);
  if (phases.length) list.push({ title: "Time by phase", unit: "seconds of an iteration", stacked: true, series: phases.map((name) => [name, name.slice(5)]) });
  for (const name of state.more) if (there.has(name)) list.push({ title: name, unit: "", series: [[name, name, `${name}_std`]], extra: true });
  return list;
}

/** Make the charts that are not there yet, and give all of them the rows. */
function build(state, grid) {
  const wanted = specs(state);
  for (const chart of [...state.charts]) {
    if (wanted.some((spec) => spec.title === chart.spec.title)) continue;
    state.group.remove(chart);
    chart.element.remove();
    state.charts = state.charts.filter((other) => other !== chart);
  }
  for (const spec of wanted) {
    if (state.charts.some((chart) => chart.spec.title === spec.title)) continue;
    const chart = state.group.add({
      ...spec,
      metrics: spec.series,
      series: spec.series.map(([, label], i) => ({ label, colour: PHASE_COLOURS[i % 8], dashed: label === "k1" || label === "longest" })),
      levels: levels(state.run, spec.alarm),
      marks: () => (state.run.alarms ?? []).filter((alarm) => alarm.kind === spec.alarm && alarm.state === "raised").map((alarm) => state.x[state.rows.findIndex((row) => row.iteration === alarm.iteration)]).filter(Number.isFinite),
    });
    state.charts.push(chart);
    grid.append(chart.element);
  }
  state.axes = axesOf([{ ...state.run, rows: state.rows }]);
  const { axis, fault } = chosenAxis(state.axes, state.by);
  const x = axis.values[0];
  if (state.group.axis.label !== axis.label) state.group.zoom(null);
  Object.assign(state, { fault, x });
  state.group.axis = axis;
  const column = (name) => state.rows.map((row) => row[name] ?? null);
  for (const chart of state.charts) {
    chart.update(x, chart.spec.metrics.map(([name, , spread]) => {
      const values = column(name);
      if (!spread || state.rows.at(-1)?.[spread] === undefined) return { values };
      const std = column(spread);
      const edge = (sign) => values.map((v, i) => (v === null || std[i] === null ? null : v + sign * std[i]));
      return { values, low: edge(-1), high: edge(1) };
    }));
  }
}

function levels(run, alarm) {
  const threshold = alarm ? run.config?.alarms?.[alarm] : null;
  return threshold && alarm !== "length" ? [{ value: threshold, label: `alarm at ${threshold}` }] : [];
}

function drawTiles(state, tiles) {
  const [first, last] = [state.rows[0], state.rows.at(-1)];
  if (!last) return;
  const speed = last["time/tokens_per_second_sampled"] ?? last["time/steps_per_second_collected"];
  const from = (name) => (state.rows.length > 1 && Number.isFinite(first[name]) ? `from ${number(first[name])}` : "");
  const length = last.response_length === undefined ? "episode_length" : "response_length";
  fill(tiles,
    tile("Score", last.score, Number.isFinite(last.score_std) ? `± ${number(last.score_std)} · ${from("score")}` : from("score")),
    last.kl === undefined ? null : tile("KL", last.kl, "nats per response"),
    tile("Entropy", last.entropy, from("entropy")),
    tile("Explained variance", last.explained_variance, "of the critic"),
    tile("Length", last[length], from(length)),
    tile("Steps per second", number(speed), `${number(last["time/iteration"])} s per iteration`));
}

function alarmBanner(run) {
  const raised = raisedAlarms(run.alarms ?? []);
  return raised.map((alarm) => h("p", { class: "notice bad" }, h("b", {}, `Since iteration ${alarm.since}: `), `${alarm.seen}: ${alarm.remedy}`));
}

function toolbar(run, state, redraw) {
  const smooth = smoothingSelect(String(state.group.smoothing), (value) => {
    state.group.smooth(Number(value));
    rename({ smooth: value === "0" ? null : value });
  });
  const by = axisSelect(state.axes, state.group.axis.name, (name) => {
    state.by = name;
    rename({ x: name === "iteration" ? null : name });
    redraw();
  });
  return [
    h("p", { class: "hint" }, "Drag over a chart to zoom in, double-click for everything."),
    h("span", { class: "spacer" }), by, smooth,
    button("Whole range", () => state.group.zoom(null), { class: "quiet" }),
    h("a", { class: "button", href: exportAddress("metrics.csv", { run: run.run }), download: "", "aria-label": "Metrics as CSV" }, "CSV")];
}

/** Every metric that no chart shows, to be ticked. */
function drawPicker(state, picker, grid) {
  state.known = new Set(names(state));
  const standard = new Set(CHARTS.flatMap((spec) => spec.series.flatMap(([name, , spread]) => [name, spread])));
  const others = [...state.known].filter((name) => !standard.has(name) && !isPhase(name)).sort();
  if (!others.length) return;
  const toggle = (name) => (event) => {
    state.more = event.target.checked ? [...state.more, name] : state.more.filter((other) => other !== name);
    rename({ more: state.more.join(",") });
    build(state, grid);
  };
  const box = (name) => h("label", { class: "check" }, h("input", { type: "checkbox", checked: state.more.includes(name), onchange: toggle(name) }), h("span", {}, name));
  const open = picker.querySelector("details")?.open ?? state.more.length > 0;
  fill(picker, h("details", { class: "picker", open }, h("summary", {}, `More metrics (${plural(others.length, "other")})`), h("div", { class: "checks" }, others.map(box))));
}
