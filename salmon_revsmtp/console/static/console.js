// Keeps a page as it is now.  The server draws pages, and this fetches the same page again when an
// event says that something has happened, and takes over those parts (data-live) that differ.  What a
// person is at work on stays: a focused control, chosen messages.  Without this file all works by
// reloading.
"use strict";
(() => {
  // What was done is said once, not again when this page is reloaded.
  const here = new URL(location.href);
  for (const one of ["said", "n"]) here.searchParams.delete(one);
  if (here.href !== location.href) history.replaceState(null, "", here);

  const state = document.querySelector("[data-live-state]");
  const heard = document.getElementById("heard");
  const path = document.body.dataset.events;
  if (!path || !window.EventSource) return;

  const LEAST = 400; // milliseconds from an event to the look, in which others come along
  // Milliseconds from one look to the next: a second at least, and more where the server has much to
  // do, so that ten browsers take little of it.
  const SHARE = 20;
  const SOONEST = 1000;
  const LATEST = 10000;
  let timer = 0;
  let again = 0;
  let looking = false;

  const busy = (part) =>
    part.querySelector("input:checked") !== null ||
    (part.contains(document.activeElement) && document.activeElement.matches("input, select"));

  const focusIn = (part) => {
    const at = document.activeElement;
    if (!part.contains(at)) return () => {};
    const all = (place) => [...place.querySelectorAll("a, button, [tabindex]")];
    const number = all(part).indexOf(at);
    return (fresh) => (all(fresh)[number] || document.getElementById("main")).focus({ preventScroll: true });
  };

  const take = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    if (!fresh.querySelector("[data-live-state]")) return location.reload(); // the session is over
    document.title = fresh.title;
    for (const part of [...document.querySelectorAll("[data-live]"), document.querySelector("nav ul")]) {
      const name = part.dataset.live;
      const other = fresh.querySelector(name ? `[data-live="${name}"]` : "nav ul");
      if (!other || busy(part) || other.isEqualNode(part)) continue;
      const refocus = focusIn(part);
      const place = document.adoptNode(other);
      const [top, left] = [part.scrollTop, part.scrollLeft];
      part.replaceWith(place);
      [place.scrollTop, place.scrollLeft] = [top, left];
      if (name) place.dataset.changed = "";
      refocus(place);
    }
  };

  const look = async () => {
    timer = 0;
    if (document.hidden || looking) { again = 1; return; }
    looking = true;
    const began = performance.now();
    try {
      const answer = await fetch(location.href, { headers: { "X-Live": "1" } });
      if (answer.ok) take(await answer.text());
    } catch { /* the stream says when the server is back */ }
    looking = false;
    const took = performance.now() - began;
    timer = setTimeout(() => { timer = 0; if (again) { again = 0; soon(); } }, Math.min(Math.max(took * SHARE, SOONEST), LATEST));
  };

  const soon = () => {
    if (timer) again = 1;
    else timer = setTimeout(look, LEAST);
  };

  const stream = new EventSource(path);
  stream.onopen = () => { if (state) state.textContent = "live"; soon(); };
  stream.onerror = () => { if (state) state.textContent = "not live just now; this page is as it was"; };
  stream.onmessage = (event) => {
    let what;
    try { what = JSON.parse(event.data); } catch { return; }
    if (what.kind === "log" && document.body.dataset.section !== "log") return;
    if (what.kind === "agent" && what.outcome) heard.textContent = `${what.agent}: ${what.outcome}`;
    if (what.kind === "delivery") heard.textContent = `${what.agent}: ${what.messages} new`;
    if (what.kind === "trouble") heard.textContent = `${what.troubles} things need you`;
    soon();
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) soon(); });
  addEventListener("pagehide", () => stream.close());
})();
