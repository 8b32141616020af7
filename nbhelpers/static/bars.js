// The rows of buttons around the viewer's canvas, and what they and a screen reader say.

const VIEWS = {
  wipe: "Drag the line to wipe, drag elsewhere to pan, wheel or pinch to zoom, double click: fit / 100 %.",
  flicker: "The pictures take turns: what jumps differs. Drag to pan, wheel or pinch to zoom.",
  difference: "Left minus right, without sign, made brighter: black is equal. Drag to pan, wheel or pinch to zoom.",
  "side by side": "Both halves zoom and pan together.",
};
const RANGES = {
  flicker: { name: "seconds", min: 0.4, max: 2, step: 0.1, text: (value) => `${value.toFixed(1)} s each` },
  difference: { name: "gain", min: 1, max: 32, step: 1, text: (value) => `× ${value}` },
};

function row(className, ...children) {
  const node = document.createElement("div");
  node.className = className;
  node.append(...children);
  return node;
}

function text(className) {
  const node = document.createElement("span");
  node.className = className;
  return node;
}

function button(text, title, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.title = title;
  node.setAttribute("aria-label", title);
  if (action) node.addEventListener("click", action);
  return node;
}

function valuesText({ pictures, model }, { x, y }) {
  const of = Object.fromEntries(SIDES.map((side) => [side, pictures.values(side, x, y)]).filter(([, value]) => value));
  const parts = Object.entries(of).map(([side, value]) => `${model.get(`${side}_label`)}: ${value.join(" ")}`);
  if (of.left && of.right) parts.push(`difference: ${of.left.map((value, i) => Math.abs(value - of.right[i])).join(" ")}`);
  return `x ${x}, y ${y} · ${parts.join(" · ")} (red green blue, 0–255)`;
}

// Everything that a screen reader or the bars around the canvas say.
function describe(viewer, g) {
  const { canvas, model, view } = viewer;
  const percent = Math.round(model.get("divider") * 100);
  const [left, right] = [model.get("left_label"), model.get("right_label")];
  const wiping = view === "wipe";
  const attributes = {
    role: wiping ? "slider" : "img",
    "aria-label": `${wiping ? "Divider between" : `View ${view}:`} ${left} (left) and ${right} (right). ${model.get("message")}`.trim(),
  };
  const slider = { valuemin: 0, valuemax: 100, valuenow: percent, orientation: "horizontal" };
  slider.valuetext = `${percent} % ${left}, ${100 - percent} % ${right}`;
  Object.entries(attributes).forEach(([name, value]) => canvas.setAttribute(name, value));
  Object.entries(slider).forEach(([name, value]) =>
    wiping ? canvas.setAttribute(`aria-${name}`, String(value)) : canvas.removeAttribute(`aria-${name}`),
  );
  canvas.style.touchAction = g.pannable ? "none" : "pan-y";
  Object.assign(canvas.dataset, { zoom: g.zoom.toFixed(3), view });
  viewer.zoomText.textContent = viewer.empty ? "" : `${Math.round(g.zoom * 100)} %`;
  viewer.hint.textContent = VIEWS[view];
  viewer.peekButton.hidden = !viewer.pictures.bitmap("original");
  viewer.filesButton.hidden = !model.get("takes_files");
  viewer.loupeButton.setAttribute("aria-pressed", String(Boolean(model.get("loupe"))));
  Object.keys(VIEWS).forEach((name, i) => viewer.viewButtons[i].setAttribute("aria-pressed", String(name === view)));
  describeRange(viewer, RANGES[view]);
}

function describeRange({ range, rangeText, model }, about) {
  range.hidden = !about;
  rangeText.textContent = about ? about.text(model.get(about.name)) : "";
  if (!about) return;
  Object.assign(range, { min: about.min, max: about.max, step: about.step, value: model.get(about.name) });
  range.setAttribute("aria-label", about.name === "gain" ? "Gain of the difference" : "Seconds for each picture");
}
