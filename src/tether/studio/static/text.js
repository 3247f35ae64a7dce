// Text from a model, shown as what it is. Characters that would be invisible or would turn the line around (control,
// bidirectional, zero width, lone surrogates) become marked code points; everything else is a plain text node.

import { h, button } from "./dom.js";

const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]" +
  "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]" +
  "|\\udb40[\\udc00-\\udc7f]",
  "g",
);

const NAMES = {
  0x200b: "zero width space", 0x200e: "left-to-right mark", 0x200f: "right-to-left mark",
  0x202a: "left-to-right embedding", 0x202b: "right-to-left embedding", 0x202c: "end of embedding",
  0x202d: "left-to-right override", 0x202e: "right-to-left override", 0x2066: "left-to-right isolate",
  0x2067: "right-to-left isolate", 0x2069: "end of isolate", 0xfeff: "byte order mark", 0: "null", 0x1b: "escape",
};

const CHUNK = 20_000;

function mark(characters) {
  const code = characters.codePointAt(0);
  const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  return h("span", { class: "codepoint", title: NAMES[code] ? `${name} ${NAMES[code]}` : name }, name);
}

/** Nodes for `text`. */
export function visible(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(mark(match[0]));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** The same as a plain string, where no element can stand: attributes, drawn labels. */
export function visibleString(text) {
  return text.replace(HIDDEN, (found) => mark(found).textContent);
}

/** One token: a space or line break that would not be seen is drawn; with `edges` the space it begins with, too. */
export function tokenNodes(text, { edges = false } = {}) {
  if (text === "") return [h("span", { class: "ghost" }, "∅")];
  const nodes = visible(text).flatMap((node) => (typeof node === "string" ? breaks(node) : [node]));
  if (edges && /^ +\S/.test(text)) {
    const end = text.search(/\S/);
    return [h("span", { class: "ghost" }, "␣".repeat(end)), ...tokenNodes(text.slice(end))];
  }
  return /^[ \t]+$/.test(text) ? [h("span", { class: "ghost" }, text.replaceAll(" ", "␣").replaceAll("\t", "⇥"))] : nodes;
}

function breaks(text) {
  return text.split("\n").flatMap((line, i) => (i ? [h("span", { class: "ghost" }, "↵"), "\n", line] : [line]));
}

/** A block of text; very long ones come in pieces, so that a megabyte does not stop the page. */
export function longText(text, props = {}) {
  const block = h("div", { ...props, class: `text ${props.class ?? ""}`, dir: "auto" });
  let shown = 0;
  const more = button("", () => extend(), { class: "quiet more" });
  const extend = () => {
    let end = Math.min(text.length, shown + CHUNK);
    if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end += 1;
    more.remove();
    block.append(...visible(text.slice(shown, end)));
    shown = end;
    if (shown < text.length) {
      more.textContent = `show more (${(text.length - shown).toLocaleString("en")} characters left)`;
      block.append(more);
    }
  };
  if (text) extend();
  else block.append(h("span", { class: "ghost" }, "(empty)"));
  return block;
}

/** At most `limit` characters on one line. */
export function snippet(text, limit = 160) {
  const line = text.replace(/\s+/g, " ").trim();
  const cut = line.length > limit ? `${line.slice(0, limit).trimEnd()}…` : line;
  return cut ? visible(cut) : [h("span", { class: "ghost" }, "(empty)")];
}
