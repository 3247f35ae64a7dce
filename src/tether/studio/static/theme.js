// Runs before the page is drawn, so that nobody sees the wrong theme first. Light, dark, or what the system says.
(function () {
  let kept = null;
  try {
    kept = localStorage.getItem("tether-theme");
  } catch {
    kept = null; // storage may be forbidden
  }
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const theme = kept ?? (system.matches ? "dark" : "light");
    document.documentElement.setAttribute("data-theme", theme);
    document.dispatchEvent(new CustomEvent("theme", { detail: theme }));
  };
  system.addEventListener("change", apply);
  document.addEventListener("toggle-theme", () => {
    kept = document.documentElement.getAttribute("data-theme") === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("tether-theme", kept);
    } catch (error) {
      console.info("the theme is kept for this page alone:", error.message);
    }
    apply();
  });
  apply();
})();
