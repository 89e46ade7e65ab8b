// Requests to the server, with the key where it asks for one, and server-sent events as async iterators.

import { addressOf } from "./address.js";
import { keepKey, keptKey } from "./store.js";

const ANSWER_SECONDS = 30; // for an answer as a whole, unless the caller knows better
const SILENT_SECONDS = 45; // of a stream: the server sends a comment every 15 s

/** An answer other than success, or none: `message` is fit to be shown. */
export class Problem extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }

  /** Nothing came back: the server is gone, or something on the way to it is. */
  get isLost() {
    return this.code === "unreachable";
  }

  /** The server wants no such thing, however often it is asked: nothing was begun. */
  get isRefusal() {
    return this.status >= 400 && this.status < 500 && !this.retryAfter;
  }
}

/** Ends when there is a (new) key. */
let askForKey = async () => {};

/** `ask(wrong)` shows the dialog for the key and ends when there is one. */
export function onLocked(ask) {
  let asking = null; // one dialog, however many requests wait for the key
  askForKey = () => (asking ??= ask(keyToSend() !== null).then((key) => {
    keepKey(key);
    asking = null;
  }));
}

/** Why a key cannot be sent, in words; an empty text where it can. */
export const wrongWithKey = (key) =>
  /[\0-\x1f\x7f]/.test(key) ? "A key has no line breaks and no other control characters." : "";

const keyToSend = () => (wrongWithKey(keptKey() ?? "") ? null : keptKey());

export const hasKey = () => keyToSend() !== null;

// A header holds bytes, which fetch takes as characters up to U+00FF; the server reads them as UTF-8.
const inBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** The `Response`, whatever its status but 401. Rejects with `Problem` where there is none, or with `AbortError`. */
async function fetchWithKey(path, { timeout, ...options }) {
  for (;;) {
    const key = keyToSend();
    const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${inBytes(key)}` }) };
    const signal = options.signal ?? AbortSignal.timeout(timeout * 1000);
    const response = await fetch(addressOf(path), { cache: "no-store", ...options, headers, signal })
      .catch((error) => { throw noAnswer(error, timeout); });
    if (response.status !== 401) return response;
    if (key === keyToSend()) await askForKey(); // else there is a newer one by now
  }
}

/** What `fetch`, or the reading of its body, has thrown, as a `Problem`. */
function noAnswer(error, timeout) {
  if (error instanceof Problem || error.name === "AbortError") return error;
  if (error.name === "TimeoutError") {
    return new Problem(`The server did not answer within ${timeout} s.`, { code: "timeout" });
  }
  return new Problem("The server cannot be reached.", { code: "unreachable" });
}

async function problemOf(response) {
  const { status } = response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: a proxy has answered, and where it says 5xx there is no server behind it.
    if (status >= 500) error = { code: "unreachable" };
  }
  const { message = `The server answered ${status}.`, param, code } = error;
  return new Problem(message, { status, param, code, retryAfter: Number(response.headers.get("Retry-After")) || 0 });
}

/** A checked `Response`. `body` is sent as JSON, or as it is where it is a form. `timeout`: seconds, without `signal`. */
export async function send(path, { method = "GET", body, headers = {}, signal, timeout = ANSWER_SECONDS } = {}) {
  const isForm = body instanceof FormData;
  const response = await fetchWithKey(path, {
    method,
    signal,
    timeout,
    headers: body === undefined || isForm ? headers : { "Content-Type": "application/json", ...headers },
    body: body === undefined || isForm ? body : written(body),
  });
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** The body of an answer: `how` is "text" or "blob". */
export async function getBody(path, how, options = {}) {
  const response = await send(path, options);
  return response[how]().catch((error) => { throw noAnswer(error, options.timeout ?? ANSWER_SECONDS); });
}

export async function getJson(path, options) {
  const text = await getBody(path, "text", options);
  try {
    return read(text);
  } catch {
    // A page of something on the way, which says that all is well.
    throw new Problem("What answered is not the server.", { code: "unreachable" });
  }
}

// A seed is a BigInt in here: numbers are exact up to 2^53 only, seeds go up to 2^63. Both ways it is text on the other
// side of JSON's own functions. No prompt is taken for a seed: in a string of JSON each quote has a backslash.
const read = (text) => JSON.parse(text.replace(/"seed":\s*(-?\d+)/g, '"seed":"$1"'), (name, value) =>
  name === "seed" && /^-?\d+$/.test(value) ? BigInt(value) : value);
const written = (body) => JSON.stringify(body, (_, value) => (typeof value === "bigint" ? String(value) : value))
  .replace(/"seed":"(-?\d+)"/g, '"seed":$1');

/** Yields `{event, data, id}`; ends with the answer. Options as `send`. */
async function* events(path, { alive, ...options }) {
  const response = await send(path, { ...options, headers: { Accept: "text/event-stream", ...options.headers } });
  if (!response.body) return; // 204: there is nothing more
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    yield* parsed(reader, alive);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("The connection to the server broke.", { code: "broken" });
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function* parsed(reader, alive) {
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    const blocks = (text + value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = eventOf(block);
      if (event) yield event;
    }
  }
}

function eventOf(block) {
  const fields = { event: "message", id: null };
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name === "data") data.push(value);
    else if (name === "event" || name === "id") fields[name] = value;
  }
  return data.length ? { ...fields, data: read(data.join("\n")) } : null;
}

/**
 * Yields events without an end: a connection that breaks is made again, from the last event on. `onState(true|false)`
 * tells whether it stands. Ends where `path` is refused for good (throws `Problem`) or where `signal` aborts it. A page
 * that nobody sees gives its connections to those that are seen: a browser has six for all of them.
 */
export async function* follow(path, { signal, onState = () => {} } = {}) {
  let lastId = null;
  let wait = 0.25;
  for (;;) {
    await seen(signal);
    const watched = watchedSignal(signal);
    try {
      const headers = lastId === null ? {} : { "Last-Event-ID": lastId };
      for await (const event of events(path, { signal: watched.signal, headers, alive: watched.alive })) {
        onState(true);
        wait = 0.25;
        lastId = event.id ?? lastId;
        yield event;
      }
    } catch (error) {
      if (signal?.aborted || !isPassing(error)) throw error;
    } finally {
      watched.end();
    }
    onState(false);
    if (!document.hidden) await pause(wait, signal);
    wait = Math.min(wait * 2, 4);
  }
}

function isPassing(error) {
  if (error.name === "AbortError") return true; // the page is not seen any more, or the connection is dead
  return error instanceof Problem && (error.status < 400 || error.status >= 500 || error.status === 429);
}

/** Ends once the page can be seen. */
function seen(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve, reject) => {
    document.addEventListener("visibilitychange", () => resolve(), { once: true, signal });
    signal?.addEventListener("abort", () => reject(aborted()), { once: true });
  });
}

/**
 * A signal that aborts with `signal`, when the page can't be seen any more, and when nothing has come for a while
 * (`alive()` is called with all that comes): a connection may be dead without a word.
 */
function watchedSignal(signal) {
  const control = new AbortController();
  const stop = () => control.abort();
  const look = () => document.hidden && stop();
  let silence = setTimeout(stop, SILENT_SECONDS * 1000);
  document.addEventListener("visibilitychange", look);
  signal?.addEventListener("abort", stop);
  return {
    signal: control.signal,
    alive() {
      clearTimeout(silence);
      silence = setTimeout(stop, SILENT_SECONDS * 1000);
    },
    end() {
      clearTimeout(silence);
      document.removeEventListener("visibilitychange", look);
      signal?.removeEventListener("abort", stop);
    },
  };
}

const aborted = () => new DOMException("aborted", "AbortError");

/** Seconds; ends with `AbortError` where `signal` aborts it. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(aborted());
    }, { once: true });
  });
}
