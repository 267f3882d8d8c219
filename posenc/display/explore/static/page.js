"use strict";
// Without this file the page works by its Draw button. With it, every change is drawn at once.
const form = document.getElementById("controls");
const result = document.getElementById("result");
let waiting = 0;
let asked = 0;

async function draw() {
  const number = ++asked;
  const address = "/?" + new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
  result.setAttribute("aria-busy", "true");
  let page;
  try {
    page = new DOMParser().parseFromString(await (await fetch(address)).text(), "text/html");
  } catch {
    if (number === asked) {
      result.replaceChildren(Object.assign(document.createElement("p"), {
        className: "error", textContent: "posenc explore does not answer: is it still running?",
      }));
      result.setAttribute("aria-busy", "false");
    }
    return;
  }
  if (number !== asked) return; // a later change is on its way
  result.replaceChildren(...page.getElementById("result").childNodes);
  const fresh = page.getElementById("parameters");
  const shown = document.getElementById("parameters");
  if (fresh.dataset.strategy !== shown.dataset.strategy) shown.replaceWith(fresh);
  document.title = page.title;
  history.replaceState(null, "", address);
  result.setAttribute("aria-busy", "false");
  offerCopy();
}

function later() {
  clearTimeout(waiting);
  waiting = setTimeout(draw, 250);
}

function offerCopy() {
  const button = document.getElementById("copy");
  if (!button) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = document.getElementById("yaml");
    const said = document.getElementById("copied");
    try {
      await navigator.clipboard.writeText(text.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(text);
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });
}

form.addEventListener("input", later);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(waiting);
  const pressed = document.activeElement === event.submitter;
  draw().then(() => pressed && result.focus()); // on a phone the result is far below
});
offerCopy();
