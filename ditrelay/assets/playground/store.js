// What the browser keeps: the key for this tab, the jobs of this browser. Where it may keep nothing (cookies are
// blocked), both last as long as the page.

import { base } from "./address.js";

const KEY = "ditrelay-key";
const JOBS = `ditrelay-jobs ${base.pathname}`; // several servers may share an origin, each under a path of its own
const KEPT_JOBS = 500;

/** Of `localStorage` or `sessionStorage`, which throw where they may not be used. */
class Store {
  #memory = new Map();

  constructor(name) {
    this.name = name;
  }

  get(key) {
    try {
      return window[this.name].getItem(key) ?? this.#memory.get(key) ?? null;
    } catch {
      return this.#memory.get(key) ?? null;
    }
  }

  set(key, text) {
    this.#memory.set(key, text);
    try {
      window[this.name].setItem(key, text);
    } catch {
      // Not allowed, or full: then it lasts as long as the page.
    }
  }
}

const tab = new Store("sessionStorage");
const browser = new Store("localStorage");

export const keptKey = () => tab.get(KEY);

export const keepKey = (key) => tab.set(KEY, key);

/** The ids of the jobs that this browser has asked for and has not cleared, oldest first. */
export function ownJobs() {
  try {
    const ids = JSON.parse(browser.get(JOBS) ?? "[]");
    return Array.isArray(ids) ? ids.filter((id) => typeof id === "string") : [];
  } catch {
    return []; // something else has written there
  }
}

export const rememberJob = (id) => browser.set(JOBS, JSON.stringify([...ownJobs(), id].slice(-KEPT_JOBS)));

export const forgetJob = (id) => browser.set(JOBS, JSON.stringify(ownJobs().filter((each) => each !== id)));
