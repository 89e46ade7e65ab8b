// The gallery: a card per picture or clip, from the order to the file.

import { colourOf, duration, ordinal } from "./numbers.js";

const LEAST_LEFT = 3; // seconds that are worth to be told
const SHOWN_SECONDS = 0.4; // a stage shorter than this is not announced
const AFTER_DENOISE = new Set(["denoised", "to_decoder", "at_decoder", "decoding"]);
const SVG = "http://www.w3.org/2000/svg";

/** How far a work is, for the bar: 0 to 1. */
export function share({ state, step, total }) {
  if (state === "done") return 1;
  if (AFTER_DENOISE.has(state)) return 0.92;
  if (state === "denoising") return 0.06 + 0.84 * (total ? step / total : 0);
  return state === "waiting" || state === "queued" ? 0 : 0.05;
}

/** Its state, in words. */
export function words(work) {
  const { state, step, total, position, eta, note } = work;
  if (note && !work.ended) return note;
  if (state === "failed") return note;
  if (state === "cancelled") return "Cancelled";
  if (state === "waiting" || state === "queued") return position ? `Waiting, ${ordinal(position)} in line` : "Waiting";
  if (state === "encoding") return "Reading the prompt";
  if (AFTER_DENOISE.has(state)) return work.kind === "video" ? "Making the clip" : "Finishing";
  if (state !== "denoising") return "On its way to be drawn";
  const left = eta >= LEAST_LEFT ? `, ${duration(Math.round(eta))} left` : "";
  return step ? `Step ${step} of ${total}${left}` : "Drawing";
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A picture, or a clip that plays without sound for as long as it is seen. */
export function media(file, alt) {
  if (!file.type.startsWith("video/")) return element("img", { src: file.url, alt, draggable: false });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const clip = element("video", { src: file.url, loop: true, muted: true, autoplay: !still, playsInline: true });
  clip.setAttribute("aria-label", alt);
  return clip;
}

function button(name, label, onclick) {
  return element("button", { type: "button", className: "icon", title: label, ariaLabel: label, onclick }, icon(name));
}

/** One card. `hooks`: `onCancel`, `onAgain`, `onSeed`, `onStart`, `onOpen`, `onLight(number)`, all with the work. */
export class Card {
  constructor(work, hooks, { canStart }) {
    Object.assign(this, { work, hooks, canStart });
    const name = work.kind === "video" ? "Clip" : "Picture";
    this.name = `${name} ${work.number}`;
    this.state = element("p", { className: "state" });
    const badge = element("span", { className: "badge", textContent: work.number, ariaHidden: "true" });
    this.frame = element("div", { className: "frame" }, badge, this.state);
    this.fill = element("span");
    const range = { role: "progressbar", ariaLabel: this.name, ariaValueMin: "0", ariaValueMax: "100" };
    this.bar = element("div", { className: "bar", ...range }, this.fill);
    this.numbers = element("span", { className: "numbers" });
    this.tools = element("span", { className: "row" });
    const prompt = element("p", { className: "prompt", textContent: work.prompt, title: work.prompt });
    const text = element("div", { className: "text" }, prompt, this.tools);
    this.root = element("li", { className: "card new working", tabIndex: -1 }, this.frame, this.bar, text);
    this.root.setAttribute("aria-label", `${this.name}: ${work.prompt}`);
    this.root.style.setProperty("--hue", colourOf(work.number));
    if (work.width) this.frame.style.aspectRatio = shape(work);
    for (const on of ["pointerenter", "focusin"]) this.root.addEventListener(on, () => hooks.onLight(work.number));
    for (const off of ["pointerleave", "focusout"]) this.root.addEventListener(off, () => hooks.onLight(0));
    this.#showTools();
    this.update();
  }

  /** Show what has changed; cheap where nothing has. */
  update() {
    const { work } = this;
    const text = words(work);
    const percent = Math.round(share(work) * 100);
    if (this.state.textContent !== text) this.state.textContent = text;
    this.fill.style.width = `${percent}%`;
    this.bar.ariaValueNow = percent;
    this.bar.ariaValueText = text;
    this.#showPreview();
    if (this.shownState === work.state) return;
    this.shownState = work.state;
    this.root.classList.remove("working", "done", "failed", "cancelled");
    this.root.classList.add(work.ended ? work.state : "working");
    this.bar.hidden = work.ended;
    if (work.ended) this.#end();
  }

  #showPreview() {
    const { preview, ended } = this.work;
    if (ended || !preview || preview === this.shownPreview) return;
    this.shownPreview = preview;
    this.preview ??= element("img", { className: "preview", alt: "" });
    this.preview.src = preview;
    if (!this.preview.isConnected) this.frame.prepend(this.preview);
    this.state.classList.add("over");
  }

  #end() {
    const { work } = this;
    this.preview?.remove();
    if (work.state === "done") {
      this.state.hidden = true;
      this.frame.style.aspectRatio = shape(work);
      const shown = media(work.file, `${this.name}: ${work.prompt}`);
      const onclick = () => this.hooks.onOpen(work);
      const open = element("button", { type: "button", className: "open", onclick }, shown);
      open.setAttribute("aria-label", `Enlarge ${this.name}: ${work.prompt}`);
      this.frame.prepend(open);
    }
    const hadFocus = this.root.contains(document.activeElement);
    this.#showTools();
    const next = this.frame.querySelector("button") ?? this.tools.querySelector("button");
    if (hadFocus) next?.focus({ preventScroll: true });
  }

  #showTools() {
    const { work, hooks } = this;
    this.tools.replaceChildren(this.numbers);
    this.numbers.replaceChildren(...this.#facts());
    if (!work.ended) {
      this.tools.append(button("cancel", `Cancel ${this.name}`, () => hooks.onCancel(work)));
      return;
    }
    this.tools.append(button("again", `Draw ${this.name} again with another seed`, () => hooks.onAgain(work)));
    if (!work.file) return;
    if (this.canStart && work.kind === "image") {
      this.tools.append(button("start", `Start from ${this.name}`, () => hooks.onStart(work)));
    }
    const { url: href, name: download } = work.file;
    const save = element("a", { className: "icon", href, download, title: "Download" }, icon("download"));
    save.setAttribute("aria-label", `Download ${this.name}`);
    this.tools.append(save);
  }

  #facts() {
    const { work, hooks } = this;
    if (work.seed === null) return [];
    const how = { type: "button", title: "Use this prompt and seed", onclick: () => hooks.onSeed(work) };
    const seed = element("button", { ...how, textContent: `seed ${work.seed}` });
    const seconds = work.timings?.total ?? work.seconds;
    return work.state === "done" && seconds !== null ? [seed, ` · ${duration(seconds)}`] : [seed];
  }
}

function shape({ width, height }) {
  return `${Math.min(1.8, Math.max(0.66, width / height))}`;
}

/** Tells a screen reader what begins and ends, not every step. */
export class Announcer {
  #told = new Map();

  constructor(region) {
    this.region = region;
  }

  say(text) {
    this.region.textContent = text;
  }

  /** `work` has changed. */
  tell(work) {
    const name = `${work.kind === "video" ? "Clip" : "Picture"} ${work.number}`;
    const stage = work.ended ? work.state : work.state === "denoising" ? "begun" : null;
    if (stage === null || this.#told.get(work) === stage) return;
    this.#told.set(work, stage);
    if (stage === "begun" && work.began !== null && performance.now() - work.began < SHOWN_SECONDS * 1000) return;
    if (stage === "done") this.say(`${name} is finished: ${work.prompt}`);
    else if (stage === "failed") this.say(`${name} failed: ${work.note}`);
    else this.say(stage === "begun" ? `${name} is being drawn` : `${name} is cancelled`);
  }
}
