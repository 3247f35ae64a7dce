// One run: its charts, live, and by tabs its settings, the difference to another's, its alarms, checkpoints and console.

import { h, fill, debounce } from "../dom.js";
import { get, onChange } from "../api.js";
import { runHeader } from "../parts.js";
import { showConsole } from "./console.js";
import { Notes } from "./notes.js";
import { showCharts } from "./run_charts.js";
import { showConfiguration, showDifference, showAlarms, showCheckpoints } from "./run_tables.js";

const TABS = {
  charts: showCharts,
  configuration: showConfiguration,
  difference: showDifference,
  alarms: showAlarms,
  checkpoints: showCheckpoints,
  console: showConsole,
};

export async function show(page) {
  const name = page.query.get("run") ?? "";
  const tab = Object.hasOwn(TABS, page.query.get("tab") ?? "") ? page.query.get("tab") : "charts";
  let run = await get("run", { run: name }, page.signal);
  document.title = `${run.name} · Tether studio`;
  const header = h("div", {}, runHeader(run, tab));
  const notes = new Notes();
  notes.show(run);
  const body = h("div", { class: `tab-${tab}` });
  fill(page.main, header, notes.element, body);
  const update = await TABS[tab](page, run, body);
  onChange([run.run], debounce(async () => {
    run = await get("run", { run: name }, page.signal);
    if (!header.contains(document.activeElement)) fill(header, runHeader(run, tab));
    if (!notes.element.contains(document.activeElement)) notes.show(run);
    await update?.(run);
  }, 250), page.signal);
}
