// The page: what is chosen (step, head, layer, statistics), the controls, and the figures that follow them.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};

class Page {
  constructor(data) {
    this.data = data;
    this.histories = {};
    for (const [name, raw] of Object.entries(data.histories)) {
      this.histories[name] = new History(name, raw, data.array);
    }
    const steps = new Set();
    for (const [name, history] of Object.entries(this.histories)) {
      if (name !== "hidden") history.steps.forEach((step) => steps.add(step));
    }
    this.steps = Array.from(steps).sort((a, b) => a - b);
    this.step = this.steps[this.steps.length - 1];
    this.head = null;
    this.layer = null;
    this.change = false;
    this.fit = false;
    this.maps = {};
    this.cursor = {};
    this.plots = new Map();
    this.timer = null;
  }

  start() {
    this.theme();
    this.controls();
    this.mapCards();
    this.layerSelects();
    for (const card of document.querySelectorAll("[data-plot]")) this.plots.set(card, this.drawer(card));
    // Figures are drawn when they come near the window, so that a long page opens at once.
    this.visible = new Set();
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) this.visible.delete(entry.target);
        else if (!this.visible.has(entry.target)) {
          this.visible.add(entry.target);
          if (entry.target.dataset.stale !== "no") this.draw(entry.target);
        }
      }
    }, { rootMargin: "300px" });
    const sizes = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        // Height follows from the width.
        if (target.dataset.width === undefined || Number(target.dataset.width) === target.clientWidth) continue;
        target.dataset.stale = "yes";
        if (this.visible.has(target)) this.draw(target);
      }
    });
    for (const card of this.plots.keys()) {
      this.observer.observe(card);
      sizes.observe(card);
    }
    this.rows();
    this.panelKeys();
    const wanted = decodeURIComponent(location.hash).match(/^#head=(.+)\/(\d+)$/);
    if (wanted) this.open({ layer: wanted[1], index: Number(wanted[2]) });
  }

  // What a step is called.
  stepName(step) {
    if (this.data.points[step] !== undefined) return this.data.points[step];
    return step < 0 ? "start" : `step ${step}`;
  }

  get namer() {
    return Object.keys(this.data.points).length ? (step) => this.stepName(step) : null;
  }

  // Figures

  drawer(card) {
    const { plot } = card.dataset;
    const drawers = {
      map: () => this.drawMap(card),
      time: () => {
        const statistic = this.statistic(card.dataset.history, card.dataset.statistic);
        return Plots.overTime({ statistic, step: this.step, name: this.namer });
      },
      entropy: () => this.drawScatter(card, false),
      passing: () => this.drawScatter(card, true),
      predicted: () => this.drawScatter(card, true, "pred"),
      propagation: () => this.drawPropagation(card),
      plane: () => this.drawPlane(card),
      within: () => this.drawWithin(),
      verdicts: () => this.drawVerdicts(),
      loss: () => {
        const curve = this.data.scalars[Number(card.dataset.index)];
        const values = this.data.array(curve.values);
        return Plots.curve({ name: curve.name, steps: curve.steps, values, events: this.data.alarms, height: 190 });
      },
      scalar: () => {
        const curve = this.data.scalars[Number(card.dataset.index)];
        return Plots.curve({ name: curve.name, steps: curve.steps, values: this.data.array(curve.values) });
      },
    };
    return drawers[plot];
  }

  statistic(history, name) {
    return this.histories[history].statistics.get(name);
  }

  draw(card) {
    const made = this.plots.get(card)();
    card.dataset.stale = "no";
    card.dataset.width = card.clientWidth;
    Chart.draw(card, made, (head) => this.open(head, card));
    card.setAttribute("aria-busy", "false");
  }

  // `Page.headOf("layer/3")`: labels may have slashes.
  static headOf(id) {
    const cut = id.lastIndexOf("/");
    return { layer: id.slice(0, cut), index: Number(id.slice(cut + 1)) };
  }

  // All figures of some kinds, those out of sight when they are scrolled to.
  redraw(...kinds) {
    for (const card of this.plots.keys()) {
      if (kinds.length && !kinds.includes(card.dataset.plot)) continue;
      card.dataset.stale = "yes";
      if (this.visible.has(card)) this.draw(card);
    }
  }

  drawMap(card) {
    const name = card.dataset.history;
    const made = Plots.heatmap({
      statistic: this.statistic(name, this.maps[name]),
      step: this.step,
      change: this.change,
      fit: this.fit,
      marked: this.head,
      cursor: card.matches(":focus-visible") ? this.cursor[name] : null,
      width: card.clientWidth,
    });
    const history = this.histories[name];
    const shown = history.steps[history.at(this.step)];
    $(`when-${name}`).textContent = this.stepName(shown) + (this.change ? ` minus ${this.stepName(history.steps[0])}` : "");
    $(`note-${name}`).textContent = made.note;
    return made;
  }

  // Every head's verdict: layers that attention does not know are those of the weights.
  drawVerdicts() {
    const known = ["attention", "spectrum"].map((name) => this.histories[name]).filter(Boolean);
    const heads = new Map(known.reverse().flatMap((one) => one.layers.map((layer, i) => [layer, one.heads[i]])));
    return Plots.verdicts({ heads, verdicts: this.data.verdicts, marked: this.head });
  }

  drawScatter(card, diagonal, from = "spectrum") {
    const x = this.statistic(from, card.dataset.x);
    const y = this.statistic("attention", card.dataset.y);
    return Plots.scatter({ x, y, step: this.step, marked: this.head, diagonal });
  }

  nearest(entries) {
    const distance = (entry) => Math.abs(entry.step - this.step);
    return entries.length ? entries.reduce((best, entry) => (distance(entry) < distance(best) ? entry : best)) : null;
  }

  // Curves of a layer's heads (or of all), at the step that is nearest to the shown one.
  curves(kind, only) {
    const found = this.nearest(this.data.propagation[kind]);
    if (!found) return null;
    const theta = found.theta || this.data.propagation.theta;
    const size = theta.length;
    const curves = [];
    let own = null;
    for (const [layer, where] of Object.entries(found.layers)) {
      const flat = this.data.array(where);
      for (let start = 0; start < flat.length; start += size) {
        const curve = Array.from(flat.subarray(start, start + size));
        if (this.head && this.head.layer === layer && this.head.index === start / size) own = curve;
        if (!only || only === layer) curves.push(curve);
      }
    }
    return { theta, curves, head: own, when: this.stepName(found.step) };
  }

  drawPropagation() {
    const layer = $("layer-propagation").value;
    return Plots.propagation({
      predicted: this.curves("predicted", layer),
      measured: this.curves("measured", layer),
      head: this.head ? `head ${this.head.index} of ${this.head.layer}` : "",
    });
  }

  // Eigenvalues of the heads of a layer, at the step that is nearest to the shown one.
  spectra(layer) {
    const found = this.nearest(this.data.eigenvalues.filter((entry) => entry.layers.includes(layer)));
    if (!found) return null;
    const part = found.parts[found.layers.indexOf(layer)];
    const [real, imag, radius] = ["real", "imag", "radius"].map((name) => this.data.array(part[name]));
    let start = 0;
    const heads = part.counts.map((count, index) => {
      const head = { id: `${layer}/${index}`, radius: radius[index], real: [], imag: [] };
      for (let i = start; i < start + count; i++) {
        head.real.push(real[i]);
        head.imag.push(imag[i]);
        if (part.mirrored && imag[i] > 0) {
          head.real.push(real[i]);
          head.imag.push(-imag[i]);
        }
      }
      start += count;
      return head;
    });
    return { heads, step: found.step, law: part.law && this.data.array(part.law) };
  }

  drawPlane() {
    const found = this.spectra($("layer-eigenvalues").value);
    $("when-eigenvalues").textContent = this.stepName(found.step);
    const squares = found.heads.map((head) => head.radius ** 2);
    const marked = this.head ? `${this.head.layer}/${this.head.index}` : null;
    return Plots.plane({ heads: found.heads, radius: Math.sqrt(Numbers.mean(squares)), marked });
  }

  drawWithin() {
    const found = this.spectra($("layer-eigenvalues").value);
    return Plots.within({ moduli: found.heads.flatMap(Page.moduli), law: found.law });
  }

  static moduli(head) {
    return head.real.map((real, i) => Math.hypot(real, head.imag[i]) / head.radius);
  }

  // Controls

  theme() {
    const media = window.matchMedia("(prefers-color-scheme: dark)");
    const root = document.documentElement;
    const apply = () => {
      const chosen = root.dataset.theme;
      Style.dark = chosen ? chosen === "dark" : media.matches;
      $("theme").textContent = Style.dark ? "Light page" : "Dark page";
      if (this.observer) this.redraw();
      if (this.head) this.fill();
    };
    $("theme").hidden = false;
    $("theme").addEventListener("click", () => {
      root.dataset.theme = Style.dark ? "light" : "dark";
      try {
        localStorage.setItem("lightning-qk-theme", root.dataset.theme);
      } catch {
        // A page from a file may keep nothing: the choice lasts until it is closed.
      }
      apply();
    });
    media.addEventListener("change", apply);
    let before;
    window.addEventListener("beforeprint", () => {
      before = root.dataset.theme;
      root.dataset.theme = "light";
      apply();
      for (const card of this.plots.keys()) this.draw(card);
    });
    window.addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before;
      else delete root.dataset.theme;
      apply();
    });
    apply();
  }

  controls() {
    if (this.steps.length < 2) return;
    const slider = $("step");
    slider.max = this.steps.length - 1;
    slider.value = slider.max;
    slider.addEventListener("input", () => {
      this.stop();
      this.show(Number(slider.value));
    });
    $("play").addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    for (const [id, field] of [["change", "change"], ["fit", "fit"]]) {
      $(id).addEventListener("change", () => {
        this[field] = $(id).checked;
        this.redraw("map");
      });
    }
    $("stepbar").hidden = false;
    this.show(this.steps.length - 1);
  }

  show(index) {
    this.step = this.steps[index];
    $("step").value = index;
    $("step").setAttribute("aria-valuetext", this.stepName(this.step));
    $("step-name").textContent = `${this.stepName(this.step)} (${index + 1} of ${this.steps.length})`;
    if (this.observer) this.redraw("map", "verdicts", "entropy", "passing", "predicted", "propagation", "plane", "within", "time");
    if (this.head) this.fill();
  }

  play() {
    let index = Number($("step").value);
    if (index >= this.steps.length - 1) index = -1;
    const next = () => {
      index += 1;
      this.show(index);
      if (index >= this.steps.length - 1) this.stop();
    };
    $("play").textContent = "❚❚ Pause";
    $("play").setAttribute("aria-pressed", "true");
    this.timer = setInterval(next, Math.max(150, 6000 / this.steps.length));
    next();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    $("play").textContent = "▶ Play";
    $("play").setAttribute("aria-pressed", "false");
  }

  // Heatmaps: a list of statistics above each, and a cursor for the keyboard.
  mapCards() {
    for (const card of document.querySelectorAll('[data-plot="map"]')) {
      const name = card.dataset.history;
      const history = this.histories[name];
      const select = $(`pick-${name}`);
      for (const statistic of history.statistics.values()) {
        select.append(make("option", { value: statistic.name, textContent: statistic.title }));
      }
      const choose = () => {
        this.maps[name] = select.value;
        const statistic = history.statistics.get(select.value);
        $(`meaning-${name}`).textContent = statistic.meaning;
        $(`worry-${name}`).hidden = !statistic.worry;
        $(`worry-${name}`).lastChild.textContent = ` ${statistic.worry}`;
        card.setAttribute("aria-label", `Heatmap of ${statistic.title} by layer and head. Arrow keys move, Enter opens a head.`);
        if (this.observer) this.redraw("map");
      };
      select.addEventListener("change", choose);
      choose();
      this.cursor[name] = { layer: history.layers[0], index: 0 };
      card.addEventListener("keydown", (event) => this.moveCursor(event, card, name));
      // Not when a click brought the focus: a figure that is drawn anew between press and release hears no click.
      card.addEventListener("focus", () => card.matches(":focus-visible") && this.follow(card, name));
      card.addEventListener("blur", () => this.redraw("map"));
    }
  }

  moveCursor(event, card, name) {
    const history = this.histories[name];
    const cursor = this.cursor[name];
    const layer = history.layers.indexOf(cursor.layer);
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.open(cursor, card);
    } else if (moves[event.key]) {
      event.preventDefault();
      const [down, right] = moves[event.key];
      const row = Math.min(Math.max(layer + down, 0), history.layers.length - 1);
      const column = Math.min(Math.max(cursor.index + right, 0), history.heads[row] - 1);
      this.cursor[name] = { layer: history.layers[row], index: column };
      this.follow(card, name);
    }
  }

  follow(card, name) {
    const cursor = this.cursor[name];
    const history = this.histories[name];
    const statistic = this.statistic(name, this.maps[name]);
    const value = history.series(statistic, history.place(cursor))[history.at(this.step)];
    $("spoken").textContent = `${cursor.layer}, head ${cursor.index}: ${Numbers.short(value)}`;
    this.draw(card);
  }

  layerSelects() {
    const fill = (id, layers, first) => {
      const select = $(id);
      if (!select) return;
      if (first) select.append(make("option", { value: "", textContent: first }));
      for (const layer of layers) select.append(make("option", { value: layer, textContent: layer }));
      select.addEventListener("change", () => this.redraw("propagation", "plane", "within"));
    };
    const { predicted, measured } = this.data.propagation;
    const drawn = new Set([...predicted, ...measured].flatMap((entry) => Object.keys(entry.layers)));
    fill("layer-propagation", drawn, "all layers");
    fill("layer-eigenvalues", new Set(this.data.eigenvalues.flatMap((entry) => entry.layers)), "");
    const select = $("layer-eigenvalues");
    if (select) select.value = this.farthest(Array.from(select.options, (option) => option.value));
  }

  // The layer whose eigenvalues leave the disc of a random head the farthest: the most learnt one.
  farthest(layers) {
    const reach = (layer) => Numbers.range(this.spectra(layer).heads.flatMap(Page.moduli))[1];
    return layers.reduce((best, layer) => (reach(layer) > reach(best) ? layer : best));
  }

  // A head

  rows() {
    for (const row of document.querySelectorAll("[data-head]")) {
      const head = Page.headOf(row.dataset.head);
      const button = row.querySelector("button");
      button.disabled = false;
      row.addEventListener("click", () => this.open(head, button));
    }
  }

  panelKeys() {
    $("close").addEventListener("click", () => this.close());
    $("before").addEventListener("click", () => this.neighbour(-1));
    $("after").addEventListener("click", () => this.neighbour(1));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.head) this.close();
    });
  }

  open(head, from = null) {
    if (!Object.values(this.histories).some((history) => history.place(head) >= 0)) return;
    if (from) this.from = from;
    this.head = { ...head };
    $("panel").hidden = false;
    this.fill();
    $("panel-title").focus();
    this.remember(`#head=${encodeURIComponent(head.layer)}/${head.index}`);
    this.redraw("map", "verdicts", "entropy", "passing", "predicted", "propagation", "plane");
  }

  close() {
    this.head = null;
    $("panel").hidden = true;
    this.remember("#");
    this.redraw("map", "verdicts", "entropy", "passing", "predicted", "propagation", "plane");
    if (this.from) this.from.focus();
  }

  remember(hash) {
    try {
      window.history.replaceState(null, "", hash);
    } catch {
      // Not allowed everywhere; the page works without.
    }
  }

  neighbour(by) {
    const any = Object.values(this.histories).find((one) => one.place(this.head) >= 0);
    const layer = any.layers.indexOf(this.head.layer);
    const index = this.head.index + by;
    if (index >= 0 && index < any.heads[layer]) this.open({ layer: this.head.layer, index });
    else if (any.layers[layer + by] !== undefined) {
      this.open({ layer: any.layers[layer + by], index: by > 0 ? 0 : any.heads[layer + by] - 1 });
    }
  }

  // The panel of the chosen head.
  fill() {
    const { layer, index } = this.head;
    const id = `${layer}/${index}`;
    const [verdict, reason] = this.data.verdicts[id] || ["ok", "nothing stands out"];
    $("panel-title").textContent = `${layer}, head ${index}`;
    $("panel-verdict").replaceChildren(make("span", { className: `tag ${verdict.replace(" ", "-")}`, textContent: verdict }), ` ${reason}.`);
    const body = $("panel-body");
    const had = new Map(Array.from(body.children, (child) => [child.dataset.key, child]));
    const wanted = [];
    const item = (key, title, value, made) => {
      let box = had.get(key);
      if (!box) {
        box = make("div", { className: "small" }, make("h4"), make("p", { className: "now" }), make("div", { className: "chart" }));
        box.dataset.key = key;
      }
      box.children[0].textContent = title;
      box.children[1].textContent = value;
      wanted.push([box, made]);
    };
    for (const history of Object.values(this.histories)) {
      const place = history.name === "hidden" ? -1 : history.place(this.head);
      if (place < 0) continue;
      for (const statistic of history.statistics.values()) {
        const now = history.at(this.step);
        const value = history.series(statistic, place)[now];
        if (!history.series(statistic, place).some(Number.isFinite)) continue;
        const others = history.allValues(statistic, now).filter(Number.isFinite);
        const rank = others.filter((other) => other > value).length + 1;
        const text = Number.isFinite(value)
          ? `${Numbers.short(value)}${statistic.unit ? ` ${statistic.unit}` : ""}, rank ${rank} of ${others.length}`
          : "no value at this step";
        const made = history.steps.length > 1 ? () => Plots.headOverTime({ statistic, place, step: this.step, name: this.namer }) : null;
        item(`${history.name}/${statistic.name}`, statistic.title, text, made);
      }
    }
    const [predicted, measured] = ["predicted", "measured"].map((kind) => this.ownCurve(kind));
    if (predicted || measured) {
      item("curve", "signal propagation by position", "", () => Plots.propagation({ predicted, measured, height: 260 }));
    }
    const spectra = this.spectra(layer);
    if (spectra && spectra.heads[index] && spectra.heads[index].real.length) {
      const own = spectra.heads[index];
      item("plane", `eigenvalues, ${this.stepName(spectra.step)}`, "", () =>
        Plots.plane({ heads: [own], radius: own.radius, marked: own.id, height: 300 })
      );
    }
    body.replaceChildren(...wanted.map(([box]) => box));
    for (const [box, made] of wanted) {
      box.classList.toggle("wide", box.dataset.key === "curve" || box.dataset.key === "plane");
      if (made) Chart.draw(box.children[2], made());
    }
  }

  ownCurve(kind) {
    const found = this.curves(kind, this.head.layer);
    return found && found.head ? { theta: found.theta, curves: [found.head], when: found.when } : null;
  }
}

(async () => {
  const failed = (sentence) => {
    $("loading").textContent = sentence;
    $("loading").hidden = false;
  };
  if (typeof DecompressionStream === "undefined") {
    failed(
      "The figures of this page need a browser that can inflate its data: Chrome or Edge from 80, Firefox from 113, " +
        "Safari from 16.4. The tables below are complete."
    );
    return;
  }
  try {
    const page = new Page(Data.unpack(await Data.inflate("data")));
    const kept = Follower.take();
    page.start();
    if (kept) Follower.restore(page, kept);
    page.follower = new Follower(page);
    document.documentElement.dataset.ready = "yes";
    window.lightningQK = page;
    $("loading").hidden = true;
  } catch (error) {
    failed(`The figures could not be drawn (${error.message}). The tables below are complete.`);
    throw error;
  }
})();
