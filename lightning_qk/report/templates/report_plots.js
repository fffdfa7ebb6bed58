// Figures. Each function takes what to draw and returns { traces, layout } for Plotly.
"use strict";

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
// Brown and purple, which all kinds of colour vision tell apart; light in the middle.
const DIVERGING = ["#7f3b08", "#b35806", "#e08214", "#fdb863", "#f7f7f7", "#b2abd2", "#8073ac", "#542788", "#2d004b"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x"];

const Style = {
  // The page's own colours, whatever the theme is now.
  color(name) {
    const probe = document.getElementById("probe");
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  },

  dark: false,

  // A colour of viridis that can be seen on the page's ground.
  ramp(share) {
    const [low, high] = Style.dark ? [0.34, 1] : [0, 0.86];
    const place = (low + (high - low) * share) * (VIRIDIS.length - 1);
    const left = Math.min(Math.floor(place), VIRIDIS.length - 2);
    const part = (color, at) => parseInt(color.slice(at, at + 2), 16);
    const mixed = [1, 3, 5].map((at) =>
      Math.round(part(VIRIDIS[left], at) + (place - left) * (part(VIRIDIS[left + 1], at) - part(VIRIDIS[left], at)))
    );
    return `rgb(${mixed.join(",")})`;
  },

  layerColor(index, count) {
    return Style.ramp(count > 1 ? index / (count - 1) : 0.5);
  },

  scale(colors) {
    return colors.map((color, i) => [i / (colors.length - 1), color]);
  },

  axis(title, more = {}) {
    return {
      title: { text: title, font: { size: 12 }, standoff: 8 },
      gridcolor: Style.color("line"),
      linecolor: Style.color("soft"),
      tickcolor: Style.color("soft"),
      tickfont: { size: 11 },
      zeroline: false,
      automargin: true,
      exponentformat: "power",
      ...more,
    };
  },

  layout(more = {}) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: Style.color("ink") },
      margin: { l: 56, r: 14, t: 8, b: 44 },
      hoverlabel: { bgcolor: Style.color("card"), bordercolor: Style.color("soft"), font: { color: Style.color("ink") } },
      showlegend: false,
      dragmode: false,
      hovermode: "closest",
      ...more,
    };
  },

  legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },

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
    return statistic.decades && low > 0 ? { type: "log", dtick: 1 } : {};
  },

  unit(statistic) {
    return statistic.unit || "";
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
    const log = statistic.decades && !change;
    const pad = (row) => Array.from({ length: columns }, (_, j) => (Number.isFinite(row[j]) ? row[j] : null));
    const z = shown.map((row) => pad(row.map((value) => (log ? Math.log10(value) : value))));
    const height = Math.max(150, Math.min(660, 26 * history.layers.length)) + 60;
    const cell = { width: (width - 150) / columns, height: (height - 60) / history.layers.length };
    const { texts, exponent } = Numbers.cells(shown);
    const longest = Math.max(1, ...texts.flat().map((text) => text.length));
    const printed = cell.width >= 6.6 * longest + 4 && cell.height >= 15;
    const outline = (head, look) => {
      const y = history.layers.indexOf(head.layer);
      return { type: "rect", x0: head.index - 0.5, x1: head.index + 0.5, y0: y - 0.5, y1: y + 0.5, line: look };
    };
    const shapes = [];
    if (marked && history.place(marked) >= 0) {
      shapes.push(outline(marked, { color: Style.color("mark"), width: 3 }));
    }
    if (cursor) shapes.push(outline(cursor, { color: Style.color("ink"), width: 2, dash: "dot" }));
    const hover = history.layers.map((layer, i) =>
      Array.from({ length: columns }, (_, j) =>
        j < rows[i].length
          ? `${layer}, head ${j}<br>${Numbers.short(rows[i][j])}` +
            (base ? ` (first: ${Numbers.short(base[i][j])}, change ${Numbers.short(shown[i][j])})` : "")
          : ""
      )
    );
    const ticks = (count) => {
      const every = Math.ceil(count / 32);
      return Array.from({ length: Math.ceil(count / every) }, (_, i) => i * every);
    };
    const columnTicks = ticks(columns).filter((_, i) => (width - 150) / columns > 18 || i % 4 === 0);
    return {
      height,
      note: printed && exponent ? `Numbers in the cells are in units of 10${Numbers.superscript(exponent)}.` : "",
      traces: [
        {
          type: "heatmap",
          z,
          ...Plots.colors(statistic, { change, fit, log, shown: z }),
          text: printed ? texts.map((row) => Array.from({ length: columns }, (_, j) => row[j] || "")) : undefined,
          texttemplate: printed ? "%{text}" : undefined,
          textfont: { size: 11 },
          hovertext: hover,
          hovertemplate: "%{hovertext}<extra></extra>",
          xgap: cell.width > 8 ? 1 : 0,
          ygap: cell.height > 8 ? 1 : 0,
          colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 }, exponentformat: "power", ...(log ? Plots.logTicks(z) : {}) },
        },
      ],
      layout: Style.layout({
        height,
        margin: { l: 60, r: 10, t: 8, b: 42 },
        shapes,
        xaxis: Style.axis(columns > 1 ? "head" : "", {
          tickvals: columnTicks,
          range: [-0.5, columns - 0.5],
          showgrid: false,
          fixedrange: true,
        }),
        yaxis: Style.axis("", {
          tickvals: ticks(history.layers.length),
          ticktext: ticks(history.layers.length).map((i) => history.layers[i]),
          range: [history.layers.length - 0.5, -0.5],
          showgrid: false,
          fixedrange: true,
        }),
      }),
    };
  },

  // One scale for all steps, so that a change over time is seen as one; `fit` takes the shown step's own range.
  colors(statistic, { change, fit, log, shown }) {
    const history = statistic.history;
    let values = shown.flat().filter(Number.isFinite);
    if (!fit && !change) values = Array.from(statistic.values, (value) => (log ? Math.log10(value) : value));
    if (!fit && change) {
      const points = history.steps.length;
      values = Array.from(statistic.values, (value, i) => value - statistic.values[i - (i % points)]);
    }
    let [low, high] = Numbers.range(values);
    if (!(low <= high)) [low, high] = [0, 1];
    if (change || (statistic.signed && low < 0)) {
      const reach = Math.max(Math.abs(low), Math.abs(high)) || 1;
      return { colorscale: Style.scale(DIVERGING), zmin: -reach, zmax: reach };
    }
    if (statistic.share && !fit) [low, high] = [Math.min(0, low), Math.max(1, high)];
    if (low === high) [low, high] = [low - 0.5 * Math.abs(low || 1), high + 0.5 * Math.abs(high || 1)];
    return { colorscale: Style.scale(VIRIDIS), zmin: low, zmax: high };
  },

  logTicks(rows) {
    const [low, high] = Numbers.range(rows.flat());
    const whole = [];
    for (let exponent = Math.floor(low) - 1; exponent <= Math.ceil(high) + 1; exponent++) whole.push(exponent);
    return { tickvals: whole, ticktext: whole.map((exponent) => `10${Numbers.superscript(exponent)}`) };
  },

  // A statistic of each layer over the steps: the mean of its heads, or the largest where that counts.
  overTime({ statistic, step, name }) {
    const history = statistic.history;
    const reduce = statistic.peak ? (values) => Numbers.range(values)[1] : Numbers.mean;
    const all = [];
    const many = history.layers.length > 10;
    const traces = history.layers.map((layer, i) => {
      const y = history.steps.map((_, index) => {
        const value = reduce(history.layerValues(statistic, layer, index));
        return Number.isFinite(value) ? value : null;
      });
      all.push(...y.filter((value) => value !== null));
      return {
        type: "scatter",
        mode: history.steps.length < 4 ? "lines+markers" : "lines",
        x: history.steps,
        y,
        name: layer,
        line: { color: Style.layerColor(i, history.layers.length), width: 1.6, dash: DASHES[i % DASHES.length] },
        hovertemplate: `${layer}<br>step %{x}: %{y:.3g}<extra></extra>`,
      };
    });
    if (many) traces.push(Plots.layerBar(history.layers));
    return {
      traces,
      layout: Style.layout({
        height: 280,
        showlegend: !many,
        legend: Style.legend,
        margin: { l: 60, r: 14, t: many ? 8 : 40, b: 44 },
        shapes: history.steps.length > 1 ? [Plots.now(step)] : [],
        xaxis: Style.axis(name ? "" : "step", Plots.stepTicks(history.steps, name)),
        yaxis: Style.axis(Style.unit(statistic), Style.valueAxis(statistic, all)),
      }),
    };
  },

  stepTicks(steps, name) {
    if (name) return { tickvals: steps, ticktext: steps.map(name) };
    return steps.length === 1 ? { tickvals: steps, range: [steps[0] - 1, steps[0] + 1] } : {};
  },

  now(step) {
    return {
      type: "line", x0: step, x1: step, y0: 0, y1: 1, yref: "paper",
      line: { color: Style.color("mark"), width: 1.5, dash: "dot" },
    };
  },

  // What the colours of many layers mean, as a bar beside the plot.
  layerBar(layers) {
    return {
      type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip", showlegend: false,
      marker: {
        color: [0], cmin: 0, cmax: layers.length - 1, showscale: true,
        colorscale: Array.from({ length: 9 }, (_, i) => [i / 8, Style.ramp(i / 8)]),
        colorbar: {
          thickness: 10, outlinewidth: 0, tickfont: { size: 11 },
          tickvals: [0, layers.length - 1], ticktext: [layers[0], layers[layers.length - 1]],
        },
      },
    };
  },

  // A point a head of the layers that both histories have.
  scatter({ x, y, step, marked, diagonal }) {
    const [a, b] = [x.history, y.history];
    const layers = a.layers.filter((layer) => b.start.has(layer));
    const points = { x: [], y: [], color: [], symbol: [], heads: [], text: [], size: [], edge: [], line: [] };
    layers.forEach((layer, i) => {
      const [xs, ys] = [a.layerValues(x, layer, a.at(step)), b.layerValues(y, layer, b.at(step))];
      xs.forEach((value, head) => {
        if (!Number.isFinite(value) || !Number.isFinite(ys[head])) return;
        const chosen = marked && marked.layer === layer && marked.index === head;
        points.x.push(value);
        points.y.push(ys[head]);
        points.color.push(Style.layerColor(i, layers.length));
        points.symbol.push(SYMBOLS[i % SYMBOLS.length]);
        points.heads.push(`${layer}/${head}`);
        points.text.push(`${layer}, head ${head}<br>${Numbers.short(value)}, ${Numbers.short(ys[head])}`);
        points.size.push(chosen ? 15 : layers.length * xs.length > 300 ? 6 : 9);
        points.edge.push(chosen ? Style.color("mark") : Style.color("card"));
        points.line.push(chosen ? 3 : 0.6);
      });
    });
    const shapes = diagonal
      ? [{ type: "line", x0: 0, x1: 1, y0: 0, y1: 1, line: { color: Style.color("soft"), dash: "dash", width: 1 } }]
      : [];
    const few = layers.length <= 10;
    const legend = few
      ? layers.map((layer, i) => ({
          type: "scatter", mode: "markers", x: [null], y: [null], name: layer, hoverinfo: "skip",
          marker: { color: Style.layerColor(i, layers.length), symbol: SYMBOLS[i % SYMBOLS.length], size: 9 },
        }))
      : [Plots.layerBar(layers)];
    return {
      traces: [
        {
          type: "scatter", mode: "markers", x: points.x, y: points.y, customdata: points.heads, text: points.text,
          hovertemplate: "%{text}<extra></extra>", showlegend: false,
          marker: {
            color: points.color, symbol: points.symbol, size: points.size, opacity: 0.9,
            line: { color: points.edge, width: points.line },
          },
        },
        ...legend,
      ],
      layout: Style.layout({
        height: 400,
        shapes,
        showlegend: few,
        legend: Style.legend,
        margin: { l: 60, r: 14, t: few ? 40 : 8, b: 48 },
        xaxis: Style.axis(x.title, diagonal ? { range: [-0.03, 1.03] } : Style.valueAxis(x, points.x)),
        yaxis: Style.axis(y.title, diagonal ? { range: [-0.03, 1.03] } : Style.valueAxis(y, points.y)),
      }),
    };
  },

  // Curves over the key's position: mean over heads, and between which all but a tenth of them lie.
  propagation({ predicted, measured, head, height = 400 }) {
    const traces = [];
    const add = (found, name, color, dash, symbol) => {
      if (!found || !found.curves.length) return;
      const at = (share) => found.theta.map((_, i) => Numbers.quantile(found.curves.map((one) => one[i]), share));
      if (found.curves.length > 2) {
        const faint = Style.color(color).replace("rgb(", "rgba(").replace(")", ", 0.16)");
        traces.push(
          { type: "scatter", mode: "lines", x: found.theta, y: at(0.05), line: { width: 0 }, hoverinfo: "skip", showlegend: false },
          { type: "scatter", mode: "lines", x: found.theta, y: at(0.95), line: { width: 0 }, fill: "tonexty", fillcolor: faint, hoverinfo: "skip", showlegend: false }
        );
      }
      traces.push({
        type: "scatter", mode: "lines+markers", x: found.theta, name,
        y: found.theta.map((_, i) => Numbers.mean(found.curves.map((one) => one[i]))),
        line: { color: Style.color(color), width: 2.4, dash },
        marker: { symbol, size: 7 },
        hovertemplate: `${name}<br>position %{x:.2f}: %{y:.3f}<extra></extra>`,
      });
      if (found.head) {
        traces.push({
          type: "scatter", mode: "lines", x: found.theta, y: found.head, name: `${name}, ${head}`,
          line: { color: Style.color(color), width: 1.4, dash: "dot" },
          hovertemplate: `${head}, ${name}<br>position %{x:.2f}: %{y:.3f}<extra></extra>`,
        });
      }
    };
    add(predicted, predicted ? `random walk, ${predicted.when}` : "", "one", "solid", "circle");
    add(measured, measured ? `measured, ${measured.when}` : "", "two", "dash", "diamond");
    return {
      traces,
      layout: Style.layout({
        height,
        showlegend: true,
        legend: Style.legend,
        margin: { l: 60, r: 14, t: 44, b: 48 },
        xaxis: Style.axis("position of the key (0: first, 1: the query's own)", { range: [0, 1] }),
        yaxis: Style.axis("probability, share of pairs", { range: [-0.03, 1.03] }),
      }),
    };
  },

  // Eigenvalues of some heads; the dashed circle is the disc of a random head.
  plane({ heads, radius, marked, height = 400 }) {
    const points = { x: [], y: [], heads: [], text: [] };
    const chosen = { x: [], y: [] };
    for (const head of heads) {
      const isChosen = marked && head.id === marked;
      head.real.forEach((real, i) => {
        const into = isChosen ? chosen : points;
        into.x.push(real);
        into.y.push(head.imag[i]);
        if (!isChosen) {
          points.heads.push(head.id);
          points.text.push(`${head.id.replace("/", ", head ")}<br>${Numbers.short(real)} ${head.imag[i] < 0 ? "−" : "+"} ${Numbers.short(Math.abs(head.imag[i]))}i`);
        }
      });
    }
    const reach = 1.06 * Math.max(radius || 0, ...[points, chosen].flatMap((one) => one.x.map((x, i) => Math.hypot(x, one.y[i]))), 1e-30);
    const dense = points.x.length > 800;
    return {
      traces: [
        {
          type: "scatter", mode: "markers", x: points.x, y: points.y, customdata: points.heads, text: points.text,
          name: "all heads", hovertemplate: "%{text}<extra></extra>",
          marker: { color: Style.color("one"), size: dense ? 4 : 6, opacity: dense ? 0.5 : 0.7 },
        },
        {
          type: "scatter", mode: "markers", x: chosen.x, y: chosen.y, name: marked ? marked.replace("/", ", head ") : "",
          hovertemplate: "%{x:.3g}, %{y:.3g}<extra></extra>", visible: chosen.x.length > 0,
          marker: { color: Style.color("two"), symbol: "diamond", size: 8, line: { color: Style.color("card"), width: 0.8 } },
        },
        Plots.circle(radius),
      ],
      layout: Style.layout({
        height,
        showlegend: true,
        legend: Style.legend,
        margin: { l: 60, r: 14, t: 44, b: 48 },
        xaxis: Style.axis("real part", { range: [-reach, reach], zeroline: true, zerolinecolor: Style.color("line") }),
        yaxis: Style.axis("imaginary part", { range: [-reach, reach], scaleanchor: "x", zeroline: true, zerolinecolor: Style.color("line") }),
      }),
    };
  },

  circle(radius) {
    const angles = Array.from({ length: 121 }, (_, i) => (i / 60) * Math.PI);
    return {
      type: "scatter", mode: "lines", name: "disc of a random head", hoverinfo: "skip", visible: radius > 0,
      x: angles.map((angle) => radius * Math.cos(angle)),
      y: angles.map((angle) => radius * Math.sin(angle)),
      line: { color: Style.color("three"), width: 2, dash: "dash" },
    };
  },

  // How many eigenvalues lie within a distance of zero, against a random head's.
  within({ moduli, law, height = 400 }) {
    const sorted = moduli.filter(Number.isFinite).sort((a, b) => a - b);
    const count = Math.min(200, sorted.length);
    const pick = Array.from({ length: count }, (_, i) => Math.round(((i + 1) / count) * sorted.length) - 1);
    const end = Math.max(1.25, 1.03 * (sorted[sorted.length - 1] || 0));
    const grid = law ? Array.from(law, (_, i) => i / (law.length - 1)) : [];
    return {
      traces: [
        {
          type: "scatter", mode: "lines", name: "these heads", x: [0, ...pick.map((i) => sorted[i])],
          y: [0, ...pick.map((i) => (i + 1) / sorted.length)], line: { color: Style.color("one"), width: 2.4, shape: "hv" },
          hovertemplate: "%{y:.0%} within %{x:.2f}<extra></extra>",
        },
        {
          type: "scatter", mode: "lines", name: "random heads", x: [...grid, end], y: [...(law || []), 1], visible: grid.length > 0,
          line: { color: Style.color("three"), width: 2, dash: "dash" }, hovertemplate: "random: %{y:.0%} within %{x:.2f}<extra></extra>",
        },
      ],
      layout: Style.layout({
        height,
        showlegend: true,
        legend: Style.legend,
        margin: { l: 60, r: 14, t: 44, b: 48 },
        xaxis: Style.axis("|eigenvalue| over the radius of a random head's disc", { range: [0, end] }),
        yaxis: Style.axis("share within", { range: [0, 1.02], tickformat: ".0%" }),
      }),
    };
  },

  // A head among all others.
  headOverTime({ statistic, place, step, name }) {
    const history = statistic.history;
    const y = history.series(statistic, place);
    const columns = history.steps.map((_, index) => history.allValues(statistic, index));
    const band = (share) => columns.map((values) => Numbers.quantile(values, share));
    const line = { type: "scatter", mode: "lines", x: history.steps, hoverinfo: "skip", showlegend: false };
    const [low, high] = [band(0.1), band(0.9)];
    return {
      traces: [
        { ...line, y: low, line: { width: 0 } },
        { ...line, y: high, line: { width: 0 }, fill: "tonexty", fillcolor: Style.color("plain") },
        { ...line, y: band(0.5), line: { color: Style.color("soft"), width: 1, dash: "dash" } },
        {
          ...line, y, hoverinfo: undefined, mode: history.steps.length < 4 ? "lines+markers" : "lines",
          line: { color: Style.color("two"), width: 2.2 }, hovertemplate: "step %{x}: %{y:.3g}<extra></extra>",
        },
      ],
      layout: Style.layout({
        height: 150,
        margin: { l: 52, r: 8, t: 6, b: 26 },
        shapes: history.steps.length > 1 ? [Plots.now(step)] : [],
        xaxis: Style.axis("", { nticks: 5, ...Plots.stepTicks(history.steps, name) }),
        yaxis: Style.axis("", { nticks: 4, ...Style.valueAxis(statistic, [...y, ...low, ...high]) }),
      }),
    };
  },

  curve({ steps, values }) {
    return {
      traces: [
        {
          type: "scatter", mode: steps.length < 4 ? "lines+markers" : "lines", x: steps, y: Array.from(values),
          line: { color: Style.color("one"), width: 2 }, hovertemplate: "step %{x}: %{y:.4g}<extra></extra>",
        },
      ],
      layout: Style.layout({ height: 220, xaxis: Style.axis("step", Plots.stepTicks(steps)), yaxis: Style.axis("") }),
    };
  },
};
