// What the server still has of what was asked for before this page was opened, newest first.

import { getJson } from "./api.js";
import { forgetJob, ownJobs } from "./store.js";

const SHOWN = 24; // clips, and everybody's pictures
const PAGE = 100;
const KNOWN_JOBS = 1000;

const clip = ({ id, prompt, seed, size }) => {
  const [width, height] = size.split("x").map(Number);
  return { kind: "video", id, prompt, seed, width, height };
};

const picture = ({ id, prompt }) => ({ kind: "image", id, prompt, seed: null });

/** This browser's clips, or `everybody`'s. */
export async function oldClips(everybody) {
  const own = ownJobs().reverse().slice(0, SHOWN);
  if (!everybody && !own.length) return [];
  const { data } = await getJson(`v1/videos?limit=${everybody ? SHOWN : PAGE}`);
  if (everybody) return data.map(clip);
  const listed = new Map(data.map((video) => [video.id, video]));
  const found = await Promise.all(own.map((id) => listed.get(id) ?? olderClip(id)));
  return found.filter(Boolean).map(clip);
}

/** One that others' clips have pushed off the list's first page; one that is gone is forgotten. */
async function olderClip(id) {
  try {
    return await getJson(`v1/videos/${id}`);
  } catch (error) {
    if (error.status !== 404) throw error;
    forgetJob(id);
    return null;
  }
}

/** This browser's pictures, or `everybody`'s. */
export async function oldPictures(everybody) {
  const own = new Set(ownJobs());
  if (!everybody && !own.size) return [];
  const { data } = await getJson(`v1/jobs?limit=${everybody ? SHOWN : KNOWN_JOBS}`);
  return data.filter((job) => everybody || own.has(job.id)).map(picture);
}
