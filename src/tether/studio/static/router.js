// Which page an address means. Every view is an address, so it can be kept, sent and opened again.

const pages = new Map();
let current = null;

/** `load` brings the module whose `show(page)` fills a page. */
export function route(path, load) {
  pages.set(path, load);
}

/** What a page gets: where to draw, what the address asks for, and a signal that aborts when it is left. */
class Page {
  constructor(main, query) {
    this.main = main;
    this.query = query;
    this.controller = new AbortController();
    this.signal = this.controller.signal;
  }

  get left() {
    return this.signal.aborted;
  }

  /** Listen to anything until the page is left. */
  listen(target, event, handler) {
    target.addEventListener(event, handler, { signal: this.signal });
  }
}

export function go(url, { replace = false } = {}) {
  const next = new URL(url, location.href);
  history[replace ? "replaceState" : "pushState"](null, "", next);
  return open();
}

/** Change the address of the page that is shown, without showing it anew. */
export function rename(changes) {
  const url = new URL(location.href);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") url.searchParams.delete(name);
    else url.searchParams.set(name, value);
  }
  history.replaceState(null, "", url);
}

async function open() {
  current?.controller.abort();
  const main = document.getElementById("main");
  const page = new Page(main, new URLSearchParams(location.search));
  current = page;
  document.dispatchEvent(new CustomEvent("page", { detail: location.pathname }));
  main.setAttribute("aria-busy", "true");
  try {
    const module = await (pages.get(location.pathname) ?? pages.get("/"))();
    if (!page.left) await module.show(page);
  } catch (error) {
    if (!page.left && error.name !== "AbortError") showError(main, error);
  }
  if (!page.left) main.removeAttribute("aria-busy");
}

function showError(main, error) {
  if (error.status === undefined) console.error(error); // not the server's word, but a fault of the page
  const box = document.createElement("div");
  box.className = "notice bad";
  box.setAttribute("role", "alert");
  const title = document.createElement("h1");
  title.textContent = error.status === 404 ? "Not found" : "This cannot be shown";
  const text = document.createElement("p");
  text.textContent = error.message;
  const back = document.createElement("a");
  back.href = "/";
  back.textContent = "All runs";
  box.append(title, text, back);
  main.replaceChildren(box);
}

export function start() {
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href]");
    if (!link || link.target || link.hasAttribute("download")) return;
    if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const url = new URL(link.href);
    if (url.origin !== location.origin || !pages.has(url.pathname) || link.getAttribute("href").startsWith("#")) return;
    event.preventDefault();
    go(url).then(() => {
      scrollTo(0, 0);
      document.getElementById("main").focus({ preventScroll: true });
    });
  });
  addEventListener("popstate", open);
  return open();
}
