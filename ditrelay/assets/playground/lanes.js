// The live picture of the pipeline: a lane per rank and kind of work, bars that move as time passes.

import { barInWords } from "./activity.js";
import { colourOf, duration, numberOf } from "./numbers.js";

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Helvetica, Arial, sans-serif';
const WINDOWS = [6, 8, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800];
const REST = 0.8; // seconds after the last end at which time stands still
const PAUSE = 3; // seconds without work that part one run from the next
const REQUESTS_WIDE = 3; // the window that fits shows the run, or this many times what a request takes
const THIN = 5;
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const MANY_GROUPS = 9; // more of them are drawn lower
const AXIS = 22;

/**
 * @param canvas, tip: the elements.
 * @param activity: what is drawn.
 * @param hooks: `promptOf(number)`, `onHover(number)`, `onPick(number)`, `say(text)`, `onFrame({overlap, from, to})`.
 */
export class Lanes {
  #rows = [];
  #hits = [];
  #groups = [];
  #down = new Map();
  #shown = null; // the moment at the right edge
  #span = 10;
  #chosenSpan = 0;
  #lit = 0;
  #bar = null; // under the pointer, or chosen by keyboard
  #busy = new Map();
  #measured = 0;
  #fitted = 0; // when the fitting window was looked for
  #fitting = 10;
  #frame = 0;
  #last = 0;
  #colours = {};

  constructor(canvas, tip, activity, hooks) {
    Object.assign(this, { canvas, tip, activity, hooks });
    this.pen = canvas.getContext("2d");
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.#readColours());
    new ResizeObserver(() => this.#layOut()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#choose(null));
    canvas.addEventListener("click", () => this.#bar && hooks.onPick(numberOf(this.#bar.job)));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#choose(null));
    this.#readColours();
  }

  /** The lanes that there are (`groupsOf`). */
  show(groups) {
    this.#groups = groups;
    this.#layOut();
  }

  /** The ranks that are not up: a map to what they are. */
  setDown(down) {
    this.#down = down;
    this.wake();
  }

  /** Seconds to show; 0: what the requests take. */
  set window(seconds) {
    this.#chosenSpan = seconds;
    this.wake();
  }

  /** Dim all requests but this; 0: none. */
  light(number) {
    this.#lit = number;
    this.wake();
  }

  /** Something has changed: draw until everything stands still again. */
  wake() {
    if (this.#frame) return;
    const draw = () => {
      this.#frame = 0;
      if (this.#tick()) this.wake();
    };
    this.#frame = this.still.matches ? setTimeout(() => requestAnimationFrame(draw), 500) : requestAnimationFrame(draw);
  }

  // ------------------------------------------------------------ where things are

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "grey", "pale", "lane", "line", "surface", "bad"]) {
      this.#colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
    this.wake();
  }

  #layOut() {
    const width = this.canvas.parentElement.clientWidth;
    this.narrow = width < 560;
    const many = this.#groups.length > MANY_GROUPS;
    this.left = this.narrow ? 76 : many ? 172 : 150;
    this.right = width - (this.narrow ? 2 : 52);
    const main = many ? 15 : this.narrow ? 20 : 24;
    let y = 4;
    this.#rows = [];
    for (const group of this.#groups) {
      const top = y;
      for (const lane of group.lanes) {
        const height = lane.thin ? THIN : lane.kind === "denoise" && !many ? main + 4 : main;
        this.#rows.push({ ...lane, group, y, height });
        y += height + 3;
      }
      group.middle = (top + y - 3) / 2;
      y += many ? 6 : 10;
    }
    this.bottom = y - (many ? 4 : 6);
    this.#resize(width, y + AXIS);
    this.wake();
  }

  #resize(width, height) {
    const scale = Math.min(devicePixelRatio || 1, 3);
    this.width = width;
    this.height = height;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.pen.setTransform(scale, 0, 0, scale, 0, 0);
  }

  #x(at) {
    return this.right - ((this.#shown - at) / this.#span) * (this.right - this.left);
  }

  // ------------------------------------------------------------ time

  /** Draws one picture. Returns whether another one is due. */
  #tick() {
    const now = this.activity.now();
    const moving = now !== null && this.#advance(now);
    this.#draw(now);
    return moving;
  }

  /** Time runs on while there is work and stands still a moment after it, so that the last run can be looked at. */
  #advance(now) {
    const clock = performance.now();
    const passed = Math.min(0.1, (clock - this.#last) / 1000);
    this.#last = clock;
    const running = this.activity.running();
    const lastEnd = this.activity.lastEnd();
    this.idle = !running.length;
    const target = this.idle ? Math.min(now, (lastEnd ?? now) + REST) : now;
    if (this.#shown === null || this.still.matches || target < this.#shown - 5) this.#shown = target;
    const behind = target - this.#shown;
    this.#shown = behind > 0.5 ? this.#shown + behind * (1 - Math.exp(-passed / 0.12)) : Math.max(this.#shown, target);
    const span = this.#chosenSpan || this.#fittingSpan(now);
    const isThere = this.still.matches || Math.abs(span / this.#span - 1) < 0.01;
    this.#span = isThere ? span : this.#span + (span - this.#span) * (1 - Math.exp(-passed / 0.2));
    return !this.idle || target - this.#shown > 0.01 || this.#span !== span || now < target + REST;
  }

  /** Looked for now and then only: it goes through all bars. */
  #fittingSpan(now) {
    if (performance.now() - this.#fitted < 400) return this.#fitting;
    this.#fitted = performance.now();
    return (this.#fitting = this.#fit(now));
  }

  #fit(now) {
    const spans = this.activity.spans(now).sort((a, b) => a - b);
    const began = this.activity.runBegan(PAUSE);
    if (began === null) return WINDOWS[2];
    const whole = (this.idle ? this.activity.lastEnd() + REST : now) - began;
    const seconds = Math.min(whole, spans[Math.floor(spans.length * 0.75)] * REQUESTS_WIDE);
    return WINDOWS.find((each) => each >= seconds) ?? WINDOWS.at(-1);
  }

  #measure() {
    const clock = performance.now();
    if (clock - this.#measured < 400 || this.#shown === null) return;
    this.#measured = clock;
    const [from, to] = [this.#shown - this.#span, this.idle ? (this.activity.lastEnd() ?? this.#shown) : this.#shown];
    for (const row of this.#rows) {
      if (!row.thin) this.#busy.set(`${row.rank} ${row.kind}`, this.activity.busy(row.rank, row.kind, from, to));
    }
    const overlap = this.activity.overlap(from, to);
    this.hooks.onFrame({ overlap, idle: this.idle });
    this.canvas.setAttribute("aria-label", this.#inWords(overlap));
  }

  #inWords(overlap) {
    const lanes = this.#rows.filter((row) => !row.thin).map((row) => {
      const bar = this.activity.lane(row.rank, row.kind).findLast((each) => each.ended === null);
      return `${row.kind} on ${row.group.title}: ${bar ? `request ${numberOf(bar.job)}` : "nothing"}`;
    });
    const percent = overlap === null ? 0 : Math.round(overlap * 100);
    return `Lanes of the ranks. ${lanes.join("; ")}. Stages overlapped for ${percent} percent of the working time.`;
  }

  // ------------------------------------------------------------ drawing

  #draw(now) {
    const pen = this.pen;
    pen.clearRect(0, 0, this.width, this.height);
    this.#hits = [];
    this.#measure();
    if (this.#shown !== null) this.#drawAxis();
    for (const row of this.#rows) this.#drawLane(row, now);
    this.#drawLabels();
    if (this.#bar) this.#placeTip(now);
  }

  #drawLane(row, now) {
    const pen = this.pen;
    pen.fillStyle = this.#colours.lane;
    rounded(pen, this.left, row.y, this.right - this.left, row.height, row.thin ? 2.5 : 4);
    if (this.#shown === null) return;
    pen.save();
    pen.beginPath();
    pen.rect(this.left, row.y - 1, this.right - this.left, row.height + 2);
    pen.clip();
    for (const bar of this.activity.lane(row.rank, row.kind)) {
      if ((bar.ended ?? Infinity) >= this.#shown - this.#span && bar.began <= this.#shown) this.#drawBar(row, bar);
    }
    pen.restore();
  }

  #drawBar(row, bar) {
    const pen = this.pen;
    const number = numberOf(bar.job);
    const began = this.#x(bar.began);
    const ended = bar.ended === null ? this.right : Math.min(this.right, this.#x(bar.ended));
    const width = Math.max(row.thin ? 2.5 : 3, ended - began - 1);
    pen.globalAlpha = this.#lit && this.#lit !== number ? 0.22 : 1;
    pen.fillStyle = colourOf(number);
    rounded(pen, began, row.y, bar.ended === null ? width + 8 : width, row.height, row.thin ? 1.5 : 4);
    if (!row.thin) this.#drawInside(row, bar, number, Math.max(began, this.left), began + width);
    if (bar === this.#bar) {
      pen.strokeStyle = this.#colours.ink;
      pen.lineWidth = 2;
      pen.strokeRect(began + 1, row.y + 1, width - 2, row.height - 2);
    }
    pen.globalAlpha = 1;
    this.#hits.push({ bar, x: began, y: row.y, width, height: row.height });
  }

  #drawInside(row, bar, number, from, to) {
    const pen = this.pen;
    pen.fillStyle = "#ffffffb0";
    for (const at of bar.ticks) {
      const x = this.#x(at);
      if (x > from && x < to - 1) pen.fillRect(x, row.y + row.height - 7, 1, 7);
    }
    if (bar.ended === null) {
      pen.fillStyle = "#ffffff90";
      pen.fillRect(this.right - 2, row.y, 2, row.height);
    }
    if (!number || to - from < 10 + 7 * String(number).length) return;
    pen.fillStyle = "#ffffff";
    pen.font = `600 ${row.height > 18 ? 13 : 11}px ${FONT}`;
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.fillText(number, from + 6, row.y + row.height / 2 - (bar.ticks.length && row.height > 18 ? 1 : 0));
  }

  #drawLabels() {
    const pen = this.pen;
    pen.textBaseline = "middle";
    for (const row of this.#rows.filter((each) => !each.thin)) {
      const middle = row.y + row.height / 2 + 1;
      pen.fillStyle = this.#colours.grey;
      pen.font = `${this.narrow ? 12 : 13}px ${FONT}`;
      pen.textAlign = "right";
      pen.fillText(this.narrow ? `${row.kind} ${row.group.short}` : row.kind, this.left - 10, middle);
      if (this.narrow) continue;
      const busy = this.#busy.get(`${row.rank} ${row.kind}`);
      if (busy !== null && busy !== undefined) pen.fillText(`${Math.round(busy * 100)} %`, this.width, middle);
    }
    if (!this.narrow) for (const group of this.#groups) this.#drawTitle(group);
  }

  #drawTitle(group) {
    const pen = this.pen;
    const down = group.ranks.map((rank) => this.#down.get(rank)).find(Boolean);
    pen.textAlign = "left";
    pen.font = `600 13px ${FONT}`;
    pen.fillStyle = down ? this.#colours.bad : this.#colours.ink;
    const low = this.#groups.length > MANY_GROUPS;
    pen.fillText(group.title, 0, group.middle - (low ? 0 : 7));
    if (low) return; // there is room for one line
    pen.font = `11.5px ${FONT}`;
    pen.fillStyle = down ? this.#colours.bad : this.#colours.pale;
    pen.fillText(down ?? group.role, 0, group.middle + 9);
  }

  #drawAxis() {
    const pen = this.pen;
    const step = [1, 2, 5, 10, 15, 30, 60, 120, 300].find((each) => this.#span / each <= (this.narrow ? 5 : 10)) ?? 600;
    pen.font = `11.5px ${FONT}`;
    pen.textBaseline = "alphabetic";
    for (let ago = 0; ago <= this.#span * 0.97; ago += step) {
      const x = this.#x(this.#shown - ago);
      pen.fillStyle = this.#colours.line;
      if (ago) pen.fillRect(Math.round(x), 2, 1, this.bottom);
      pen.fillStyle = this.#colours.pale;
      pen.textAlign = ago ? "center" : "right";
      const past = ago < 60 ? `-${ago} s` : `-${ago / 60} min`;
      pen.fillText(ago ? past : this.idle ? "idle" : "now", x, this.bottom + 17);
    }
  }

  // ------------------------------------------------------------ pointing

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const isIn = (at, from, length) => at >= from - 2 && at <= from + length + 2;
    const near = this.#hits.findLast((hit) => isIn(x, hit.x, hit.width) && isIn(y, hit.y, hit.height));
    this.#choose(near?.bar ?? null);
  }

  #choose(bar) {
    if (bar === this.#bar) return;
    this.#bar = bar;
    this.canvas.style.cursor = bar ? "pointer" : "";
    this.#lit = bar ? numberOf(bar.job) : 0;
    this.hooks.onHover(this.#lit);
    this.tip.hidden = !bar;
    if (bar) this.#placeTip(this.activity.now());
    this.wake();
  }

  #placeTip(now) {
    const hit = this.#hits.find((each) => each.bar === this.#bar);
    this.tip.hidden = !hit;
    if (!hit) return;
    const words = barInWords(this.#bar, now, this.hooks.promptOf);
    const title = document.createElement("b");
    const text = document.createElement("span");
    title.textContent = words.title;
    text.textContent = `${words.text}: ${duration(words.seconds)}`;
    this.tip.replaceChildren(title, text);
    const box = this.canvas.getBoundingClientRect();
    const middle = box.left + Math.max(this.left, Math.min(hit.x + hit.width / 2, this.right));
    const x = Math.max(8, Math.min(middle - this.tip.offsetWidth / 2, innerWidth - this.tip.offsetWidth - 8));
    const above = box.top + hit.y - this.tip.offsetHeight - 8;
    this.tip.style.left = `${x}px`;
    this.tip.style.top = `${above > 4 ? above : box.top + hit.y + hit.height + 8}px`;
  }

  #key(event) {
    if (event.key === "Enter" && this.#bar) {
      event.preventDefault(); // whatever has the focus then is not pressed
      return this.hooks.onPick(numberOf(this.#bar.job));
    }
    const [across, along] = ARROWS[event.key] ?? [0, 0];
    if (event.key === "Escape") return this.#choose(null);
    if (!across && !along) return;
    event.preventDefault();
    const hits = this.#hits.filter((hit) => hit.x + hit.width > this.left);
    const from = hits.find((hit) => hit.bar === this.#bar);
    const next = from ? (along ? beside(hits, from, along) : acrossFrom(hits, from, across)) : newest(hits);
    if (!next) return;
    this.#choose(next.bar);
    const words = barInWords(next.bar, this.activity.now(), this.hooks.promptOf);
    this.hooks.say(`${words.title}: ${words.text}, ${duration(words.seconds)}`);
  }
}

function newest(hits) {
  return hits.reduce((best, hit) => (best === null || hit.bar.began > best.bar.began ? hit : best), null);
}

function beside(hits, from, step) {
  const lane = hits.filter((hit) => hit.y === from.y).sort((a, b) => a.x - b.x);
  return lane[lane.indexOf(from) + step];
}

/** The bar nearest in time on the next lane above or below that has one. */
function acrossFrom(hits, from, step) {
  const beyond = hits.filter((hit) => (hit.y - from.y) * step > 0);
  if (!beyond.length) return null;
  const rows = beyond.map((hit) => hit.y);
  const y = step > 0 ? Math.min(...rows) : Math.max(...rows);
  const away = (hit) => Math.abs(hit.x + hit.width / 2 - (from.x + from.width / 2));
  return beyond.filter((hit) => hit.y === y).reduce((best, hit) => (away(hit) < away(best) ? hit : best));
}

function rounded(pen, x, y, width, height, radius) {
  pen.beginPath();
  pen.roundRect(x, y, Math.max(0.5, width), height, Math.min(radius, width / 2, height / 2));
  pen.fill();
}
