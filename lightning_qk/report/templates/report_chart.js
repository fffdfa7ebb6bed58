// Charts as SVG: lines, bands, points and cells on two axes, with a legend, a colour bar and a word on what is under
// the pointer. A chart is { height, x, y, marks, ... }; report_plots.js makes them.
"use strict";

const Shape = {
  make(tag, attributes = {}, style = {}) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
    return element;
  },

  text(words, x, y, attributes = {}, whole = "") {
    const element = Shape.make("text", { x, y, ...attributes });
    element.textContent = words;
    if (whole && whole !== words) {
      const title = Shape.make("title");
      title.textContent = whole;
      element.append(title);
    }
    return element;
  },

  // Outlines around (0, 0), of about the same area.
  symbols: {
    circle: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    square: (r) => `M${-0.9 * r} ${-0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
    diamond: (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0z`,
    triangle: (r) => `M0 ${-1.3 * r}L${1.15 * r} ${0.8 * r}H${-1.15 * r}z`,
    cross: (r) => `M${-0.4 * r} ${-1.2 * r}h${0.8 * r}v${0.8 * r}h${0.8 * r}v${0.8 * r}h${-0.8 * r}v${0.8 * r}h${-0.8 * r}v${-0.8 * r}h${-0.8 * r}v${-0.8 * r}h${0.8 * r}z`,
    bar: (r) => `M${-0.35 * r} ${-1.4 * r}h${0.7 * r}v${2.8 * r}h${-0.7 * r}z`,
  },

  symbol(name, x, y, size, style) {
    return Shape.make("path", { d: Shape.symbols[name](size / 2), transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})` }, style);
  },

  dashes: { solid: "none", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4" },
};

// From a number to a place, and the numbers that are written along the way.
class Axis {
  constructor(given, values, length, fewest) {
    Object.assign(this, { title: "", count: Math.max(2, Math.floor(length / fewest)) }, given);
    const known = values.filter((value) => Number.isFinite(value) && (!this.log || value > 0));
    let [low, high] = this.range || Numbers.range(known);
    if (!this.range && !(low <= high)) [low, high] = this.log ? [1, 10] : [0, 1];
    if (!this.range) {
      if (this.log) [low, high] = low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
      else {
        const room = high > low ? 0.05 * (high - low) : 0.5 * Math.abs(high || 1);
        [low, high] = [low - room, high + room];
      }
    }
    this.range = [low, high];
    if (!this.ticks) this.ticks = this.log ? Axis.powers(low, high, this.count) : Axis.even(low, high, this.count, this);
    const [least, most] = [Math.min(low, high), Math.max(low, high)];
    this.ticks = this.ticks.filter(({ at }) => at >= least - 1e-9 * Math.abs(least) && at <= most + 1e-9 * Math.abs(most));
  }

  place(from, to) {
    const by = this.log ? Math.log10 : (value) => value;
    const [low, high] = this.range.map(by);
    this.at = (value) => from + ((by(value) - low) / (high - low)) * (to - from);
    return this;
  }

  static even(low, high, count, { percent, whole } = {}) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const found = power * [1, 2, 5, 10].find((one) => one * power >= rough * 0.7);
    const step = whole ? Math.max(1, found) : found;
    const ticks = [];
    const first = Math.ceil(low / step - 1e-9);
    for (let i = first; i * step <= high + 1e-9 * step && ticks.length < 40; i++) ticks.push(i * step);
    const largest = Math.max(...ticks.map(Math.abs), 0);
    const decimals = Math.max(0, -Math.floor(Math.log10(step * 1.001)));
    const text = (value) => {
      if (percent) return `${Math.round(100 * value)} %`;
      if (value === 0 || Math.abs(value) < 1e-9 * step) return "0";
      if (largest < 1e5 && decimals <= 4) return value.toFixed(decimals).replace("-", "−");
      const exponent = Math.floor(Math.log10(largest) + 1e-9);
      const digits = Math.max(0, exponent - Math.floor(Math.log10(step * 1.001)));
      return `${(value / 10 ** exponent).toFixed(digits).replace("-", "−")}×10${Numbers.superscript(exponent)}`;
    };
    return ticks.map((at) => ({ at, text: text(at) }));
  }

  static powers(low, high, count) {
    const name = (power, times = 1) => {
      const value = times * 10 ** power;
      if (power >= -2 && power < 4) return String(Number(value.toPrecision(3)));
      return `${times === 1 ? "" : `${times}×`}10${Numbers.superscript(power)}`;
    };
    const powers = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) powers.push(power);
    const inside = powers.filter((power) => 10 ** power >= low && 10 ** power <= high);
    if (inside.length >= 2) {
      const every = Math.ceil(inside.length / count);
      return inside.filter((_, i) => i % every === 0).map((power) => ({ at: 10 ** power, text: name(power) }));
    }
    const some = powers.flatMap((power) => [1, 2, 5].map((times) => ({ at: times * 10 ** power, text: name(power, times) })));
    const shown = some.filter(({ at }) => at >= low && at <= high);
    return shown.length >= 2 ? shown : Axis.even(low, high, count);
  }
}

const Chart = {
  // Draw into an element. `pick` is called with what `pick` of a mark, or of the cells, says of what was clicked.
  draw(element, chart, pick = null) {
    const width = Math.max(180, element.clientWidth || 320);
    const marks = chart.marks.filter((mark) => mark.shown !== false);
    const cells = marks.find((mark) => mark.kind === "cells");
    const values = (name) => marks.flatMap((mark) => [name, ...(name === "y" ? ["low", "high"] : [])].flatMap((key) => Array.from(mark[key] || [])));
    const bottom = chart.x.title ? 40 : 24;
    const y = new Axis(chart.y, chart.y.range ? [] : values("y"), chart.height - bottom, 40);
    const limit = Math.max(8, Math.floor(width / 26));
    const label = (text) => Numbers.shorten(text, limit);
    const longest = Math.max(1, ...y.ticks.map(({ text }) => label(text).length));
    const left = Math.ceil(10 + 6.4 * longest + (y.title ? 18 : 0));
    const barTexts = chart.bar ? chart.bar.ticks.map(({ text }) => label(text)) : [];
    const right = chart.bar ? 28 + Math.ceil(6.4 * Math.max(1, ...barTexts.map((text) => text.length))) + (chart.bar.title ? 22 : 0) : 12;
    const box = { left, top: 8, right: width - right, bottom: chart.height - bottom };
    let x = new Axis(chart.x, chart.x.range ? [] : values("x"), box.right - box.left, 64);
    if (chart.same) {
      // One unit is as long on both axes.
      const ratio = (box.right - box.left) / (box.bottom - box.top);
      const [[low, high], reach] = [y.range, ratio * (y.range[1] - y.range[0])];
      x = new Axis({ ...chart.x, range: [(low + high - reach) / 2, (low + high + reach) / 2] }, [], box.right - box.left, 64);
    }
    x.place(box.left, box.right);
    y.place(box.bottom, box.top);
    const root = Shape.make("svg", { width, height: chart.height, viewBox: `0 0 ${width} ${chart.height}`, class: "chart-svg", "aria-hidden": "true" });
    const clip = `clip-${(Chart.count += 1)}`;
    const hole = Shape.make("clipPath", { id: clip });
    hole.append(Shape.make("rect", { x: box.left, y: box.top - 4, width: box.right - box.left + 4, height: box.bottom - box.top + 8 }));
    root.append(hole);
    root.append(Chart.axes(x, y, box, { grid: !cells, label, width, height: chart.height, titleGap: left }));
    const inside = Shape.make("g", { "clip-path": `url(#${clip})` });
    for (const rule of (chart.rules || []).filter((one) => Number.isFinite(one.x))) inside.append(Chart.rule(rule, x, box));
    for (const mark of marks) inside.append(Chart[mark.kind](mark, x, y));
    for (const one of chart.boxes || []) {
      const [a, b, c, d] = [x.at(one.x0), x.at(one.x1), y.at(one.y1), y.at(one.y0)];
      inside.append(Shape.make("rect", { x: a, y: Math.min(c, d), width: b - a, height: Math.abs(d - c), fill: "none", "stroke-width": one.width, "stroke-dasharray": Shape.dashes[one.dash || "solid"] }, { stroke: one.color }));
    }
    root.append(inside);
    if (chart.bar) root.append(Chart.bar(chart.bar, box, barTexts));
    const parts = [root];
    if (chart.legend && chart.legend.length) parts.unshift(Chart.legend(chart.legend));
    element.replaceChildren(...parts);
    element.chart = { ...chart, axes: { x, y }, box, svg: root };
    Chart.listen(element, pick);
  },

  count: 0,

  axes(x, y, box, { grid, label, width, height, titleGap }) {
    const group = Shape.make("g", { class: "axes" });
    const line = (x1, y1, x2, y2, kind) => group.append(Shape.make("line", { x1, y1, x2, y2, class: kind }));
    let free = -Infinity;
    for (const { at, text } of Chart.apart(x)) {
      const place = x.at(at);
      if (grid) line(place, box.top, place, box.bottom, "grid");
      const half = 3.3 * text.length;
      if (place - half < free) continue;
      free = place + half + 6;
      line(place, box.bottom, place, box.bottom + 4, "tick");
      group.append(Shape.text(text, Math.min(place, width - half), box.bottom + 16, { class: "xtick", "text-anchor": "middle" }));
    }
    for (const { at, text } of y.ticks) {
      const place = y.at(at);
      if (grid) line(box.left, place, box.right, place, "grid");
      group.append(Shape.text(label(text), box.left - 7, place + 4, { class: "ytick", "text-anchor": "end" }, text));
    }
    if (x.zero && x.range[0] < 0 && x.range[1] > 0) line(x.at(0), box.top, x.at(0), box.bottom, "zero");
    if (y.zero && y.range[0] < 0 && y.range[1] > 0) line(box.left, y.at(0), box.right, y.at(0), "zero");
    line(box.left, box.bottom, box.right, box.bottom, "frame");
    line(box.left, box.top, box.left, box.bottom, "frame");
    const middle = (box.left + box.right) / 2;
    if (x.title) group.append(Chart.title(x.title, width - 8, middle, height - 6, width));
    if (y.title) {
      const title = Chart.title(y.title, box.bottom - box.top + 12, 0, 0);
      title.setAttribute("transform", `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`);
      group.append(title);
    }
    return group;
  },

  // Of evenly spaced ticks every n-th, so that their texts stay apart.
  apart(x) {
    const places = x.ticks.map(({ at }) => x.at(at));
    if (places.length < 3) return x.ticks;
    const gap = Math.abs(places[1] - places[0]);
    if (Math.abs(places[places.length - 1] - places[0]) < 0.99 * gap * (places.length - 1)) return x.ticks;
    const widest = Math.max(...x.ticks.map(({ text }) => 6.6 * text.length));
    const least = Math.ceil((widest + 6) / gap);
    const every = [1, 2, 4, 5, 8, 10].find((one) => one >= least) || least;
    return x.ticks.filter((_, i) => i % every === 0);
  },

  // About x, or beside it where it would else pass an end of a drawing of some width.
  title(words, room, x, y, width = Infinity) {
    const text = Numbers.shorten(words, Math.max(8, Math.floor(room / 6.1)), true);
    const half = 3.05 * text.length + 4;
    const place = Number.isFinite(width) ? Math.max(Math.min(x, width - half), Math.min(half, width / 2)) : x;
    return Shape.text(text, place, y, { class: "title", "text-anchor": "middle" }, words);
  },

  rule({ x: at, color, dash = "dot", width = 1.5 }, x, box) {
    const place = x.at(at);
    return Shape.make("line", { x1: place, x2: place, y1: box.top, y2: box.bottom, "stroke-width": width, "stroke-dasharray": Shape.dashes[dash] }, { stroke: color });
  },

  // Marks

  path(xs, ys, x, y, step = false) {
    let d = "";
    let pen = false;
    let last = 0;
    for (let i = 0; i < xs.length; i++) {
      const known = Number.isFinite(xs[i]) && Number.isFinite(ys[i]) && (!y.log || ys[i] > 0);
      if (known) {
        const [a, b] = [x.at(xs[i]).toFixed(1), y.at(ys[i]).toFixed(1)];
        d += !pen ? `M${a} ${b}` : step ? `H${a}V${b}` : `L${a} ${b}`;
        last = a;
      }
      // A point between two gaps is a dot.
      if (!known && pen) d += `H${last}`;
      pen = known;
    }
    return d;
  },

  line(mark, x, y) {
    const group = Shape.make("g");
    group.append(Shape.make("path", { d: Chart.path(mark.x, mark.y, x, y, mark.step), fill: "none", "stroke-width": mark.width || 2, "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": Shape.dashes[mark.dash || "solid"] }, { stroke: mark.color }));
    if (mark.symbol) {
      mark.x.forEach((value, i) => {
        if (Number.isFinite(mark.y[i])) group.append(Shape.symbol(mark.symbol, x.at(value), y.at(mark.y[i]), mark.size || 6, { fill: mark.color }));
      });
    }
    return group;
  },

  band(mark, x, y) {
    const group = Shape.make("g");
    let [from, xs] = [0, mark.x];
    const known = (i) => Number.isFinite(mark.low[i]) && Number.isFinite(mark.high[i]) && (!y.log || mark.low[i] > 0);
    for (let i = 0; i <= xs.length; i++) {
      if (i < xs.length && known(i)) continue;
      if (i > from) {
        const there = Chart.path(xs.slice(from, i), mark.high.slice(from, i), x, y);
        const back = Chart.path(xs.slice(from, i).reverse(), mark.low.slice(from, i).reverse(), x, y);
        group.append(Shape.make("path", { d: `${there}${back.replace("M", "L")}z`, stroke: "none" }, { fill: mark.color, "fill-opacity": mark.opacity || 1 }));
      }
      from = i + 1;
    }
    return group;
  },

  points(mark, x, y) {
    const group = Shape.make("g", { class: "points" });
    if (typeof mark.color === "string" && !mark.symbols && !mark.sizes) {
      // Many alike are one path of round dots.
      let d = "";
      mark.x.forEach((value, i) => {
        d += `M${x.at(value).toFixed(1)} ${y.at(mark.y[i]).toFixed(1)}h0`;
      });
      group.append(Shape.make("path", { d, fill: "none", "stroke-linecap": "round", "stroke-width": mark.size, "stroke-opacity": mark.opacity || 1 }, { stroke: mark.color }));
      return group;
    }
    mark.x.forEach((value, i) => {
      if (!Number.isFinite(value) || !Number.isFinite(mark.y[i])) return;
      const chosen = mark.chosen === i;
      const style = { fill: typeof mark.color === "string" ? mark.color : mark.color[i], stroke: chosen ? "var(--mark)" : "var(--card)", "stroke-width": chosen ? 3 : 0.6 };
      group.append(Shape.symbol(mark.symbols ? mark.symbols[i] : "circle", x.at(value), y.at(mark.y[i]), chosen ? mark.size + 6 : mark.size, style));
    });
    return group;
  },

  // Rows of cells, the first at the top. A cell beyond the scale's ends has a corner cut off.
  cells(mark, x, y) {
    const group = Shape.make("g", { class: "cells" });
    const texts = Shape.make("g", { class: "heatmap-label" });
    const columns = Math.round(x.range[1] - x.range[0]);
    mark.rows.forEach((row, i) => {
      for (let j = 0; j < columns; j++) {
        const value = row[j];
        const [a, b] = [x.at(j - 0.5), x.at(j + 0.5) - mark.gap];
        const [c, d] = [y.at(i - 0.5), y.at(i + 0.5) - mark.gap];
        if (!Number.isFinite(value)) {
          group.append(Shape.make("rect", { x: a.toFixed(1), y: c.toFixed(1), width: (b - a).toFixed(1), height: (d - c).toFixed(1), fill: "url(#no-value)" }));
          continue;
        }
        const color = mark.color(value);
        group.append(Shape.make("rect", { x: a.toFixed(1), y: c.toFixed(1), width: (b - a).toFixed(1), height: (d - c).toFixed(1) }, { fill: color.fill }));
        const beyond = mark.beyond(value);
        if (beyond) {
          const r = Math.max(3, Math.min(8, 0.45 * Math.min(b - a, d - c)));
          const corner = beyond > 0 ? `M${b} ${c}h${-r}l${r} ${r}z` : `M${b} ${d}h${-r}l${r} ${-r}z`;
          group.append(Shape.make("path", { d: corner, class: "beyond" }));
        }
        const words = mark.texts && mark.texts[i][j];
        if (words) texts.append(Shape.text(words, ((a + b) / 2).toFixed(1), ((c + d) / 2 + 4).toFixed(1), { "text-anchor": "middle", fill: color.ink }));
      }
    });
    group.append(texts);
    return group;
  },

  // Beside the plot: what colours mean.
  bar({ colors, ticks, title, ends = [false, false] }, box, texts) {
    const group = Shape.make("g", { class: "bar" });
    const id = `ramp-${(Chart.count += 1)}`;
    const ramp = Shape.make("linearGradient", { id, x1: 0, y1: 1, x2: 0, y2: 0 });
    colors.forEach((color, i) => ramp.append(Shape.make("stop", { offset: i / (colors.length - 1), "stop-color": color })));
    const [x, height] = [box.right + 10, box.bottom - box.top];
    group.append(ramp, Shape.make("rect", { x, y: box.top, width: 10, height, fill: `url(#${id})` }));
    // An end that goes on is an arrow.
    if (ends[0]) group.append(Shape.make("path", { d: `M${x} ${box.bottom}h10l-5 8z`, fill: colors[0] }));
    if (ends[1]) group.append(Shape.make("path", { d: `M${x} ${box.top}h10l-5 -8z`, fill: colors[colors.length - 1] }));
    ticks.forEach(({ share, text }, i) =>
      group.append(Shape.text(texts[i], x + 14, box.bottom - share * height + 4, { class: "bartick" }, text))
    );
    if (title) {
      const words = Chart.title(title, height + 8, 0, 0);
      const place = x + 32 + 6.4 * Math.max(1, ...texts.map((text) => text.length));
      words.setAttribute("transform", `translate(${place} ${(box.top + box.bottom) / 2}) rotate(-90)`);
      group.append(words);
    }
    return group;
  },

  legend(entries) {
    const list = make("ul", { className: "legend" });
    for (const { name, color, dash, symbol, block } of entries) {
      const swatch = Shape.make("svg", { width: 26, height: 12, "aria-hidden": "true" });
      if (block) swatch.append(Shape.make("rect", { x: 2, y: 1, width: 22, height: 10, rx: 2 }, { fill: color, "fill-opacity": block }));
      else if (dash) swatch.append(Shape.make("line", { x1: 1, x2: 25, y1: 6, y2: 6, "stroke-width": 2.4, "stroke-dasharray": Shape.dashes[dash] }, { stroke: color }));
      if (symbol) swatch.append(Shape.symbol(symbol, 13, 6, 8, { fill: color }));
      list.append(make("li", {}, swatch, name));
    }
    return list;
  },

  // Under the pointer

  // What is nearest to a place: { mark, i } or { mark, i, j } of cells.
  nearest(chart, px, py) {
    const { x, y } = chart.axes;
    const cells = chart.marks.find((mark) => mark.kind === "cells");
    if (cells) {
      const [low, high] = x.range;
      const j = Math.floor(low + ((px - chart.box.left) / (chart.box.right - chart.box.left)) * (high - low) + 0.5);
      const i = Math.floor(((py - chart.box.top) / (chart.box.bottom - chart.box.top)) * cells.rows.length);
      return cells.rows[i] && j >= 0 && j < cells.rows[i].length ? { mark: cells, i, j, at: [x.at(j), y.at(i)] } : null;
    }
    let best = null;
    let least = 30;
    for (const mark of chart.marks) {
      if (!mark.hover || mark.shown === false) continue;
      for (let i = 0; i < mark.x.length; i++) {
        if (!Number.isFinite(mark.x[i]) || !Number.isFinite(mark.y[i])) continue;
        const at = [x.at(mark.x[i]), y.at(mark.y[i])];
        const away = Math.hypot(at[0] - px, at[1] - py);
        if (away < least) [best, least] = [{ mark, i, at }, away];
      }
    }
    return best;
  },

  listen(element, pick) {
    element.chartPick = pick;
    if (element.dataset.listening) return;
    element.dataset.listening = "yes";
    const find = (event) => {
      const box = element.chart.svg.getBoundingClientRect();
      const found = Chart.nearest(element.chart, event.clientX - box.left, event.clientY - box.top);
      return { found, box };
    };
    const leave = () => element.querySelectorAll(".tip, .ring").forEach((one) => one.remove());
    element.addEventListener("pointermove", (event) => {
      const { found, box } = find(event);
      leave();
      element.style.cursor = found && found.mark.pick && element.chartPick ? "pointer" : "";
      const words = found && found.mark.hover && found.mark.hover(found.i, found.j);
      if (!words) return;
      if (found.mark.kind !== "cells") {
        element.chart.svg.append(Shape.make("circle", { cx: found.at[0], cy: found.at[1], r: 6, class: "ring" }));
      }
      const tip = make("div", { className: "tip", textContent: words });
      const outer = element.getBoundingClientRect();
      element.append(tip);
      const place = found.at[0] + box.left - outer.left;
      tip.style.left = `${Math.max(0, Math.min(place + 12, outer.width - tip.offsetWidth - 2))}px`;
      tip.style.top = `${Math.max(0, found.at[1] + box.top - outer.top - tip.offsetHeight - 10)}px`;
    });
    element.addEventListener("pointerleave", leave);
    element.addEventListener("click", (event) => {
      const { found } = find(event);
      if (found && found.mark.pick && element.chartPick) element.chartPick(found.mark.pick(found.i, found.j));
    });
  },
};
