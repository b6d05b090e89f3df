// The theme that was chosen on the Hub's own pages, or the system's: set before anything is painted.
"use strict";
{
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("jupyterhub-bs-theme");
    } catch {
      return null; // a browser that keeps nothing
    }
  };
  const paint = () => {
    const theme = chosen();
    const wanted = theme === "light" || theme === "dark" ? theme : dark.matches ? "dark" : "light";
    document.documentElement.setAttribute("data-bs-theme", wanted);
    document.dispatchEvent(new Event("theme"));
  };
  paint();
  dark.addEventListener("change", paint);
  addEventListener("storage", paint);
}
