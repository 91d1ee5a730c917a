// The viewer on RoutingMapPreview: sliders for step and block, who is where under the pointer, a
// switch per subject. One element; `show` takes what the node sent.

import { readAtlas, shares } from "./atlas.js";
import { fit, paint } from "./paint.js";
import { isMiddle } from "./widget.js";

const STEP_KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MAP_HEIGHT = 250; // pixels of the map, at least
const GAP = 4; // pixels between the parts and around them, as in viewer.css
const OWN_KEYS = new Set([...Object.keys(STEP_KEYS), "Home", "End", "PageUp", "PageDown", " "]);

/** An element with properties and children; `role` and `aria-*` become attributes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.startsWith("aria-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** "23 %", "0.4 %": as in the figure. */
function percent(share) {
  const value = 100 * share;
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

export class RouteViewer {
  /** `load(file)` gives the Blob of a file on the host; `texts` are the words of texts.js;
   * `resized()` is called when `height` may have changed. */
  constructor(load, texts, resized) {
    this.load = load;
    this.texts = texts;
    this.resized = resized;
    this.rest = 110; // pixels below the map, until they are laid out
    this.entries = [];
    this.runs = 0;
    this.marker = null;
    this.hidden = new Set(["background"]);
    this.canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": texts.map });
    this.where = make("div", { className: "where", textContent: texts.hint });
    this.where.setAttribute("aria-live", "polite");
    this.sliders = {
      picture: this.slider("picture", () => this.open()),
      step: this.slider("step", () => this.draw()),
      block: this.slider("block", () => this.draw()),
    };
    this.subjects = make("fieldset");
    this.notes = make("div", { className: "notes" });
    this.element = make(
      "div",
      { className: "anystory-viewer", role: "group", "aria-label": texts.title },
      make("div", { className: "stage" }, this.canvas),
      this.where,
      ...Object.values(this.sliders).map((slider) => slider.row),
      this.subjects,
      this.notes,
    );
    this.listen();
  }

  /** Pixels that the viewer needs in height: the map, and all below it as it stands, with notes
   * that wrap. While the editor hides the viewer, the last that was seen. */
  get height() {
    const [, ...parts] = this.element.children;
    const seen = parts.map((part) => part.offsetHeight).filter((height) => height);
    if (seen.length) this.rest = seen.reduce((sum, height) => sum + height + GAP, 0);
    return MAP_HEIGHT + this.rest + 2 * GAP;
  }

  slider(name, changed) {
    const input = make("input", { type: "range", min: 0, max: 0, value: 0, name });
    const text = make("output");
    const row = make("label", { className: "slider" }, this.texts[name], input, text);
    input.setAttribute("aria-label", this.texts[name]);
    input.addEventListener("input", () => changed());
    return { input, text, row, get value() { return Number(input.value); } };
  }

  listen() {
    // Dragging here must not drag the node, nor may our keys move it.
    for (const kind of ["pointerdown", "pointermove", "pointerup"]) {
      this.element.addEventListener(kind, (event) => {
        if (!isMiddle(event)) event.stopPropagation();
      });
    }
    this.element.addEventListener("keydown", (event) => {
      if (OWN_KEYS.has(event.key)) event.stopPropagation();
    });
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.mark(null));
    this.canvas.addEventListener("blur", () => this.mark(null));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    const observer = new ResizeObserver(() => {
      this.element.style.setProperty("--anystory-height", `${this.height}px`);
      this.resized();
    });
    for (const part of [this.where, this.subjects, this.notes]) observer.observe(part);
  }

  /** Show what the node sent: a list of { file, layout, picture? }, and its warnings. An empty list
   * is a run without routes: those of the run before go. */
  async show(entries, notes = []) {
    this.entries = entries;
    this.notes.replaceChildren(
      ...notes.map((text) => make("p", { className: "note", textContent: text })),
    );
    const { input, row } = this.sliders.picture;
    input.max = Math.max(0, entries.length - 1);
    row.hidden = entries.length < 2;
    if (entries.length) await this.open();
    else {
      this.runs++; // what is on its way is outdated
      this.clear(this.texts.nothing);
    }
  }

  /** Fetch and show the chosen picture's routes. */
  async open() {
    const number = this.sliders.picture.value;
    const entry = this.entries[number];
    const run = ++this.runs;
    try {
      const [atlas, picture] = await Promise.all([
        this.load(entry.file).then((blob) => readAtlas(blob, entry.layout)),
        entry.picture ? this.load(entry.picture).then((blob) => createImageBitmap(blob)) : null,
      ]);
      if (run !== this.runs) {
        picture?.close();
        return; // a newer one is on its way
      }
      this.picture?.close();
      this.atlas = atlas;
      this.picture = picture;
    } catch (error) {
      if (run !== this.runs) return;
      this.clear(this.texts.lost);
      console.warn("AnyStory viewer:", error);
      return;
    }
    const { layout } = this.atlas;
    const { step, block, picture } = this.sliders;
    picture.text.textContent = this.texts.of(number + 1, this.entries.length);
    // Routes are best at the end: the viewer shows the last step until another one is chosen.
    const atEnd = step.value === Number(step.input.max);
    step.input.max = layout.steps.length - 1;
    if (atEnd) step.input.value = step.input.max;
    block.input.max = this.atlas.blocks.length;
    // Outside of all subjects' time windows a step has no map.
    const first = layout.steps.findIndex((_, number) => this.atlas.majority(number));
    const shape = first < 0 ? { width: 1, height: 1 } : this.atlas.majority(first);
    fit(this.canvas, shape, this.picture);
    this.listSubjects(layout);
    this.marker = null;
    this.draw();
  }

  /** Show no routes, and say why. */
  clear(why) {
    this.picture?.close();
    this.picture = null;
    this.atlas = null;
    this.marker = null;
    fit(this.canvas, { width: 1, height: 1 }); // empties it, too
    this.subjects.replaceChildren();
    for (const slider of [this.sliders.step, this.sliders.block]) {
      slider.input.max = 0;
      this.say(slider, "");
    }
    this.where.textContent = why;
  }

  /** A switch, a colour, a name and a share for each region. */
  listSubjects(layout) {
    const last = layout.labels.length - 1;
    this.rows = layout.labels.map((label, i) => {
      const key = i === last ? "background" : `${i} ${label}`;
      const input = make("input", { type: "checkbox", checked: !this.hidden.has(key) });
      input.addEventListener("change", () => {
        this.hidden[input.checked ? "delete" : "add"](key);
        this.draw();
      });
      const swatch = make("span", { className: "swatch" });
      swatch.style.background = layout.colors[i];
      const share = make("span", { className: "share" });
      const name = i === last ? this.texts.background : label;
      const row = make("label", {}, input, swatch, make("span", { textContent: name }), share);
      return { input, share, row, name };
    });
    const legend = make("legend", { textContent: this.texts.subjects });
    this.subjects.replaceChildren(legend, ...this.rows.map((row) => row.row));
  }

  /** The block that the slider is on: its number, or 0 for all. */
  get block() {
    return this.sliders.block.value ? this.atlas.blocks[this.sliders.block.value - 1] : 0;
  }

  get map() {
    return this.atlas.map(this.sliders.step.value, this.block);
  }

  draw() {
    if (!this.atlas) return;
    const { layout } = this.atlas;
    const { step, block } = this.sliders;
    const { number, sigma, active } = layout.steps[step.value];
    const map = this.map;
    const size = map ? `${map.width}×${map.height}` : "";
    const name = this.block ? `${layout.blocks[this.block]}, ${size}` : this.texts.all;
    this.say(step, `${this.texts.of(number + 1, layout.count)}, σ ${sigma}`);
    this.say(block, name);
    const parts = map ? shares(map, layout.labels.length) : [];
    this.rows.forEach(({ share }, i) => {
      share.textContent = active[i] === false ? this.texts.inactive : percent(parts[i] ?? 0);
    });
    if (this.marker != null && !(this.marker < (map?.ids.length ?? 0))) this.marker = null;
    paint(this.canvas, {
      map,
      picture: this.picture,
      colours: layout.colors,
      shown: this.rows.map((row) => row.input.checked),
      marker: this.marker,
    });
    this.tell();
  }

  /** A slider's value in words, for eyes and for screen readers. */
  say({ input, text }, words) {
    text.textContent = words;
    text.title = words;
    input.setAttribute("aria-valuetext", words);
  }

  /** Block, resolution and region at the marker. */
  tell() {
    const map = this.map;
    if (!map) this.where.textContent = this.texts.nothing;
    else if (this.marker == null) this.where.textContent = this.texts.hint;
    else {
      const block = this.block ? this.atlas.layout.blocks[this.block] : this.texts.all;
      const region = this.rows[map.ids[this.marker]].name;
      this.where.textContent = `${region} · ${block} · ${map.width}×${map.height}`;
    }
  }

  mark(marker) {
    if (!this.atlas || marker === this.marker) return;
    this.marker = marker;
    this.draw();
  }

  /** The token under the pointer; the canvas keeps its proportions inside its box. */
  point(event) {
    const map = this.atlas && this.map;
    if (!map) return;
    const { width, height } = this.canvas;
    const box = this.canvas.getBoundingClientRect();
    const scale = Math.min(box.width / width, box.height / height);
    const x = (event.clientX - box.left - (box.width - width * scale) / 2) / (width * scale);
    const y = (event.clientY - box.top - (box.height - height * scale) / 2) / (height * scale);
    const inside = x >= 0 && y >= 0 && x < 1 && y < 1;
    this.mark(inside ? Math.floor(y * map.height) * map.width + Math.floor(x * map.width) : null);
  }

  /** Arrow keys on the map move the marker by one token. */
  walk(event) {
    const map = this.atlas && this.map;
    const [dx, dy] = STEP_KEYS[event.key] ?? [];
    if (!map || dx === undefined) return;
    event.preventDefault();
    const clamp = (value, most) => Math.min(most - 1, Math.max(0, value));
    if (this.marker == null) {
      this.mark(Math.floor(map.height / 2) * map.width + Math.floor(map.width / 2));
      return;
    }
    const x = clamp((this.marker % map.width) + dx, map.width);
    const y = clamp(Math.floor(this.marker / map.width) + dy, map.height);
    this.mark(y * map.width + x);
  }
}
