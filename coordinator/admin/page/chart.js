// A line chart as SVG: curves over rounds, quartile bands, a cross-hair. Colours come from style.css,
// so that dark mode needs no redrawing.

import { element } from "./format.js";

const SPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 200;
const MARGIN = { top: 8, right: 8, bottom: 22, left: 52 };

function svg(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

function extent(values, zero) {
  let low = zero ? 0 : Infinity;
  let high = zero ? 0 : -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low === high) [low, high] = [low - (zero ? 0 : 0.5), high + 0.5];
  const room = (high - low) * 0.06;
  return [zero ? 0 : low - room, high + room];
}

export class Chart {
  // curves: [{label, kind: "one" | "two" | "three", points: [{x, y, low?, high?}]}], sorted by x
  constructor(host, { title, format, tick = format, zero = false, counts = false, empty }) {
    Object.assign(this, { title, format, tick, zero, counts });
    this.caption = element("figcaption");
    this.plot = svg("svg", { class: "plot", role: "img" });
    this.tip = element("div", { class: "tip", hidden: true });
    this.empty = element("p", { class: "empty" }, empty);
    host.append(this.caption, this.plot, this.empty, this.tip);
    this.curves = [];
    this.faults = [];
    this.pointed = null; // where the pointer is, so that what it shows outlasts a redrawing
    new ResizeObserver(() => this.draw()).observe(host);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX));
    this.plot.addEventListener("pointerleave", () => this.unpoint());
  }

  show(curves, faults = []) {
    this.curves = curves.filter((curve) => curve.points.length);
    this.faults = faults;
    this.draw();
  }

  draw() {
    const shown = this.curves.length > 0;
    this.plot.toggleAttribute("hidden", !shown);
    this.empty.hidden = shown;
    this.caption.replaceChildren(element("h2", {}, this.title), ...this.curves.map((c) => this.key(c)));
    if (this.faults.length) {
      this.caption.append(element("span", { class: "key fault" }, "abandoned ", element("b", {}, String(this.faults.length))));
    }
    const pointed = this.pointed;
    this.unpoint();
    if (!shown) return;
    const width = this.plot.clientWidth || 500;
    const points = this.curves.flatMap((curve) => curve.points);
    // Rounds that failed after the last good one belong to it: they are why an operator looks.
    const all = [...points.map((p) => p.x), ...this.faults];
    const [first, last] = all.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [all[0], all[0]]);
    const ys = extent(points.flatMap((p) => (p.low === undefined ? [p.y] : [p.y, p.low, p.high])), this.zero);
    const right = width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    const span = first === last ? extent([first], false) : [first, last];
    this.x = (value) => MARGIN.left + ((value - span[0]) / (span[1] - span[0])) * (right - MARGIN.left);
    this.y = (value) => bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (bottom - MARGIN.top);
    const parts = [];
    for (const tick of ticks(ys[0], ys[1], 5)) {
      if (this.counts && !Number.isInteger(tick)) continue;
      const y = this.y(tick);
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }));
      parts.push(svg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, this.tick(tick)));
    }
    for (const tick of ticks(span[0], span[1], Math.max(2, Math.floor(width / 80)))) {
      if (!Number.isInteger(tick)) continue;
      const x = this.x(tick);
      const anchor = x > right - 12 ? "end" : "middle";
      parts.push(svg("text", { x, y: HEIGHT - 5, "text-anchor": anchor }, String(tick)));
    }
    parts.push(svg("text", { x: MARGIN.left - 8, y: HEIGHT - 5, "text-anchor": "end" }, "round"));
    parts.push(svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    for (const curve of this.curves) parts.push(...this.strokes(curve));
    for (const fault of this.faults) {
      const x = this.x(fault);
      parts.push(svg("path", { class: "fault", d: `M${x - 4},${bottom} h8 l-4,-7 z` }));
    }
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.setAttribute("aria-label", this.spoken());
    this.plot.replaceChildren(...parts);
    if (pointed !== null) this.point(pointed);
  }

  strokes(curve) {
    const at = (x, y) => `${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`;
    const line = curve.points.map((p) => at(p.x, p.y)).join("L");
    const parts = [];
    const banded = curve.points.filter((p) => p.low !== undefined);
    if (banded.length > 1) {
      const over = banded.map((p) => at(p.x, p.high));
      const under = banded.map((p) => at(p.x, p.low)).reverse();
      parts.push(svg("path", { class: `band ${curve.kind}`, d: `M${[...over, ...under].join("L")}Z` }));
    }
    parts.push(svg("path", { class: `curve ${curve.kind}`, d: `M${line}` }));
    if (curve.points.length === 1) parts.push(this.dot(curve, curve.points[0]));
    return parts;
  }

  dot(curve, point) {
    return svg("circle", { class: `dot ${curve.kind}`, cx: this.x(point.x), cy: this.y(point.y), r: 4.5 });
  }

  key(curve) {
    const last = element("b", {}, this.format(curve.points.at(-1).y));
    return element("span", { class: `key ${curve.kind}` }, `${curve.label} `, last);
  }

  spoken() {
    const said = this.curves.map((c) => `${c.label} ${this.format(c.points.at(-1).y)}`);
    const failed = this.faults.length ? `; abandoned ${this.faults.length}` : "";
    return `${this.title} over rounds; last: ${said.join(", ")}${failed}`;
  }

  point(clientX) {
    if (!this.curves.length) return;
    const box = this.plot.getBoundingClientRect();
    const at = clientX - box.left;
    const nearest = (points) =>
      points.reduce((a, b) => (Math.abs(this.x(b.x) - at) < Math.abs(this.x(a.x) - at) ? b : a));
    const chosen = nearest([...this.curves.flatMap((curve) => curve.points), ...this.faults.map((x) => ({ x }))]).x;
    const here = this.curves
      .map((curve) => [curve, curve.points.find((p) => p.x === chosen)])
      .filter(([, point]) => point);
    this.unpoint();
    this.pointed = clientX;
    const x = this.x(chosen);
    const mark = svg("g", { "data-mark": "" });
    mark.append(svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    mark.append(...here.map(([curve, point]) => this.dot(curve, point)));
    this.plot.append(mark);
    const lines = here.map(([curve, p]) => element("div", {}, `${curve.label} ${this.format(p.y)}`));
    if (this.faults.includes(chosen)) lines.push(element("div", {}, here.length ? "abandoned before" : "abandoned"));
    this.tip.replaceChildren(element("strong", {}, `Round ${chosen}`), ...lines);
    this.tip.hidden = false;
    // An SVG has no offsetLeft: where it lies in the host is the difference of two boxes.
    const host = this.tip.offsetParent.getBoundingClientRect();
    const left = box.left - host.left + x + 12;
    const flip = x + 12 + this.tip.offsetWidth > box.width;
    const shift = flip ? left - 24 - this.tip.offsetWidth : left;
    this.tip.style.transform = `translate(${Math.max(0, shift)}px, ${box.top - host.top + 8}px)`;
  }

  unpoint() {
    this.pointed = null;
    this.tip.hidden = true;
    this.plot.querySelector("[data-mark]")?.remove();
  }
}
