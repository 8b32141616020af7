// Files between the page and the kernel: photos dropped on the viewer, comparisons saved.

const PART_BYTES = 2 ** 20; // Jupyter's server closes the connection on messages above 10 MB

// Sends files in parts, one after the other; see WipeViewer._receive in nbhelpers/wipe.py.
async function sendFiles(model, files) {
  const batch = crypto.getRandomValues(new Uint32Array(1))[0];
  if (!files.length) return model.send({ kind: "file", batch, name: "", count: 0 });
  for (const [index, file] of files.entries()) {
    const about = { kind: "file", batch, name: file.name, index, count: files.length, size: file.size };
    let data = new ArrayBuffer(0);
    let problem = "";
    try {
      data = await file.arrayBuffer();
    } catch {
      problem = "cannot be read here (is it a folder?)";
    }
    for (let start = 0; start === 0 || start < data.byteLength; start += PART_BYTES) {
      const last = start + PART_BYTES >= data.byteLength;
      model.send({ ...about, last, problem }, undefined, [new DataView(data.slice(start, start + PART_BYTES))]);
    }
  }
}

function download(name, type, data) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
