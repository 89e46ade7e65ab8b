// Puts the page together.

import { Activity, groupsOf, ranksInWords } from "./activity.js";
import { Problem, follow, getJson, hasKey, onLocked, pause, send, wrongWithKey } from "./api.js";
import { Announcer, Card, element } from "./cards.js";
import { Form } from "./form.js";
import { Lanes } from "./lanes.js";
import { installReader } from "./reader.js";
import { Works } from "./works.js";
import { installViewer, openViewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const KEPT_CARDS = 300;
const WATCH_SECONDS = 1;
const HEALTH_SECONDS = 5; // that the server may take to say how it is
const REPLACED_SECONDS = 8; // that a rank is said to be replaced
const EXAMPLES = {
  image: ["a red apple", "a fox at night", "a rocket in space", "a small house in the snow"],
  video: ["a fox runs through the snow", "waves at sunset", "a paper boat on a river"],
};

const announcer = new Announcer($("said"));
const activity = new Activity();
const cards = new Map(); // by number
const generations = new Map(); // of the ranks
const replaced = new Map(); // ranks, and when that was seen
let connected = false;
let wasLost = false; // the server: it may be a new one
let warm = false; // every rank is up, and the server has said that it is ready
let lookAgain = () => {}; // at the server's health
let lanes, works, form;

// ------------------------------------------------------------ the gallery

function addCard(work) {
  const card = new Card(work, {
    onCancel: (each) => works.cancel(each),
    onAgain: ({ prompt, order }) => form.onOrder({ ...form.order(prompt), ...order, count: 1, seed: null, form: null }),
    onSeed: (each) => form.fill(each),
    onStart: startFrom,
    onOpen: openViewer,
    onLight: (number) => lanes.light(number),
  }, { canStart: works.model.limits.edits });
  cards.set(work.number, card);
  $("cards").prepend(card.root);
  const surplus = Math.max(0, works.all.length - KEPT_CARDS);
  works.all.filter((each) => each.ended).slice(0, surplus).forEach(removeCard);
  showTools();
}

function removeCard(work) {
  cards.get(work.number)?.root.remove();
  cards.delete(work.number);
  works.forget(work);
}

function dropCard(work) {
  removeCard(work);
  showTools();
}

function changed(work) {
  cards.get(work.number)?.update();
  announcer.tell(work);
  lanes.wake();
  showTools();
}

function showTools() {
  const unfinished = works.unfinished.length;
  $("cancel-all").hidden = unfinished < 2;
  $("clear").hidden = works.all.length === unfinished;
  $("examples").hidden = works.all.length > 0;
  document.title = unfinished ? `(${unfinished}) ditrelay playground` : "ditrelay playground";
}

function startFrom({ file }) {
  form.startFrom(new File([file.blob], file.name, { type: file.type }));
  $("settings").open = true;
  $("prompt").focus();
}

function showExamples(media) {
  const draw = (prompt) => {
    const onclick = () => form.ask(prompt);
    return element("button", { type: "button", textContent: prompt, onclick });
  };
  $("examples").replaceChildren("For instance:", ...EXAMPLES[media].map(draw));
}

function light(number) {
  for (const [each, card] of cards) card.root.classList.toggle("lit", each === number);
}

/** To the card itself, and to none of its buttons: the key that leads there must not press one. */
function pick(number) {
  const root = cards.get(number)?.root;
  root?.scrollIntoView({ block: "nearest", behavior: "smooth" });
  root?.focus({ preventScroll: true });
}

// ------------------------------------------------------------ the pipeline

async function watchActivity() {
  const news = follow("v1/activity", { onState: setConnected });
  for await (const { event, data } of news) {
    if (event === "topology") begin(data);
    else if (event === "activity") show(data);
  }
}

function setConnected(stands) {
  if (connected === stands) return;
  connected = stands;
  lookAgain();
}

function begin(topology) {
  activity.reset();
  activity.take({ now: topology.now });
  const groups = groupsOf(topology);
  $("ranks").textContent = ranksInWords(groups);
  lanes.show(groups);
}

function show(news) {
  activity.take(news);
  $("nothing").hidden = true;
  lanes.wake();
}

function showLoad({ overlap, idle }) {
  const waiting = works.unfinished.filter((work) => ["waiting", "queued"].includes(work.state)).length;
  const going = works.unfinished.length - waiting;
  const own = [going && `${going} at work`, waiting && `${waiting} waiting`].filter(Boolean).join(", ");
  const state = idle ? "At rest" : own || "At work";
  const share = `stages overlapped for ${Math.round(overlap * 100)} % of the working time`;
  $("load").textContent = overlap === null ? "" : `${state} · ${share}`;
}

// ------------------------------------------------------------ the server's health

async function watchHealth() {
  for (;;) {
    const [state, text, down] = await health();
    $("health").dataset.state = state;
    if ($("health").textContent !== text) $("health").replaceChildren(element("span", { textContent: text }));
    lanes.setDown(down);
    await Promise.race([pause(WATCH_SECONDS), new Promise((resolve) => (lookAgain = resolve))]);
  }
}

async function health() {
  try {
    const { ranks, placement } = await getJson("v1/topology", { timeout: HEALTH_SECONDS });
    if (wasLost) await works.meetAgain();
    wasLost = works.isLost = false;
    $("placement").textContent = (ranks.length > 1 && placement?.text) || "";
    const lost = lostRanks(ranks);
    const words = [...lost].map(([rank, state]) => `rank ${rank} is ${state}`).join(", ");
    const isWhole = ranks.length > 0 && ranks.every((rank) => rank.state === "up");
    warm &&= isWhole;
    if (!connected) return ["loading", "connecting", lost];
    if (!isWhole) return ["loading", words || "starting", lost];
    warm ||= await isReady();
    if (!warm) return ["loading", "warming up", lost];
    const model = works.isOther ? "with another model now: reload this page" : "";
    return ["ready", ["ready", words, model].filter(Boolean).join(", "), lost];
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    warm = false;
    wasLost = true;
    const isAnswered = error.status && !error.isLost; // by the server: it is there, and refuses
    works.isLost = !isAnswered;
    return ["lost", isAnswered ? error.message : "no answer from the server", new Map()];
  }
}

/** The ranks that are not up, and for a while those that are up again: it may take them less than a second. */
function lostRanks(ranks) {
  const now = performance.now();
  const lost = new Map();
  for (const { rank, state, generation } of ranks) {
    if (generation > (generations.get(rank) ?? generation)) replaced.set(rank, now);
    generations.set(rank, generation);
    if (state !== "up") lost.set(rank, state);
    else if (now - (replaced.get(rank) ?? -Infinity) < REPLACED_SECONDS * 1000) lost.set(rank, "replaced");
  }
  return lost;
}

async function isReady() {
  try {
    await send("ready", { timeout: HEALTH_SECONDS });
    return true;
  } catch (error) {
    if (error.status === 503) return false;
    throw error;
  }
}

// ------------------------------------------------------------ the key

function askForKey(wrong) {
  sayOfKey(wrong ? "The server does not take this key." : "");
  $("key").value = "";
  const dialog = $("key-dialog");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    // Escape closes it, the second time whatever the page says to it; without a key there is no page.
    dialog.onclose = () => (dialog.returnValue ? resolve($("key").value) : dialog.showModal());
  });
}

function sayOfKey(message) {
  $("key-error").textContent = message;
  $("key").setAttribute("aria-invalid", message !== "");
}

function checkKey(event) {
  const wrong = wrongWithKey($("key").value);
  if (!wrong) return;
  event.preventDefault();
  sayOfKey(wrong);
}

// ------------------------------------------------------------ begin

async function modelOf() {
  for (;;) {
    try {
      return (await getJson("v1/models")).data[0];
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      $("health").textContent = error.message;
      await pause(2);
    }
  }
}

/** A key that is held down presses a button once. */
function pressOnce(event) {
  const isPressed = event.key === "Enter" && event.target.closest("button, a, input, summary, canvas");
  if (event.repeat && isPressed) event.preventDefault();
}

document.addEventListener("keydown", pressOnce, { capture: true });
$("key-form").addEventListener("submit", checkKey);
$("key").addEventListener("input", () => sayOfKey(""));
onLocked(askForKey);
installViewer();
const model = await modelOf();
$("model").textContent = model.id;
lanes = new Lanes($("lanes"), $("tip"), activity, {
  promptOf: (number) => cards.get(number)?.work.prompt,
  onHover: light,
  onPick: pick,
  onFrame: showLoad,
  say: (text) => announcer.say(text),
});
works = new Works(model, {
  onNew: addCard,
  onChange: changed,
  onDropped: dropCard,
  onRefused: (order, problem) => form.refuse(order, problem),
});
form = new Form(model.limits, (order) => works.draw(order));
showExamples(model.limits.media);
showTools();
$("window").addEventListener("change", () => (lanes.window = Number($("window").value)));
$("clear").addEventListener("click", () => {
  works.all.filter((work) => work.ended).forEach(removeCard);
  showTools();
});
$("cancel-all").addEventListener("click", () => works.unfinished.forEach((work) => works.cancel(work)));
if (hasKey()) installReader();
works.restore({ everybody: new URLSearchParams(location.search).has("all") });
watchActivity();
watchHealth();
