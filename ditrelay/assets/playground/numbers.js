// Each request has a number and a colour, the same in the lanes and in the gallery.

/** The palette of the written timelines (runtime/timeline.py): white text is readable on each. */
export const PALETTE = [
  "#3073c9", "#b95624", "#24816d", "#c34384", "#6c7a24", "#7563cd",
  "#996b12", "#247c99", "#ce3f45", "#428140", "#a154b3", "#84705c",
];

const KEPT = 2000;
const PATIENCE = 1500; // milliseconds

let last = 0;
let expected = 0; // pictures of this page whose request is not known yet
const numbers = new Map(); // by the id of a job, oldest first
const strangers = new Map(); // by the id of a job: since when it is seen, milliseconds

export const nextNumber = () => ++last;

export const colourOf = (number) => (number ? PALETTE[(number - 1) % PALETTE.length] : "#8b949f");

/** A picture of this page has begun (`+1`) or has ceased (`-1`) to wait for the id of its job. */
export function expect(change) {
  expected += change;
}

/** The job is the picture with this number. */
export function bind(jobId, number) {
  strangers.delete(jobId);
  numbers.set(jobId, number);
  if (numbers.size > KEPT) numbers.delete(numbers.keys().next().value);
}

/** The number of a job. Somebody else's gets the next one; 0: of no job, or it may still turn out to be ours. */
export function numberOf(jobId) {
  if (jobId === null) return 0;
  const number = numbers.get(jobId);
  if (number !== undefined) return number;
  const now = performance.now();
  if (!strangers.has(jobId)) strangers.set(jobId, now);
  if (expected > 0 && now - strangers.get(jobId) < PATIENCE) return 0;
  bind(jobId, nextNumber());
  return last;
}

export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 99.95) return `${Number.isInteger(seconds) ? seconds : seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  return `${minutes} min ${Math.round(seconds) % 60} s`;
}

export function ordinal(n) {
  const ending = n % 100 >= 11 && n % 100 <= 13 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th");
  return `${n}${ending}`;
}
