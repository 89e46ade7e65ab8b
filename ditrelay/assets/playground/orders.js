// What is sent to the server for an order, `{kind, prompt, count, seed, width, height, body, image}`.

const PREVIEWS = 3;
const ORDER_SECONDS = 120; // until the server has taken an order, a picture to start from included

/** The request for `count` pictures, of which the first has number `first` in the order. */
export function picturesOf(order, count, first, { previews }) {
  // By address: the page fetches what it shows. The answer comes at once, with the jobs, which go on by themselves.
  const body = { ...order.body, n: count, response_format: "url" };
  if (order.seed !== null) body.seed = order.seed + BigInt(first);
  if (previews) body.partial_images = PREVIEWS;
  const how = { method: "POST", headers: { Prefer: "respond-async" }, timeout: ORDER_SECONDS };
  if (!order.image) return ["v1/images/generations", { ...how, body }];
  return ["v1/images/edits", { ...how, body: formOf({ ...body, image: order.image }) }];
}

/** The request for clip number `index` of an order. Sent twice, it is one clip all the same. */
export function clipOf(order, index) {
  const body = order.seed === null ? order.body : { ...order.body, seed: order.seed + BigInt(index) };
  const headers = { "Idempotency-Key": randomName() };
  const sent = order.image ? formOf({ ...body, input_reference: order.image }) : body;
  return ["v1/videos", { method: "POST", headers, timeout: ORDER_SECONDS, body: sent }];
}

/** (`crypto.randomUUID` is only there over HTTPS and on the machine itself.) */
function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function formOf(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return form;
}

export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}

export function fileName(prompt, seed, suffix) {
  const words = prompt.toLowerCase().normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48);
  return `${words.replace(/^-|-$/g, "") || "picture"}-${seed}.${suffix}`;
}
