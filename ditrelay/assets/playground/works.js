// The pictures and clips of this page: sends what asks for them, and follows them to their end. No DOM in here.

import { Problem, follow, getBody, getJson, pause, send } from "./api.js";
import { pathOfFile } from "./address.js";
import { blobOf, clipOf, fileName, picturesOf } from "./orders.js";
import { oldClips, oldPictures } from "./restore.js";
import { forgetJob, rememberJob } from "./store.js";
import { Work } from "./work.js";

// A browser keeps six connections to a server: two are left for the lanes and for what is asked in between. So a few
// jobs are followed by their events, and how far the others are is asked for now and then.
const STREAMS = 4;
const MAX_N = 10;
const BEFORE_DENOISE = new Set(["waiting", "queued", "encoding"]);
const ON_ITS_WAY = new Set(["encoded", "to_dit", "at_dit"]);
const POLL_SECONDS = 1;
const RETRY_SECONDS = 1;
const LONGEST_WAIT = 15;
const FILE_SECONDS = 300;
const KNOWN_JOBS = 500;
const SENT_LATER = "No answer from the server: this is sent when it is back";

/** Sends orders and follows them, a few streams at a time. */
export class Works {
  #streams = 0;
  #line = []; // jobs that wait for a stream
  #stops = new Map(); // how to end a work's stream
  #isLost = false;
  all = [];

  /**
   * @param hooks: `onNew(work)`, `onChange(work)`, `onDropped(work)`, and `onRefused(order, problem)`, which tells
   *   whether it has shown what is wrong with an order; then its works are dropped, else they fail.
   */
  constructor(model, hooks) {
    Object.assign(this, { model, hooks });
    this.isOther = false; // the server was started anew, with another model
    this.#poll();
  }

  get unfinished() {
    return this.all.filter((work) => !work.ended);
  }

  /** Whether the server is gone: what is under way stands still. */
  set isLost(isLost) {
    if (isLost === this.#isLost) return;
    this.#isLost = isLost;
    for (const work of this.unfinished) {
      const { eta, note } = work; // back again, it may have told something new of it by now
      work.set({ isLost, ...(isLost ? { eta: null, note: "" } : { eta, note }) });
    }
  }

  /** `order`: see orders.js. */
  draw(order) {
    const add = (_, index) => this.#add(new Work(order, index, this.hooks.onChange));
    const works = Array.from({ length: order.count }, add);
    if (order.kind === "video") return works.forEach((work, index) => this.#order([work], clipOf(order, index)));
    for (let i = 0; i < works.length; i += MAX_N) {
      const some = works.slice(i, i + MAX_N);
      this.#order(some, picturesOf(order, some.length, i, this.model.limits));
    }
  }

  #add(work) {
    this.all.push(work);
    this.hooks.onNew(work);
    return work;
  }

  /** What this browser has asked for before, as long as the server has it; `everybody`: what anybody has. */
  async restore({ everybody = false } = {}) {
    const old = this.model.limits.media === "video" ? oldClips : oldPictures;
    const found = await this.#insist([], () => old(everybody));
    for (const each of found.reverse()) {
      const work = new Work(each, 0, this.hooks.onChange);
      work.began = null; // not by this page's clock
      this.#add(work);
      work.know(each.id);
      this.#queue(() => this.#follow(work));
    }
  }

  async cancel(work) {
    const id = work.jobId;
    try {
      if (id) await send(`v1/jobs/${id}/cancel`, { method: "POST" });
    } catch (error) {
      if (error.status !== 404 && error.status !== 400) return work.set({ note: error.message });
      return; // it has ended, and its events tell how
    }
    work.set({ state: "cancelled" });
    this.#stops.get(work)?.abort();
  }

  forget(work) {
    const place = this.all.indexOf(work);
    if (place >= 0) this.all.splice(place, 1);
    work.drop();
    if (work.jobId) forgetJob(work.jobId);
  }

  // ------------------------------------------------------------ orders

  /** Sends what asks for `works`, again after a while where the server is busy or gone; then they are followed. */
  async #order(works, [path, how]) {
    try {
      const answer = await this.#insist(works, () => getJson(path, how));
      const jobs = answer.data ?? [answer];
      works.forEach((work, index) => this.#begun(work, jobs[index]));
    } catch (error) {
      this.#refused(works, error);
      if (!(error instanceof Problem)) throw error;
    }
  }

  #refused(works, error) {
    const isSaid = error instanceof Problem && error.isRefusal && this.hooks.onRefused(works[0].order, error);
    for (const work of works) {
      if (isSaid && !work.ended) this.hooks.onDropped(work);
      else work.fail(error);
    }
  }

  async #insist(works, ask) {
    for (;;) {
      try {
        return await ask();
      } catch (error) {
        const isPassing = error instanceof Problem && (error.retryAfter || error.isLost);
        if (!isPassing || (works.length && works.every((work) => work.ended))) throw error; // or cancelled meanwhile
        const note = error.isLost ? SENT_LATER : error.message;
        for (const work of works) if (work.note !== note) work.set({ note });
        await pause(error.retryAfter ? Math.min(error.retryAfter, LONGEST_WAIT) : RETRY_SECONDS);
      }
    }
  }

  #begun(work, job) {
    const { ended } = work;
    work.know(job.id);
    if (ended) return this.cancel(work); // before there was a job
    rememberJob(job.id);
    work.set({ state: "queued", seed: job.seed ?? work.seed });
    this.#queue(() => this.#follow(work));
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

  /** Follows a job by its events to its end. */
  async #follow(work) {
    if (work.ended) return;
    const control = new AbortController();
    this.#stops.set(work, control);
    try {
      for await (const { event, data } of follow(`v1/jobs/${work.jobId}/events`, { signal: control.signal })) {
        await this.#tell(work, event, data);
        if (work.ended) return;
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 404) return this.#missing(work);
      work.fail(error);
      if (!(error instanceof Problem)) throw error;
    } finally {
      this.#stops.delete(work);
    }
  }

  /** After a while without the server: does it still serve the model that this page was made for? */
  async meetAgain() {
    const { id, limits } = (await getJson("v1/models")).data[0];
    this.isOther = JSON.stringify([id, limits]) !== JSON.stringify([this.model.id, this.model.limits]);
  }

  /** The server knows it no more, as after a new start: it is asked for again, once, where the page knows how. */
  async #missing(work) {
    forgetJob(work.jobId);
    await this.#insist([work], () => this.meetAgain());
    if (this.isOther) return work.fail(new Problem("The server was started anew, with another model; this is lost."));
    if (!work.order.body || work.renewed) return work.fail(new Problem("The server does not have this any more."));
    work.renew();
    const { ownOrder } = work;
    const sent = work.kind === "video" ? clipOf(ownOrder, 0) : picturesOf(ownOrder, 1, 0, this.model.limits);
    this.#order([work], sent);
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
    work.set({ state: "denoising", step, total, eta, isLost: false });
  }

  async #finish(work, data) {
    // Fetched, because the page's own requests carry the key and those of its elements don't.
    const blob = await this.#file(pathOfFile(data.url));
    const name = fileName(work.prompt, data.seed, data.media_type.split("/")[1]);
    const file = { url: URL.createObjectURL(blob), name, type: data.media_type, blob };
    work.set({ state: "done", file, seed: data.seed, timings: data.timings, width: data.width, height: data.height });
  }

  /** Asked for until the server answers: what is drawn must not be lost with a connection. */
  async #file(path) {
    for (;;) {
      try {
        return await getBody(path, "blob", { timeout: FILE_SECONDS });
      } catch (error) {
        if (error.status && !error.isLost && !error.retryAfter) throw error;
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
      const jobs = await getJson(`v1/jobs?limit=${KNOWN_JOBS}`).catch(() => ({ data: [] }));
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
