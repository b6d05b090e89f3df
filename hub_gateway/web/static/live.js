// The part of a page that refreshes itself (#live). htmx asks for it and fits it in, row by row, so that what is
// ticked, open or in focus stays; here is decided when not to ask, and what is said of it. A page is whole without it.
"use strict";
{
  const live = document.getElementById("live");
  const said = document.getElementById("live-said");
  const pause = document.getElementById("live-pause");
  const news = document.getElementById("live-news");
  const usual = said?.textContent;
  let paused = false;
  let ended = false;
  let since = new Date();
  let known = null;
  let focused = null;

  const say = (text, again) => {
    if (said.textContent === text) return;
    said.textContent = text;
    if (again) {
      const link = document.createElement("a");
      link.href = location.href;
      link.textContent = "Open the page again";
      said.append(" ", link, ".");
    }
  };

  // What somebody has typed is not to be lost, not even with a row that is gone.
  const typed = () =>
    [...live.querySelectorAll("input, textarea")].some(
      (field) => !["hidden", "checkbox", "radio"].includes(field.type) && field.value !== field.defaultValue,
    );

  const headline = () => document.getElementById("news")?.dataset.news ?? null;

  const failed = (sentence) => {
    const time = since.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    say(`Not refreshed since ${time}: ${sentence}`, ended);
  };

  if (live && said && pause && news) {
    document.getElementById("live-bar").hidden = false;
    known = headline();

    pause.addEventListener("click", () => {
      paused = !paused;
      pause.setAttribute("aria-pressed", String(paused));
      pause.textContent = paused ? "Go on" : "Pause";
      say(paused ? "Refreshing is paused." : usual);
      if (!paused) htmx.trigger(live, "refresh");
    });

    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) htmx.trigger(live, "refresh");
    });

    live.addEventListener("htmx:config:request", (event) => {
      if (event.target !== live) return;
      const busy = typed();
      if (busy && !paused && !ended) say("Not refreshed while you write.");
      if (document.hidden || paused || ended || busy) event.preventDefault();
    });

    live.addEventListener("htmx:after:request", (event) => {
      const { ctx } = event.detail;
      const answer = ctx.response;
      if (answer.status === 200 && !answer.raw.redirected) return;
      event.preventDefault(); // nothing of it belongs into the page
      ended = answer.status === 401 || answer.status === 403 || answer.raw.redirected;
      const plain = (answer.headers.get("Content-Type") ?? "").startsWith("text/plain");
      failed(plain ? ctx.text : ended ? "your login has ended." : "the gateway does not answer.");
    });

    live.addEventListener("htmx:error", () => failed("the gateway cannot be reached."));

    live.addEventListener("htmx:before:swap", () => {
      focused = live.contains(document.activeElement) ? document.activeElement : null;
    });

    live.addEventListener("htmx:after:swap", () => {
      since = new Date();
      if (focused && !focused.isConnected) live.focus({ preventScroll: true });
      say(usual);
      const found = headline();
      if (found !== known) {
        known = found;
        news.textContent = found ?? "";
      }
    });
  }
}
