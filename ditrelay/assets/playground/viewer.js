// One picture or clip, large, with where its time went.

import { element, media } from "./cards.js";
import { colourOf, duration } from "./numbers.js";

const $ = (id) => document.getElementById(id);
const STAGES = [
  ["queued", "waited"], ["encode", "encode"], ["to_dit", "to the DiT"], ["wait_dit", "waited there"],
  ["denoise", "denoise"], ["to_decoder", "to the decoder"], ["wait_decoder", "waited there"], ["decode", "decode"],
];

export function openViewer(work) {
  const dialog = $("viewer");
  $("viewer-prompt").textContent = work.prompt;
  const shown = media(work.file, work.prompt);
  if (shown.tagName === "VIDEO") shown.controls = true;
  $("viewer-media").replaceChildren(shown);
  const kind = work.file.type.split("/")[1].toUpperCase();
  const facts = [["Seed", work.seed], ["Size", `${work.width} × ${work.height}`], ["File", kind]];
  if (work.timings) facts.push(["Time", duration(work.timings.total)]);
  $("viewer-facts").replaceChildren(...facts.flatMap(([name, value]) => [
    element("dt", { textContent: name }), element("dd", { textContent: value }),
  ]));
  $("viewer-times").replaceChildren(...(work.timings ? timesOf(work) : []));
  Object.assign($("viewer-save"), { href: work.file.url, download: work.file.name });
  dialog.showModal();
}

export function installViewer() {
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => event.target === $("viewer") && $("viewer").close());
  $("viewer").addEventListener("close", () => $("viewer-media").replaceChildren());
}

function timesOf({ timings, number }) {
  const longest = Math.max(...STAGES.map(([name]) => timings[name] ?? 0));
  return STAGES.filter(([name]) => timings[name] > 0).flatMap(([name, title]) => {
    const fill = element("b");
    fill.style.width = `${(timings[name] / longest) * 100}%`;
    fill.style.background = colourOf(number);
    const seconds = element("span", { textContent: duration(timings[name]) });
    return [element("span", { textContent: title }), element("i", {}, fill), seconds];
  });
}
