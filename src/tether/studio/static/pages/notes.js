// What people noted about a run: its tags and a text, and the form to change them. What is typed stays until it is
// saved or given up, whatever the run does meanwhile.

import { h, fill, button, announce } from "../dom.js";
import { address, post } from "../api.js";
import { longText, visible } from "../text.js";

/** A tag, leading to the runs that have it. */
export function tagLink(tag) {
  return h("a", { class: "tag own", href: address("/", { tag }), title: "Runs with this tag" }, visible(tag));
}

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
    const note = h("textarea", { id: "run-note", rows: "4", maxlength: "10000", value: this.run.note });
    const tags = h("input", { id: "run-tags", value: this.run.tags.join(", "), placeholder: "baseline, long run" });
    const fault = h("p", { class: "notice bad", role: "alert", hidden: true });
    const save = async (event) => {
      event.preventDefault();
      try {
        const kept = await post("notes", { run: this.run.run, note: note.value, tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean) });
        this.close({ ...this.run, ...kept });
        announce("Notes saved");
      } catch (error) {
        fault.textContent = `Not saved: ${error.message}`;
        fault.hidden = false;
      }
    };
    fill(this.element, h("form", { class: "panel", onsubmit: save }, fault,
      h("label", { for: "run-tags" }, "Tags, with commas between them"), tags, h("label", { for: "run-note" }, "Note"), note,
      h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Save"), button("Cancel", () => this.close(this.run), { class: "quiet" }))));
    tags.focus();
  }

  close(run) {
    this.editing = false;
    this.show(run);
    this.element.querySelector(".edit").focus();
  }
}
