// Everything that is drawn on the viewer's canvas.

const LOUPE = 11; // picture pixels across, an odd number: one of them is in the middle
const LOUPE_CELL_CSS = 11;

class Painter {
  constructor(canvas, pictures, label) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.pictures = pictures;
    this.label = label; // (side) => text
  }

  get unit() {
    return window.devicePixelRatio || 1;
  }

  clear() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  // Draws `content` clipped to the columns from..to of a window that begins at column `left` of the canvas.
  clipped(left, from, to, g, content) {
    if (to <= from) return;
    this.context.save();
    this.context.translate(left, 0);
    this.context.beginPath();
    this.context.rect(from, 0, to - from, g.H);
    this.context.clip();
    content();
    this.context.restore();
  }

  image(source, g) {
    this.context.imageSmoothingEnabled = g.zoom < 1;
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(source, g.x, g.y, g.w * g.zoom, g.h * g.zoom);
  }

  // One picture and its label; `message` explains a missing one.
  side(side, from, to, g, message, left = 0) {
    const bitmap = this.pictures.bitmap(side);
    const label = this.label(side);
    this.clipped(left, from, to, g, () => {
      if (bitmap) this.image(bitmap, g);
      else this.words(this.pictures.words(side) || message || `No picture: ${label || side}.`, from, to);
      if (label) this.tag(label, side === "right", g.W);
    });
  }

  difference(gain, g) {
    const canvas = this.pictures.differenceTimes(gain);
    this.clipped(0, 0, g.W, g, () => {
      if (canvas) this.image(canvas, g);
      else this.words("A difference needs two pictures.", 0, g.W);
      const [left, right] = ["left", "right"].map((side) => this.label(side).split(",")[0]); // without their scores
      if (canvas) this.tag(`|${left} − ${right}| × ${gain}; black: equal`, false, g.W);
    });
  }

  tag(text, atRight, W) {
    const { context, unit } = this;
    context.font = `600 ${13 * unit}px system-ui, sans-serif`;
    const width = context.measureText(text).width + 16 * unit;
    const x = atRight ? W - width - 8 * unit : 8 * unit;
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
  line(x, H) {
    for (const [widthCss, colour] of [[4, "rgba(0, 0, 0, 0.75)"], [2, "#fff"]]) {
      const width = widthCss * this.unit;
      this.context.fillStyle = colour;
      this.context.fillRect(x - Math.round(width / 2), 0, Math.round(width), H);
    }
  }

  divider({ split, H }) {
    const { context, unit } = this;
    this.line(split, H);
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
    const { context, unit } = this;
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

  // The surroundings of one picture pixel, enlarged, from every picture, in the lower corner away from the pointer.
  loupe({ x, y, atLeft }, g) {
    const { context, unit } = this;
    const sides = SIDES.filter((side) => this.pictures.bitmap(side));
    const square = LOUPE * LOUPE_CELL_CSS * unit;
    const gap = 8 * unit;
    const width = sides.length * (square + gap) + gap;
    const height = square + 2 * gap + 34 * unit;
    const left = atLeft ? this.canvas.width - width - gap : gap;
    const top = g.H - height - gap;
    context.fillStyle = "rgba(0, 0, 0, 0.82)";
    context.beginPath();
    context.roundRect(left, top, width, height, 6 * unit);
    context.fill();
    context.imageSmoothingEnabled = false;
    sides.forEach((side, i) => this.square(side, x, y, left + gap + i * (square + gap), top + gap, square));
  }

  square(side, x, y, left, top, square) {
    const { context, unit } = this;
    const reach = (LOUPE - 1) / 2;
    const cell = square / LOUPE;
    const bitmap = this.pictures.bitmap(side);
    context.drawImage(bitmap, x - reach, y - reach, LOUPE, LOUPE, left, top, square, square);
    for (const [width, colour] of [[3, "#000"], [1, "#fff"]]) {
      context.lineWidth = width * unit;
      context.strokeStyle = colour;
      context.strokeRect(left + reach * cell, top + reach * cell, cell, cell);
    }
    context.font = `${12 * unit}px system-ui, sans-serif`;
    context.fillStyle = "#fff";
    context.textAlign = "center";
    context.textBaseline = "top";
    context.fillText(side, left + square / 2, top + square + 5 * unit);
    context.fillText(this.pictures.values(side, x, y).join("  "), left + square / 2, top + square + 20 * unit);
  }
}
