// The episodes of a run: filtered, sorted, searched; and one prompt across the iterations, side by side.

import { h, fill, table, button, debounce, told } from "../dom.js";
import { get, address, exportAddress, onChange } from "../api.js";
import { runHeader } from "../parts.js";
import { nats, signed, count, plural } from "../format.js";
import { snippet } from "../text.js";
import { promptLine } from "../turns.js";
import { rename } from "../router.js";
import { keys } from "../keys.js";
import { step } from "./runs.js";
import { showSamePrompt } from "./same_prompt.js";

const LIMIT = 50;
const RANGES = [["iteration", "Iteration", 1], ["score", "Score", "any"], ["kl", "KL", "any"], ["length", "Length", 1]];
const FILTERS = [...RANGES.flatMap(([name]) => [`${name}_from`, `${name}_to`]), "ended", "text", "prompt"];
const ORDERS = [["id", "Order of collection"], ["score", "Score"], ["reward", "Reward"], ["kl", "KL"], ["length", "Length"], ["iteration", "Iteration"]];

export async function show(page) {
  const name = page.query.get("run") ?? "";
  const run = await get("run", { run: name }, page.signal);
  document.title = `Episodes of ${run.name} · Tether studio`;
  const header = h("div", {}, runHeader(run, "episodes"));
  const body = h("div", {});
  fill(page.main, header, body);
  if (page.query.get("same")) {
    await showSamePrompt(page, run, body);
    return;
  }
  await showList(page, run, body);
}

async function showList(page, run, body) {
  const query = Object.fromEntries(FILTERS.map((key) => [key, page.query.get(key) ?? ""]));
  const state = { run, query, order: page.query.get("order") ?? "id", descending: page.query.get("descending") ?? "1", offset: Number(page.query.get("offset") ?? 0), total: 0 };
  const results = h("div", { class: "results" });
  const status = h("p", { class: "hint", role: "status" });
  const link = h("a", { class: "button", download: "", "aria-label": "These episodes as CSV" }, "CSV");
  const load = async () => {
    const asked = { run: run.run, ...state.query, order: state.order, descending: state.descending };
    const turn = (state.turn = (state.turn ?? 0) + 1);
    const found = await get("episodes", { ...asked, limit: LIMIT, offset: state.offset }, page.signal);
    if (turn !== state.turn) return; // asked otherwise in the meantime
    state.total = found.total;
    link.href = exportAddress("episodes.csv", asked);
    status.textContent = found.total ? `${plural(found.total, "episode")}${found.total > LIMIT ? `, ${state.offset + 1}–${state.offset + found.episodes.length}` : ""}` : "";
    fill(results, found.episodes.length ? [episodesTable(found.episodes, run), pager(state, changed)] : h("p", { class: "nothing" }, filtered(state) ? "No episode fits these filters." : "No episode was stored yet."));
  };
  const changed = (change) => {
    Object.assign(state, { offset: 0 }, change);
    rename({ ...state.query, order: state.order === "id" ? null : state.order, descending: state.descending === "1" ? null : state.descending, offset: state.offset || null });
    return told(load());
  };
  const form = filters(state, changed);
  fill(body, form, h("div", { class: "toolbar" }, status, h("span", { class: "spacer" }), sorting(state, changed), link), results);
  await load();
  onChange([run.run], debounce(async () => {
    if (!state.offset && !results.contains(document.activeElement)) await load();
  }, 500), page.signal);
  keys(page.signal, [
    ["j", "next episode", () => step(results, 1)],
    ["k", "episode before", () => step(results, -1)],
    ["/", "search", () => form.querySelector("[type=search]").focus()],
    ["]", "next page", () => state.offset + LIMIT < state.total && changed({ offset: state.offset + LIMIT })],
    ["[", "page before", () => state.offset && changed({ offset: Math.max(0, state.offset - LIMIT) })],
  ]);
}

const filtered = (state) => FILTERS.some((key) => state.query[key]);

function filters(state, changed) {
  const soon = debounce(() => changed({}), 300);
  const set = (key, value) => {
    state.query = { ...state.query, [key]: value };
  };
  const take = (key, { validity, value }) => {
    if (!validity.valid) return;
    set(key, value.trim());
    soon();
  };
  const field = (key, label, props) => h("input", { value: state.query[key], "aria-label": label, name: key, oninput: (event) => take(key, event.target), ...props });
  const range = ([name, label, step]) => h("fieldset", { class: "range" }, h("legend", {}, label),
    field(`${name}_from`, `${label} from`, { type: "number", step, placeholder: "from" }), h("span", { "aria-hidden": "true" }, "–"),
    field(`${name}_to`, `${label} to`, { type: "number", step, placeholder: "to" }));
  const ended = h("select", { "aria-label": "How it ended", name: "ended", onchange: (event) => changed({ query: { ...state.query, ended: event.target.value } }) },
    [["", "any end"], ["terminated", "ended by itself"], ["truncated", "cut off"]].map(([value, label]) => h("option", { value, selected: state.query.ended === value }, label)));
  const clear = () => {
    for (const input of form.querySelectorAll("input, select")) input.value = "";
    changed({ query: Object.fromEntries(FILTERS.map((key) => [key, ""])) });
  };
  const form = h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    field("text", "Search in prompts and responses", { type: "search", placeholder: "Search in prompts and responses" }),
    h("details", { open: matchMedia("(min-width: 761px)").matches || FILTERS.some((key) => key !== "text" && state.query[key]) }, h("summary", {}, "Filters"),
      h("div", {}, RANGES.map(range), h("fieldset", { class: "range" }, h("legend", {}, "Ended"), ended), button("Clear", clear, { class: "quiet" }))));
  return form;
}

function sorting(state, changed) {
  const order = h("select", { "aria-label": "Sort by", onchange: (event) => changed({ order: event.target.value }) }, ORDERS.map(([value, label]) => h("option", { value, selected: value === state.order }, label)));
  const direction = button(state.descending === "1" ? "↓" : "↑", () => {
    const descending = state.descending === "1" ? "0" : "1";
    direction.textContent = descending === "1" ? "↓" : "↑";
    direction.setAttribute("aria-label", descending === "1" ? "Largest first" : "Smallest first");
    changed({ descending });
  }, { class: "icon", "aria-label": state.descending === "1" ? "Largest first" : "Smallest first" });
  return h("span", { class: "sorting" }, order, direction);
}

function pager(state, changed) {
  if (state.total <= LIMIT) return null;
  const page = Math.floor(state.offset / LIMIT) + 1;
  const pages = Math.ceil(state.total / LIMIT);
  const to = (offset) => async () => {
    await changed({ offset });
    scrollTo({ top: 0 });
  };
  return h("nav", { class: "pager", "aria-label": "Pages" },
    button("← Before", to(Math.max(0, state.offset - LIMIT)), { disabled: page === 1 }),
    h("span", {}, `page ${count(page)} of ${count(pages)}`),
    button("Next →", to(state.offset + LIMIT), { disabled: page >= pages }));
}

function episodesTable(episodes, run) {
  const columns = [["Score", "number"], ["KL", "number"], ["Length", "number"], ["Iteration", "number"], ["Prompt and response"], ["Ended"], [""]];
  const head = columns.map(([label, cls]) => h("th", { role: "columnheader", class: cls ?? null }, label || h("span", { class: "hidden" }, "Same prompt")));
  const scores = episodes.map((episode) => episode.score).filter(Number.isFinite);
  const most = Math.max(...scores.map(Math.abs), 1e-9);
  return table("Episodes", head, episodes.map((episode) => row(episode, run, most)), { class: "episodes cards" });
}

function row(episode, run, most) {
  const cell = (label, props, ...children) => h("td", { role: "cell", dataset: { label }, ...props }, children);
  const sign = episode.score < 0 ? "worse" : "better";
  const bar = h("span", { class: "score-chip", dataset: { shade: Number.isFinite(episode.score) ? sign : "none" }, style: { "--shade": `${Math.round((Math.abs(episode.score ?? 0) / most) * 70)}%` } }, signed(episode.score));
  return h("tr", { role: "row", dataset: { id: episode.id } },
    cell("Score", { class: "number" }, bar), cell("KL", { class: "number" }, nats(episode.kl)), cell("Length", { class: "number" }, count(episode.length)),
    cell("Iteration", { class: "number" }, count(episode.iteration)),
    cell("", { class: "texts" }, h("div", { class: "prompt line" }, promptLine(episode.prompt, episode.messages)),
      h("a", { class: "open line", href: address("/episode", { run: run.run, id: episode.id }) }, h("bdi", {}, snippet(episode.response, 220)))),
    cell("Ended", { class: "ended" }, episode.truncated ? h("span", { class: "tag warn" }, "cut off") : h("span", { class: "faint" }, episode.terminated ? "by itself" : "–")),
    cell("", { class: "same" }, h("a", { class: "quiet", href: address("/episodes", { run: run.run, same: episode.id }), "aria-label": `Episode ${episode.id}: the same prompt across iterations` }, "same prompt")));
}
