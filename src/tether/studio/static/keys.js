// Keyboard shortcuts: each page says which it has, `?` shows them. Keys typed into fields are left alone.

import { h, fill, button } from "./dom.js";

const common = [["?", "show these keys"], ["Esc", "close, or leave a field"]];
let described = [];

/** `bindings`: [key or list of keys, words, handler]. They hold until `signal` aborts. */
export function keys(signal, bindings) {
  described.push(...bindings);
  signal.addEventListener("abort", () => {
    described = described.filter((binding) => !bindings.includes(binding));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || inField(event.target) || dialog().open) return;
    const binding = bindings.find(([names]) => [names].flat().includes(event.key));
    if (binding && binding[2](event) !== false) event.preventDefault();
  }, { signal });
}

function inField(target) {
  return target.closest?.("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]") ?? false;
}

function dialog() {
  return document.getElementById("keys");
}

const SYMBOLS = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Enter: "↵", " ": "Space" };

export function showKeys() {
  const rows = [...described.map(([names, words]) => [names, words]), ...common].filter(([, words]) => words);
  fill(dialog(),
    h("header", {}, h("h2", {}, "Keys"), button("Close", () => dialog().close(), { class: "quiet" })),
    h("dl", { class: "keys" }, rows.map(([names, words]) => h("div", {},
      h("dt", {}, [names].flat().map((name) => h("kbd", {}, SYMBOLS[name] ?? name))),
      h("dd", {}, words)))));
  dialog().showModal();
}

export function startKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && inField(event.target)) event.target.blur();
    if (event.key === "?" && !inField(event.target) && !dialog().open) showKeys();
  });
  dialog().addEventListener("click", (event) => {
    if (event.target === dialog()) dialog().close();
  });
}
