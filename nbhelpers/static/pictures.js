// The decoded pictures of a viewer, their pixel values, and their difference.

const SIDES = ["left", "right", "original"];

async function decode(bytes) {
  if (!bytes || bytes.byteLength === 0) return { bitmap: null, words: "" };
  try {
    const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
    return { bitmap, words: "" };
  } catch {
    return { bitmap: null, words: "This picture cannot be decoded." };
  }
}

class Pictures {
  constructor(model) {
    this.model = model;
    this.shown = {}; // side -> {bitmap, words, bytes, sampler}
    this.loading = 0;
  }

  get ready() {
    return Boolean(this.shown.left);
  }

  bitmap(side) {
    return this.shown[side]?.bitmap;
  }

  words(side) {
    return this.shown[side]?.words;
  }

  // Decodes everything that changed first and swaps afterwards, in one step: no flicker, and never a left
  // side from one setting beside a right side from another. False: a later load has overtaken this one.
  async load() {
    const ticket = ++this.loading;
    await Promise.resolve(); // left and right of one update arrive as two events of the same turn
    if (ticket !== this.loading) return false;
    const next = {};
    await Promise.all(
      SIDES.map(async (side) => {
        const bytes = this.model.get(side);
        const old = this.shown[side];
        next[side] = old && old.bytes === bytes ? old : { ...(await decode(bytes)), bytes };
      }),
    );
    const late = ticket !== this.loading;
    const [kept, dropped] = late ? [this.shown, next] : [next, this.shown];
    SIDES.forEach((side) => dropped[side] !== kept[side] && dropped[side]?.bitmap?.close());
    this.shown = kept;
    if (!late) this.difference = null;
    return !late;
  }

  size() {
    const first = SIDES.map((side) => this.bitmap(side)).find((bitmap) => bitmap);
    return first ? { width: first.width, height: first.height } : null;
  }

  // A canvas that holds one picture and gives its pixel values.
  sampler(side) {
    const picture = this.shown[side];
    if (!picture?.bitmap) return null;
    if (!picture.sampler) {
      const canvas = new OffscreenCanvas(picture.bitmap.width, picture.bitmap.height);
      picture.sampler = canvas.getContext("2d", { willReadFrequently: true });
      picture.sampler.drawImage(picture.bitmap, 0, 0);
    }
    return picture.sampler;
  }

  // [red, green, blue] of one pixel, 0..255; null without a picture.
  values(side, x, y) {
    const sampler = this.sampler(side);
    return sampler && [...sampler.getImageData(x, y, 1, 1).data.slice(0, 3)];
  }

  // A canvas with |left - right| times a gain, or null where a side is missing.
  differenceTimes(gain) {
    if (this.difference?.gain === gain) return this.difference.canvas;
    const samplers = [this.sampler("left"), this.sampler("right")];
    if (samplers.some((sampler) => !sampler)) return null;
    const { width, height } = this.size();
    const [a, b] = samplers.map((sampler) => sampler.getImageData(0, 0, width, height).data);
    const out = new ImageData(width, height);
    for (let i = 0; i < a.length; i += 1) out.data[i] = (i & 3) === 3 ? 255 : Math.abs(a[i] - b[i]) * gain;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(out, 0, 0);
    this.difference = { gain, canvas };
    return canvas;
  }

  close() {
    this.loading += 1; // a decode still under way finds itself outdated
    SIDES.forEach((side) => this.bitmap(side)?.close());
  }
}
