// The Vercel AI SDK (npm: ai, @ai-sdk/openai) at work on a server: node vercel_session.mjs ADDRESS MODEL
// Prints one line of JSON: what each call brought.
import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";

const [address, model] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${address}/v1`, apiKey: "none" });
const kind = (image) => `${image.mediaType} ${Buffer.from(image.uint8Array).subarray(1, 4).toString("latin1")}`;
const told = {};

const drawn = await generateImage({ model: openai.image(model), prompt: "a red apple", n: 2, size: "128x128" });
told.generated = drawn.images.map(kind);

const asked = { quality: "high", background: "opaque", style: "vivid", moderation: "low", user: "me" };
const fine = await generateImage({
  model: openai.image(model), prompt: "a red apple", providerOptions: { openai: asked },
});
told.options = fine.images.map(kind);
told.warnings = fine.warnings.length;

const picture = drawn.images[0].uint8Array;
const edited = await generateImage({
  model: openai.image(model),
  prompt: { text: "a green apple", images: [picture] },
  providerOptions: { openai: { quality: "medium", inputFidelity: "high", background: "auto" } },
});
told.edited = edited.images.map(kind);

try {
  await generateImage({ model: openai.image(model), prompt: "a red apple", size: "7x7", maxRetries: 0 });
} catch (error) {
  told.refused = `${error.statusCode} ${error.message}`;
}
console.log(JSON.stringify(told));
