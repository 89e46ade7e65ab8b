// One picture or clip, from the order to its end. No DOM in here.

import { bind, expect, nextNumber } from "./numbers.js";

const ENDED = new Set(["done", "failed", "cancelled"]);

/** `on` is called after each change. */
export class Work {
  #expected = 0;

  constructor(order, index, on) {
    Object.assign(this, {
      number: nextNumber(), kind: order.kind, prompt: order.prompt, width: order.width, height: order.height,
      seed: order.seed === null ? null : order.seed + BigInt(index), order,
      state: "waiting", note: "", isLost: false, step: 0, total: 0, position: null, eta: null,
      jobId: null, renewed: false, preview: null, file: null, timings: null, seconds: null, began: performance.now(),
    });
    this.on = on;
    this.#wait(1);
  }

  get ended() {
    return ENDED.has(this.state);
  }

  /** The order of this one alone, with the seed that it has by now. */
  get ownOrder() {
    return { ...this.order, count: 1, seed: this.seed };
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

  /** The server has lost it: it waits to be asked for again, once. */
  renew() {
    this.jobId = null;
    this.#wait(1);
    this.set({ state: "waiting", step: 0, position: null, eta: null, renewed: true });
  }

  /** Forget the files, and wait for nothing any more: the card goes. */
  drop() {
    this.#wait(-this.#expected);
    for (const url of [this.preview, this.file?.url]) if (url?.startsWith("blob:")) URL.revokeObjectURL(url);
  }
}
