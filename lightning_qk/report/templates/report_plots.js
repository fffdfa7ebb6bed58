// Figures. Each function takes what to draw and returns a chart for Chart.draw.
"use strict";

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
// Brown and purple, which all kinds of colour vision tell apart; light in the middle.
const DIVERGING = ["#7f3b08", "#b35806", "#e08214", "#fdb863", "#f7f7f7", "#b2abd2", "#8073ac", "#542788", "#2d004b"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const SYMBOLS = ["circle", "square", "diamond", "triangle", "cross", "bar"];

const Style = {
  dark: false,

  color(name) {
    return `var(--${name})`;
  },

  mix(colors, share) {
    const place = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
    const left = Math.min(Math.floor(place), colors.length - 2);
    const part = (color, at) => parseInt(color.slice(at, at + 2), 16);
    return [1, 3, 5].map((at) =>
      Math.round(part(colors[left], at) + (place - left) * (part(colors[left + 1], at) - part(colors[left], at)))
    );
  },

  // A colour of viridis that can be seen on the page's ground.
  ramp(share) {
    const [low, high] = Style.dark ? [0.34, 1] : [0, 0.86];
    return `rgb(${Style.mix(VIRIDIS, low + (high - low) * share).join(",")})`;
  },

  layerColor(index, count) {
    return Style.ramp(count > 1 ? index / (count - 1) : 0.5);
  },

  // A cell's colour, and that of what is written on it.
  cell(colors, share) {
    const [red, green, blue] = Style.mix(colors, share);
    const dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140;
    return { fill: `rgb(${red},${green},${blue})`, ink: dark ? "#ffffff" : "#1a1a1a" };
  },

  // Shares from zero to one, unless everything lies in a narrow band, which is then shown whole.
  shareRange(values) {
    const [low, high] = Numbers.range(values);
    if (!(high - low <= 0.2)) return [-0.02, 1.02];
    const start = Math.min(Math.max((low + high) / 2 - 0.12, -0.01), 0.78);
    return [start, start + 0.24];
  },

  valueAxis(statistic, values) {
    const [low] = Numbers.range(values);
    if (statistic.share) return { range: Style.shareRange(values) };
    return statistic.scale === "log" && low > 0 ? { log: true } : {};
  },
};

const Plots = {
  // Layers down, heads across. `marked` is the chosen head, `cursor` where the keyboard is.
  heatmap({ statistic, step, change, fit, marked, cursor, width }) {
    const history = statistic.history;
    const index = history.at(step);
    const rows = history.layers.map((layer) => history.layerValues(statistic, layer, index));
    const base = change ? history.layers.map((layer) => history.layerValues(statistic, layer, 0)) : null;
    const shown = base ? rows.map((row, i) => row.map((value, j) => value - base[i][j])) : rows;
    const columns = Math.max(...history.heads);
    const scale = Scale.of(statistic, { change, fit, shown });
    const height = Math.max(150, Math.min(660, 26 * history.layers.length)) + 60;
    const labels = Math.min(Math.max(8, Math.floor(width / 26)), Math.max(...history.layers.map((layer) => layer.length)));
    const cell = { width: (width - 100 - 6.4 * labels) / columns, height: (height - 48) / history.layers.length };
    const { texts, exponent } = Numbers.cells(shown);
    const longest = Math.max(1, ...texts.flat().map((text) => text.length));
    const printed = cell.width >= 6.6 * longest + 4 && cell.height >= 15;
    const frame = (head, look) => {
      const y = history.layers.indexOf(head.layer);
      return { x0: head.index - 0.5, x1: head.index + 0.5, y0: y - 0.5, y1: y + 0.5, ...look };
    };
    const boxes = [];
    if (marked && history.place(marked) >= 0) boxes.push(frame(marked, { color: Style.color("mark"), width: 3 }));
    if (cursor) boxes.push(frame(cursor, { color: Style.color("ink"), width: 2, dash: "dot" }));
    const every = Math.max(1, Math.ceil(history.layers.length / 32));
    const beyond = shown.flat().filter((value) => scale.beyond(value)).length;
    const notes = [];
    if (printed && exponent) notes.push(`Numbers in the cells are in units of 10${Numbers.superscript(exponent)}.`);
    if (beyond) notes.push(`${beyond === 1 ? "One head lies" : `${beyond} heads lie`} beyond the colours' ends, so that the others can be told apart: a corner is cut off.`);
    return {
      height,
      note: notes.join(" "),
      x: { title: "head", range: [-0.5, columns - 0.5], ticks: Array.from({ length: columns }, (_, at) => ({ at, text: String(at) })) },
      y: {
        title: "layer",
        range: [history.layers.length - 0.5, -0.5],
        ticks: history.layers.map((text, at) => ({ at, text })).filter((_, i) => i % every === 0),
      },
      boxes,
      bar: { ...scale.bar(), title: change ? `change${statistic.unit ? ` (${statistic.unit})` : ""}` : statistic.unit },
      marks: [
        {
          kind: "cells",
          rows: shown,
          texts: printed ? texts : null,
          gap: Math.min(cell.width, cell.height) > 8 ? 1 : 0,
          color: (value) => scale.color(value),
          beyond: (value) => scale.beyond(value),
          hover: (i, j) =>
            `${history.layers[i]}, head ${j}\n${Numbers.unit(rows[i][j], statistic.unit)}` +
            (base ? ` (first: ${Numbers.short(base[i][j])}, change ${Numbers.short(shown[i][j])})` : "") +
            (scale.beyond(shown[i][j]) ? ", beyond the colours' end" : ""),
          pick: (i, j) => ({ layer: history.layers[i], index: j }),
        },
      ],
    };
  },

  // Every head's verdict: a row a layer.
  verdicts({ heads, verdicts, marked }) {
    const layers = Array.from(heads.keys());
    const columns = Math.max(...heads.values());
    const height = Math.max(90, Math.min(360, 22 * layers.length)) + 48;
    const [of, words] = [(i, j) => `${layers[i]}/${j}`, (id) => verdicts[id] || ["ok", ""]];
    const every = Math.max(1, Math.ceil(layers.length / ((height - 48) / 14)));
    const colors = { ok: "good-bg", "no data": "plain", "not judged": "plain" };
    const faults = ["non-finite", "saturated", "growing", "collapsed"];
    const names = layers.flatMap((_, i) => Array.from({ length: heads.get(layers[i]) }, (_, j) => words(of(i, j))[0]));
    const boxes = [];
    if (marked && heads.has(marked.layer)) {
      const y = layers.indexOf(marked.layer);
      boxes.push({ x0: marked.index - 0.5, x1: marked.index + 0.5, y0: y - 0.5, y1: y + 0.5, color: Style.color("mark"), width: 3 });
    }
    let count = 0;
    return {
      height,
      x: { title: "head", range: [-0.5, columns - 0.5], ticks: Array.from({ length: columns }, (_, at) => ({ at, text: String(at) })) },
      y: { title: "layer", range: [layers.length - 0.5, -0.5], ticks: layers.map((text, at) => ({ at, text })).filter((_, i) => i % every === 0) },
      boxes,
      marks: [
        {
          kind: "cells",
          rows: layers.map((layer) => Array.from({ length: heads.get(layer) }, () => count++)),
          texts: null,
          gap: 1,
          color: (place) => {
            const name = names[place];
            return { fill: Style.color(faults.includes(name) ? "fault" : colors[name] || Plots.described[name] || "plain"), ink: Style.color("ink") };
          },
          beyond: () => 0,
          hover: (i, j) => `${layers[i]}, head ${j}\n${words(of(i, j)).filter(Boolean).join(": ")}`,
          pick: (i, j) => ({ layer: layers[i], index: j }),
        },
      ],
    };
  },

  described: { fresh: "is-fresh", uniform: "is-uniform", sharp: "is-sharp", positional: "is-positional", sink: "is-sink" },

  // A statistic of each layer over the steps: the mean of its heads, or the largest where that counts.
  overTime({ statistic, step, name }) {
    const history = statistic.history;
    const reduce = statistic.peak ? (values) => Numbers.range(values)[1] : Numbers.mean;
    const many = history.layers.length > 10;
    const marks = history.layers.map((layer, i) => ({
      kind: "line",
      x: history.steps,
      y: history.steps.map((_, index) => reduce(history.layerValues(statistic, layer, index))),
      name: layer,
      color: Style.layerColor(i, history.layers.length),
      width: 1.6,
      dash: DASHES[i % DASHES.length],
      symbol: history.steps.length < 4 ? "circle" : null,
    }));
    for (const mark of marks) mark.hover = Plots.says(mark, name, statistic.unit);
    return {
      height: 280,
      rules: history.steps.length > 1 ? [Plots.now(step)] : [],
      x: { title: name ? "" : "step", ...Plots.stepAxis(history.steps, name) },
      y: { title: statistic.unit || (statistic.share ? "share" : "value"), ...Style.valueAxis(statistic, marks.flatMap((mark) => mark.y)) },
      legend: many ? [] : marks,
      bar: many ? Plots.layerBar(history.layers) : null,
      marks,
    };
  },

  says(mark, name, unit = "") {
    return (i) => `${mark.name ? `${mark.name}\n` : ""}${name ? name(mark.x[i]) : `step ${mark.x[i]}`}: ${Numbers.unit(mark.y[i], unit)}`;
  },

  stepAxis(steps, name) {
    const ticks = name ? steps.map((at) => ({ at, text: name(at) })) : null;
    const one = steps.length === 1 ? { range: [steps[0] - 1, steps[0] + 1], ticks: [{ at: steps[0], text: String(steps[0]) }] } : {};
    return { whole: true, ...one, ...(ticks ? { ticks } : {}) };
  },

  now(step) {
    return { x: step, color: Style.color("mark") };
  },

  // What the colours of many layers mean, as a bar beside the plot.
  layerBar(layers) {
    return {
      title: "layer",
      colors: Array.from({ length: 9 }, (_, i) => Style.ramp(i / 8)),
      ticks: [{ share: 0, text: layers[0] }, { share: 1, text: layers[layers.length - 1] }],
    };
  },

  // A point a head of the layers that both histories have.
  scatter({ x, y, step, marked, diagonal }) {
    const [a, b] = [x.history, y.history];
    const layers = a.layers.filter((layer) => b.start.has(layer));
    const points = { kind: "points", x: [], y: [], color: [], symbols: [], heads: [], chosen: -1 };
    layers.forEach((layer, i) => {
      const [xs, ys] = [a.layerValues(x, layer, a.at(step)), b.layerValues(y, layer, b.at(step))];
      xs.forEach((value, head) => {
        if (!Number.isFinite(value) || !Number.isFinite(ys[head])) return;
        if (marked && marked.layer === layer && marked.index === head) points.chosen = points.x.length;
        points.x.push(value);
        points.y.push(ys[head]);
        points.color.push(Style.layerColor(i, layers.length));
        points.symbols.push(SYMBOLS[i % SYMBOLS.length]);
        points.heads.push({ layer, index: head });
      });
    });
    points.size = points.x.length > 300 ? 6 : 9;
    points.pick = (i) => points.heads[i];
    points.hover = (i) =>
      `${points.heads[i].layer}, head ${points.heads[i].index}\n${x.title}: ${Numbers.unit(points.x[i], x.unit)}\n${y.title}: ${Numbers.unit(points.y[i], y.unit)}`;
    const few = layers.length <= 10;
    const line = { kind: "line", x: [0, 1], y: [0, 1], color: Style.color("soft"), dash: "dash", width: 1, shown: diagonal };
    const label = (one) => (one.unit ? `${one.title} (${one.unit})` : one.title);
    const named = (words, one) => (diagonal && !one.title.startsWith(words) ? words : "") + label(one);
    return {
      height: 400,
      x: { title: named("predicted ", x), ...(diagonal ? { range: [-0.03, 1.03] } : Style.valueAxis(x, points.x)) },
      y: { title: named("measured ", y), ...(diagonal ? { range: [-0.03, 1.03] } : Style.valueAxis(y, points.y)) },
      legend: few ? layers.map((layer, i) => ({ name: layer, color: Style.layerColor(i, layers.length), symbol: SYMBOLS[i % SYMBOLS.length] })) : [],
      bar: few ? null : Plots.layerBar(layers),
      marks: [points, line],
    };
  },

  // Curves over the key's position: mean over heads, and between which all but a tenth of them lie.
  propagation({ predicted, measured, head, height = 400 }) {
    const [marks, legend] = [[], []];
    const add = (found, name, color, dash, symbol) => {
      if (!found || !found.curves.length) return;
      const at = (share) => found.theta.map((_, i) => Numbers.quantile(found.curves.map((one) => one[i]), share));
      if (found.curves.length > 2) {
        marks.push({ kind: "band", x: found.theta, low: at(0.05), high: at(0.95), color: Style.color(color), opacity: 0.16 });
      }
      const line = {
        kind: "line", x: found.theta, name, color: Style.color(color), width: 2.4, dash, symbol, size: 7,
        y: found.theta.map((_, i) => Numbers.mean(found.curves.map((one) => one[i]))),
      };
      line.hover = (i) => `${name}\nposition ${line.x[i].toFixed(2)}: ${Numbers.short(line.y[i])}`;
      marks.push(line);
      legend.push(line);
      if (found.head) {
        const own = { kind: "line", x: found.theta, y: found.head, name: `${name}, ${head}`, color: Style.color(color), width: 1.4, dash: "dot" };
        own.hover = (i) => `${own.name}\nposition ${own.x[i].toFixed(2)}: ${Numbers.short(own.y[i])}`;
        marks.push(own);
        if (head) legend.push(own);
      }
    };
    add(predicted, predicted ? `random walk, ${predicted.when}` : "", "one", "solid", "circle");
    add(measured, measured ? `measured, ${measured.when}` : "", "two", "dash", "diamond");
    return {
      height,
      x: { title: "position of the key (0: first, 1: the query's own)", range: [0, 1] },
      y: { title: "probability, share of pairs", range: [-0.03, 1.03] },
      legend,
      marks,
    };
  },

  // Eigenvalues of some heads; the dashed circle is the disc of a random head.
  plane({ heads, radius, marked, height = 400 }) {
    const points = { kind: "points", x: [], y: [], heads: [], color: Style.color("one"), name: "all heads" };
    const chosen = { kind: "points", x: [], y: [], heads: [], color: Style.color("two"), size: 8 };
    for (const head of heads) {
      const into = marked && head.id === marked ? chosen : points;
      head.real.forEach((real, i) => {
        into.x.push(real);
        into.y.push(head.imag[i]);
        into.heads.push(head.id);
      });
    }
    const dense = points.x.length > 800;
    Object.assign(points, { size: dense ? 4 : 6, opacity: dense ? 0.5 : 0.7 });
    for (const one of [points, chosen]) {
      const name = (i) => one.heads[i].replace(/\/(\d+)$/, ", head $1");
      one.hover = (i) => `${name(i)}\n${Numbers.short(one.x[i])} ${one.y[i] < 0 ? "−" : "+"} ${Numbers.short(Math.abs(one.y[i]))}i`;
      one.pick = (i) => Page.headOf(one.heads[i]);
    }
    const angles = Array.from({ length: 121 }, (_, i) => (i / 60) * Math.PI);
    const circle = {
      kind: "line", name: "disc of a random head", color: Style.color("three"), dash: "dash", shown: radius > 0,
      x: angles.map((angle) => radius * Math.cos(angle)), y: angles.map((angle) => radius * Math.sin(angle)),
    };
    const farthest = Numbers.range([points, chosen].flatMap((one) => one.x.map((x, i) => Math.hypot(x, one.y[i]))))[1];
    const reach = 1.06 * Math.max(radius || 0, Number.isFinite(farthest) ? farthest : 0, 1e-30);
    const legend = [];
    if (points.x.length) legend.push({ name: chosen.x.length ? "other heads of the layer" : "heads of the layer", color: points.color, symbol: "circle" });
    if (chosen.x.length) legend.push({ name: marked.replace(/\/(\d+)$/, ", head $1"), color: chosen.color, symbol: "circle" });
    if (circle.shown) legend.push(circle);
    return {
      height,
      same: true,
      x: { title: "real part", range: [-reach, reach], zero: true },
      y: { title: "imaginary part", range: [-reach, reach], zero: true },
      legend,
      marks: [points, chosen, circle],
    };
  },

  // How many eigenvalues lie within a distance of zero, against a random head's.
  within({ moduli, law, height = 400 }) {
    const sorted = moduli.filter(Number.isFinite).sort((a, b) => a - b);
    const count = Math.min(200, sorted.length);
    const pick = Array.from({ length: count }, (_, i) => Math.round(((i + 1) / count) * sorted.length) - 1);
    const end = Math.max(1.25, 1.03 * (sorted[sorted.length - 1] || 0));
    const grid = law ? Array.from(law, (_, i) => i / (law.length - 1)) : [];
    const own = {
      kind: "line", name: "these heads", color: Style.color("one"), width: 2.4, step: true, dash: "solid",
      x: [0, ...pick.map((i) => sorted[i])], y: [0, ...pick.map((i) => (i + 1) / sorted.length)],
    };
    const random = { kind: "line", name: "random heads", color: Style.color("three"), dash: "dash", shown: grid.length > 0, x: [...grid, end], y: [...(law || []), 1] };
    for (const one of [own, random]) one.hover = (i) => `${one.name}\n${Math.round(100 * one.y[i])} % within ${one.x[i].toFixed(2)}`;
    return {
      height,
      x: { title: "|eigenvalue| over the radius of a random head's disc", range: [0, end] },
      y: { title: "share within", range: [0, 1.02], percent: true },
      legend: [own, random].filter((one) => one.shown !== false),
      marks: [own, random],
    };
  },

  // A head among all others.
  headOverTime({ statistic, place, step, name }) {
    const history = statistic.history;
    const columns = history.steps.map((_, index) => history.allValues(statistic, index));
    const at = (share) => columns.map((values) => Numbers.quantile(values, share));
    const x = history.steps;
    const band = { kind: "band", x, low: at(0.1), high: at(0.9), color: Style.color("band") };
    const middle = { kind: "line", x, y: at(0.5), color: Style.color("soft"), width: 1.2, dash: "dash", name: "median of all heads" };
    const own = { kind: "line", x, y: history.series(statistic, place), color: Style.color("two"), width: 2.2, name: "this head", symbol: x.length < 4 ? "circle" : null };
    for (const one of [own, middle]) one.hover = Plots.says(one, name, statistic.unit);
    return {
      height: 170,
      rules: x.length > 1 ? [Plots.now(step)] : [],
      x: { title: name ? "" : "step", ...Plots.stepAxis(x, name) },
      y: { title: statistic.unit || (statistic.share ? "share" : "value"), ...Style.valueAxis(statistic, [...own.y, ...band.low, ...band.high]) },
      marks: [band, middle, own],
    };
  },

  // A curve of the run; at alarms and remedies there is a line.
  curve({ name, steps, values, events = [], height = 220 }) {
    const line = { kind: "line", x: steps, y: Array.from(values), color: Style.color("one"), name, symbol: steps.length < 4 ? "circle" : null };
    line.hover = Plots.says(line, null);
    const marks = [line];
    if (events.length) {
      // On the curve, where it is known nearby.
      const near = (step) => steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0);
      const alarms = { kind: "points", x: [], y: [], color: [], symbols: [], size: 11, words: [] };
      for (const [step, sentence] of events) {
        const y = values[near(step)];
        alarms.x.push(step);
        alarms.y.push(Number.isFinite(y) ? y : Numbers.mean(Array.from(values)));
        alarms.color.push(Style.color("bad"));
        alarms.symbols.push("triangle");
        alarms.words.push(`step ${step}\n${sentence}`);
      }
      alarms.hover = (i) => alarms.words[i];
      marks.push(alarms);
    }
    const [low] = Numbers.range(line.y);
    const [first, last] = Numbers.range([...steps, ...events.map(([step]) => step)]);
    return {
      height,
      rules: events.map(([step]) => ({ x: step, color: Style.color("bad"), dash: "dash", width: 1 })),
      x: { title: "step", ...(first < last ? { range: [first, last], whole: true } : Plots.stepAxis(steps)) },
      y: { title: name.split("/").pop().replaceAll("_", " "), ...(name.endsWith("/health") ? { range: [-0.03, 1.03] } : {}), ...(low > 0 && Numbers.range(line.y)[1] > 100 * low ? { log: true } : {}) },
      marks,
    };
  },
};
