"""The explorer without a browser: photos and networks that the reader brings, long work, files saved."""

import asyncio
import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.ESRGAN import ESRGAN

from nbhelpers import checkpoints, comparison, deploy, explorer, images, inference, jobs, panels, runtime
from nbhelpers.images import flattened, read_picture
from nbhelpers.tests.conftest import tiny_network

RED = (200, 30, 40)


@pytest.fixture
def panel(networks):
    rng = np.random.default_rng(0)
    photos = {"noise": rng.integers(0, 256, (150, 140, 3), dtype=np.uint8)}
    return panels.explorer_panel(photos, device="cpu")


def send(panel, *files: tuple[str, bytes], part: int = 1000) -> None:
    """What the browser sends when the reader drops files (static/files.js), in small parts."""
    for index, (name, data) in enumerate(files):
        about = {"kind": "file", "batch": 7, "name": name, "index": index, "count": len(files), "size": len(data)}
        for start in range(0, max(1, len(data)), part):
            content = {**about, "last": start + part >= len(data), "problem": ""}
            panel.viewer._handle_custom_msg(content, [memoryview(data)[start : start + part]])


def png(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert(mode).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


# --- photos -----------------------------------------------------------------------------------------------------


def test_files_are_shown_and_bad_ones_told_in_words(panel):
    send(
        panel, ("good.png", png(300, 280)), ("text.png", b"no picture"), ("empty.png", b""), ("two.png", png(290, 270))
    )
    assert panel.photo.value == "good.png"
    assert list(panel.photo.options) == ["good.png", "two.png", "noise"]
    for words in (
        "2 added, 2 not",
        "text.png: is not a picture",
        "empty.png: the file is empty",
        "256 x 256 pixels of",
    ):
        assert words in panel.status.value
    assert panel.result is not None
    panel.quality.value = 50
    assert "not:" not in panel.status.value, "told once"


def test_only_bad_files_change_nothing(panel):
    before, result = panel.viewer.right, panel.result
    send(panel, ("text.png", b"no picture"))
    assert "0 added, 1 not" in panel.status.value
    assert (panel.viewer.right, panel.result) == (before, result)
    panel.viewer._handle_custom_msg({"kind": "file", "batch": 1, "name": "", "count": 0}, [])
    assert "holds no file" in panel.status.value


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_picture_mode(panel, mode):
    send(panel, ("photo.png", png(280, 270, mode)))
    assert panel.photo.value == "photo.png" and "⚠" not in panel.status.value


def test_a_telephones_photo_stands_upright(panel):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right
    send(panel, ("phone.jpg", png(300, 200, format="JPEG", exif=exif)))
    panel.size.value = 0
    assert "200 x 300 pixels of phone.jpg" in panel.status.value


def test_another_file_of_the_same_name_takes_its_place_and_two_at_once_both_stay(panel):
    send(panel, ("photo.png", png(300, 300)))
    first = panel.viewer.right
    send(panel, ("photo.png", png(310, 310)))
    assert panel.viewer.right != first
    assert list(panel.photo.options) == ["photo.png", "noise"]
    send(panel, ("a.png", png(300, 300)), ("a.png", png(310, 310)))
    assert list(panel.photo.options) == ["a.png", "a (2).png", "photo.png", "noise"]


def test_file_names_are_text_not_html_and_cannot_leave_their_folder(panel, tmp_path):
    send(panel, ("<img src=x onerror=alert(1)>.png", b"no picture"), ("../../outside.pth", b"no network"))
    assert "<img" not in panel.status.value and "outside.pth is not a readable weight file" in panel.status.value
    assert (runtime.RUNS / "uploads" / "outside.pth").is_file()
    assert not list(tmp_path.glob("*.pth"))


def test_what_the_page_could_not_read_is_told(panel):
    content = {"kind": "file", "batch": 1, "name": "holiday", "index": 0, "count": 1, "size": 0}
    panel.viewer._handle_custom_msg(content | {"last": True, "problem": "cannot be read here (is it a folder?)"}, [b""])
    assert "holiday: cannot be read here (is it a folder?)" in panel.status.value


def test_a_panel_without_uploads_takes_no_files():
    panel = panels.compare_panel(tiny_network(2), {"noise": np.zeros((64, 64, 3), np.uint8)}, device="cpu")
    send(panel, ("photo.png", png(100, 100)))
    assert list(panel.photo.options) == ["noise"]


def test_transparent_parts_are_shown_on_white_and_white_logos_on_dark_grey():
    for colour, ground in ((RED, 255), ((255, 255, 255), 48)):
        rgba = np.zeros((20, 30, 4), np.uint8)
        rgba[5:15, 5:15] = (*colour, 255)
        buffer = io.BytesIO()
        Image.fromarray(rgba).save(buffer, "PNG")
        rgb = flattened(read_picture(buffer))
        assert rgb[0, 0].tolist() == [ground] * 3 and tuple(rgb[10, 10]) == colour
    half = images.Picture(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 51, np.uint8))
    assert flattened(half).tolist() == [[[204, 204, 204]]]


# --- networks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A published network's weights, and an exported one of ours."""
    torch.manual_seed(0)
    esrgan = tmp_path / "somewhere" / "esrgan.pth"
    esrgan.parent.mkdir()
    torch.save(ESRGAN(num_filters=8, num_blocks=1, scale=4).state_dict(), esrgan)
    return {"esrgan.pth": esrgan}


def test_a_published_network_from_a_path_or_dropped(panel, files):
    panel.file.value = str(files["esrgan.pth"])
    panel.load.click()
    assert panel.network.value == "esrgan.pth" and panel.result.scale == 4 and "⚠" not in panel.status.value
    by_path = panel.viewer.right
    panel.network.value = "tiny_x4"
    panel.compare_with.value = "esrgan.pth"
    assert panel.viewer.left == by_path
    send(panel, ("dropped.pth", files["esrgan.pth"].read_bytes()), part=2**20)
    assert panel.network.value == "dropped.pth" and panel.viewer.right == by_path


def test_exported_networks_and_whom_to_trust(panel, tmp_path):
    for name in ("tiny.onnx", "tiny.pt2"):
        deploy.export("tiny_x2", tmp_path / name)
    panel.network.value = "tiny_x2"
    expected = panel.result.network
    panel.add_network(tmp_path / "tiny.onnx")
    assert panel.network.value == "tiny.onnx"
    torch.testing.assert_close(panel.result.network, expected, atol=1e-4, rtol=0)
    assert "not seen" in panel.readout.value, "what another runtime holds cannot be counted"
    panel.add_network(tmp_path / "tiny.pt2")
    assert "tick “I trust its maker” first" in panel.status.value and "tiny.pt2" not in panel.network.options
    panel.trusted.value = True
    panel.add_network(tmp_path / "tiny.pt2")
    torch.testing.assert_close(panel.result.network, expected, atol=1e-4, rtol=0)


def test_exported_networks_in_the_checkpoints_folder_are_offered(networks):
    deploy.export("tiny_x2", runtime.CHECKPOINTS / "fast.onnx")
    found = explorer.found_networks("cpu")
    assert list(found) == ["tiny_x2", "tiny_x4", "fast.onnx"]
    assert found["fast.onnx"]().scale == 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "Write the path"),
        ("nowhere.pth", "no such file"),
        ("folder", "is a folder, not a network"),
        ("text.txt", "no network file that is known here"),
        ("junk.pth", "junk.pth is not a readable weight file"),
        ("junk.onnx", "junk.onnx is not a readable ONNX file"),
        ("other.safetensors", "holds no network that spandrel knows"),
    ],
)
def test_what_is_no_network_is_told_in_words(panel, tmp_path, name, why):
    (tmp_path / "folder").mkdir()
    for junk in ("text.txt", "junk.pth", "junk.onnx"):
        (tmp_path / junk).write_bytes(b"no network at all")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    before = panel.viewer.right
    panel.add_network(tmp_path / name if name else "")
    assert why in panel.status.value and "Traceback" not in panel.status.value
    assert panel.viewer.right == before and list(panel.network.options) == ["tiny_x2", "tiny_x4"]


# --- long work --------------------------------------------------------------------------------------------------


def test_a_large_photo_by_hand_answers_at_once_and_can_be_cancelled(panel, monkeypatch):
    """A loop stands in for a kernel's: the button's message gets through while tiles are computed."""
    monkeypatch.setattr(jobs, "by_hand", lambda: True)
    monkeypatch.setattr(jobs, "GRACE", 0.01)
    monkeypatch.setattr(jobs, "EVERY", 0)
    monkeypatch.setattr(inference, "_plan", lambda m, h, w, *rest: list(inference._tiles(h, w, 8, 2)))
    before = panel.viewer.right

    async def page():
        panel.size.value = 0
        assert panel.working.layout.display is None and "Working" in panel.status.value
        while "of 81" not in panel.progress_text.value:
            await asyncio.sleep(0.001)
        assert panel.progress.max == 81 and panel.viewer.right == before
        panel.cancel.click()
        while panel.worker.job:
            await asyncio.sleep(0.001)

    with_photo = np.random.default_rng(1).integers(0, 256, (144, 144, 3), dtype=np.uint8)
    monkeypatch.setattr(jobs, "by_hand", lambda: False)
    panel.photos["noise"] = with_photo
    panel.update()
    before = panel.viewer.right
    monkeypatch.setattr(jobs, "by_hand", lambda: True)
    asyncio.run(page())
    assert "Cancelled" in panel.status.value and "pixels of noise" in panel.status.value
    assert panel.working.layout.display == "none"
    assert panel.viewer.right == before, "the last finished picture stays"
    monkeypatch.setattr(jobs, "by_hand", lambda: False)
    panel.quality.value = 60  # and everything goes on as before
    assert panel.viewer.right != before and "⚠" not in panel.status.value


def test_a_photo_too_large_for_a_page_is_shown_smaller_and_saved_whole(panel, monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "MOST_SHOWN", 200 * 200)
    panel.network.value, panel.mode.value, panel.size.value = "tiny_x2", panels.AS_IS, 0
    assert "Save enlarged photo" in panel.status.value and "280 x 300 pixels is shown 1.4 times smaller" in (
        panel.status.value
    )
    panel.save_enlarged(tmp_path / "large.png")
    expected = inference.upscale(checkpoints.cached("tiny_x2"), panel.photos["noise"], precision=panel.precision)
    with Image.open(tmp_path / "large.png") as image:
        assert np.array_equal(np.asarray(image), expected)


# --- saving -----------------------------------------------------------------------------------------------------


def test_a_comparison_saved_by_button_reaches_disk_and_browser(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(type(panel.viewer), "download", lambda self, *what: sent.append(what))
    for suffix, kind in ((".png", "image/png"), (".webp", "image/webp"), (".html", "text/html")):
        getattr(panel, f"save_{suffix[1:]}").click()
        path = runtime.RUNS / "comparisons" / f"noise_bicubic_and_tiny_x2{suffix}"
        assert f"Saved as runs/comparisons/{path.name}" in panel.status.value
        assert sent.pop() == (path.name, kind, path.read_bytes())
    panel.save_photo.click()
    assert sent.pop()[0] == "noise_enlarged_tiny_x2.png"


def test_nothing_to_save_and_impossible_places_are_told_in_words(panel, tmp_path):
    panel.save(tmp_path / "a.bmp")
    assert "name the file *.png, *.webp, *.html" in panel.status.value
    (tmp_path / "file").write_text("")
    panel.save(tmp_path / "file" / "a.png")
    assert "Not saved" in panel.status.value
    panel.add_photo("dot", np.zeros((4, 4, 3), np.uint8))
    for save in (panel.save, panel.save_enlarged):
        save(tmp_path / "b.png")
        assert "no picture to draw" in panel.status.value and not (tmp_path / "b.png").exists()
