"use strict";
// Curves on canvas: a band from least to most, the mean, and the smoothed mean; one cross hair for all charts.

const CHARTS = [
  { title: "Loss", of: ["train/loss"], smooth: true },
  { title: "Validation loss", of: ["validation/loss"], dots: true },
  { title: "Learning rate", of: "lr/" },
  { title: "Gradient norm", of: ["train/grad_norm"], smooth: true, fromZero: true },
  { title: "Images per second", of: ["speed/images_per_second"], smooth: true, fromZero: true },
  { title: "Waiting for data", of: ["data/wait_fraction"], smooth: true, fromZero: true, percent: true },
];
const COLOURS = ["--blue", "--red", "--green", "--violet"];
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
const LEFT = 52, BOTTOM = 22, TOP = 6, RIGHT = 6;

/** Numbers as people read them: 0.104, 1.2e-5, 44,100, 1.5M. */
function shown(value, percent) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  if (percent) return (100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0) + " %";
  const size = Math.abs(value);
  if (size >= 1e7) return (value / 1e6).toFixed(1) + "M";
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(4));
}

/** Ticks at 1, 2 or 5 times a power of ten. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(+value.toPrecision(12));
  return found;
}

/** Exponential mean over about `width` points, from both sides, so that it does not lag; gaps stay gaps. */
function smoothed(values, width) {
  const keep = width / (width + 1), once = (list) => {
    let sum = 0, weight = 0;
    return list.map((value) => {
      if (value === null) return null;
      sum = keep * sum + value;
      weight = keep * weight + 1;
      return sum / weight;
    });
  };
  const there = once(values), back = once([...values].reverse()).reverse();
  return values.map((value, index) => (value === null ? null : (there[index] + back[index]) / 2));
}

class Chart {
  constructor(definition, board) {
    this.definition = definition;
    this.board = board;
    this.root = element("div", { class: "chart" });
    this.readout = element("output");
    this.names = element("div", { class: "names" });
    this.canvas = element("canvas", { tabindex: "0", role: "img" });
    const head = element("div", { class: "head" }, element("h3", {}, definition.title), this.readout);
    this.root.append(head, this.canvas, this.names);
    this.canvas.addEventListener("pointermove", (event) => board.point(this.indexAt(event.offsetX)));
    this.canvas.addEventListener("pointerdown", (event) => board.point(this.indexAt(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => board.point(null));
    this.canvas.addEventListener("blur", () => board.point(null));
    this.canvas.addEventListener("keydown", (event) => board.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  get series() {
    const { of } = this.definition, curves = this.board.data.curves;
    const names = typeof of === "string" ? Object.keys(curves).filter((name) => name.startsWith(of)) : of;
    return names.filter((name) => curves[name]).map((name) => ({ name, ...curves[name] }));
  }

  get x() { return this.board.data.x[this.board.axis]; }

  indexAt(offset) {
    const x = this.x;
    if (!x.length) return null;
    const [low, high] = [x[0], x[x.length - 1]];
    const value = low + ((offset - LEFT) / Math.max(this.canvas.clientWidth - LEFT - RIGHT, 1)) * (high - low);
    let best = 0;
    x.forEach((one, index) => { if (Math.abs(one - value) < Math.abs(x[best] - value)) best = index; });
    return best;
  }

  limits(series) {
    const known = series.flatMap((one) => one.mean).filter((value) => value !== null);
    let low = Math.min(...known), high = Math.max(...known);
    const room = (high - low) * 0.35;
    const extremes = (name, pick) => pick(...series.flatMap((one) => one[name]).filter((value) => value !== null));
    low = Math.max(extremes("least", Math.min), low - room);
    high = Math.min(extremes("most", Math.max), high + room);
    if (this.definition.fromZero) low = Math.min(low, 0);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    const margin = (high - low) * 0.04;
    return [this.definition.fromZero && low === 0 ? 0 : low - margin, high + margin];
  }

  draw() {
    const { canvas, board } = this, series = this.series, x = this.x, style = getComputedStyle(canvas);
    const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    const colour = (name) => style.getPropertyValue(name).trim();
    this.root.hidden = !series.length && Boolean(x.length);
    if (!series.length) {
      pen.fillStyle = colour("--quiet");
      pen.fillText("no steps yet", LEFT, height / 2);
      return;
    }
    const [low, high] = this.limits(series), first = x[0], last = x[x.length - 1];
    const toX = (value) => LEFT + ((value - first) / Math.max(last - first, 1e-9)) * (width - LEFT - RIGHT);
    const toY = (value) => TOP + (1 - (value - low) / (high - low)) * (height - TOP - BOTTOM);
    this.drawGrid(pen, colour, { low, high, first, last, width, height, toX, toY });
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP - 1, width - LEFT - RIGHT, height - TOP - BOTTOM + 2);
    pen.clip();
    series.forEach((one, number) => this.drawSeries(pen, one, colour(COLOURS[number % 4]), DASHES[number % 4], toX, toY));
    pen.restore();
    this.drawMarks(pen, colour, toX, height - BOTTOM);
    if (board.index !== null) this.drawHair(pen, colour, series, toX, toY, height);
    this.tell(series);
  }

  drawGrid(pen, colour, { low, high, first, last, width, height, toX, toY }) {
    pen.lineWidth = 1;
    pen.strokeStyle = colour("--grid");
    pen.fillStyle = colour("--quiet");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const tick of ticks(low, high, 5)) {
      pen.beginPath(); pen.moveTo(LEFT, toY(tick)); pen.lineTo(width - RIGHT, toY(tick)); pen.stroke();
      pen.fillText(shown(tick, this.definition.percent), LEFT - 6, toY(tick));
    }
    pen.textBaseline = "top";
    pen.textAlign = "center";
    if (last === first) { pen.fillText(shown(first), LEFT + (width - LEFT) / 2, height - BOTTOM + 7); return; }
    for (const tick of ticks(first, last, Math.floor((width - LEFT) / 95))) {
      const half = pen.measureText(shown(tick)).width / 2;
      if (toX(tick) + half <= width) pen.fillText(shown(tick), toX(tick), height - BOTTOM + 7);
    }
  }

  drawSeries(pen, one, colour, dash, toX, toY) {
    const x = this.x, line = (values) => {
      pen.beginPath();
      values.forEach((value, index) => { if (value !== null) pen.lineTo(toX(x[index]), toY(value)); });
      pen.stroke();
    };
    const known = x.map((_, index) => index).filter((index) => one.least[index] !== null);
    pen.fillStyle = pen.strokeStyle = colour;
    pen.globalAlpha = 0.2;
    pen.beginPath();
    known.forEach((index) => pen.lineTo(toX(x[index]), toY(one.most[index])));
    known.reverse().forEach((index) => pen.lineTo(toX(x[index]), toY(one.least[index])));
    pen.fill();
    pen.lineJoin = "round";
    if (this.definition.smooth) {
      pen.globalAlpha = 0.45;
      pen.lineWidth = 1;
      line(one.mean);
    }
    pen.globalAlpha = 1;
    pen.lineWidth = 2;
    pen.setLineDash(dash);
    line(this.definition.smooth ? smoothed(one.mean, (this.board.smoothing * x.length) / 600) : one.mean);
    pen.setLineDash([]);
    if (this.definition.dots && known.length < 80) {
      known.forEach((index) => { pen.beginPath(); pen.arc(toX(x[index]), toY(one.mean[index]), 2.5, 0, 7); pen.fill(); });
    }
  }

  drawMarks(pen, colour, toX, bottom) {
    for (const mark of this.board.data.marks) {
      const at = toX(this.board.place(mark.step));
      pen.fillStyle = colour(mark.event === "failed" || mark.event === "rolled_back" ? "--red" : "--orange");
      pen.beginPath(); pen.moveTo(at, bottom - 6); pen.lineTo(at - 4, bottom + 1); pen.lineTo(at + 4, bottom + 1); pen.fill();
    }
  }

  drawHair(pen, colour, series, toX, toY, height) {
    const index = this.board.index, at = toX(this.x[index]);
    pen.strokeStyle = colour("--quiet");
    pen.beginPath(); pen.moveTo(at, TOP); pen.lineTo(at, height - BOTTOM); pen.stroke();
    series.forEach((one, number) => {
      if (one.mean[index] === null) return;
      pen.fillStyle = colour(COLOURS[number % 4]);
      pen.beginPath(); pen.arc(at, toY(one.mean[index]), 4, 0, 7); pen.fill();
    });
  }

  /** Say in words what is drawn, for those who do not see it, and what the cross hair points at. */
  tell(series) {
    const { board, definition } = this, percent = definition.percent, last = this.x.length - 1;
    const newest = (one) => one.mean.reduce((found, value) => (value === null ? found : value), null);
    const label = (one) => (series.length > 1 ? one.name.replace(/^.*\//, "") + " " : "");
    if (board.index === null) {
      this.readout.textContent = series.map((one) => label(one) + "now " + shown(newest(one), percent)).join(", ");
    } else {
      const index = board.index, values = series.map((one) => {
        const range = series.length > 1 || one.least[index] === one.most[index] ? "" : ` (${shown(one.least[index], percent)} to ${shown(one.most[index], percent)})`;
        return label(one) + shown(one.mean[index], percent) + range;
      });
      this.readout.textContent = `${board.axis} ${shown(this.x[index])}: ${values.join(", ")}`;
    }
    const range = (one) => `${label(one)}from ${shown(one.mean.find((value) => value !== null), percent)} to ${shown(newest(one), percent)}`;
    this.canvas.setAttribute("aria-label", `${definition.title}, ${series.map(range).join("; ")}, over ${board.axis === "step" ? "steps" : "images"} ${shown(this.x[0])} to ${shown(this.x[last])}; arrow keys read values`);
    this.names.replaceChildren(...(series.length < 2 ? [] : series.map((one, number) => {
      const sample = element("i");
      sample.style.borderTopColor = `var(${COLOURS[number % 4]})`;
      sample.style.borderTopStyle = ["solid", "dashed", "dotted", "dashed"][number % 4];
      return element("span", {}, sample, one.name.replace(/^lr\//, ""));
    })));
  }
}

/** All charts with what they share: the data, the axis, the smoothing and the cross hair. */
class Board {
  constructor(root) {
    this.data = { x: { step: [], images: [] }, curves: {}, marks: [] };
    this.axis = "step";
    this.smoothing = 6;
    this.index = null;
    this.charts = CHARTS.map((definition) => new Chart(definition, this));
    root.append(...this.charts.map((chart) => chart.root));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(data) {
    this.data = data;
    if (this.index !== null) this.index = Math.min(this.index, data.x.step.length - 1);
    this.draw();
  }

  draw() { this.charts.forEach((chart) => chart.draw()); }

  point(index) {
    if (index === this.index) return;
    this.index = index;
    this.draw();
    const near = index === null ? [] : this.data.marks.filter((mark) => Math.abs(this.nearest(mark.step) - index) < 2);
    find("happened").textContent = near.map((mark) => mark.text).join(" · ");
    find("happened").hidden = !near.length;
    find("hint").hidden = Boolean(near.length);
  }

  key(event) {
    const count = this.data.x.step.length, from = this.index === null ? count - 1 : this.index;
    const to = { ArrowLeft: from - (event.shiftKey ? 20 : 1), ArrowRight: from + (event.shiftKey ? 20 : 1), Home: 0, End: count - 1, Escape: null }[event.key];
    if (to === undefined || !count) return;
    event.preventDefault();
    this.point(to === null ? null : Math.max(0, Math.min(count - 1, to)));
  }

  /** Return the number of the bin that a step lies in. */
  nearest(step) {
    const index = this.data.x.step.findIndex((one) => one >= step);
    return index < 0 ? this.data.x.step.length - 1 : index;
  }

  /** Return where a step lies on the axis that is shown. */
  place(step) {
    const steps = this.data.x.step;
    if (this.axis === "step") return Math.max(steps[0], Math.min(steps[steps.length - 1], step));
    return this.data.x.images[this.nearest(step)];
  }
}
