// The tabs of a run that are tables: settings, difference to another run, alarms, checkpoints.

import { h, fill, table, told } from "../dom.js";
import { get } from "../api.js";
import { flatten, setting, number, bytes, moment } from "../format.js";
import { csvButton } from "../csv.js";
import { notice } from "../parts.js";
import { rename } from "../router.js";

const head = (...labels) => labels.map(([label, cls]) => h("th", { role: "columnheader", class: cls ?? null }, label));
const row = (...cells) => h("tr", { role: "row" }, cells);
const cell = (label, content, cls = null) => h("td", { role: "cell", dataset: { label }, class: cls }, content);

export function showConfiguration(page, run, body) {
  const fields = flatten(run.config ?? {});
  const place = h("div", {});
  const draw = (words) => {
    const shown = fields.filter(([name, value]) => `${name} ${setting(value)}`.toLowerCase().includes(words.toLowerCase()));
    const sections = Map.groupBy ? Map.groupBy(shown, ([name]) => section(name)) : grouped(shown);
    fill(place, shown.length ? null : h("p", { class: "nothing" }, "No setting has this in it."),
      h("div", { class: "settings" }, [...sections].map(([title, list]) => h("section", {}, h("h2", {}, title),
        h("dl", {}, list.map(([name, value]) => h("div", {}, h("dt", {}, name.slice(title === "run" ? 0 : title.length + 1)), h("dd", {}, setting(value)))))))));
  };
  fill(body, h("div", { class: "toolbar" },
    h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting", oninput: (event) => draw(event.target.value) }),
    h("span", { class: "spacer" }), csvButton("configuration.csv", () => [["field", "value"], ...fields])), place);
  draw("");
}

const section = (name) => (name.includes(".") ? name.split(".")[0] : "run");

function grouped(fields) {
  const groups = new Map();
  for (const field of fields) groups.set(section(field[0]), [...(groups.get(section(field[0])) ?? []), field]);
  return groups;
}

export async function showDifference(page, run, body) {
  const others = (await get("runs", {}, page.signal)).runs.filter((other) => other.run !== run.run && other.state !== "damaged");
  if (!others.length) {
    fill(body, notice("There is no other run to compare with."));
    return;
  }
  const place = h("div", {});
  let fields = [];
  let asked = null;
  const draw = async (name) => {
    asked = name;
    const found = (await get("difference", { run: run.run, with: name }, page.signal)).fields;
    if (asked !== name) return; // another was chosen in the meantime
    fields = found;
    rename({ with: name });
    fill(place, fields.length ? differenceTable(run.name, name, fields) : notice("Both have the same settings."));
  };
  const wanted = page.query.get("with");
  const chosen = others.some((other) => other.run === wanted) ? wanted : others[0].run;
  fill(body, h("div", { class: "toolbar" },
    h("label", {}, "Compared with ", h("select", { onchange: (event) => told(draw(event.target.value)) }, others.map((other) => h("option", { value: other.run, selected: other.run === chosen }, other.run)))),
    h("span", { class: "spacer" }), csvButton("difference.csv", () => [["field", "left", "right"], ...fields.map((f) => [f.name, f.left, f.right])])), place);
  await draw(chosen);
}

function differenceTable(left, right, fields) {
  return table("Settings that differ", head(["Field"], [left], [right]), fields.map((field) => row(
    cell("", h("code", {}, field.name)), cell(left, h("code", { class: "was" }, setting(field.left))), cell(right, h("code", { class: "is" }, setting(field.right))))),
  { class: "cards difference" });
}

export function showAlarms(page, run, body) {
  const draw = ({ alarms }) => {
    if (!alarms.length) return fill(body, notice("No alarm was raised."));
    const list = [...alarms].reverse();
    return fill(body,
      h("div", { class: "toolbar" }, h("span", { class: "spacer" }), csvButton("alarms.csv", () => [["iteration", "kind", "state", "since", "value", "threshold", "seen", "remedy"], ...alarms.map((a) => [a.iteration, a.kind, a.state, a.since, a.value, a.threshold, a.seen, a.remedy])])),
      h("ol", { class: "alarms" }, list.map((alarm) => h("li", { dataset: { state: alarm.state } },
        h("p", { class: "what" }, h("b", {}, alarm.kind), h("span", { class: "tag" }, alarm.state), h("span", { class: "faint" }, alarm.state === "raised" ? `iteration ${alarm.iteration}` : `iteration ${alarm.iteration}, raised in ${alarm.since}`)),
        h("p", { class: "sentence" }, `${alarm.seen}.`), alarm.remedy ? h("p", { class: "sentence faint" }, `${alarm.remedy}.`) : null,
        h("p", { class: "faint" }, `${number(alarm.value)} against a threshold of ${number(alarm.threshold)}`)))));
  };
  draw(run);
  return draw;
}

export function showCheckpoints(page, run, body) {
  const draw = ({ checkpoints }) => {
    if (!checkpoints.length) return fill(body, notice("No checkpoint yet."));
    return fill(body,
      h("div", { class: "toolbar" }, h("span", { class: "spacer" }), csvButton("checkpoints.csv", () => [["iteration", "path", "bytes", "time"], ...checkpoints.map((c) => [c.iteration, c.path, c.bytes, c.time])])),
      table("Checkpoints", head(["Iteration", "number"], ["Path"], ["Size", "number"], ["Written", "number"]), checkpoints.map((one) => row(
        cell("Iteration", String(one.iteration), "number"), cell("Path", h("code", {}, one.path)), cell("Size", bytes(one.bytes), "number"), cell("Written", moment(one.time), "number"))), { class: "cards" }));
  };
  draw(run);
  return draw;
}
