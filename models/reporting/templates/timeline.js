"use strict";
// Filters of the timelines, on what the page holds already.
const filters = document.querySelector(".filters");
const wanted = document.getElementById("text");
const differs = document.getElementById("differs");
const boxes = [...filters.querySelectorAll("input[name=outcome]")];
const steps = [...document.querySelectorAll(".step")].map(item => ({
  item, words: item.textContent.toLowerCase(), outcomes: item.dataset.outcomes.split(" "),
}));
const open = new Set([...document.querySelectorAll(".trace[open]")]);

function filter() {
  const text = wanted.value.toLowerCase().trim();
  const outcomes = new Set(boxes.filter(box => box.checked).map(box => box.value));
  let shown = 0;
  for (const { item, words, outcomes: mine } of steps) {
    const fits = mine.some(one => outcomes.has(one)) && (!differs || !differs.checked || item.dataset.differs === "true");
    item.hidden = !(fits && words.includes(text));
    shown += !item.hidden;
  }
  const narrowed = shown < steps.length;
  for (const trace of document.querySelectorAll(".trace")) {
    const any = trace.querySelector(".step:not([hidden])") !== null;
    trace.hidden = !any;
    trace.open = narrowed ? any : open.has(trace);
  }
  document.getElementById("found").textContent = narrowed ? `${shown} of ${steps.length} events` : "";
}

function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const trace = target && target.closest(".trace");
  if (!trace) return;
  open.add(trace);
  trace.open = true;
  target.scrollIntoView();
}

filters.addEventListener("submit", event => event.preventDefault());
filters.addEventListener("input", filter);
addEventListener("hashchange", reveal);
reveal();
