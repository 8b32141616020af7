"""Comparisons as files: pictures side by side, an animation, and a page; each holds the very pixels on show."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageSequence

from nbhelpers import saving, wipe
from nbhelpers.saving import STRIP, Saved
from nbhelpers.wipe import WipeViewer


def picture(seed: int, h: int = 420, w: int = 410) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.fixture
def viewer():
    viewer = WipeViewer(divider=0.3, view="flicker", seconds=0.5)
    viewer.show(("bicubic, 26.06 dB", picture(0)), ("</script><b>net", picture(1)), original=picture(2))
    return viewer


def test_png_holds_the_pictures_in_a_row(viewer):
    sheet = np.asarray(Image.open(io.BytesIO(saving.encode(Saved.of(viewer), "a.png"))))
    assert sheet.shape == (420 + STRIP, 3 * 410 + 2 * 8, 3)
    for i in range(3):
        left = i * 418
        assert np.array_equal(sheet[STRIP:, left : left + 410], picture(i))
        assert (sheet[:STRIP, left : left + 410] < 100).any(), "a label in dark letters"


def test_png_shows_the_original_once_and_small_pictures_enlarged():
    viewer = WipeViewer()
    small = picture(3, 50, 60)
    viewer.show(("original", small), ("net", picture(4, 50, 60)), original=small)
    sheet = np.asarray(Image.open(io.BytesIO(saving.as_png(Saved.of(viewer)))))
    assert sheet.shape == (50 * 7 + STRIP, 2 * 60 * 7 + 8, 3)
    assert np.array_equal(sheet[STRIP::7, : 60 * 7 : 7], small), "pixels are repeated"


def test_webp_flickers_without_loss(viewer):
    image = Image.open(io.BytesIO(saving.encode(Saved.of(viewer), "a.webp")))
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert image.n_frames == 2 and image.info["loop"] == 0 and image.info["duration"] == 500
    for i, frame in enumerate(frames):
        assert np.array_equal(frame[STRIP:], picture(i))


def test_the_page_holds_everything(viewer):
    text = saving.encode(Saved.of(viewer, "Daisies & <more>", "<p>26.06</p>"), "a.html").decode()
    assert "<title>Daisies &amp; &lt;more&gt;</title>" in text and "<p>26.06</p>" in text
    for side in saving.SIDES:
        data = re.search(rf"id='picture-{side}'[^>]*src='data:image/png;base64,([^']+)'", text)[1]
        assert base64.b64decode(data) == getattr(viewer, side)
    settings = json.loads(re.search(r"openSaved\((\{.*\})\);", text)[1])
    assert settings["divider"] == 0.3 and settings["view"] == "flicker" and settings["right_label"] == "</script><b>net"
    assert text.count("</script>") == 1, "no label can end the script"
    assert wipe.script() in text and (wipe.STATIC / "wipe.css").read_text() in text
    assert not re.findall(r"(?:src|href)\s*=\s*['\"]?(?:https?:)?//", text), "nothing is fetched from elsewhere"


def test_what_cannot_be_saved_is_told():
    viewer = WipeViewer()
    with pytest.raises(ValueError, match="no picture to save"):
        Saved.of(viewer)
    viewer.show(("bicubic", picture(0)), ("net", None), message="none")
    with pytest.raises(ValueError, match="needs both pictures"):
        saving.as_webp(Saved.of(viewer))
    assert Image.open(io.BytesIO(saving.as_png(Saved.of(viewer)))).width == 410
    with pytest.raises(ValueError, match=r"'a\.gif'; name the file \*\.png"):
        saving.encode(Saved.of(viewer), "a.gif")
    long = WipeViewer()
    long.show(("a", picture(0, 16, 16400)), ("b", picture(1, 16, 16400)))
    with pytest.raises(ValueError, match="WebP holds at most 16383"):
        saving.as_webp(Saved.of(long))
