// A saved page has no kernel: this object stands in for the model that a notebook shares with one.

function standIn(values) {
  const handlers = {};
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      (handlers[`change:${name}`] || []).forEach((handler) => handler());
    },
    save_changes() {},
    on: (name, handler) => (handlers[name] ||= []).push(handler),
    off: (name, handler) => (handlers[name] = (handlers[name] || []).filter((other) => other !== handler)),
  };
}

async function openSaved(settings) {
  const values = { ...settings };
  for (const side of SIDES) {
    const source = document.getElementById(`picture-${side}`)?.getAttribute("src") || "";
    const text = atob(source.slice(source.indexOf(",") + 1));
    values[side] = new DataView(Uint8Array.from(text, (c) => c.charCodeAt(0)).buffer);
  }
  render({ model: standIn(values), el: document.getElementById("viewer") });
}
