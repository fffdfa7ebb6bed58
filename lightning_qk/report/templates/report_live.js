// A page of a run that goes on looks for a newer version of its own file, and loads it where it was: no other file and
// no network are needed. The file is opened in a frame without a face, which says its version and stops there.
"use strict";

class Follower {
  constructor(page, every = 3000) {
    const root = document.documentElement;
    Object.assign(this, { page, version: root.dataset.version, written: Number(root.dataset.written), frame: null, count: 0 });
    if (!root.dataset.written) return;
    window.addEventListener("message", (event) => this.heard(event));
    this.timer = setInterval(() => this.look(), every);
    this.age();
  }

  look() {
    this.age();
    if (document.hidden) return;
    if (this.frame) this.frame.remove();
    // A page may not have itself in a frame: its address differs by a number.
    const address = location.href.replace(/[?#].*$/, "");
    this.frame = make("iframe", { hidden: true, src: `${address}?version=${(this.count += 1)}` });
    this.frame.setAttribute("sandbox", "allow-scripts");
    document.body.append(this.frame);
  }

  heard(event) {
    if (!this.frame || event.source !== this.frame.contentWindow || !event.data) return;
    const found = event.data.lightningQK;
    this.frame.remove();
    this.frame = null;
    // Not under somebody's hand: the next look comes soon.
    if (typeof found === "string" && found && found !== this.version && !this.page.timer) this.reload();
  }

  age() {
    const seconds = Math.max(0, Date.now() / 1000 - this.written);
    const ago = seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
    const late = seconds > 900 ? ": a run that measures seldom, or one that ended without a word" : "";
    $("state-age").textContent = `, written ${ago} ago${late}`;
  }

  reload() {
    const { page } = this;
    const kept = {
      // Who looks at the newest step wants the newest.
      step: page.step === page.steps[page.steps.length - 1] ? null : page.step,
      change: page.change,
      fit: page.fit,
      fields: Array.from(document.querySelectorAll("[data-keep]"), (one) => [one.dataset.keep, one.tagName === "DETAILS" ? one.open : one.value]),
      drawn: Array.from(page.plots.keys(), (card) => card.dataset.width !== undefined),
      scroll: window.scrollY,
      panel: $("panel").scrollTop,
    };
    try {
      history.replaceState({ lightningQK: kept }, "", location.href);
    } catch {
      // The newer page begins at its top.
    }
    clearInterval(this.timer);
    location.reload();
  }

  // What an older version of the page left; taken before anything is drawn.
  static take() {
    const kept = history.state && history.state.lightningQK;
    if (kept) history.scrollRestoration = "manual";
    return kept || null;
  }

  static restore(page, kept) {
    for (const [name, value] of kept.fields) {
      const field = document.querySelector(`[data-keep="${CSS.escape(name)}"]`);
      if (!field) continue;
      if (field.tagName === "DETAILS") field.open = value;
      else if (Array.from(field.options).some((option) => option.value === value)) {
        field.value = value;
        field.dispatchEvent(new Event("change"));
      }
    }
    for (const name of ["change", "fit"]) {
      page[name] = $(name).checked = kept[name];
    }
    if (kept.step !== null && page.steps.length > 1) {
      const later = page.steps.findIndex((step) => step > kept.step);
      page.show(Math.max(0, (later < 0 ? page.steps.length : later) - 1));
    }
    // What was drawn takes the room that it had.
    Array.from(page.plots.keys()).forEach((card, i) => kept.drawn[i] && page.draw(card));
    window.scrollTo(0, kept.scroll);
    $("panel").scrollTop = kept.panel;
    history.scrollRestoration = "auto";
  }
}
