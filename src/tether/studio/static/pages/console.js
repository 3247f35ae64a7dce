// How a run was started, each time, and what it printed. Commands and lines are text.

import { h, fill } from "../dom.js";
import { get, exportAddress } from "../api.js";
import { bytes, count, moment, plural } from "../format.js";
import { visible } from "../text.js";

export async function showConsole(page, run, body) {
  const cards = h("div", { class: "starts" });
  const log = h("pre", { class: "console", tabindex: "0", role: "region", "aria-label": "What the run printed" });
  const hint = h("p", { class: "hint" });
  const link = h("a", { class: "button", href: exportAddress("console.log", { run: run.run }), download: "", "aria-label": "The whole log" }, "console.log");
  const draw = async () => {
    const { starts, text, before } = await get("console", { run: run.run }, page.signal);
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    fill(cards, starts.length ? starts.map(card) : h("p", { class: "nothing" }, "Nothing was kept of how this run was started: an older version of Tether wrote it."));
    fill(log, visible(text));
    log.hidden = link.hidden = !text;
    hint.textContent = text ? (before ? `The end of what the run printed; ${bytes(before)} are before it.` : "") : "Nothing was kept of what the run printed.";
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  fill(body, cards, h("div", { class: "section-head" }, h("h2", {}, "Console"), link), hint, log);
  await draw();
  log.scrollTop = log.scrollHeight;
  return draw;
}

function card(start) {
  const { commit, machine, versions } = start;
  const fact = (label, value) => (value ? h("div", {}, h("dt", {}, label), h("dd", {}, value)) : null);
  const text = (value) => (value === null || value === undefined || value === "" ? null : visible(String(value)));
  const cores = machine?.cores ? `${plural(machine.cores, "core")}, ${plural(machine.threads, "thread")} of torch` : null;
  return h("section", { class: "panel start" },
    h("h2", {}, start.iteration ? `Went on after iteration ${count(start.iteration)}` : "Started", h("small", {}, moment(start.time))),
    h("pre", { class: "command" }, visible(start.command)),
    h("dl", { class: "settings-list" },
      fact("commit", commit ? [h("code", {}, visible(String(commit.id))), commit.dirty ? h("span", { class: "tag warn" }, "with changes") : null] : "none: not in a git repository"),
      fact("folder", text(start.folder)),
      fact("versions", versions ? text(Object.entries(versions).map(([name, value]) => `${name} ${value ?? "–"}`).join(", ")) : null),
      fact("host", text(machine?.host)), fact("system", text(machine?.system)),
      fact("processor", text([machine?.processor, cores].filter(Boolean).join(", "))),
      fact("memory", machine?.memory ? bytes(machine.memory) : null),
      fact("device", text([machine?.device, machine?.device_name].filter(Boolean).join(", ")))));
}
