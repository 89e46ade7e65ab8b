// The pictures and clips that this page has asked for, from the order to their end. No DOM in here.

import { Problem, follow, getJson, pause, send } from "./api.js";
import { bind, expect, nextNumber } from "./numbers.js";

// A browser keeps six connections to a server: two are left for the lanes and for what is asked in between. So a few
// jobs are followed by their events, and how far the others are is asked for now and then.
const STREAMS = 4;
const MAX_N = 10;
const PREVIEWS = 3;
const LATER = { Prefer: "respond-async" }; // answered with the jobs, which go on by themselves
const BEFORE_DENOISE = new Set(["waiting", "queued", "encoding"]);
const ON_ITS_WAY = new Set(["encoded", "to_dit", "at_dit"]);
const ENDED = new Set(["done", "failed", "cancelled"]);
const POLL_SECONDS = 1;
const KNOWN_JOBS = 500;
const OWN = "ditrelay-jobs";

/** One picture or clip. `on` is called after each change. */
export class Work {
  constructor(order, index, on) {
    Object.assign(this, {
      number: nextNumber(), kind: order.kind, prompt: order.prompt, width: order.width, height: order.height,
      seed: order.seed === null ? null : order.seed + BigInt(index), order,
      state: "waiting", note: "", step: 0, total: 0, position: null, eta: null,
      jobId: null, preview: null, file: null, timings: null, seconds: null, began: performance.now(),
    });
    this.on = on;
    this.#wait(1);
  }

  #expected = 0;

  get ended() {
    return ENDED.has(this.state);
  }

  #wait(change) {
    this.#expected += change;
    expect(change);
  }

  know(jobId) {
    if (this.jobId !== null || !jobId) return;
    this.jobId = jobId;
    bind(jobId, this.number);
    this.#wait(-this.#expected);
  }

  /** News: a note lasts until the next. */
  set(changes) {
    if (this.ended) return;
    Object.assign(this, { note: "" }, changes);
    if (this.ended) {
      this.#wait(-this.#expected);
      this.seconds = this.began === null ? null : (performance.now() - this.began) / 1000;
    }
    this.on(this);
  }

  /** A small JPEG of how it looks by now. */
  show(jpeg) {
    if (this.preview) URL.revokeObjectURL(this.preview);
    this.set({ preview: URL.createObjectURL(jpeg) });
  }

  fail(error) {
    this.set({ state: "failed", note: error.message });
  }

  /** Forget the files: the card goes. */
  drop() {
    for (const url of [this.preview, this.file?.url]) if (url?.startsWith("blob:")) URL.revokeObjectURL(url);
  }
}

/** Sends orders and follows them, a few streams at a time. */
export class Works {
  #streams = 0;
  #line = []; // jobs that wait for a stream
  #stops = new Map(); // how to end a work's stream
  all = [];

  /** @param hooks: `onNew(work)`, `onChange(work)`, `onRefused(problem)` (a field is wrong: nothing was begun). */
  constructor(model, hooks) {
    Object.assign(this, { model, hooks });
    this.#poll();
  }

  get unfinished() {
    return this.all.filter((work) => !work.ended);
  }

  /** `order`: `{kind, prompt, count, seed, width, height, body, image}`. */
  draw(order) {
    const add = (_, index) => this.#add(new Work(order, index, this.hooks.onChange));
    const works = Array.from({ length: order.count }, add);
    if (order.kind === "video") return works.forEach((work, index) => this.#order([work], clipOf(order, index)));
    for (let i = 0; i < works.length; i += MAX_N) {
      this.#order(works.slice(i, i + MAX_N), this.#picturesOf(order, works, i));
    }
  }

  #add(work) {
    this.all.push(work);
    this.hooks.onNew(work);
    return work;
  }

  #picturesOf(order, works, first) {
    const body = { ...order.body, n: Math.min(MAX_N, works.length - first) };
    if (order.seed !== null) body.seed = order.seed + BigInt(first);
    if (this.model.limits.previews) body.partial_images = PREVIEWS;
    if (!order.image) return { path: "/v1/images/generations", body };
    return { path: "/v1/images/edits", body: formOf({ ...body, image: order.image }) };
  }

  /** What was asked for before: all clips that the server has; the tab's pictures, as long as they are known. */
  async restore(limit = 24) {
    const found = this.model.limits.media === "video" ? await this.#oldClips(limit) : await this.#oldPictures();
    for (const old of found.reverse()) {
      const work = new Work(old, 0, this.hooks.onChange);
      work.began = null; // not by this page's clock
      this.#add(work);
      work.know(old.id);
      this.#queue(() => this.#follow(work));
    }
  }

  async #oldClips(limit) {
    const { data } = await this.#insist([], () => getJson(`/v1/videos?limit=${limit}`));
    return data.map((video) => {
      const [width, height] = video.size.split("x").map(Number);
      return { kind: "video", id: video.id, prompt: video.prompt, seed: video.seed, width, height };
    });
  }

  async #oldPictures() {
    const own = new Set(ownJobs());
    if (!own.size) return [];
    const { data } = await getJson(`/v1/jobs?limit=${KNOWN_JOBS}`);
    return data.filter((job) => own.has(job.id)).map(({ id, prompt }) => ({ kind: "image", id, prompt, seed: null }));
  }

  async cancel(work) {
    try {
      if (work.jobId) await send(`/v1/jobs/${work.jobId}/cancel`, { method: "POST" });
    } catch (error) {
      if (error.status !== 404 && error.status !== 400) return work.set({ note: error.message });
      return; // it has ended, and its events tell how
    }
    work.set({ state: "cancelled" });
    this.#stops.get(work)?.abort();
  }

  forget(work) {
    this.all.splice(this.all.indexOf(work), 1);
    work.drop();
    if (work.kind === "image" && work.jobId) forgetJob(work.jobId);
  }

  // ------------------------------------------------------------ streams

  #queue(start) {
    this.#line.push(start);
    this.#next();
  }

  #next() {
    while (this.#streams < STREAMS && this.#line.length) {
      this.#streams += 1;
      const start = this.#line.shift();
      start().finally(() => {
        this.#streams -= 1;
        this.#next();
      });
    }
  }

  /** Sends what asks for `works`, again after a while where the server is busy; then they are followed. */
  async #order(works, { path, body }) {
    try {
      const answer = await this.#insist(works, () => getJson(path, { method: "POST", body, headers: LATER }));
      const jobs = answer.data ?? [answer];
      works.forEach((work, index) => this.#begun(work, jobs[index]));
    } catch (error) {
      for (const work of works) work.fail(error);
      if (error.param) this.hooks.onRefused(error);
      if (!(error instanceof Problem)) throw error;
    }
  }

  async #insist(works, ask) {
    for (;;) {
      try {
        return await ask();
      } catch (error) {
        if (!(error instanceof Problem && error.retryAfter)) throw error;
        if (works.length && works.every((work) => work.ended)) throw error; // cancelled in the meantime
        for (const work of works) work.set({ note: error.message });
        await pause(Math.min(error.retryAfter, 15));
      }
    }
  }

  #begun(work, job) {
    const { ended } = work;
    work.know(job.id);
    if (ended) return this.cancel(work); // before there was a job
    if (work.kind === "image") remember(job.id);
    work.set({ state: "queued", seed: job.seed ?? work.seed });
    this.#queue(() => this.#follow(work));
  }

  /** Follows a job by its events to its end. */
  async #follow(work) {
    if (work.ended) return;
    const control = new AbortController();
    this.#stops.set(work, control);
    try {
      for await (const { event, data } of follow(`/v1/jobs/${work.jobId}/events`, { signal: control.signal })) {
        await this.#tell(work, event, data);
        if (work.ended) return;
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      work.fail(error);
      if (!(error instanceof Problem)) throw error;
    } finally {
      this.#stops.delete(work);
    }
  }

  async #tell(work, event, data) {
    if (event === "queued") work.set({ state: "queued", position: data.position });
    else if (event === "encoding" || event === "decoding") work.set({ state: event, position: null });
    else if (event === "denoising") this.#step(work, data);
    else if (event === "preview") work.show(blobOf(data.b64_jpeg, "image/jpeg"));
    else if (event === "failed") work.fail(new Problem(data.error.message));
    else if (event === "cancelled") work.set({ state: "cancelled" });
    else if (event === "completed") await this.#finish(work, data);
  }

  #step(work, { step, total_steps: total, eta_seconds: eta }) {
    work.set({ state: "denoising", step, total, eta });
  }

  async #finish(work, data) {
    // Fetched, because the page's own requests carry the key and those of its elements don't.
    const blob = await this.#file(new URL(data.url, location).pathname);
    const name = fileName(work.prompt, data.seed, data.media_type.split("/")[1]);
    const file = { url: URL.createObjectURL(blob), name, type: data.media_type, blob };
    work.set({ state: "done", file, seed: data.seed, timings: data.timings, width: data.width, height: data.height });
  }

  /** Asked for until the server answers: what is drawn must not be lost with a connection. */
  async #file(path) {
    for (;;) {
      try {
        return await (await send(path)).blob();
      } catch (error) {
        if (error.status) throw error;
        await pause(POLL_SECONDS);
      }
    }
  }

  // ------------------------------------------------------------ places in the queue, and jobs without a stream

  /** Whether the list tells more than the job's own events have: these name no place between encode and denoise. */
  #knowsLess(work, job) {
    return !this.#stops.has(work) || (work.state === "encoding" && ON_ITS_WAY.has(job.stage));
  }

  async #poll() {
    for (;;) {
      await pause(POLL_SECONDS);
      const isAsked = (work) => work.jobId && (BEFORE_DENOISE.has(work.state) || !this.#stops.has(work));
      const asked = this.unfinished.filter(isAsked);
      if (!asked.length) continue;
      const jobs = await getJson(`/v1/jobs?limit=${KNOWN_JOBS}`).catch(() => ({ data: [] }));
      for (const job of jobs.data) {
        const work = asked.find((each) => each.jobId === job.id);
        if (work && job.status === "queued") work.set({ state: "queued", position: job.position });
        else if (work && job.stage && this.#knowsLess(work, job)) {
          work.set({ state: job.stage, step: job.step, total: job.total_steps });
        }
      }
    }
  }
}

function clipOf(order, index) {
  const body = order.seed === null ? order.body : { ...order.body, seed: order.seed + BigInt(index) };
  return { path: "/v1/videos", body: order.image ? formOf({ ...body, input_reference: order.image }) : body };
}

function formOf(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return form;
}

function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}

function fileName(prompt, seed, suffix) {
  const words = prompt.toLowerCase().normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48);
  return `${words.replace(/^-|-$/g, "") || "picture"}-${seed}.${suffix}`;
}

// The ids of this tab's pictures, so that a reload loses none.

const ownJobs = () => JSON.parse(sessionStorage.getItem(OWN) ?? "[]");

const remember = (jobId) => sessionStorage.setItem(OWN, JSON.stringify([...ownJobs(), jobId].slice(-KNOWN_JOBS)));

const forgetJob = (jobId) => sessionStorage.setItem(OWN, JSON.stringify(ownJobs().filter((each) => each !== jobId)));
