"use strict";
// Without this file the page works with its Draw button. With it, every change is drawn at once.
const form = document.getElementById("controls");
const result = document.getElementById("result");
let timer = 0;
let latest = 0;

async function draw() {
  const number = ++latest;
  const address = "/?" + new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
  result.setAttribute("aria-busy", "true");
  let page;
  try {
    page = new DOMParser().parseFromString(await (await fetch(address)).text(), "text/html");
  } catch {
    if (number === latest) {
      result.replaceChildren(Object.assign(document.createElement("p"), {
        className: "error", textContent: "posenc explore does not answer. Is it still running?",
      }));
      result.setAttribute("aria-busy", "false");
    }
    return;
  }
  if (number !== latest) return; // a later change is being drawn
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
  clearTimeout(timer);
  timer = setTimeout(draw, 250);
}

function offerCopy() {
  const button = document.getElementById("copy");
  if (!button) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = document.getElementById("yaml");
    const status = document.getElementById("copied");
    try {
      await navigator.clipboard.writeText(text.textContent);
      status.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(text);
      status.textContent = "Selected: copy it with the keyboard.";
    }
  });
}

form.addEventListener("input", later);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  const pressed = document.activeElement === event.submitter;
  draw().then(() => pressed && result.focus()); // on a phone the result is far below
});
offerCopy();
