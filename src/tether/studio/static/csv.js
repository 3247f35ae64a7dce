// Tables that the page itself holds, as CSV. The large ones (metrics, episodes, steps) the server writes.

import { button, download } from "./dom.js";

/** A cell; text that a spreadsheet would take for a formula gets an apostrophe before it. */
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  const text = typeof value === "string" ? value : JSON.stringify(value);
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

export function csv(rows) {
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

export function csvButton(name, rows) {
  return button("CSV", () => download(name, new Blob([csv(rows())], { type: "text/csv" })), { class: "quiet", "aria-label": `${name.replace(/\.csv$/, "")} as CSV` });
}
