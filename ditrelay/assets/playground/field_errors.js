// What is wrong with the order, said at the field that is wrong: one thing at a time.

const $ = (id) => document.getElementById(id);

export class FieldErrors {
  #wrong = []; // the inputs that are marked

  /** Say `message` at the first of `inputs` and mark them all; without any it is said below the prompt. */
  say(message, inputs) {
    this.unsay();
    this.#wrong = inputs;
    const [first] = inputs;
    const field = first?.closest(".field");
    if (field) {
      $("settings").open = true;
      field.append($("order-error"));
    }
    for (const input of inputs) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-errormessage", "order-error");
    }
    $("order-error").textContent = message; // after it has moved: then it is read out
    first?.focus();
  }

  /** One of `inputs` has been changed: what was said of it, or of no input, is said no longer. */
  edited(inputs) {
    if (!this.#wrong.length || inputs.some((input) => this.#wrong.includes(input))) this.unsay();
  }

  unsay() {
    for (const each of this.#wrong) {
      for (const name of ["aria-invalid", "aria-errormessage"]) each.removeAttribute(name);
    }
    this.#wrong = [];
    $("order-error").textContent = "";
    $("ask").after($("order-error"));
  }
}
