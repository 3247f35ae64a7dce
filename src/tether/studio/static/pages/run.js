// One run: its charts, live, and by tabs its settings, the difference to another's, its alarms and checkpoints.

import { h, fill, debounce } from "../dom.js";
import { get, onChange } from "../api.js";
import { runHeader } from "../parts.js";
import { showCharts } from "./run_charts.js";
import { showConfiguration, showDifference, showAlarms, showCheckpoints } from "./run_tables.js";

const TABS = {
  charts: showCharts,
  configuration: showConfiguration,
  difference: showDifference,
  alarms: showAlarms,
  checkpoints: showCheckpoints,
};

export async function show(page) {
  const name = page.query.get("run") ?? "";
  const tab = Object.hasOwn(TABS, page.query.get("tab") ?? "") ? page.query.get("tab") : "charts";
  let run = await get("run", { run: name }, page.signal);
  document.title = `${run.name} · Tether studio`;
  const header = h("div", {}, runHeader(run, tab));
  const body = h("div", { class: `tab-${tab}` });
  fill(page.main, header, body);
  const update = await TABS[tab](page, run, body);
  onChange([run.run], debounce(async () => {
    run = await get("run", { run: name }, page.signal);
    if (!header.contains(document.activeElement)) fill(header, runHeader(run, tab));
    await update?.(run);
  }, 250), page.signal);
}
