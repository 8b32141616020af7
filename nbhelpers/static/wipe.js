// Wipe viewer: two pictures of one size on one canvas, parted by a divider that the reader drags.
//
// State shared with Python (see nbhelpers/wipe.py):
//   left, right, original   encoded pictures (PNG, WebP or JPEG bytes); empty bytes: that picture is missing
//   divider                 0..1, where the divider stands within the visible width of the picture
//   zoom                    screen pixels per picture pixel; 0 means "fit the picture into the canvas"
//   center                  [x, y] in 0..1, the point of the picture in the middle of the canvas
// All positions inside this file are device pixels unless a name ends in "Css".

const SIDES = ["left", "right", "original"];
const MAX_ZOOM = 64;
const GRAB_CSS = { mouse: 14, pen: 20, touch: 28 };
const DRAG_STARTS_CSS = 3;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Above 1:1 only whole factors: then every picture pixel covers equally many screen pixels.
const snapZoom = (zoom) => (zoom > 1 ? Math.round(zoom) : zoom);

function stepZoom(zoom, direction) {
  let next = snapZoom(zoom * 1.5 ** direction);
  if (zoom >= 1 && next === zoom) next = zoom + direction;
  if ((zoom < 1 && next > 1) || (zoom > 1 && next < 1)) next = 1;
  return next;
}

// Start of a picture `size` long in a window `view` long: centred when it fits, else never pulled off an edge.
function place(view, size, center) {
  if (size <= view) return Math.round((view - size) / 2);
  return Math.round(clamp(view / 2 - center * size, view - size, 0));
}

async function decode(bytes) {
  if (!bytes || bytes.byteLength === 0) return { bitmap: null, words: "" };
  try {
    const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
    return { bitmap, words: "" };
  } catch {
    return { bitmap: null, words: "This picture cannot be decoded." };
  }
}

class WipeView {
  constructor(model, el) {
    this.model = model;
    this.pictures = {}; // side -> {bitmap, words, bytes}
    this.size = null; // {width, height} of the pictures in their own pixels
    this.pointers = new Map();
    this.drag = null; // what the pointer that is down does: {kind, x, y, ...}
    this.wanted = null; // unsnapped zoom while a trackpad or a pinch moves in small steps
    this.loading = 0;
    this.peeking = false;
    this.spaceDown = false;
    this.build(el);
    this.listen();
    this.load();
  }

  // ---- page elements ----
  build(el) {
    this.root = document.createElement("div");
    this.root.className = "wipe-viewer";
    this.canvas = document.createElement("canvas");
    this.canvas.className = "wipe-canvas";
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "slider");
    this.canvas.setAttribute("aria-valuemin", "0");
    this.canvas.setAttribute("aria-valuemax", "100");
    this.canvas.setAttribute("aria-orientation", "horizontal");
    // JupyterLab would otherwise take these keys as notebook commands ("0 0" restarts the kernel).
    this.canvas.setAttribute("data-lm-suppress-shortcuts", "true");
    this.root.append(this.canvas, this.buildBar());
    el.append(this.root);
    this.context = this.canvas.getContext("2d");
  }

  buildBar() {
    const bar = document.createElement("div");
    bar.className = "wipe-bar";
    const button = (text, title, action) => {
      const node = document.createElement("button");
      node.type = "button";
      node.textContent = text;
      node.title = title;
      node.setAttribute("aria-label", title);
      if (action) node.addEventListener("click", action);
      bar.append(node);
      return node;
    };
    button("−", "Zoom out (key -)", () => this.step(-1));
    this.zoomText = document.createElement("span");
    this.zoomText.className = "wipe-zoom";
    bar.append(this.zoomText);
    button("+", "Zoom in (key +)", () => this.step(1));
    button("Fit", "Fit the whole picture (key 0)", () => this.setZoom(0));
    button("100 %", "One picture pixel on one screen pixel (key 1)", () => this.setZoom(1));
    this.peekButton = button("Original", "Hold to see the original (key O)");
    const hint = document.createElement("span");
    hint.className = "wipe-hint";
    hint.textContent = "Drag the line to wipe, drag elsewhere to pan, wheel or pinch to zoom, double click: fit / 100 %.";
    bar.append(hint);
    return bar;
  }

  listen() {
    const on = (node, names, handler, options) =>
      names.split(" ").forEach((name) => node.addEventListener(name, handler, options));
    on(this.canvas, "pointerdown", (event) => this.pointerDown(event));
    on(this.canvas, "pointermove", (event) => this.pointerMove(event));
    on(this.canvas, "pointerup pointercancel", (event) => this.pointerUp(event));
    on(this.canvas, "wheel", (event) => this.wheel(event), { passive: false });
    on(this.canvas, "dblclick", (event) => this.doubleClick(event));
    on(this.canvas, "keydown", (event) => this.keyDown(event));
    on(this.canvas, "keyup", (event) => this.keyUp(event));
    on(this.canvas, "blur", () => this.release());
    on(this.canvas, "contextmenu", (event) => this.contextMenu(event));
    on(this.peekButton, "pointerdown", () => this.peek(true));
    on(this.peekButton, "pointerup pointerleave pointercancel blur", () => this.peek(false));
    on(this.peekButton, "keydown", (event) => (event.key === " " || event.key === "Enter") && this.peek(true));
    on(this.peekButton, "keyup", () => this.peek(false));
    this.onPictures = () => this.load();
    this.onView = () => this.redraw();
    this.pictureEvents = SIDES.map((side) => `change:${side}`);
    this.viewEvents = ["divider", "zoom", "center", "height", "message", ...SIDES.map((side) => `${side}_label`)].map(
      (name) => `change:${name}`,
    );
    this.pictureEvents.forEach((name) => this.model.on(name, this.onPictures));
    this.viewEvents.forEach((name) => this.model.on(name, this.onView));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.canvas);
    window.addEventListener("resize", this.onView); // also fires when the device pixel ratio changes
  }

  destroy() {
    this.pictureEvents.forEach((name) => this.model.off(name, this.onPictures));
    this.viewEvents.forEach((name) => this.model.off(name, this.onView));
    this.observer.disconnect();
    window.removeEventListener("resize", this.onView);
    cancelAnimationFrame(this.frame);
    this.loading += 1; // a decode still under way finds itself outdated
    SIDES.forEach((side) => this.pictures[side]?.bitmap?.close());
    this.root.remove();
  }

  // ---- pictures ----
  // Decodes everything that changed first and swaps afterwards, in one step: no flicker, and never a left
  // side from one setting beside a right side from another.
  async load() {
    const ticket = ++this.loading;
    await Promise.resolve(); // left and right of one update arrive as two events of the same turn
    if (ticket !== this.loading) return;
    const next = {};
    await Promise.all(
      SIDES.map(async (side) => {
        const bytes = this.model.get(side);
        const old = this.pictures[side];
        next[side] = old && old.bytes === bytes ? old : { ...(await decode(bytes)), bytes };
      }),
    );
    if (ticket !== this.loading) {
      SIDES.forEach((side) => next[side] !== this.pictures[side] && next[side].bitmap?.close());
      return;
    }
    SIDES.forEach((side) => next[side] !== this.pictures[side] && this.pictures[side]?.bitmap?.close());
    this.pictures = next;
    this.adoptSize();
    this.canvas.dataset.updates = String(Number(this.canvas.dataset.updates || 0) + 1);
    this.draw();
  }

  adoptSize() {
    const first = SIDES.map((side) => this.pictures[side].bitmap).find((bitmap) => bitmap);
    const size = first ? { width: first.width, height: first.height } : null;
    const changed = this.size && size && (size.width !== this.size.width || size.height !== this.size.height);
    if (size) this.size = size; // kept while nothing is shown, so that zoom and pan survive an error in between
    this.empty = !size;
    if (changed) this.save({ zoom: 0, center: [0.5, 0.5] });
  }

  save(values) {
    Object.entries(values).forEach(([name, value]) => this.model.set(name, value));
    this.model.save_changes();
    this.redraw();
  }

  // ---- geometry ----
  geometry() {
    const { width: W, height: H } = this.canvas;
    const { width: w, height: h } = this.size || { width: 1, height: 1 };
    const room = Math.min(W / w, H / h);
    const fit = room > 1 ? Math.min(MAX_ZOOM, Math.floor(room)) : room;
    const asked = this.model.get("zoom");
    const zoom = asked > 0 ? clamp(snapZoom(asked), Math.min(fit, 0.1), MAX_ZOOM) : fit;
    const [cx, cy] = this.model.get("center");
    const x = place(W, w * zoom, cx);
    const y = place(H, h * zoom, cy);
    const from = Math.max(0, x);
    const to = Math.min(W, x + w * zoom);
    const split = Math.round(from + clamp(this.model.get("divider"), 0, 1) * (to - from));
    return { W, H, w, h, fit, zoom, x, y, from, to, split, pannable: w * zoom > W + 1 || h * zoom > H + 1 };
  }

  ratio() {
    return window.devicePixelRatio || 1;
  }

  // Pointer position in device pixels of the canvas.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) * this.ratio(), y: (event.clientY - box.top) * this.ratio() };
  }

  // Zooms so that the picture point under (px, py) stays there; zoom 0 means fit.
  setZoom(zoom, px = this.canvas.width / 2, py = this.canvas.height / 2) {
    const g = this.geometry();
    const target = zoom > 0 ? snapZoom(clamp(zoom, Math.min(g.fit, 1), MAX_ZOOM)) : g.fit;
    const center = [
      clamp((g.W / 2 - px) / (g.w * target) + (px - g.x) / (g.w * g.zoom), 0, 1),
      clamp((g.H / 2 - py) / (g.h * target) + (py - g.y) / (g.h * g.zoom), 0, 1),
    ];
    if (target === g.zoom && zoom > 0) return;
    this.save(target === g.fit ? { zoom: 0, center: [0.5, 0.5] } : { zoom: target, center });
  }

  step(direction, px, py) {
    this.setZoom(stepZoom(this.geometry().zoom, direction), px, py);
  }

  pan(dx, dy) {
    const g = this.geometry();
    // Start from the place actually shown: a centre beyond the edge would make the first moves do nothing.
    const center = [(g.W / 2 - g.x - dx) / (g.w * g.zoom), (g.H / 2 - g.y - dy) / (g.h * g.zoom)];
    const keep = [Math.min(0.5, g.W / 2 / (g.w * g.zoom)), Math.min(0.5, g.H / 2 / (g.h * g.zoom))];
    this.save({ center: center.map((value, axis) => clamp(value, keep[axis], 1 - keep[axis])) });
  }

  moveDivider(x) {
    const g = this.geometry();
    if (g.to > g.from) this.save({ divider: clamp((x - g.from) / (g.to - g.from), 0, 1) });
  }

  // ---- mouse, pen, touch ----
  pointerDown(event) {
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    const point = this.at(event);
    this.pointers.set(event.pointerId, point);
    if (this.pointers.size === 2) {
      const [a, b] = [...this.pointers.values()];
      this.wanted = this.geometry().zoom;
      this.drag = { kind: "pinch", span: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
      return;
    }
    if (event.button === 1) event.preventDefault(); // no auto-scroll
    this.drag = { kind: this.dragKind(event, point), ...point, button: event.button, moved: false };
    this.updateCursor(event);
  }

  nearDivider(event, point) {
    const reach = (GRAB_CSS[event.pointerType] || GRAB_CSS.mouse) * this.ratio();
    return Math.abs(point.x - this.geometry().split) <= reach;
  }

  dragKind(event, point) {
    if (this.empty) return "none";
    if (event.button !== 0 || this.spaceDown) return "pan";
    // With the whole picture in view there is nothing to pan, so a drag anywhere moves the divider.
    return this.nearDivider(event, point) || !this.geometry().pannable ? "divider" : "pan";
  }

  pointerMove(event) {
    const point = this.at(event);
    if (!this.drag || !this.pointers.has(event.pointerId)) return this.updateCursor(event);
    this.pointers.set(event.pointerId, point);
    if (this.drag.kind === "pinch") return this.pinch();
    const dx = point.x - this.drag.x;
    const dy = point.y - this.drag.y;
    if (!this.drag.moved && Math.hypot(dx, dy) < DRAG_STARTS_CSS * this.ratio()) return;
    if (this.drag.kind === "divider") this.moveDivider(point.x);
    if (this.drag.kind === "pan") this.pan(dx, dy);
    Object.assign(this.drag, point, { moved: true });
  }

  pinch() {
    const [a, b] = [...this.pointers.values()];
    const span = Math.hypot(a.x - b.x, a.y - b.y);
    const x = (a.x + b.x) / 2;
    const y = (a.y + b.y) / 2;
    if (span < 1 || this.drag.span < 1) return;
    this.wanted *= span / this.drag.span;
    this.setZoom(this.wanted, x, y);
    if (this.geometry().pannable) this.pan(x - this.drag.x, y - this.drag.y);
    Object.assign(this.drag, { span, x, y });
  }

  pointerUp(event) {
    this.pointers.delete(event.pointerId);
    this.rightDragged = this.drag?.button === 2 && this.drag.moved;
    this.drag = null;
    this.wanted = null;
    this.updateCursor(event);
  }

  contextMenu(event) {
    if (!this.rightDragged && !(this.drag?.button === 2 && this.drag.moved)) return;
    event.preventDefault();
    event.stopPropagation();
  }

  wheel(event) {
    if (this.empty) return;
    const { fit, zoom } = this.geometry();
    const inwards = event.deltaY < 0;
    // At the end of the range the page scrolls on, so that the viewer is no trap for someone scrolling past.
    if (event.deltaY === 0 || (!inwards && zoom <= fit) || (inwards && zoom >= MAX_ZOOM)) return;
    event.preventDefault();
    event.stopPropagation();
    const { x, y } = this.at(event);
    if (event.deltaMode !== 0 || Math.abs(event.deltaY) >= 50) {
      this.wanted = null; // one notch of a mouse wheel: one level
      return this.setZoom(Math.max(fit, stepZoom(zoom, inwards ? 1 : -1)), x, y);
    }
    if (this.wanted === null || snapZoom(this.wanted) !== zoom) this.wanted = zoom;
    this.wanted = clamp(this.wanted * 2 ** (-event.deltaY / 100), fit, MAX_ZOOM);
    this.setZoom(this.wanted, x, y);
  }

  doubleClick(event) {
    const { x, y } = this.at(event);
    const { fit, zoom } = this.geometry();
    // Where "fit" already is 100 %, the second state is 400 %, or the double click would do nothing.
    this.setZoom(zoom === fit ? (fit === 1 ? 4 : 1) : 0, x, y);
  }

  updateCursor(event) {
    const kind = this.drag?.kind || (event ? this.dragKind({ button: 0, pointerType: event.pointerType }, this.at(event)) : "");
    this.canvas.style.cursor = kind === "divider" ? "ew-resize" : kind === "pan" ? (this.drag ? "grabbing" : "grab") : "default";
  }

  // ---- keyboard ----
  keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = event.shiftKey ? this.panKeys()[event.key] : this.plainKeys()[event.key];
    const either = { "+": () => this.step(1), "-": () => this.step(-1), _: () => this.step(-1) }[event.key];
    if (!action && !either) return;
    event.preventDefault();
    event.stopPropagation();
    (action || either)();
  }

  plainKeys() {
    const nudge = (by) => () => this.save({ divider: clamp(this.model.get("divider") + by, 0, 1) });
    return {
      ArrowLeft: nudge(-0.02), ArrowDown: nudge(-0.02), ArrowRight: nudge(0.02), ArrowUp: nudge(0.02),
      PageDown: nudge(-0.1), PageUp: nudge(0.1), Home: nudge(-1), End: nudge(1),
      "=": () => this.step(1), 0: () => this.setZoom(0), 1: () => this.setZoom(1),
      o: () => this.peek(true), " ": () => { this.spaceDown = true; this.updateCursor(); },
    };
  }

  panKeys() {
    const by = (dx, dy) => () => this.pan(dx * this.canvas.width * 0.1, dy * this.canvas.height * 0.1);
    return { ArrowLeft: by(1, 0), ArrowRight: by(-1, 0), ArrowUp: by(0, 1), ArrowDown: by(0, -1), O: () => this.peek(true) };
  }

  keyUp(event) {
    if (event.key === " ") this.spaceDown = false;
    if (event.key === "o" || event.key === "O") this.peek(false);
  }

  release() {
    this.spaceDown = false;
    this.peek(false);
  }

  peek(on) {
    if (this.peeking === on) return;
    this.peeking = on && Boolean(this.pictures.original?.bitmap);
    this.redraw();
  }

  // ---- painting ----
  redraw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.draw());
  }

  resizeCanvas() {
    this.canvas.style.height = `${this.model.get("height")}px`;
    const width = Math.round(this.canvas.clientWidth * this.ratio());
    const height = Math.round(this.canvas.clientHeight * this.ratio());
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    return width > 0 && height > 0;
  }

  draw() {
    if (!this.pictures.left || !this.resizeCanvas()) return; // nothing decoded yet, or the cell is folded away
    const g = this.geometry();
    const context = this.context;
    context.clearRect(0, 0, g.W, g.H);
    this.describe(g);
    if (this.empty) return this.words(this.model.get("message") || "No picture to show yet.", 0, g.W);
    context.imageSmoothingEnabled = g.zoom < 1;
    context.imageSmoothingQuality = "high";
    if (this.peeking) return this.paintSide("original", 0, g.W, g);
    this.paintSide("left", 0, g.split, g);
    this.paintSide("right", g.split, g.W, g);
    this.paintDivider(g);
  }

  // Paints one picture and its label, clipped to the columns from..to.
  paintSide(side, from, to, g) {
    if (to <= from) return;
    const { bitmap, words } = this.pictures[side];
    const label = this.model.get(`${side}_label`);
    this.context.save();
    this.context.beginPath();
    this.context.rect(from, 0, to - from, g.H);
    this.context.clip();
    if (bitmap) this.context.drawImage(bitmap, g.x, g.y, g.w * g.zoom, g.h * g.zoom);
    else this.words(words || this.model.get("message") || `No picture: ${label || side}.`, from, to);
    if (label) this.paintLabel(label, side === "right", g);
    this.context.restore();
  }

  paintLabel(text, atRight, g) {
    const context = this.context;
    const unit = this.ratio();
    context.font = `600 ${13 * unit}px system-ui, sans-serif`;
    const width = context.measureText(text).width + 16 * unit;
    const x = atRight ? g.W - width - 8 * unit : 8 * unit;
    context.fillStyle = "rgba(0, 0, 0, 0.72)";
    context.beginPath();
    context.roundRect(x, 8 * unit, width, 24 * unit, 4 * unit);
    context.fill();
    context.fillStyle = "#fff";
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(text, x + 8 * unit, 20.5 * unit);
  }

  // White between black edges: visible on any picture, and told apart by lightness, not by hue.
  paintDivider({ split, H }) {
    const context = this.context;
    const unit = this.ratio();
    const line = (width, colour) => {
      context.fillStyle = colour;
      context.fillRect(split - Math.round(width / 2), 0, Math.round(width), H);
    };
    line(4 * unit, "rgba(0, 0, 0, 0.75)");
    line(2 * unit, "#fff");
    context.beginPath();
    context.arc(split, H / 2, 13 * unit, 0, 2 * Math.PI);
    context.fillStyle = "#fff";
    context.fill();
    context.lineWidth = 2 * unit;
    context.strokeStyle = "rgba(0, 0, 0, 0.75)";
    context.stroke();
    context.fillStyle = "#111";
    for (const way of [-1, 1]) {
      context.beginPath();
      context.moveTo(split + way * 9 * unit, H / 2);
      context.lineTo(split + way * 4 * unit, H / 2 - 5 * unit);
      context.lineTo(split + way * 4 * unit, H / 2 + 5 * unit);
      context.fill();
    }
  }

  words(text, from, to) {
    const context = this.context;
    const unit = this.ratio();
    context.font = `${14 * unit}px system-ui, sans-serif`;
    context.fillStyle = getComputedStyle(this.canvas).color;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const lines = [""];
    for (const word of text.split(/\s+/)) {
      const longer = `${lines.at(-1)} ${word}`.trim();
      if (lines.at(-1) && context.measureText(longer).width > to - from - 32 * unit) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    const top = Math.max(56 * unit, this.canvas.height / 2 - (lines.length - 1) * 10 * unit); // clear of the label
    lines.forEach((line, row) => context.fillText(line, (from + to) / 2, top + row * 20 * unit));
  }

  // Everything that a screen reader or the bar below the canvas says.
  describe(g) {
    const percent = Math.round(this.model.get("divider") * 100);
    const [left, right] = [this.model.get("left_label"), this.model.get("right_label")];
    const missing = this.model.get("message");
    this.canvas.setAttribute("aria-valuenow", String(percent));
    this.canvas.setAttribute("aria-valuetext", `${percent} % ${left}, ${100 - percent} % ${right}`);
    this.canvas.setAttribute("aria-label", `Divider between ${left} (left) and ${right} (right). ${missing}`.trim());
    this.canvas.style.touchAction = g.pannable ? "none" : "pan-y";
    this.canvas.dataset.zoom = g.zoom.toFixed(3);
    this.zoomText.textContent = this.empty ? "" : `${Math.round(g.zoom * 100)} %`;
    this.peekButton.hidden = !this.pictures.original.bitmap;
  }
}

function render({ model, el }) {
  const view = new WipeView(model, el);
  return () => view.destroy();
}

export default { render };
