// Starts the studio: the header, the theme's switch, the keys, and the pages by their addresses.

import { connect } from "./api.js";
import { route, start } from "./router.js";
import { showKeys, startKeys } from "./keys.js";

route("/", () => import("./pages/runs.js"));
route("/run", () => import("./pages/run.js"));
route("/compare", () => import("./pages/compare.js"));
route("/episodes", () => import("./pages/episodes.js"));
route("/episode", () => import("./pages/episode.js"));
route("/labels", () => import("./pages/labels.js"));
route("/label", () => import("./pages/label.js"));

const SECTION = { "/label": "/labels", "/run": "/", "/episodes": "/", "/episode": "/", "/compare": "/" };

document.addEventListener("page", ({ detail: path }) => {
  for (const link of document.querySelectorAll("#nav a")) {
    const here = link.getAttribute("href") === (SECTION[path] ?? path);
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
});

const themeSwitch = document.getElementById("theme");
const label = () => {
  const dark = document.documentElement.getAttribute("data-theme") === "dark";
  themeSwitch.setAttribute("aria-label", dark ? "Switch to the light theme" : "Switch to the dark theme");
};
document.addEventListener("theme", label);
themeSwitch.addEventListener("click", () => document.dispatchEvent(new CustomEvent("toggle-theme")));
label();

document.getElementById("show-keys").addEventListener("click", showKeys);
startKeys();
connect();
start();
