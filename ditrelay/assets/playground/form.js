// The order: the prompt and the settings that the model takes.

import { FieldErrors } from "./field_errors.js";

const $ = (id) => document.getElementById(id);
const SHAPES = [
  ["Square", 1], ["Landscape 3:2", 3 / 2], ["Portrait 2:3", 2 / 3], ["Wide 16:9", 16 / 9], ["Tall 9:16", 9 / 16],
];
// The fields of this form by the names that the server has for them.
const FIELDS = { n: "count", input_reference: "image", num_frames: "seconds" };
const SIDES = ["width", "height"];
const NUMBERS = ["num_inference_steps", "guidance_scale"];
const UPLOAD_TOO_LARGE = 413;

export class Form {
  /** @param limits: of the model (`/v1/models`). @param onOrder: called with each order. */
  constructor(limits, onOrder) {
    Object.assign(this, { limits, onOrder });
    this.isVideo = limits.media === "video";
    this.image = null;
    this.errors = new FieldErrors();
    this.#showFields();
    this.#setShapes();
    this.#setDefaults();
    $("order").addEventListener("submit", (event) => this.#submit(event));
    $("order").addEventListener("input", (event) => this.#edited(event.target));
    $("prompt").addEventListener("keydown", (event) => this.#key(event));
    $("shape").addEventListener("change", () => ($("custom").hidden = $("shape").value !== "custom"));
    $("image").addEventListener("change", () => this.startFrom($("image").files[0] ?? null));
    $("image-clear").addEventListener("click", () => this.startFrom(null));
    $("settings").open = matchMedia("(min-width: 760px)").matches;
    this.#summarize();
  }

  /** A picture (`File`) to start from, or none. */
  startFrom(file) {
    this.image = file;
    $("image-clear").hidden = !file;
    if (!file) $("image").value = "";
    else if ($("image").files[0] !== file) {
      const list = new DataTransfer();
      list.items.add(file);
      $("image").files = list.files;
    }
    $("strength").closest(".field").hidden = !file || !this.limits.default_strength; // 0: it has none
    this.#edited($("image"));
  }

  /**
   * Say at its field what is wrong with an order, where the form still holds that order. Returns whether it does: what
   * has been changed meanwhile is not at fault.
   */
  refuse(order, problem) {
    if (order.form !== this.#written()) return false;
    this.errors.say(problem.message, this.#inputsOf(problem));
    return true;
  }

  /** Fill in what drew `work`. */
  fill(work) {
    $("prompt").value = work.prompt;
    $("seed").value = work.seed ?? "";
    this.#edited($("prompt"));
    this.#edited($("seed"));
    $("prompt").focus();
  }

  // ------------------------------------------------------------ fields

  #showFields() {
    const { limits } = this;
    const shown = {
      video: this.isVideo, guidance: limits.guidance, negative: limits.negative_prompt,
      start: limits.needs_image || limits.edits, strength: false,
    };
    for (const field of document.querySelectorAll("[data-if]")) field.hidden = !shown[field.dataset.if];
    if (this.isVideo) {
      $("count-label").textContent = "Clips";
      $("draw").textContent = "Make";
      $("order").setAttribute("aria-label", "New clip");
    }
    $("prompt").placeholder = this.isVideo ? "Say what the clip shows" : "Say what to draw";
  }

  #setShapes() {
    const seen = new Set();
    for (const [name, ratio] of SHAPES) {
      const [width, height] = this.#sized(ratio);
      if (seen.has(`${width}x${height}`)) continue;
      seen.add(`${width}x${height}`);
      $("shape").add(new Option(`${name} (${width} × ${height})`, `${width}x${height}`));
    }
    const { size } = this.limits;
    const usual = `${size.default_width}x${size.default_height}`;
    const title = `Usual (${size.default_width} × ${size.default_height})`;
    if (!seen.has(usual)) $("shape").add(new Option(title, usual), 0);
    if (size.multiple < size.max_side) $("shape").add(new Option("Custom", "custom")); // else there is but one size
    $("shape").value = usual;
  }

  /** A size of that ratio with about as many pixels as the model's default has. */
  #sized(ratio) {
    const { multiple, max_side: side, max_pixels: pixels, default_width, default_height } = this.limits.size;
    const nearest = (length) => Math.max(multiple, Math.round(length / multiple) * multiple);
    const fit = (length) => Math.min(side - (side % multiple), nearest(length));
    const area = Math.min(default_width * default_height, pixels);
    let [across, up] = [fit(Math.sqrt(area * ratio)), fit(Math.sqrt(area / ratio))];
    while (across * up > pixels && Math.max(across, up) > multiple) {
      if (across > up) across -= multiple;
      else up -= multiple;
    }
    return [across, up];
  }

  #setDefaults() {
    const { limits } = this;
    const { multiple, max_side: side, default_width: width, default_height: height } = limits.size;
    const sides = { min: multiple, step: multiple, max: side };
    Object.assign($("width"), { ...sides, value: width, placeholder: width });
    Object.assign($("height"), { ...sides, value: height, placeholder: height });
    const steps = { min: limits.min_steps, max: limits.max_steps, placeholder: limits.default_steps };
    Object.assign($("num_inference_steps"), steps);
    const guidance = { max: limits.max_guidance_scale, placeholder: limits.default_guidance_scale };
    Object.assign($("guidance_scale"), guidance);
    $("prompt").maxLength = limits.max_prompt_chars;
    if (limits.default_strength) $("strength").value = limits.default_strength;
    if (!limits.clip) return;
    const { fps, max_num_frames: frames, default_num_frames: usual } = limits.clip;
    Object.assign($("seconds"), { placeholder: (usual / fps).toFixed(1), max: frames / fps });
  }

  get #isCustom() {
    return $("shape").value === "custom";
  }

  #size() {
    const typed = () => SIDES.map((side) => $(side).value || $(side).placeholder);
    const sides = this.#isCustom ? typed() : $("shape").value.split("x");
    const [width, height] = sides.map(Number);
    return { width, height };
  }

  #summarize() {
    const { width, height } = this.#size();
    const steps = $("num_inference_steps").value || $("num_inference_steps").placeholder;
    const count = Number($("count").value) > 1 ? ` · ${$("count").value} at once` : "";
    const seed = $("seed").value ? ` · seed ${$("seed").value}` : "";
    $("summary").textContent = `${width} × ${height} · ${steps} steps${seed}${count}`;
  }

  /** What was said of `input` is said no longer; another shape puts an end to what was said of the sides, too. */
  #edited(input) {
    this.#summarize();
    this.errors.edited(input === $("shape") ? [input, ...SIDES.map($)] : [input]);
  }

  // ------------------------------------------------------------ what is wrong

  /** What the page can tell by itself; the server says the rest. */
  #wrong(prompt) {
    if (!prompt) return { message: "Say what to draw.", inputs: [$("prompt")] };
    if (this.limits.needs_image && !this.image) {
      return { message: "This model starts from a picture: choose one.", inputs: [$("image")] };
    }
    for (const input of $("order").querySelectorAll("input[type=number]")) {
      if (input.closest("[hidden]") || input.validity.valid) continue;
      return { message: `${input.labels[0].textContent.trim()}: ${input.validationMessage}`, inputs: [input] };
    }
    const [{ width, height }, { max_pixels: most }] = [this.#size(), this.limits.size];
    if (!this.#isCustom || width * height <= most) return null;
    const message = `${width} × ${height} is ${width * height} pixels; at most ${most} are allowed.`;
    return { message, inputs: SIDES.map($) };
  }

  /** The inputs that a problem of the server's is about; none: the order as a whole. */
  #inputsOf({ param, status, message }) {
    if (SIDES.includes(param) || param === "size") return this.#sidesOf(param, message);
    if (status === UPLOAD_TOO_LARGE && this.image) return [$("image")];
    const input = $(FIELDS[param] ?? param);
    return input?.closest("#order") && !input.closest("[hidden]") ? [input] : [];
  }

  #sidesOf(param, message) {
    if (!this.#isCustom) return [$("shape")];
    const isNamed = (side) => param === side || (param === "size" && new RegExp(`\\b${side}\\b`).test(message));
    const named = SIDES.filter(isNamed);
    return (named.length ? named : SIDES).map($);
  }

  // ------------------------------------------------------------ the order

  #key(event) {
    const isOfAnInputMethod = event.isComposing || event.keyCode === 229; // which ends a word by Enter
    if (event.key !== "Enter" || event.shiftKey || isOfAnInputMethod) return;
    event.preventDefault();
    if (!event.repeat) $("order").requestSubmit(); // held down, it is still one order
  }

  /** Order `prompt` with the settings as they are, or say what is wrong. Returns whether it is ordered. */
  ask(prompt) {
    const wrong = this.#wrong(prompt);
    if (wrong) this.errors.say(wrong.message, wrong.inputs);
    else {
      this.errors.unsay();
      this.onOrder({ ...this.order(prompt), form: this.#written() });
    }
    return !wrong;
  }

  #submit(event) {
    event.preventDefault();
    if (!this.ask($("prompt").value.trim())) return;
    if (matchMedia("(pointer: coarse)").matches) $("prompt").blur(); // its keyboard would cover the page
    else $("prompt").select();
  }

  /** All that is in the form, to tell whether it has been changed. */
  #written() {
    const inputs = [...$("order").querySelectorAll("textarea, input:not([type=file]), select")];
    const { name, size, lastModified } = this.image ?? {};
    return JSON.stringify([...inputs.map((input) => input.value), name, size, lastModified]);
  }

  /** An order of `prompt` with the settings as they are. */
  order(prompt) {
    const { width, height } = this.#size();
    // A side that is wrong is named by the server where it was given by itself, which only pictures can.
    const size = this.#isCustom && !this.isVideo ? { width, height } : { size: `${width}x${height}` };
    const body = { prompt, ...size };
    for (const name of NUMBERS) if ($(name).value && !$(name).closest("[hidden]")) body[name] = Number($(name).value);
    const negative = $("negative_prompt").value.trim();
    if (negative && this.limits.negative_prompt) body.negative_prompt = negative;
    if (this.isVideo && $("seconds").value) body.seconds = Number($("seconds").value);
    if ($("strength").value && !$("strength").closest("[hidden]")) body.strength = Number($("strength").value);
    return {
      kind: this.isVideo ? "video" : "image", prompt, width, height, body,
      count: Number($("count").value) || 1,
      seed: $("seed").value === "" ? null : wholeOf($("seed").value),
      image: this.image,
    };
  }
}

/** What the field has may be written `1e3`, too. */
const wholeOf = (text) => BigInt(/^-?\d+$/.test(text) ? text : Math.trunc(Number(text)));
