// The gallery: a card per picture or clip, from the order to the file.

import { colourOf, duration, ordinal } from "./numbers.js";

const LEAST_LEFT = 3; // seconds that are worth to be told
const LONGEST_DECODE = 3000; // milliseconds
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
  const { state, step, total, position, eta, note, isLost } = work;
  if (note && !work.ended) return note;
  if (isLost && !work.ended) return "No answer from the server";
  if (state === "failed") return note;
  if (state === "cancelled") return "Cancelled";
  if (state === "waiting" || state === "queued") return position ? `Waiting, ${ordinal(position)} in line` : "Waiting";
  if (state === "encoding") return "Reading the prompt";
  if (AFTER_DENOISE.has(state) || state === "done") return work.kind === "video" ? "Making the clip" : "Finishing";
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

/** Ends once a picture or a clip can be shown without a gap; after a while in any case. */
function shownAtOnce(shown) {
  const ready = shown.tagName === "IMG"
    ? shown.decode().catch(() => {}) // what is broken is shown as the browser shows it
    : new Promise((resolve) => ["loadeddata", "error"].forEach((name) => shown.addEventListener(name, resolve)));
  return Promise.race([ready, new Promise((resolve) => setTimeout(resolve, LONGEST_DECODE))]);
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
    if (work.state === "done") this.#showFile();
    else if (work.ended) this.#end();
  }

  /** The next preview takes the place of the last one only once it can be seen. */
  async #showPreview() {
    const { preview, ended } = this.work;
    if (ended || !preview || preview === this.shownPreview) return;
    this.shownPreview = preview;
    const next = element("img", { className: "preview", alt: "", src: preview });
    await shownAtOnce(next);
    if (this.shownPreview !== preview || this.work.ended) return; // there is a newer one, or all of it
    this.preview?.remove();
    this.preview = next;
    this.frame.prepend(next);
    this.state.classList.add("over");
  }

  /** The file fades in over the last preview, which goes only then: at no moment is there nothing to see. */
  async #showFile() {
    const { work } = this;
    const shown = media(work.file, `${this.name}: ${work.prompt}`);
    const onclick = () => this.hooks.onOpen(work);
    const open = element("button", { type: "button", className: "open", onclick }, shown);
    open.setAttribute("aria-label", `Enlarge ${this.name}: ${work.prompt}`);
    this.frame.prepend(open);
    await shownAtOnce(shown);
    this.frame.style.aspectRatio = shape(work);
    open.classList.add("shown");
    this.#end();
    await Promise.allSettled(shown.getAnimations().map((each) => each.finished));
    this.preview?.remove();
  }

  #end() {
    const { state } = this.work;
    const hadFocus = this.root.contains(document.activeElement);
    this.root.classList.replace("working", state);
    this.bar.hidden = true;
    this.state.hidden = state === "done";
    if (state !== "done") this.preview?.remove();
    this.#showTools();
    // To no button: whoever is about to press the one that is gone would press that.
    if (hadFocus) this.root.focus({ preventScroll: true });
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
    const how = { type: "button", onclick: () => hooks.onSeed(work) };
    if (work.seed === null && !work.ended) return [];
    if (work.seed === null) return [element("button", { ...how, textContent: "use this prompt" })];
    how.title = "Use this prompt and seed";
    const seed = element("button", { ...how, textContent: `seed ${work.seed}` });
    const seconds = work.timings?.total ?? work.seconds;
    if (work.state !== "done" || seconds === null) return [seed];
    return [seed, ` · ${duration(seconds).replaceAll(" ", "\u00a0")}`];
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
