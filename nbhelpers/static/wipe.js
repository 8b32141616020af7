// The viewer: two pictures of one size on one canvas, wiped, flickered, subtracted, or side by side.
//
// nbhelpers/wipe.py joins these files into one module: zoom.js, pictures.js, paint.js, files.js, bars.js, hands.js,
// and this one.
// State shared with Python:
//   left, right, original   encoded pictures (PNG, WebP or JPEG bytes); empty bytes: that picture is missing
//   view                    one of VIEWS
//   divider                 0..1, where the divider stands within the visible width of the picture
//   zoom                    screen pixels per picture pixel; 0 means "fit the picture into the canvas"
//   center                  [x, y] in 0..1, the point of the picture in the middle of the canvas
//   gain, seconds           of the difference, and for which each picture of a flicker stays
//   loupe                   whether pixel values are shown
//   takes_files             whether files may be dropped here

class WipeView extends Hands {
  constructor(model, el) {
    super();
    this.model = model;
    this.pictures = new Pictures(model);
    this.size = null; // {width, height} of the pictures in their own pixels
    this.pointers = new Map();
    this.drag = null; // what the pointer that is down does: {kind, x, y, ...}
    this.wanted = null; // unsnapped zoom while a trackpad or a pinch moves in small steps
    this.peeking = false;
    this.spaceDown = false;
    this.turn = "left"; // which picture a flicker shows now
    this.build(el);
    this.painter = new Painter(this.canvas, this.pictures, (side) => this.model.get(`${side}_label`));
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
    // JupyterLab would otherwise take these keys as notebook commands ("0 0" restarts the kernel).
    this.canvas.setAttribute("data-lm-suppress-shortcuts", "true");
    this.root.append(this.buildViews(), this.canvas, this.buildBar());
    el.append(this.root);
  }

  buildViews() {
    this.viewButtons = Object.keys(VIEWS).map((view) =>
      button(view[0].toUpperCase() + view.slice(1), `View: ${view} (key ${view[0].toUpperCase()})`, () => this.save({ view })),
    );
    this.range = document.createElement("input");
    this.range.type = "range";
    this.range.addEventListener("input", () => this.save({ [RANGES[this.view].name]: Number(this.range.value) }));
    this.rangeText = text("wipe-range");
    this.filesButton = button("Add photos …", "Add photos or network files: choose them here, or drop them on the picture", () => this.pickFiles());
    const views = row("wipe-group", ...this.viewButtons);
    return row("wipe-bar", views, this.range, this.rangeText, text("wipe-spring"), this.filesButton);
  }

  buildBar() {
    this.zoomText = text("wipe-zoom");
    this.loupeButton = button("Loupe", "Pixel values under the pointer (key L)", () => this.save({ loupe: !this.model.get("loupe") }));
    this.peekButton = button("Original", "Hold to see the original (key O)");
    this.hint = text("wipe-hint");
    this.values = document.createElement("output");
    this.values.className = "wipe-values";
    return row(
      "wipe-bar",
      button("−", "Zoom out (key -)", () => this.step(-1)),
      this.zoomText,
      button("+", "Zoom in (key +)", () => this.step(1)),
      button("Fit", "Fit the whole picture (key 0)", () => this.setZoom(0)),
      button("100 %", "One picture pixel on one screen pixel (key 1)", () => this.setZoom(1)),
      this.loupeButton,
      this.peekButton,
      this.hint,
      this.values,
    );
  }

  listen() {
    const on = (node, names, handler, options) =>
      names.split(" ").forEach((name) => node.addEventListener(name, handler, options));
    on(this.canvas, "pointerdown", (event) => this.pointerDown(event));
    on(this.canvas, "pointermove", (event) => this.pointerMove(event));
    on(this.canvas, "pointerleave", () => this.look(null));
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
    on(this.root, "dragover dragleave drop", (event) => this.drop(event));
    this.onPictures = () => this.load();
    this.onView = () => this.redraw();
    this.onMessage = (content, buffers) => content.kind === "save" && download(content.name, content.type, buffers[0]);
    this.pictureEvents = SIDES.map((side) => `change:${side}`);
    const shared = ["view", "divider", "zoom", "center", "gain", "seconds", "loupe", "takes_files", "height", "message"];
    this.viewEvents = [...shared, ...SIDES.map((side) => `${side}_label`)].map((name) => `change:${name}`);
    this.pictureEvents.forEach((name) => this.model.on(name, this.onPictures));
    this.viewEvents.forEach((name) => this.model.on(name, this.onView));
    this.model.on("msg:custom", this.onMessage);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.canvas);
    window.addEventListener("resize", this.onView); // also fires when the device pixel ratio changes
  }

  destroy() {
    this.pictureEvents.forEach((name) => this.model.off(name, this.onPictures));
    this.viewEvents.forEach((name) => this.model.off(name, this.onView));
    this.model.off("msg:custom", this.onMessage);
    this.observer.disconnect();
    window.removeEventListener("resize", this.onView);
    cancelAnimationFrame(this.frame);
    clearInterval(this.flickering);
    this.pictures.close();
    this.root.remove();
  }

  // ---- state ----
  get view() {
    const view = this.model.get("view");
    return view in VIEWS ? view : "wipe";
  }

  async load() {
    if (!(await this.pictures.load())) return;
    const size = this.pictures.size();
    const changed = this.size && size && (size.width !== this.size.width || size.height !== this.size.height);
    if (size) this.size = size; // kept while nothing is shown, so that zoom and pan survive an error in between
    this.empty = !size;
    if (changed) this.save({ zoom: 0, center: [0.5, 0.5] });
    this.canvas.dataset.updates = String(Number(this.canvas.dataset.updates || 0) + 1);
    this.draw();
  }

  save(values) {
    Object.entries(values).forEach(([name, value]) => this.model.set(name, value));
    this.model.save_changes();
    this.redraw();
  }

  pickFiles() {
    const input = document.createElement("input");
    input.type = "file";
    input.multiple = true;
    input.addEventListener("change", () => sendFiles(this.model, [...input.files]));
    input.click();
  }

  drop(event) {
    if (!this.model.get("takes_files")) return;
    event.preventDefault(); // or the browser leaves the notebook and opens the file
    event.stopPropagation();
    this.root.classList.toggle("wipe-dropping", event.type === "dragover");
    if (event.type === "drop") sendFiles(this.model, [...event.dataTransfer.files]);
  }

  // ---- geometry ----
  // Of one pane: side by side, the canvas holds two.
  geometry() {
    const width = this.view === "side by side" ? Math.floor(this.canvas.width / 2) : this.canvas.width;
    const [zoom, center, divider] = ["zoom", "center", "divider"].map((name) => this.model.get(name));
    return layout(width, this.canvas.height, this.size || { width: 1, height: 1 }, zoom, center, divider);
  }

  ratio() {
    return window.devicePixelRatio || 1;
  }

  // Pointer position in device pixels: of the canvas (x, y), and of the pane it is in (px, y).
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * this.ratio();
    const pane = this.geometry().W;
    return { x, y: (event.clientY - box.top) * this.ratio(), px: x < pane ? x : x - pane };
  }

  // Zooms so that the picture point under (px, py) stays there; zoom 0 means fit.
  setZoom(zoom, px, py = this.canvas.height / 2) {
    const g = this.geometry();
    px ??= g.W / 2;
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

  peek(on) {
    if (this.peeking === on) return;
    this.peeking = on && Boolean(this.pictures.bitmap("original"));
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
    if (!this.pictures.ready || !this.resizeCanvas()) return; // nothing decoded yet, or the cell is folded away
    const g = this.geometry();
    const message = this.model.get("message");
    this.painter.clear();
    this.flicker();
    describe(this, g);
    if (this.empty) return this.painter.words(message || "No picture to show yet.", 0, this.canvas.width);
    if (this.peeking) this.painter.side("original", 0, this.canvas.width, { ...g, ...this.wide() }, message);
    else this.paint(g, message);
    this.paintLoupe(g);
  }

  // The original is shown across the whole canvas, also where there are two panes.
  wide() {
    const [zoom, center] = [this.model.get("zoom"), this.model.get("center")];
    return layout(this.canvas.width, this.canvas.height, this.size, zoom, center, 0);
  }

  paint(g, message) {
    const { painter, view } = this;
    if (view === "difference") return painter.difference(this.model.get("gain"), g);
    if (view === "flicker") {
      this.canvas.dataset.turn = this.turn;
      return painter.side(this.turn, 0, g.W, g, message);
    }
    if (view === "side by side") {
      painter.side("left", 0, g.W, g, message);
      painter.side("right", 0, g.W, g, message, g.W);
      return painter.line(g.W, g.H);
    }
    painter.side("left", 0, g.split, g, message);
    painter.side("right", g.split, g.W, g, message);
    painter.divider(g);
  }

  flicker() {
    const seconds = this.view === "flicker" && !this.empty ? this.model.get("seconds") : 0;
    if (seconds === this.pace) return;
    this.pace = seconds;
    clearInterval(this.flickering);
    if (!seconds) return;
    this.flickering = setInterval(() => {
      this.turn = this.turn === "left" ? "right" : "left";
      this.redraw();
    }, seconds * 1000);
  }

  // ---- loupe ----
  look(point) {
    this.pointer = point;
    if (this.model.get("loupe")) this.redraw();
  }

  // The picture pixel under the pointer, or in the middle of the view for those who have none.
  looked(g) {
    const { px, y, x } = this.pointer || { px: g.W / 2, y: g.H / 2, x: 0 };
    const pixel = { x: Math.floor((px - g.x) / g.zoom), y: Math.floor((y - g.y) / g.zoom) };
    const inside = pixel.x >= 0 && pixel.y >= 0 && pixel.x < g.w && pixel.y < g.h;
    return inside ? { ...pixel, atLeft: x < this.canvas.width / 2 } : null;
  }

  paintLoupe(g) {
    const place = this.model.get("loupe") ? this.looked(g) : null;
    this.values.textContent = place ? valuesText(this, place) : "";
    if (place) this.painter.loupe(place, g);
  }
}

function render({ model, el }) {
  const view = new WipeView(model, el);
  return () => view.destroy();
}

export default { render };
