"use strict";
// Keys of the labelling page. Each does what a control on the page does, so that mouse and screen reader need none.
const form = document.getElementById("answer");
const useKeys = document.getElementById("use-keys");
const candidates = [...form.querySelectorAll("input[name=accepted]")];
const none = form.querySelector("input[name=none]");
const help = [...form.querySelectorAll("input[name=help]")];
let sent = false;

const isDecided = () => candidates.length === 0 || none.checked || candidates.some(box => box.checked);
const isHelpSaid = () => help.some(radio => radio.checked);

function follow(rel) {
  const link = document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
}
function press(id) {
  const button = document.getElementById(id);
  if (button) button.click();
}
function toggle(place) {
  if (place >= candidates.length) return;
  candidates[place].click();
  candidates[place].focus();
}
function rejectAll() {
  if (!none) return;
  if (!none.checked) none.click();
  none.focus();
  if (isHelpSaid()) press("save");
}
function sayHelp(value) {
  const radio = help.find(one => one.value === value);
  radio.checked = true;
  radio.focus();
  if (isDecided() && candidates.length > 0) press("save");
}
function move(by) {
  const all = [...candidates, ...(none ? [none] : [])];
  const place = all.indexOf(document.activeElement);
  const next = place < 0 ? (by > 0 ? 0 : all.length - 1) : place + by;
  if (all[next]) all[next].focus();
}

for (const box of candidates) box.addEventListener("change", () => { if (box.checked) none.checked = false; });
if (none) none.addEventListener("change", () => { if (none.checked) for (const box of candidates) box.checked = false; });

for (const one of document.forms) one.addEventListener("submit", event => {
  if (sent) event.preventDefault(); // two clicks send one answer
  sent = true;
});
addEventListener("pageshow", () => { sent = false; });

try { useKeys.checked = localStorage.getItem("keys") !== "off"; } catch { /* no storage: keys are on */ }
useKeys.addEventListener("change", () => {
  try { localStorage.setItem("keys", useKeys.checked ? "on" : "off"); } catch { /* until the next page */ }
});

addEventListener("keydown", event => {
  if (!useKeys.checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const on = document.activeElement;
  const isRadio = on && on.type === "radio";
  const actions = {
    0: rejectAll, h: () => sayHelp("yes"), n: () => sayHelp("no"), s: () => press("skip"), u: () => press("back"),
    ArrowLeft: () => follow("prev"), ArrowRight: () => follow("next"),
    ArrowUp: isRadio ? null : () => move(-1), ArrowDown: isRadio ? null : () => move(1),
    Enter: !on || on === document.body || on.form === form && on.tagName === "INPUT" ? () => press("save") : null,
  };
  let act = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (/^[1-9]$/.test(event.key)) act = () => toggle(Number(event.key) - 1);
  if (!act) return;
  event.preventDefault();
  act();
});
