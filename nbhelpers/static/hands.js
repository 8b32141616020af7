// What mouse, pen, touch and keyboard do to the viewer: the base of WipeView in wipe.js.

const GRAB_CSS = { mouse: 14, pen: 20, touch: 28 };
const DRAG_STARTS_CSS = 3;

class Hands {
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
    if (event.button !== 0 || this.spaceDown || this.view !== "wipe") return "pan";
    // With the whole picture in view there is nothing to pan, so a drag anywhere moves the divider.
    return this.nearDivider(event, point) || !this.geometry().pannable ? "divider" : "pan";
  }

  pointerMove(event) {
    const point = this.at(event);
    this.look(point);
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
    this.setZoom(this.wanted, (a.px + b.px) / 2, y);
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
    const { px, y } = this.at(event);
    if (event.deltaMode !== 0 || Math.abs(event.deltaY) >= 50) {
      this.wanted = null; // one notch of a mouse wheel: one level
      return this.setZoom(Math.max(fit, stepZoom(zoom, inwards ? 1 : -1)), px, y);
    }
    if (this.wanted === null || snapZoom(this.wanted) !== zoom) this.wanted = zoom;
    this.wanted = clamp(this.wanted * 2 ** (-event.deltaY / 100), fit, MAX_ZOOM);
    this.setZoom(this.wanted, px, y);
  }

  doubleClick(event) {
    const { px, y } = this.at(event);
    const { fit, zoom } = this.geometry();
    // Where "fit" already is 100 %, the second state is 400 %, or the double click would do nothing.
    this.setZoom(zoom === fit ? (fit === 1 ? 4 : 1) : 0, px, y);
  }

  updateCursor(event) {
    const kind = this.drag?.kind || (event ? this.dragKind({ button: 0, pointerType: event.pointerType }, this.at(event)) : "");
    const still = this.model.get("loupe") ? "crosshair" : "grab";
    const pan = this.geometry().pannable ? (this.drag ? "grabbing" : still) : still === "grab" ? "default" : still;
    this.canvas.style.cursor = kind === "divider" ? "ew-resize" : kind === "pan" ? pan : "default";
  }

  // ---- keyboard ----
  keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const arrows = event.shiftKey || this.view !== "wipe" ? this.panKeys() : this.dividerKeys();
    const action = arrows[key] || this.otherKeys()[key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  dividerKeys() {
    const nudge = (by) => () => this.save({ divider: clamp(this.model.get("divider") + by, 0, 1) });
    return {
      ArrowLeft: nudge(-0.02), ArrowDown: nudge(-0.02), ArrowRight: nudge(0.02), ArrowUp: nudge(0.02),
      PageDown: nudge(-0.1), PageUp: nudge(0.1), Home: nudge(-1), End: nudge(1),
    };
  }

  panKeys() {
    const by = (dx, dy) => () => this.pan(dx * this.canvas.width * 0.1, dy * this.canvas.height * 0.1);
    return { ArrowLeft: by(1, 0), ArrowRight: by(-1, 0), ArrowUp: by(0, 1), ArrowDown: by(0, -1) };
  }

  otherKeys() {
    const views = Object.fromEntries(Object.keys(VIEWS).map((view) => [view[0], () => this.save({ view })]));
    return {
      ...views,
      "+": () => this.step(1), "=": () => this.step(1), "-": () => this.step(-1), _: () => this.step(-1),
      0: () => this.setZoom(0), 1: () => this.setZoom(1),
      l: () => this.save({ loupe: !this.model.get("loupe") }),
      o: () => this.peek(true), " ": () => { this.spaceDown = true; this.updateCursor(); },
    };
  }

  keyUp(event) {
    if (event.key === " ") this.spaceDown = false;
    if (event.key === "o" || event.key === "O") this.peek(false);
  }

  release() {
    this.spaceDown = false;
    this.peek(false);
  }
}
