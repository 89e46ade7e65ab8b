// What the ranks do, as /v1/activity tells it: bars on lanes, in the server's monotonic seconds.

import { numberOf } from "./numbers.js";

const KEPT_BARS = 600; // of a lane
const NEAR_END = 40; // bars of a lane, among which are those under way
const TRANSFERS = new Set(["send", "receive"]);
const STAGES = ["encode", "denoise", "decode"];

/**
 * The lanes of a `topology` event, those of one unit side by side: groups `{title, short, role, ranks, lanes}` of lanes
 * `{rank, kind, thin}`. A unit that encodes and decodes for others stands at both ends.
 */
export function groupsOf({ ranks, lanes }) {
  const groups = [];
  for (const { rank, kind, title, role } of lanes) {
    let group = groups.at(-1);
    if (group?.title !== title || group.role !== role) {
      group = { title, role, ranks: membersOf(rank, ranks), lanes: [] };
      group.short = group.ranks.length > 1 ? `${group.ranks[0]}-${group.ranks.at(-1)}` : `${rank}`;
      groups.push(group);
    }
    group.lanes.push({ rank, kind, thin: TRANSFERS.has(kind) });
  }
  return groups;
}

function membersOf(leader, ranks) {
  const replica = ranks.find((each) => each.rank === leader)?.replica ?? null;
  return replica === null ? [leader] : ranks.filter((each) => each.replica === replica).map((each) => each.rank);
}

/** `3 DiT + 1 non-DiT ranks` */
export function ranksInWords(groups) {
  const roles = new Map(); // ranks by role: a unit may stand at both ends
  for (const { role, ranks } of groups) {
    if (!roles.has(role)) roles.set(role, new Set());
    for (const rank of ranks) roles.get(role).add(rank);
  }
  const total = [...roles.values()].reduce((sum, ranks) => sum + ranks.size, 0);
  const inOrder = [...roles].sort(([, a], [, b]) => Math.min(...a) - Math.min(...b));
  return `${inOrder.map(([role, ranks]) => `${ranks.size} ${role}`).join(" + ")} ${total === 1 ? "rank" : "ranks"}`;
}

/**
 * Bars by lane. A bar: `{request, job, rank, kind, began, ended, step, total, ticks}`; `job` is null where there is none
 * (the warm-up), `ended` while it is under way.
 */
export class Activity {
  #lanes = new Map();
  #offset = Infinity;
  #lastEnd = null;

  /** A connection begins: the server may be another one, with another clock. */
  reset() {
    this.#lanes.clear();
    this.#offset = Infinity;
    this.#lastEnd = null;
  }

  /** The server's clock, as far as what it has sent tells; `null` before it has sent anything. */
  now() {
    return this.#offset === Infinity ? null : performance.now() / 1000 - this.#offset;
  }

  take(news) {
    this.#offset = Math.min(this.#offset, performance.now() / 1000 - news.now);
    if (news.kind === undefined) return;
    const bars = this.lane(news.rank, news.kind);
    const isSame = (bar) => bar.request === news.request_id && (bar.ended === null || bar.began === news.began);
    let bar = bars.findLast(isSame);
    if (!bar) {
      const { request_id: request, job_id: job, rank, kind, began } = news;
      bar = { request, job, rank, kind, began, ended: null, step: 0, total: 0, ticks: [] };
      bars.push(bar);
    }
    if (news.ended === null && news.step > bar.step) bar.ticks.push(news.now);
    bar.job ??= news.job_id;
    bar.step = Math.max(bar.step, news.step);
    bar.total = Math.max(bar.total, news.total_steps);
    bar.began = Math.min(bar.began, news.began);
    bar.ended = news.ended;
    if (bar.ended !== null) this.#lastEnd = Math.max(this.#lastEnd ?? bar.ended, bar.ended);
    if (bars.length > KEPT_BARS) bars.shift();
  }

  lane(rank, kind) {
    const key = `${rank} ${kind}`;
    if (!this.#lanes.has(key)) this.#lanes.set(key, []);
    return this.#lanes.get(key);
  }

  *bars() {
    for (const bars of this.#lanes.values()) yield* bars;
  }

  /** Under way. */
  running() {
    return [...this.#lanes.values()].flatMap((bars) => bars.slice(-NEAR_END).filter((bar) => bar.ended === null));
  }

  /** When the newest work ended; `null` before any has. */
  lastEnd() {
    return this.#lastEnd;
  }

  /** When the work began that has gone on since, with no pause of `rest` seconds; `null` before any. */
  runBegan(rest) {
    const bars = [...this.bars()].sort((a, b) => a.began - b.began);
    let [began, ended] = [null, -Infinity];
    for (const bar of bars) {
      if (bar.began > ended + rest) began = bar.began;
      ended = Math.max(ended, bar.ended ?? Infinity);
    }
    return began;
  }

  /** Seconds that the newest requests took from their first bar to their last, those under way included. */
  spans(now, newest = 8) {
    const spans = new Map();
    for (const bar of this.bars()) {
      const span = spans.get(bar.request) ?? { began: bar.began, ended: 0 };
      spans.set(bar.request, { began: Math.min(span.began, bar.began), ended: Math.max(span.ended, bar.ended ?? now) });
    }
    const inOrder = [...spans.values()].sort((a, b) => a.began - b.began);
    return inOrder.slice(-newest).map(({ began, ended }) => ended - began);
  }

  /** Share of the seconds from `from` to `to`, but not before the lane's first bar, in which the lane worked. */
  busy(rank, kind, from, to) {
    const spans = this.lane(rank, kind).map((bar) => [Math.max(from, bar.began), Math.min(to, bar.ended ?? to)])
      .filter(([began, ended]) => ended > began);
    if (!spans.length) return null;
    const worked = spans.reduce((sum, [began, ended]) => sum + ended - began, 0);
    return Math.min(1, worked / (to - Math.min(...spans.map(([began]) => began))));
  }

  /** Share of the working time in which at least two stages computed at once; `null` where none did. */
  overlap(from, to) {
    const edges = [];
    for (const bar of this.bars()) {
      const [began, ended] = [Math.max(from, bar.began), Math.min(to, bar.ended ?? to)];
      if (TRANSFERS.has(bar.kind) || ended <= began) continue;
      const stage = STAGES.indexOf(bar.kind);
      edges.push([began, stage, 1], [ended, stage, -1]);
    }
    edges.sort((a, b) => a[0] - b[0]);
    const active = [0, 0, 0];
    let [working, both, before] = [0, 0, 0];
    for (const [at, stage, change] of edges) {
      const stages = active.filter((count) => count > 0).length;
      if (stages > 0) working += at - before;
      if (stages > 1) both += at - before;
      active[stage] += change;
      before = at;
    }
    return working > 0 ? both / working : null;
  }
}

/** What a bar says of itself. */
export function barInWords(bar, now, promptOf) {
  const number = numberOf(bar.job);
  const prompt = number ? promptOf(number) : null;
  const steps = bar.total ? `, step ${bar.step} of ${bar.total}` : "";
  return {
    number,
    title: number ? `${number} · ${prompt ?? "sent from elsewhere"}` : "warm-up",
    text: `${bar.kind} on rank ${bar.rank}${steps}`,
    seconds: (bar.ended ?? now) - bar.began,
  };
}
