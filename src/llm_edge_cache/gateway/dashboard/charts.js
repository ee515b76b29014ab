"use strict";
// Charts, drawn as SVG into whatever width there is. They know of points in time and of numbers, not of caches.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 182, LEFT = 58, RIGHT = 14, TOP = 22, BOTTOM = 26;

// ---- numbers for people ----

function compact(value, thousands = 1e4) {
  if (value === 0) return "0";
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"]]) {
    if (value >= size) return significant(value / size, 3) + unit;
  }
  return value >= thousands ? `${significant(value / 1e3, 3)} k` : significant(value, 3);
}

function significant(value, digits) {
  if (value >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.05) return "< 0.1 %";
  return (value === 0 || value >= 99.95 ? value.toFixed(0) : value.toFixed(1)) + " %";
}

function many(count, what) {
  return `${compact(count)} ${what}${count === 1 ? "" : "s"}`;
}

function bytes(value) {
  for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]]) {
    if (value >= 1024 ** power) return significant(value / 1024 ** power, 3) + " " + unit;
  }
  return Math.round(value) + " B";
}

function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return significant(seconds * 1e6, 2) + " µs";
  if (seconds < 1) return significant(seconds * 1e3, 2) + " ms";
  if (seconds < 120) return significant(seconds, 3) + " s";
  if (seconds < 7200) return significant(seconds / 60, 3) + " min";
  if (seconds < 172800) return significant(seconds / 3600, 3) + " h";
  return significant(seconds / 86400, 3) + " d";
}

function clock(time, withSeconds = true) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  return new Date(time * 1000).toLocaleTimeString("en", withSeconds ? { ...options, second: "2-digit" } : options);
}

// ---- scales: where the ticks are, and how high a value stands, from 0 to 1 ----

function linearScale(top) {
  const raw = (top || 1) / 4, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= raw * 0.999) * power;
  const count = Math.max(1, Math.ceil((top || 1) / step - 1e-9));
  const ticks = Array.from({ length: count + 1 }, (_, at) => at * step);
  return { ticks, height: (value) => value / (count * step) };
}

function shareScale() {
  return { ticks: [0, 0.25, 0.5, 0.75, 1], height: (value) => value };
}

function byteScale(limit) {
  const step = 2 ** Math.ceil(Math.log2((limit || 1) / 4)), top = limit * 1.06 || 1;
  const ticks = [];
  for (let tick = 0; tick <= top; tick += step) ticks.push(tick);
  return { ticks, height: (value) => value / top };
}

function logScale(bottom, top) {
  const low = Math.floor(Math.log10(bottom) + 1e-9), high = Math.max(Math.ceil(Math.log10(top) - 1e-9), low + 1);
  const ticks = [];
  for (let power = low; power <= high; power += high - low > 5 ? 2 : 1) ticks.push(10 ** power);
  return { ticks, height: (value) => Math.max(0, (Math.log10(value) - low) / (high - low)) };
}

// ---- elements ----

function element(parent, tag, attributes = {}, text = null) {
  const made = parent.namespaceURI === SVG || tag === "svg"
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return parent.appendChild(made);
}

function figureIn(parent, id, title, note) {
  const figure = element(parent, "figure", { id });
  const caption = element(figure, "figcaption");
  element(caption, "b", {}, title);
  element(caption, "span", {}, note);
  return { figure, caption };
}

// ---- curves over time ----

// spec: id, title, note, unit (above the axis), text(value), none (said where nothing is to be seen), stacked,
//       series [{name, ink, thin, of(point) -> number or null, isShown()}], scale(largest, smallest) -> a scale,
//       isNothing(values) -> whether a curve of these shows nothing.
class TimeChart {
  constructor(parent, spec) {
    this.spec = spec;
    const { figure, caption } = figureIn(parent, spec.id, spec.title, spec.note);
    this.when = element(caption, "span", { class: "when" });
    this.svg = element(figure, "svg", { role: "img", height: HEIGHT });
    this.legend = element(figure, "ul", { class: "legend" });
    this.pointer = null;
    this.points = [];
    const follow = (event) => {
      this.pointer = event.clientX - this.svg.getBoundingClientRect().left;
      this.draw();
    };
    this.svg.addEventListener("pointermove", follow);
    this.svg.addEventListener("pointerdown", follow);
    this.svg.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
  }

  show(points, from, until) {
    Object.assign(this, { points, from, until });
    this.draw();
  }

  draw() {
    if (this.points.length === 0) return;
    const width = this.svg.clientWidth, right = width - RIGHT, bottom = HEIGHT - BOTTOM;
    this.x = (time) => LEFT + (time - this.from) / (this.until - this.from) * (right - LEFT);
    const series = this.spec.series.filter((each) => !each.isShown || each.isShown());
    const rows = series.map((each) => this.points.map((point) => each.of(point) ?? null));
    const tops = this.spec.stacked ? stack(rows) : rows;
    const known = tops.flat().filter((value) => value !== null && value > 0);
    const scale = this.spec.scale(known.reduce((a, b) => Math.max(a, b), 0), known.reduce((a, b) => Math.min(a, b), Infinity));
    this.y = (value) => bottom - scale.height(value) * (bottom - TOP);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren();
    this.drawAxes(scale.ticks, width, right, bottom);
    if (this.spec.isNothing(rows.flat().filter((value) => value !== null))) {
      element(this.svg, "text", { class: "none", x: (LEFT + right) / 2, y: (TOP + bottom) / 2, "text-anchor": "middle" }, this.spec.none);
    }
    for (let at = series.length - 1; at >= 0; at--) {
      this.drawCurve(series[at], tops[at], this.spec.stacked ? (at ? tops[at - 1] : tops[at].map(() => 0)) : null);
    }
    this.drawPointed(series, rows, tops, bottom);
  }

  drawAxes(ticks, width, right, bottom) {
    element(this.svg, "text", { x: 0, y: 12 }, this.spec.unit);
    for (const tick of ticks) {
      const y = Math.round(this.y(tick)) + 0.5;
      element(this.svg, "line", { class: tick === ticks[0] ? "axis" : "grid", x1: LEFT, x2: right, y1: y, y2: y });
      element(this.svg, "text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, this.spec.tick(tick));
    }
    const room = Math.max(1, Math.floor((right - LEFT) / 66)), span = this.until - this.from;
    const step = [5, 10, 15, 30, 60, 120, 300].find((each) => span / each <= room) || 600;
    for (let time = Math.ceil(this.from / step) * step; time <= this.until; time += step) {
      const x = Math.round(this.x(time)) + 0.5;
      element(this.svg, "line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
      const anchor = x > right - 26 ? "end" : "middle";
      element(this.svg, "text", { x: anchor === "end" ? right + RIGHT : x, y: bottom + 20, "text-anchor": anchor }, clock(time, step < 60));
    }
  }

  drawCurve(series, tops, bases) {
    let run = [];
    const close = () => {
      if (run.length === 1) run.push([run[0][0] + 1.5, run[0][1], run[0][2]]);
      if (run.length) this.drawRun(series, run, bases !== null || series.filled);
      run = [];
    };
    this.points.forEach((point, at) => {
      if (tops[at] === null) { close(); return; }
      run.push([this.x(point.time), this.y(tops[at]), this.y(bases === null ? 0 : bases[at])]);
    });
    close();
  }

  drawRun(series, run, isFilled) {
    const line = (at) => run.map((place) => `${place[0].toFixed(1)},${place[at].toFixed(1)}`);
    if (isFilled) {
      element(this.svg, "path", { class: `area ${series.ink}`, d: `M${line(1).join("L")}L${line(2).reverse().join("L")}Z` });
    }
    element(this.svg, "path", { class: `curve ${series.ink}${series.thin ? " thin" : ""}`, d: `M${line(1).join("L")}` });
  }

  drawPointed(series, rows, tops, bottom) {
    let at = this.points.length - 1;
    if (this.pointer !== null) {
      const distance = (point) => Math.abs(this.x(point.time) - this.pointer);
      at = this.points.reduce((best, point, each) => (distance(point) < distance(this.points[best]) ? each : best), 0);
      const x = this.x(this.points[at].time);
      element(this.svg, "line", { class: "rule", x1: x, x2: x, y1: TOP, y2: bottom });
      series.forEach((each, index) => {
        if (tops[index][at] !== null) element(this.svg, "circle", { class: `dot ${each.ink}`, cx: x, cy: this.y(tops[index][at]), r: 4 });
      });
    }
    this.when.textContent = this.pointer === null ? "" : `at ${clock(this.points[at].time)}`;
    this.legend.replaceChildren();
    const said = series.map((each, index) => {
      const value = rows[index][at], text = value === null ? "–" : this.spec.text(value);
      const item = element(this.legend, "li", { class: each.ink });
      element(item, "i", each.thin ? { class: "thin" } : {});
      element(item, "span", {}, each.name);
      element(item, "b", {}, text);
      return `${each.name} ${text}`;
    });
    this.svg.setAttribute("aria-label", `${this.spec.title}: ${said.join(", ")}`);
  }
}

// Each row becomes the sum of itself and those before it; null where nothing is known.
function stack(rows) {
  const sums = [];
  rows.forEach((row, at) => {
    sums.push(row.map((value, index) => (value === null ? null : value + (at ? sums[at - 1][index] : 0))));
  });
  return sums;
}

// ---- bars ----

class BarChart {
  constructor(parent, { id, title, note, none, ink, isKey }) {
    Object.assign(this, { none, ink, isKey });
    this.figure = figureIn(parent, id, title, note).figure;
    this.body = element(this.figure, "div");
  }

  // rows: [{name, share (0 to 1), text, more}]
  show(rows) {
    this.body.replaceChildren();
    this.body.className = rows.length ? "bars" : "";
    if (rows.length === 0) element(this.body, "p", { class: "none" }, this.none);
    for (const row of rows) {
      element(this.body, "span", this.isKey ? { class: "name key", title: row.name } : { class: "name" }, row.name);
      const bar = element(element(this.body, "span", { class: `track ${this.ink}` }), "i");
      bar.style.width = `${(row.share * 100).toFixed(1)}%`;
      element(this.body, "span", { class: "number" }, row.text);
      element(this.body, "span", { class: "number more" }, row.more);
    }
  }
}
