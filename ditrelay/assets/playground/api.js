// Requests to the server, with the key where it asks for one, and server-sent events as async iterators.

const KEY = "ditrelay-key";

/** An answer other than success, or none: `message` is fit to be shown. */
export class Problem extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** Ends when there is a (new) key. */
let askForKey = async () => {};

/** `ask(wrong)` shows the dialog for the key and ends when there is one. */
export function onLocked(ask) {
  let asking = null; // one dialog, however many requests wait for the key
  askForKey = () => (asking ??= ask(sessionStorage.getItem(KEY) !== null).then((key) => {
    sessionStorage.setItem(KEY, key);
    asking = null;
  }));
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** The `Response`, whatever its status but 401. Rejects with `Problem` where there is none, or with `AbortError`. */
async function fetchWithKey(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { cache: "no-store", ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached.", { code: "unreachable" });
    }
    if (response.status !== 401) return response;
    if (key === sessionStorage.getItem(KEY)) await askForKey(); // else there is a newer one by now
  }
}

async function problemOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: something between the server and us has answered.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new Problem(error.message ?? `The server answered ${response.status}.`, {
    status: response.status, param: error.param, code: error.code, retryAfter,
  });
}

/** A checked `Response`. `body` is sent as JSON, or as it is where it is a form. */
export async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const isForm = body instanceof FormData;
  const response = await fetchWithKey(path, {
    method,
    signal,
    headers: body === undefined || isForm ? headers : { "Content-Type": "application/json", ...headers },
    body: body === undefined || isForm ? body : written(body),
  });
  if (!response.ok) throw await problemOf(response);
  return response;
}

export const getJson = async (path, options) => read(await (await send(path, options)).text());

// A seed is a BigInt in here: numbers are exact up to 2^53 only, seeds go up to 2^63. Both ways it is text on the other
// side of JSON's own functions. No prompt is taken for a seed: in a string of JSON each quote has a backslash.
const read = (text) => JSON.parse(text.replace(/"seed":\s*(-?\d+)/g, '"seed":"$1"'), (name, value) =>
  name === "seed" && value !== null ? BigInt(value) : value);
const written = (body) => JSON.stringify(body, (_, value) => (typeof value === "bigint" ? String(value) : value))
  .replace(/"seed":"(-?\d+)"/g, '"seed":$1');

/** Yields `{event, data, id}`; ends with the answer. Options as `send`. */
async function* events(path, options) {
  const response = await send(path, { ...options, headers: { Accept: "text/event-stream", ...options.headers } });
  if (!response.body) return; // 204: there is nothing more
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    yield* parsed(reader);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("The connection to the server broke.", { code: "broken" });
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function* parsed(reader) {
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
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
    const unseen = unseenSignal(signal);
    try {
      const headers = lastId === null ? {} : { "Last-Event-ID": lastId };
      for await (const event of events(path, { signal: unseen.signal, headers })) {
        onState(true);
        wait = 0.25;
        lastId = event.id ?? lastId;
        yield event;
      }
    } catch (error) {
      if (signal?.aborted || !isPassing(error)) throw error;
    } finally {
      unseen.end();
    }
    onState(false);
    if (!document.hidden) await pause(wait, signal);
    wait = Math.min(wait * 2, 4);
  }
}

function isPassing(error) {
  if (error.name === "AbortError") return true; // the page is not seen any more
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

/** A signal that aborts with `signal`, and when the page can't be seen any more. */
function unseenSignal(signal) {
  const control = new AbortController();
  const stop = () => control.abort();
  const look = () => document.hidden && stop();
  document.addEventListener("visibilitychange", look);
  signal?.addEventListener("abort", stop);
  return {
    signal: control.signal,
    end() {
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
