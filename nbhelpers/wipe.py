"""The viewer of two pictures on one canvas: wiped, flickered, subtracted or side by side (an anywidget)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from PIL import Image
from torch import Tensor

from .images import to_uint8

STATIC = Path(__file__).parent / "static"
PARTS = ("zoom", "pictures", "paint", "files", "bars", "hands", "wipe")  # of the script, in this order
VIEWS = ("wipe", "flicker", "difference", "side by side")
MOST_BYTES = 2**30  # of one file that the page may send


def script() -> str:
    """The viewer's JavaScript as one module, which a page without a kernel can use as well."""
    return "\n".join((STATIC / f"{part}.js").read_text(encoding="utf-8") for part in PARTS)


def encode_picture(x: Tensor | np.ndarray | None) -> bytes:
    """Losslessly encode a picture as PNG bytes; None gives ``b""``, which the viewer shows as "no picture".

    Takes float (3, h, w) in [0, 1] or uint8 (h, w, 3). Raises TypeError for an array of another kind.
    """
    if x is None:
        return b""
    rgb = to_uint8(x) if isinstance(x, Tensor) else x
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise TypeError(f"expected uint8 (h, w, 3), got {rgb.dtype} {rgb.shape}; convert with images.to_uint8")
    buffer = io.BytesIO()
    # Huffman coding alone is the fastest PNG (1024x1024: 47 ms against 56 at level 1), and stays lossless.
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1, compress_type=2)
    return buffer.getvalue()


class WipeViewer(anywidget.AnyWidget):
    """Compares two pictures of one size; wheel or pinch zooms, drag pans, the divider wipes, all keys work.

    Everything is synced both ways, so code can move what the reader moves. With ``takes_files``, files dropped on the
    viewer or chosen with its button go to ``on_files([(name, bytes or what was wrong)])``, and while they come
    ``on_receiving(name, bytes so far, all bytes)`` is called.
    """

    _esm = script()
    _css = STATIC / "wipe.css"

    left = traitlets.Bytes(b"", help="encoded picture (PNG, WebP, JPEG) left of the divider; b'' = missing").tag(
        sync=True
    )
    right = traitlets.Bytes(b"", help="encoded picture right of the divider, same size").tag(sync=True)
    original = traitlets.Bytes(b"", help="optional third picture, shown while key O is held").tag(sync=True)
    left_label = traitlets.Unicode("left").tag(sync=True)
    right_label = traitlets.Unicode("right").tag(sync=True)
    original_label = traitlets.Unicode("original").tag(sync=True)
    message = traitlets.Unicode("", help="words shown in place of a missing picture").tag(sync=True)
    divider = traitlets.Float(0.5, min=0.0, max=1.0, help="position within the visible picture width").tag(sync=True)
    zoom = traitlets.Float(0.0, min=0.0, max=64.0, help="screen pixels per picture pixel; 0 = fit").tag(sync=True)
    center = traitlets.Tuple(
        traitlets.Float(), traitlets.Float(), default_value=(0.5, 0.5), help="(x, y) in 0..1 in mid-canvas"
    ).tag(sync=True)
    view = traitlets.Enum(VIEWS, "wipe").tag(sync=True)
    gain = traitlets.Float(8.0, min=1.0, max=32.0, help="of the difference").tag(sync=True)
    seconds = traitlets.Float(0.8, min=0.4, max=2.0, help="for which a flicker shows each picture").tag(sync=True)
    loupe = traitlets.Bool(False, help="show pixel values under the pointer").tag(sync=True)
    takes_files = traitlets.Bool(False).tag(sync=True)
    height = traitlets.Int(512, min=64, help="height of the canvas in CSS pixels").tag(sync=True)

    def __init__(self, **traits: object):
        super().__init__(**traits)
        self.on_files: Callable[[list[tuple[str, bytes | str]]], None] = lambda files: None
        self.on_receiving: Callable[[str, int, int], None] = lambda name, done, size: None
        self._batch: tuple[int | None, dict[int, tuple[str, bytearray | str]]] = (None, {})
        self.on_msg(lambda widget, content, buffers: self._receive(content, buffers))

    def __repr__(self) -> str:  # the default prints the pictures' bytes into the notebook
        return f"WipeViewer({self.left_label} | {self.right_label})"

    def show(
        self,
        left: tuple[str, Tensor | np.ndarray | None],
        right: tuple[str, Tensor | np.ndarray | None],
        original: Tensor | np.ndarray | None = None,
        message: str = "",
    ) -> None:
        """Show (label, picture) on both sides in one step; a picture may be None, ``message`` then says why.

        Pictures are float (3, h, w) in [0, 1] or uint8 (h, w, 3). Raises ValueError when their sizes differ.
        """
        pictures = {"left": left[1], "right": right[1], "original": original}
        check_same_size(pictures)
        with ThreadPoolExecutor(3) as pool:  # Pillow's encoder releases the interpreter lock
            encoded = dict(zip(pictures, pool.map(encode_picture, pictures.values()), strict=True))
        with self.hold_sync():
            self.left_label, self.right_label, self.message = left[0], right[0], message
            self.set_trait("left", encoded["left"])
            self.set_trait("right", encoded["right"])
            self.set_trait("original", encoded["original"])

    def download(self, name: str, kind: str, data: bytes) -> None:
        """Let the reader's browser save ``data`` of media type ``kind`` as a file."""
        self.send({"kind": "save", "name": name, "type": kind}, [data])

    def _receive(self, content: Mapping[str, object], buffers: Sequence[bytes | memoryview]) -> None:
        """One part of a file from the page (static/files.js); the last one of the last file ends the batch."""
        if content.get("kind") != "file" or not self.takes_files:
            return
        if self._batch[0] != content["batch"]:
            self._batch = (content["batch"], {})
        files = self._batch[1]
        if content["count"]:
            name, data = files.setdefault(content["index"], (Path(content["name"]).name, bytearray()))
            if content["problem"] or content["size"] > MOST_BYTES:
                files[content["index"]] = name, content["problem"] or f"is larger than {MOST_BYTES >> 20} MB"
            else:
                data += buffers[0]
                self.on_receiving(name, len(data), content["size"])
            if not content["last"] or len(files) < content["count"]:
                return
        self._batch = (None, {})
        self.on_files([(name, data if isinstance(data, str) else bytes(data)) for name, data in files.values()])


def check_same_size(pictures: Mapping[str, Tensor | np.ndarray | None]) -> None:
    """Raise ValueError, naming the sizes, unless all pictures (None apart) have one height and width."""
    sizes = {
        name: tuple(x.shape[-2:] if isinstance(x, Tensor) else x.shape[:2])
        for name, x in pictures.items()
        if x is not None
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"pictures in one viewer must have one size (h, w), got {sizes}")
