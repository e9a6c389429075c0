"use strict";
// Previews over time: a strip of one prompt's pictures, and two steps side by side.

class PreviewPanel {
  constructor(find) {
    this.section = find("preview-section");
    this.film = find("film");
    this.prompt = find("prompt");
    this.text = find("prompt-text");
    this.sides = { left: find("left"), right: find("right") };
    this.pictures = { left: find("left-picture"), right: find("right-picture") };
    this.known = "";
    this.next = "left";
    this.prompt.addEventListener("change", () => this.build());
    for (const side of ["left", "right"]) this.sides[side].addEventListener("change", () => this.compare());
  }

  show(data) {
    const known = JSON.stringify(data);
    if (known === this.known) return;
    const isFollowing = !this.known || this.sides.right.selectedIndex === this.sides.right.options.length - 1;
    this.known = known;
    this.data = data;
    this.section.classList.toggle("nothing", !data.steps.length);
    if (!data.steps.length) {
      this.text.textContent = "No previews were drawn yet. What is drawn, and when, is set in [preview] of run.toml.";
      return;
    }
    const numbers = [...new Set(data.steps.flatMap((step) => Object.keys(step.pictures)))].sort();
    const chosen = numbers.includes(this.prompt.value) ? this.prompt.value : numbers[0];
    this.prompt.replaceChildren(...numbers.map((number) => {
      const newest = data.steps.findLast((step) => step.pictures[number]);
      const text = data.texts[newest.pictures[number].text].split("\n")[0];
      return element("option", { value: number }, `${Number(number) + 1}: ${text.length > 60 ? text.slice(0, 60) + "…" : text}`);
    }));
    this.prompt.value = chosen;
    this.build(isFollowing);
  }

  build(isFollowing = true) {
    const before = { left: this.sides.left.value, right: this.sides.right.value };
    this.steps = this.data.steps.filter((step) => step.pictures[this.prompt.value]);
    for (const side of ["left", "right"]) {
      this.sides[side].replaceChildren(...this.steps.map((step) => element("option", { value: String(step.step) }, `step ${step.step.toLocaleString("en-US")}, ${step.chunk}`)));
      const isThere = this.steps.some((step) => String(step.step) === before[side]);
      this.sides[side].selectedIndex = side === "left" ? 0 : this.steps.length - 1;
      if (isThere && !(side === "right" && isFollowing)) this.sides[side].value = before[side];
    }
    this.film.replaceChildren(...this.steps.map((step) => {
      const image = small(step.pictures[this.prompt.value]);
      const button = element("button", { type: "button", title: step.chunk }, image, step.step.toLocaleString("en-US"));
      button.addEventListener("click", () => this.take(step));
      return button;
    }));
    this.film.scrollLeft = this.film.scrollWidth;
    this.compare();
  }

  /** Put a picture of the strip on the left, the next one that is chosen on the right, and so on. */
  take(step) {
    this.sides[this.next].value = String(step.step);
    this.next = this.next === "left" ? "right" : "left";
    this.compare();
  }

  compare() {
    for (const button of this.film.children) delete button.dataset.side;
    const texts = [];
    for (const side of ["left", "right"]) {
      const step = this.steps[this.sides[side].selectedIndex];
      if (!step) continue;
      const picture = step.pictures[this.prompt.value], text = this.data.texts[picture.text];
      this.pictures[side].src = source(picture);
      this.pictures[side].alt = `Preview at step ${step.step}: ${text.split("\n")[0]}`;
      this.film.children[this.sides[side].selectedIndex].dataset.side = side;
      if (!texts.includes(text)) texts.push(text);
    }
    this.text.textContent = texts.join("\n\n") || "These pictures do not say how they were made.";
  }
}

/** A small picture that takes its place before it is there. */
function small(picture) {
  const width = String(Math.round((96 * picture.width) / picture.height));
  return element("img", { loading: "lazy", alt: "", width, height: "96", src: source(picture, 160) });
}

/** Where a picture is: inside the page, or at the server, small when `height` is given. */
function source(picture, height) {
  if (picture.data) return picture.data;
  const path = picture.path.split("/").map(encodeURIComponent).join("/");
  return `picture/${path}${height ? `?height=${height}` : ""}`;
}
