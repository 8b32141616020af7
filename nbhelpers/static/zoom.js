// Zoom steps, and where a zoomed picture lies in its window. All positions are device pixels unless a name ends in "Css".

const MAX_ZOOM = 64;

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

// Where a picture w x h lies in a window W x H, for a wanted zoom (0 = fit) and a centre [x, y] in 0..1.
function layout(W, H, { width: w, height: h }, asked, [cx, cy], divider) {
  const room = Math.min(W / w, H / h);
  const fit = room > 1 ? Math.min(MAX_ZOOM, Math.floor(room)) : room;
  const zoom = asked > 0 ? clamp(snapZoom(asked), Math.min(fit, 0.1), MAX_ZOOM) : fit;
  const x = place(W, w * zoom, cx);
  const y = place(H, h * zoom, cy);
  const from = Math.max(0, x);
  const to = Math.min(W, x + w * zoom);
  const split = Math.round(from + clamp(divider, 0, 1) * (to - from));
  return { W, H, w, h, fit, zoom, x, y, from, to, split, pannable: w * zoom > W + 1 || h * zoom > H + 1 };
}
