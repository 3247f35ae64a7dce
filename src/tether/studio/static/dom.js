// Makes elements. Text always becomes a text node: nothing in the studio parses a string as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: `class`, `on…` listeners, `dataset`, `style` (custom properties too); the rest are attributes. */
export function h(tag, props = {}, ...children) {
  return build(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function s(tag, props = {}, ...children) {
  return build(document.createElementNS(SVG, tag), props, children);
}

function build(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") assign(element.dataset, value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function assign(dataset, values) {
  for (const [key, value] of Object.entries(values)) if (value !== null && value !== undefined) dataset[key] = value;
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child);
  }
  return element;
}

/** Replace what is in `element`. */
export function fill(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

/** A table with roles written out, so that it stays one for screen readers when a narrow page lays it out as cards. */
export function table(label, head, rows, props = {}) {
  return h("table", { role: "table", "aria-label": label, ...props },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)),
    h("tbody", { role: "rowgroup" }, rows));
}

export function button(label, onclick, props = {}) {
  return h("button", { type: "button", onclick, ...props }, label);
}

/** What fails in the background is told, unless it failed because the page was left. */
export function told(promise) {
  return Promise.resolve(promise).catch((error) => {
    if (error.name !== "AbortError") announce(error.message);
  });
}

/** Call `run` once things have been quiet for `wait` milliseconds. */
export function debounce(run, wait) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => told(run(...args)), wait);
  };
}

/** Tell a screen reader, and people for a moment, that something happened. */
export function announce(text) {
  const place = document.getElementById("announcer");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => place.classList.remove("shown"), 2200);
}

/** Hand the user a file. */
export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
