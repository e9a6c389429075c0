"use strict";
// One square per chunk, by data set. Tab reaches the map once; arrow keys walk through it.

const STATES = {
  done: "done", running: "running", half: "half trained", failed: "failed", superseded: "superseded", waiting: "waiting",
};

class ChunkMap {
  constructor({ root, legend, facts }) {
    Object.assign(this, { root, legend, facts });
    this.squares = new Map();
    this.chosen = null;
    this.names = "";
    root.addEventListener("keydown", (event) => this.walk(event));
    root.addEventListener("pointerover", (event) => this.tell(event.target));
    root.addEventListener("pointerleave", () => this.tell(this.squares.get(this.chosen)?.button));
    root.addEventListener("focusin", (event) => this.tell(event.target));
    root.addEventListener("click", (event) => this.choose(event.target));
  }

  show(groups) {
    const names = JSON.stringify(groups.map((group) => group.chunks.map((chunk) => chunk.name)));
    if (names !== this.names) this.build(groups);
    this.names = names;
    const counts = {};
    for (const chunk of groups.flatMap((group) => group.chunks)) {
      const { button } = this.squares.get(chunk.name);
      this.squares.get(chunk.name).chunk = chunk;
      button.dataset.state = chunk.state;
      button.style.setProperty("--share", `${100 * chunk.fraction}%`);
      button.setAttribute("aria-label", `${chunk.name}, ${STATES[chunk.state]}`);
      button.title = this.words(chunk).map(([title, text]) => (title ? `${title}: ${text}` : text)).join("\n");
      counts[chunk.state] = (counts[chunk.state] || 0) + 1;
    }
    this.legend.replaceChildren(...Object.keys(STATES).filter((state) => counts[state]).map((state) => element(
      "li", {}, element("span", { class: "square", "data-state": state, style: "--share: 50%" }), `${STATES[state]} ${counts[state].toLocaleString("en-US")}`,
    )));
    groups.forEach((group, number) => {
      const done = group.chunks.filter((chunk) => chunk.state === "done").length;
      this.root.children[number].querySelector("h3").textContent = `${group.name}  ${done} / ${group.chunks.length}`;
    });
    this.tell(this.squares.get(this.chosen)?.button);
  }

  build(groups) {
    this.squares.clear();
    this.root.replaceChildren(...groups.map((group) => {
      const squares = group.chunks.map((chunk) => {
        const button = element("button", { type: "button", class: "square", tabindex: "-1", "aria-pressed": "false" });
        button.chunkName = chunk.name;
        this.squares.set(chunk.name, { button, chunk });
        return button;
      });
      return element("div", { class: "group" }, element("h3"), element("div", { class: "squares" }, ...squares));
    }));
    const first = this.squares.values().next().value;
    if (first) first.button.tabIndex = 0;
  }

  words(chunk) {
    return [["", `${chunk.name} (${STATES[chunk.state]})`], ...Object.entries(chunk.facts)];
  }

  tell(target) {
    const found = target && this.squares.get(target.chunkName);
    if (!found) {
      if (!this.chosen) this.facts.replaceChildren(element("div", { class: "quiet" }, element("dt", {}, "Point at a square, or choose one.")));
      return;
    }
    this.facts.replaceChildren(...this.words(found.chunk).map(([title, text]) => (
      title ? element("div", {}, element("dt", {}, title), element("dd", {}, text)) : element("div", { class: "whole" }, element("dt", {}, text))
    )));
  }

  choose(target) {
    if (!this.squares.has(target.chunkName)) return;
    this.squares.get(this.chosen)?.button.setAttribute("aria-pressed", "false");
    this.chosen = this.chosen === target.chunkName ? null : target.chunkName;
    if (this.chosen) target.setAttribute("aria-pressed", "true");
    this.tell(target);
  }

  walk(event) {
    const buttons = [...this.squares.values()].map((one) => one.button), at = buttons.indexOf(event.target);
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -at, End: buttons.length - 1 - at }[event.key] ?? this.rows(event.key, buttons, at);
    const to = buttons[at + move];
    if (at < 0 || !move || !to) return;
    event.preventDefault();
    buttons[at].tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  /** How many squares to go for one row up or down: to the nearest one of the next row. */
  rows(key, buttons, at) {
    if (key !== "ArrowDown" && key !== "ArrowUp") return 0;
    const own = buttons[at], down = key === "ArrowDown";
    const others = (down ? buttons.slice(at) : buttons.slice(0, at).reverse()).filter((one) => (down ? one.offsetTop > own.offsetTop : one.offsetTop < own.offsetTop));
    const row = others.filter((one) => one.offsetTop === others[0].offsetTop);
    row.sort((one, other) => Math.abs(one.offsetLeft - own.offsetLeft) - Math.abs(other.offsetLeft - own.offsetLeft));
    return row.length ? buttons.indexOf(row[0]) - at : 0;
  }
}
