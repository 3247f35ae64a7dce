// The server's answers. Knows the addresses; nothing of how anything is shown.

/** An error the server explained in one line. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** `/path?query`, leaving out what is empty. */
export function address(path, query = {}) {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const entry of Array.isArray(value) ? value : [value]) {
      if (entry !== null && entry !== undefined && entry !== "") search.append(name, entry);
    }
  }
  const text = search.toString();
  return text ? `${path}?${text}` : path;
}

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new ApiError(body.error ?? `the studio answered ${response.status}`, response.status);
  return body;
}

/** GET /api/NAME. Rejects with an `ApiError`, or an `AbortError` when the page was left. */
export async function get(name, query = {}, signal = undefined) {
  return answer(await fetch(address(`/api/${name}`, query), { signal, headers: { Accept: "application/json" } }));
}

export async function post(name, body) {
  return answer(
    await fetch(`/api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "application/json" },
      body: JSON.stringify(body),
    }),
  );
}

export const exportAddress = (file, query = {}) => address(`/api/export/${file}`, query);

const listeners = new Set();
/** Listen to the server from now on. */
export function connect() {
  const source = new EventSource("/api/events");
  const state = document.documentElement.dataset;
  source.addEventListener("open", () => {
    const missed = state.connection === "lost";
    state.connection = "live";
    if (missed) for (const listener of listeners) listener({ run: null });
  });
  source.addEventListener("error", () => {
    state.connection = "lost";
  });
  source.addEventListener("runs", (event) => {
    const change = JSON.parse(event.data);
    for (const listener of listeners) listener(change);
  });
}

/** Call `listener` whenever one of these runs has changed (any where null), until `signal` aborts. */
export function onChange(runs, call, signal) {
  const listener = ({ run }) => {
    if (run === null || runs === null || runs.includes(run)) call();
  };
  listeners.add(listener);
  signal.addEventListener("abort", () => listeners.delete(listener));
}
