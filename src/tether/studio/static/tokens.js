// A response as its actions: coloured by a quantity, walked by pointer and arrow keys. Knows columns of steps; nothing
// of where the numbers are shown: it says which step is looked at.

import { h, fill, button } from "./dom.js";
import { shade } from "./colours.js";
import { tokenNodes, visibleString } from "./text.js";

const WINDOW = 2000; // tokens in the page at once
const LONGEST = 300; // characters of one token that are shown

export class TokenStrip {
  /** `onLook(index)`: the step under the pointer or the keys. `chips`: actions of a simulator, which are no text. */
  constructor(steps, { onLook, label, chips = false, step = 0 }) {
    this.steps = steps;
    this.onLook = onLook;
    this.count = steps.action.length;
    this.selected = Math.min(Math.max(0, step), Math.max(0, this.count - 1));
    this.looked = this.selected;
    this.start = Math.floor(this.selected / WINDOW) * WINDOW;
    this.prefix = `token-${Math.random().toString(36).slice(2)}`;
    this.list = h("div", { class: chips ? "tokens chips" : "tokens", role: "listbox", tabindex: "0", "aria-label": label, dir: "auto" });
    this.element = h("div", { class: "strip" }, this.list);
    this.list.addEventListener("pointermove", (event) => this.hover(event));
    this.list.addEventListener("pointerleave", () => this.look(this.selected));
    this.list.addEventListener("click", (event) => this.click(event));
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.draw();
  }

  draw() {
    const end = Math.min(this.count, this.start + WINDOW);
    this.tokens = [];
    for (let i = this.start; i < end; i += 1) this.tokens.push(this.token(i));
    fill(this.list, this.tokens);
    const turn = (start, words) => button(words, () => this.turn(start), { class: "quiet" });
    this.element.replaceChildren(...[
      this.start ? turn(this.start - WINDOW, `steps before ${this.start}`) : null, this.list,
      end < this.count ? turn(end, `steps from ${end} (${(this.count - end).toLocaleString("en")} more)`) : null].filter(Boolean));
    if (this.scale) this.colour(this.scale, this.column);
    this.mark();
  }

  token(i) {
    const text = this.steps.action[i];
    const shown = text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text;
    return h("span", { role: "option", id: `${this.prefix}-${i}`, class: text.includes("\n") ? "token breaks" : "token", dataset: { step: i, clipped: this.steps.clipped?.[i] ? "" : undefined }, "aria-selected": "false" }, tokenNodes(shown));
  }

  colour(scale, column) {
    Object.assign(this, { scale, column });
    for (const [i, token] of this.tokens.entries()) shade(token, scale, column?.[this.start + i] ?? null);
  }

  turn(start) {
    this.start = start;
    this.draw();
    this.select(start);
  }

  hover(event) {
    const token = event.target.closest?.(".token");
    if (token && event.pointerType !== "touch") this.look(Number(token.dataset.step));
  }

  click(event) {
    const token = event.target.closest?.(".token");
    if (token) this.select(Number(token.dataset.step));
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, PageUp: -20, PageDown: 20 };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in moves) this.select(this.selected + moves[event.key]);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") this.select(this.beside(event.key === "ArrowDown" ? 1 : -1));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** The token in the next line that is nearest to the selected one. */
  beside(way) {
    const box = (i) => this.tokens[i - this.start]?.getClientRects()[0];
    const here = box(this.selected);
    let best = this.selected;
    let line = null;
    for (let i = this.selected + way; here && box(i); i += way) {
      const found = box(i);
      if (Math.abs(found.top - here.top) < here.height / 2) continue;
      if (line !== null && Math.abs(found.top - line) > here.height / 2) break;
      line = found.top;
      if (best === this.selected || Math.abs(found.left - here.left) < Math.abs(box(best).left - here.left)) best = i;
    }
    return best;
  }

  select(step) {
    if (!this.count) return;
    this.selected = Math.min(this.count - 1, Math.max(0, step));
    const start = Math.floor(this.selected / WINDOW) * WINDOW;
    if (start !== this.start) {
      this.start = start;
      this.draw();
    }
    this.look(this.selected);
    this.mark();
    const token = this.tokens[this.selected - this.start];
    if (document.activeElement === this.list) token?.scrollIntoView({ block: "nearest" });
    this.onSelect?.(this.selected);
  }

  /** Show a step without choosing it. */
  look(step) {
    if (step === this.looked && this.told) return;
    this.told = true;
    this.tokens[this.looked - this.start]?.removeAttribute("data-looked");
    this.looked = step;
    this.tokens[step - this.start]?.setAttribute("data-looked", "");
    this.onLook?.(step);
  }

  mark() {
    for (const token of this.list.querySelectorAll("[aria-selected=true]")) token.setAttribute("aria-selected", "false");
    const token = this.tokens[this.selected - this.start];
    if (!token) return;
    token.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", token.id);
  }
}

/** A response's tokens, coloured and otherwise still: for groups side by side. */
export function stillTokens(steps, scale, column, limit = 600) {
  const shown = steps.action.slice(0, limit).map((text, i) => {
    const token = h("span", { class: "token", title: visibleString(text.slice(0, LONGEST)) }, tokenNodes(text.slice(0, LONGEST)));
    shade(token, scale, column?.[i] ?? null);
    return token;
  });
  const left = steps.action.length - limit;
  return h("div", { class: "tokens still", dir: "auto" }, shown, left > 0 ? h("span", { class: "ghost" }, ` … ${left} more`) : null);
}
