"""A comparison as a file to keep or send: a picture, an animation that flickers, a page that wipes without a kernel."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import wipe

LEAST_WIDTH = (
    400  # pixels of one picture in a file; smaller ones are enlarged by repeating pixels, for the labels' sake
)
STRIP = 30  # pixels for a label above each picture
WEBP_MOST = 16383  # pixels a side
SIDES = ("left", "right", "original")
SHARED = ("view", "divider", "zoom", "center", "gain", "seconds", "loupe", "height", "message")


@dataclass(frozen=True)
class Saved:
    """What a viewer shows: encoded ``pictures`` and their ``labels`` by side, its ``state``; ``title`` and ``numbers``
    (HTML) belong to it."""

    pictures: dict[str, bytes]
    labels: dict[str, str]
    state: dict[str, object]
    title: str = ""
    numbers: str = ""

    @classmethod
    def of(cls, viewer: wipe.WipeViewer, title: str = "", numbers: str = "") -> Saved:
        """The viewer as it stands. Raises ValueError where it shows no picture."""
        pictures = {side: getattr(viewer, side) for side in SIDES if getattr(viewer, side)}
        if not pictures:
            raise ValueError("there is no picture to save: the panel's status line says why")
        labels = {side: getattr(viewer, f"{side}_label") for side in SIDES}
        return cls(pictures, labels, {name: getattr(viewer, name) for name in SHARED}, title, numbers)

    def labelled(self) -> list[Image.Image]:
        """The pictures, each below a strip with its label; the original only once."""
        sides = [s for s in self.pictures if s != "original" or self.pictures[s] != self.pictures.get("left")]
        return [_labelled(self.pictures[side], self.labels[side]) for side in sides]


def as_png(saved: Saved) -> bytes:
    """All pictures in a row, lossless."""
    tiles = saved.labelled()
    sheet = Image.new("RGB", (sum(t.width for t in tiles) + 8 * (len(tiles) - 1), tiles[0].height), "white")
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width + 8
    return _encoded(sheet, "PNG", compress_level=4)


def as_webp(saved: Saved) -> bytes:
    """Left and right in turns, for ever, lossless. Raises ValueError for a picture larger than the format holds."""
    if not {"left", "right"} <= set(saved.pictures):
        raise ValueError("an animation needs both pictures; save a PNG or HTML file")
    first, second = saved.labelled()[:2]
    if max(first.size) > WEBP_MOST:
        raise ValueError(
            f"{first.width} x {first.height} pixels: WebP holds at most {WEBP_MOST} a side; save a PNG file"
        )
    milliseconds = round(1000 * saved.state["seconds"])
    options = {"save_all": True, "append_images": [second], "duration": milliseconds, "loop": 0}
    return _encoded(first, "WEBP", lossless=True, quality=0, method=1, **options)


def as_page(saved: Saved) -> bytes:
    """One HTML file with pictures, viewer and numbers inside: it needs no kernel and no network."""
    settings = saved.state | {f"{side}_label": label for side, label in saved.labels.items()}
    # In JSON inside a script "<" could only begin "</script>" or a comment; its escape means the same.
    settings = json.dumps(settings, ensure_ascii=False).replace("<", "\\u003c")
    pictures = "\n".join(
        f"<img id='picture-{side}' hidden alt='{html.escape(saved.labels[side])}' src='{_data_url(data)}'>"
        for side, data in saved.pictures.items()
    )
    parts = {
        "title": html.escape(saved.title),
        "css": (wipe.STATIC / "wipe.css").read_text(encoding="utf-8"),
        "pictures": pictures,
        "numbers": saved.numbers,
        "script": wipe.script() + "\n" + (wipe.STATIC / "standalone.js").read_text(encoding="utf-8"),
        "settings": settings,
    }
    page = (wipe.STATIC / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page).encode()


FORMATS = {".png": (as_png, "image/png"), ".webp": (as_webp, "image/webp"), ".html": (as_page, "text/html")}


def encode(saved: Saved, path: str | Path) -> bytes:
    """The file that ``path`` names, by its suffix. Raises ValueError for another one than .png, .webp, .html."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"cannot save a comparison as {str(path)!r}; name the file {', '.join('*' + s for s in FORMATS)}"
        )
    return FORMATS[suffix][0](saved)


def _data_url(data: bytes) -> str:
    kind = "image/png" if data.startswith(b"\x89PNG") else "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _labelled(data: bytes, label: str) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    factor = max(1, -(-LEAST_WIDTH // picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (picture.width, picture.height + STRIP), "white")
    sheet.paste(picture, (0, STRIP))
    draw, font = ImageDraw.Draw(sheet), _font()
    while label and draw.textlength(label, font) > picture.width - 12:
        label = label[:-2] + "…"
    draw.text((6, STRIP / 2), label, "black", font, anchor="lm")
    return sheet


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont  # whose DejaVu Sans knows more alphabets than Pillow's own font

    return ImageFont.truetype(findfont("DejaVu Sans"), 16)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
