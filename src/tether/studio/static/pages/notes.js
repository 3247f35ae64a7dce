// What people noted about a run: its tags and a text, and the form to change them. What is typed stays until it is
// saved or given up, whatever the run does meanwhile. What another page wrote in the meantime is shown before it can be
// replaced.

import { h, fill, button, announce } from "../dom.js";
import { address, get, post } from "../api.js";
import { longText, visible } from "../text.js";

/** A tag, leading to the runs that have it. */
export function tagLink(tag) {
  return h("a", { class: "tag own", href: address("/", { tag }), title: "Runs with this tag" }, visible(tag));
}

const wordsOf = (run) => ({ note: run.note, tags: run.tags });

/** The notes of a run; `show(run)` draws them as they are now. */
export class Notes {
  constructor() {
    this.element = h("section", { class: "notes", "aria-label": "Notes" });
    this.editing = false;
  }

  show(run) {
    this.run = run;
    if (this.editing) return;
    const edit = button(run.note || run.tags.length ? "Edit notes" : "Add notes", () => this.edit(), { class: "quiet edit" });
    fill(this.element, h("div", { class: "tag-list" }, run.tags.map(tagLink), edit), run.note ? longText(run.note, { class: "note" }) : null);
  }

  edit() {
    this.editing = true;
    let seen = wordsOf(this.run);
    const note = h("textarea", { id: "run-note", rows: "4", maxlength: "10000", value: this.run.note });
    const tags = h("input", { id: "run-tags", value: this.run.tags.join(", "), placeholder: "baseline, long run" });
    const fault = h("p", { class: "notice bad", role: "alert", hidden: true });
    const save = async (event) => {
      event.preventDefault();
      try {
        const kept = await post("notes", { run: this.run.run, seen, note: note.value, tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean) });
        this.close({ ...this.run, ...kept });
        announce("Notes saved");
      } catch (error) {
        fill(fault, `Not saved: ${error.message}`);
        fault.hidden = false;
        if (error.status === 409) await this.showOthers(fault, (words) => (seen = words));
      }
    };
    fill(this.element, h("form", { class: "panel", onsubmit: save }, fault,
      h("label", { for: "run-tags" }, "Tags, with commas between them"), tags, h("label", { for: "run-note" }, "Note"), note,
      h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Save"), button("Cancel", () => this.close(this.run), { class: "quiet" }))));
    tags.focus();
  }

  /** What is there now, which the next save replaces: `agree(words)` once it is shown. */
  async showOthers(fault, agree) {
    const words = wordsOf(await get("run", { run: this.run.run }));
    fault.append(". There now, and replaced if you save again:", h("div", { class: "tag-list" }, words.tags.map(tagLink)), longText(words.note || "(no note)", { class: "note" }));
    agree(words);
  }

  close(run) {
    this.editing = false;
    this.show(run);
    this.element.querySelector(".edit").focus();
  }
}
