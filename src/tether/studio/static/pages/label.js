// Judging pairs: two answers without names, one key each; every answer is on the disk before the next pair is shown.

import { h, fill, button, announce } from "../dom.js";
import { address, get, post } from "../api.js";
import { progress } from "../parts.js";
import { longText } from "../text.js";
import { promptView } from "../turns.js";
import { go } from "../router.js";
import { keys } from "../keys.js";
import { agreementView } from "./labels.js";

const KEPT = "tether-annotator";
let known = null; // the name where storage is forbidden
const sure = new Set(); // names that were asked about
const CHOICES = [
  { answer: "left", label: "Left is better", keys: ["1", "ArrowLeft"] },
  { answer: "right", label: "Right is better", keys: ["2", "ArrowRight"] },
  { answer: "tie", label: "Tie", keys: ["3", "t"] },
  { answer: "skip", label: "Skip", keys: ["4", "s"] },
  { answer: "both_bad", label: "Both bad", keys: ["5", "b"] },
];

export async function show(page) {
  const set = page.query.get("set") ?? "";
  document.title = "Label · Tether studio";
  const annotator = kept();
  if (annotator && !page.query.has("rename")) await label(page, set, annotator);
  else askName(page, set, annotator);
}

function kept() {
  try {
    return known ?? localStorage.getItem(KEPT) ?? "";
  } catch {
    return "";
  }
}

function keep(name) {
  known = name;
  try {
    localStorage.setItem(KEPT, name);
  } catch (error) {
    console.info("the name is kept for this page alone:", error.message);
  }
}

function askName(page, set, before) {
  const input = h("input", { id: "annotator", value: before, maxlength: "80", required: true, autocomplete: "nickname" });
  const submit = (event) => {
    event.preventDefault();
    const name = input.value.trim();
    if (!name) return;
    keep(name);
    go(address("/label", { set }), { replace: true });
  };
  fill(page.main, h("form", { class: "panel ask", onsubmit: submit }, h("h1", {}, "Who is labelling?"),
    h("p", {}, "Answers are kept under a name, so that several people can judge the same pairs and their agreement can be told."),
    h("label", { for: "annotator" }, "Your name"), input, h("button", { type: "submit", class: "primary" }, "Begin")));
  input.focus();
}

/** Somebody has judged under almost the same name: one person should not count as two. */
function askWhich(page, set, annotator, near) {
  const begin = (name) => {
    sure.add(name);
    keep(name);
    go(address("/label", { set }), { replace: true });
  };
  fill(page.main, h("div", { class: "panel ask" }, h("h1", {}, "Is that you?"),
    h("p", {}, `Nobody has judged as ${annotator} yet, but there are answers under almost the same name. Two names count as two people.`),
    near.map(({ name, done }) => button(`I am ${name} (${done} judged)`, () => begin(name), { class: "primary" })),
    button(`No, go on as ${annotator}`, () => begin(annotator))));
}

async function label(page, set, annotator) {
  const first = await get("labels/next", { set, annotator }, page.signal);
  if (first.near.length && !sure.has(annotator)) return askWhich(page, set, annotator, first.near);
  const state = { set, annotator, busy: false, pair: null };
  const parts = {
    bar: h("div", {}), place: h("div", { class: "pair" }), error: h("p", { class: "notice bad", role: "alert", hidden: true }),
    note: h("textarea", { rows: "1", id: "note", placeholder: "A note, if there is something to say", maxlength: "2000" }),
    undo: button(["Undo ", h("kbd", {}, "u")], () => undo(), { class: "quiet" }),
  };
  const choose = CHOICES.map((choice) => button([choice.label, " ", h("kbd", {}, choice.keys[0])], () => answer(choice), { class: "choice", dataset: { answer: choice.answer } }));
  const controls = h("div", { class: "controls" }, h("div", { class: "choices" }, choose), h("div", { class: "below" }, h("label", { class: "hidden", for: "note" }, "Note"), parts.note, parts.undo));

  async function show(next) {
    state.pair = next.pair;
    parts.undo.disabled = !next.can_undo;
    fill(parts.bar, progress(next.progress.done, next.progress.total));
    controls.classList.toggle("finished", !next.pair);
    for (const one of choose) one.disabled = !next.pair;
    parts.note.value = "";
    if (next.pair) fill(parts.place, pairView(next.pair));
    else fill(parts.place, await finished(page, state));
  }

  /** One request at a time; what fails is said, and the pair stays. */
  async function send(request, said) {
    if (state.busy) return;
    state.busy = true;
    parts.error.hidden = true;
    try {
      const next = await request();
      await show(next);
      announce(said(next));
    } catch (error) {
      parts.error.textContent = `Not saved: ${error.message}. Answer again.`;
      parts.error.hidden = false;
    } finally {
      state.busy = false;
    }
  }

  function answer(choice) {
    if (!state.pair) return;
    const body = { set, annotator, pair: state.pair.id, answer: choice.answer, note: parts.note.value.trim() || null };
    send(() => post("labels/answer", body), () => `Saved: ${choice.label.toLowerCase()}`);
  }

  function undo() {
    send(() => post("labels/undo", { set, annotator }), (next) => (next.undone === null ? "There is nothing to undo" : "The last answer is taken back"));
  }

  fill(page.main, h("header", { class: "page-header label-header" }, h("div", {}, h("p", { class: "crumbs" }, h("a", { href: "/labels" }, "Labels"), h("span", { "aria-hidden": "true" }, "/"), set), h("h1", {}, "Which answer is better?")),
    h("div", { class: "actions" }, parts.bar, button(`as ${annotator}`, () => go(address("/label", { set, rename: 1 }), { replace: true }), { class: "quiet", "aria-label": `You are ${annotator}: change the name` }))),
  parts.error, parts.place, controls);
  keys(page.signal, [
    ...CHOICES.map((choice) => [choice.keys, choice.label.toLowerCase(), () => answer(choice)]),
    ["u", "undo the last answer", () => undo()],
    ["n", "write a note", () => parts.note.focus()],
  ]);
  await show(first);
  return undefined;
}

function pairView(pair) {
  const side = (name, label) => h("section", { class: `panel side ${name}`, "aria-label": label }, h("h2", { class: "small" }, label), longText(pair[name], { class: "answer-text" }));
  return [h("section", { class: "panel", "aria-label": "Prompt" }, h("h2", { class: "small" }, "Prompt"), promptView(pair.prompt, pair.messages)),
    h("div", { class: "sides" }, side("left", "Left"), side("right", "Right"))];
}

async function finished(page, state) {
  const agreement = await get("labels/agreement", { set: state.set }, page.signal);
  return h("div", { class: "panel done" }, h("h2", {}, "All pairs are judged. Thank you."), agreementView(agreement));
}
