// The data of the page: inflated, and as views of one array. The Python side is lightning_qk/report/packing.py.
"use strict";

const Data = {
  async inflate(id) {
    const text = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  },

  // Four bytes with the length of the JSON, the JSON, then the three upper bytes of all float32 numbers.
  unpack(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const content = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const planes = new Uint8Array(buffer, 4 + length);
    const count = planes.length / 3;
    const bits = new Uint32Array(count);
    for (let i = 0; i < count; i++) {
      bits[i] = (planes[i] << 24) | (planes[count + i] << 16) | (planes[2 * count + i] << 8);
    }
    const numbers = new Float32Array(bits.buffer);
    content.array = ([start, size]) => numbers.subarray(start, start + size);
    return content;
  },
};

// One monitor's history: statistics of all heads, which lie flat in the order of the layers.
class History {
  constructor(name, raw, array) {
    Object.assign(this, { name, layers: raw.layers, heads: raw.heads, steps: raw.steps });
    this.total = raw.heads.reduce((sum, count) => sum + count, 0);
    this.start = new Map();
    let start = 0;
    raw.layers.forEach((layer, i) => {
      this.start.set(layer, [start, raw.heads[i]]);
      start += raw.heads[i];
    });
    this.statistics = new Map(
      raw.statistics.map((one) => [one.name, { ...one, values: array(one.values), history: this }])
    );
  }

  // The newest kept step at or before a step; the first where there is none.
  at(step) {
    let index = 0;
    while (index + 1 < this.steps.length && this.steps[index + 1] <= step) index++;
    return index;
  }

  // A head's place among all, or -1.
  place(head) {
    const [start, count] = this.start.get(head.layer) || [0, 0];
    return head.index < count ? start + head.index : -1;
  }

  // One number a head of a layer, at a kept step.
  layerValues(statistic, layer, index) {
    const [start, count] = this.start.get(layer) || [0, 0];
    const points = this.steps.length;
    return Array.from({ length: count }, (_, head) => statistic.values[(start + head) * points + index]);
  }

  allValues(statistic, index) {
    const points = this.steps.length;
    return Array.from({ length: this.total }, (_, head) => statistic.values[head * points + index]);
  }

  // One number a step of a head.
  series(statistic, place) {
    const points = this.steps.length;
    return Array.from(statistic.values.subarray(place * points, (place + 1) * points));
  }
}

const Numbers = {
  // At most eight characters, and a dash for an unknown number: as format_value does it in Python.
  short(value) {
    if (value === undefined || value === null || Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace("-", "−");
    return (size < 99.95 ? value.toPrecision(3) : value.toFixed(0)).replace("-", "−");
  },

  unit(value, unit) {
    return `${Numbers.short(value)}${unit && Number.isFinite(value) ? ` ${unit}` : ""}`;
  },

  // A text of so many characters: its middle is left out, or its end.
  shorten(text, limit, atEnd = false) {
    if (text.length <= limit) return text;
    if (atEnd) return `${text.slice(0, limit - 1)}…`;
    const end = Math.ceil((limit - 1) * 0.6);
    return `${text.slice(0, limit - 1 - end)}…${text.slice(-end)}`;
  },

  // Texts for the cells of a heatmap, all in one power of ten so that digits never overlap.
  cells(rows) {
    const finite = rows.flat().filter(Number.isFinite).map(Math.abs);
    const largest = Math.max(0, ...finite);
    const exponent = largest && (largest < 0.1 || largest >= 9999.5) ? Math.floor(Math.log10(largest)) : 0;
    const scale = 10 ** -exponent;
    const digits = largest * scale >= 99.5 ? 0 : largest * scale >= 9.95 ? 1 : 2;
    const text = (value) => {
      if (!Number.isFinite(value)) return "";
      const plain = (value * scale).toFixed(digits);
      return Number(plain) === 0 ? plain.replace("-", "") : plain.replace("-", "−");
    };
    return { texts: rows.map((row) => row.map(text)), exponent };
  },

  superscript(exponent) {
    return String(exponent).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
  },

  mean(values) {
    const known = values.filter(Number.isFinite);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
  },

  // Quantile of the finite values, NaN of none.
  quantile(values, share) {
    const known = values.filter(Number.isFinite).sort((a, b) => a - b);
    return known.length ? known[Math.round(share * (known.length - 1))] : NaN;
  },

  // Largest or smallest of the finite values of a long array.
  range(values) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  },
};

// Colours of a heatmap. Limits are those of color_scale in lightning_qk/report/colors.py, which come with the data;
// for one step alone, and for changes, they are found here in the same way.
class Scale {
  constructor(kind, low, high) {
    Object.assign(this, { kind, low, high, colors: kind === "signed" ? DIVERGING : VIRIDIS });
    const by = kind === "log" ? Math.log10 : (value) => value;
    this.share = (value) => (by(value) - by(low)) / (by(high) - by(low));
  }

  static of(statistic, { change, fit, shown }) {
    if (!fit && !change) return new Scale(statistic.scale, ...statistic.limits);
    let values = [shown.flat()];
    if (change && !fit) {
      const history = statistic.history;
      const first = history.allValues(statistic, 0);
      values = history.steps.map((_, index) => history.allValues(statistic, index).map((value, i) => value - first[i]));
    }
    const kind = change ? "signed" : statistic.scale === "share" ? "linear" : statistic.scale;
    return new Scale(kind, ...Scale.limits(values, kind));
  }

  // The widest of the steps' robust limits: one head far off does not take the colours from all others.
  static limits(steps, kind) {
    const ends = steps.map((values) => Scale.robust(values, kind === "log")).filter(([low]) => Number.isFinite(low));
    if (!ends.length) return [0, 1];
    const widest = (from) => [Math.min(...ends.map((one) => one[from])), Math.max(...ends.map((one) => one[from + 1]))];
    let [low, high] = widest(0);
    // Nearly all heads are alike at every step: the others are all there is to see.
    if (low === high) [low, high] = widest(2);
    if (kind === "signed") high = Math.max(-low, high, 0) || 1;
    if (kind === "signed") low = -high;
    if (low === high) [low, high] = kind === "log" ? [low / 2, high * 2] : [low - 0.5 * Math.abs(low || 1), high + 0.5 * Math.abs(high || 1)];
    return [low, high];
  }

  // Robust limits of a step, and the plain ones.
  static robust(values, log) {
    const known = values.filter((value) => Number.isFinite(value) && (!log || value > 0)).map((value) => (log ? Math.log10(value) : value));
    if (!known.length) return [NaN];
    known.sort((a, b) => a - b);
    const at = (share) => {
      const place = share * (known.length - 1);
      const left = Math.floor(place);
      return known[left] + (place - left) * ((known[left + 1] ?? known[left]) - known[left]);
    };
    const [least, most] = [known[0], known[known.length - 1]];
    const [below, above] = [at(0.1), at(0.9)];
    const found = [Math.max(least, 2 * below - above), Math.min(most, 2 * above - below), least, most];
    return log ? found.map((value) => 10 ** value) : found;
  }

  color(value) {
    return Style.cell(this.colors, this.share(value));
  }

  // 1 above the end of the colours, -1 below it, else 0; float32 is as exact as the data.
  beyond(value) {
    if (!Number.isFinite(value)) return 0;
    const room = 1e-3 * (this.kind === "log" ? 1 : Math.abs(this.high - this.low));
    if (this.kind === "log") return value > this.high * (1 + room) ? 1 : value < this.low * (1 - room) ? -1 : 0;
    return value > this.high + room ? 1 : value < this.low - room ? -1 : 0;
  }

  bar() {
    const axis = new Axis({ range: [this.low, this.high], log: this.kind === "log", count: 5 }, [], 200, 40);
    return { colors: this.colors, ticks: axis.ticks.map(({ at, text }) => ({ share: this.share(at), text })) };
  }
}
