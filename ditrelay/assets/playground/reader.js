// What the links at the foot lead to, where the server asks for a key: a link could not bring it along, this page can.

import { getBody, getJson } from "./api.js";
import { element } from "./cards.js";

const $ = (id) => document.getElementById(id);
const READERS = { docs: readApi, "v1/topology": readJson, metrics: readText };

/** From now on the links open in the page. */
export function installReader() {
  for (const link of document.querySelectorAll("footer a")) {
    const onclick = () => openReader(link.textContent, link.getAttribute("href"));
    link.replaceWith(element("button", { type: "button", className: "link", textContent: link.textContent, onclick }));
  }
  $("reader-close").addEventListener("click", () => $("reader").close());
  $("reader").addEventListener("click", (event) => event.target === $("reader") && $("reader").close());
  $("reader").addEventListener("close", () => URL.revokeObjectURL($("reader-save").href));
}

async function openReader(title, path) {
  $("reader-title").textContent = title;
  $("reader-save").hidden = true;
  $("reader-text").replaceChildren(element("p", { className: "hint", textContent: "Asking the server" }));
  $("reader").showModal();
  try {
    const { shown, text, name } = await READERS[path](path);
    $("reader-text").replaceChildren(...shown);
    const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    Object.assign($("reader-save"), { href, download: name, hidden: false });
  } catch (error) {
    $("reader-text").replaceChildren(element("p", { className: "error", textContent: error.message }));
  }
}

const pre = (text) => element("pre", { textContent: text, tabIndex: 0 }); // by keyboard it is scrolled, too

async function readText(path) {
  const text = await getBody(path, "text");
  return { shown: [pre(text)], text, name: `${path}.txt` };
}

async function readJson(path) {
  const text = JSON.stringify(await getJson(path), null, 2);
  return { shown: [pre(text)], text, name: `${path.split("/").at(-1)}.json` };
}

// ------------------------------------------------------------ the API

async function readApi() {
  const api = await getJson("openapi.json");
  const shown = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => operationOf(api, `${method.toUpperCase()} ${path}`, operation)));
  return { shown, text: JSON.stringify(api, null, 2), name: "openapi.json" };
}

function operationOf(api, name, operation) {
  const description = operation.description ?? operation.summary ?? "";
  const [first] = description.split(/\n\s*\n/);
  const summary = element("summary", {}, element("code", { textContent: name }), ` ${first}`);
  const rest = description.slice(first.length).trim();
  const about = rest ? [element("p", { className: "about", textContent: rest })] : [];
  return element("details", { className: "operation" }, summary, ...about, fieldsOf(api, operation));
}

/** The fields of its body and of its address, each with what it is for. */
function fieldsOf(api, { requestBody, parameters = [] }) {
  const body = Object.values(requestBody?.content ?? {}).map(({ schema }) => resolved(api, schema))[0];
  const ofBody = Object.entries(body?.properties ?? {});
  const fields = [...parameters.map((each) => [each.name, { ...each.schema, ...each }]), ...ofBody];
  return element("dl", {}, ...fields.flatMap(([name, field]) => [
    element("dt", { textContent: name }), element("dd", { textContent: inWords(field) }),
  ]));
}

function resolved(api, schema = {}) {
  return schema.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

function inWords(field) {
  const kindsOf = (each) => each.enum?.join(" | ") ?? each.const ?? each.type ?? [];
  const kinds = [field, ...(field.anyOf ?? [])].flatMap(kindsOf);
  return [kinds.filter((kind) => kind !== "null").join(" or "), field.description].filter(Boolean).join(": ");
}
