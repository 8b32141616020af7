"""The panels without a browser: every control changes the picture, and every problem is told in words."""

import io
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

from nbhelpers import comparison, models, panels, runtime
from nbhelpers.tests.conftest import tiny_network
from nbhelpers.wipe import WipeViewer, encode_picture


@pytest.fixture
def explorer(networks):
    return panels.explorer_panel(device="cpu")


@pytest.fixture
def compared():
    rng = np.random.default_rng(0)
    photos = {"noise": rng.integers(0, 256, (300, 420, 3), dtype=np.uint8)}
    return panels.compare_panel(tiny_network(4), photos, name="tiny", device="cpu")


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_encoding_is_lossless():
    rgb = np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_picture(rgb))) as image:
        assert np.array_equal(np.asarray(image), rgb)
    assert encode_picture(None) == b""
    with pytest.raises(TypeError, match="uint8"):
        encode_picture(rgb.astype(np.float32))


def test_viewer_refuses_pictures_of_different_size():
    with pytest.raises(ValueError, match="one size"):
        WipeViewer().show(("a", torch.zeros(3, 8, 8)), ("b", torch.zeros(3, 8, 9)))


def test_viewer_text_form_holds_no_picture_bytes():
    viewer = WipeViewer()
    viewer.show(("a", torch.zeros(3, 8, 8)), ("b", None), message="nothing here")
    assert repr(viewer) == "WipeViewer(a | b)"
    assert viewer.message == "nothing here"


def test_explorer_starts_with_every_network_and_the_validation_photos_first(explorer, networks):
    assert list(explorer.network.options) == networks
    assert explorer.photo.options[0].startswith("val/")
    assert any(name.startswith("train/") for name in explorer.photo.options)
    assert explorer.viewer.left
    assert explorer.viewer.right


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("photo", 3),
        ("network", 1),
        ("mode", panels.AS_IS),
        ("size", 128),
        ("across", 10),
        ("down", 90),
        ("quality", 20),
        ("blur", 1.5),
        ("noise", 20),
    ],
)
def test_each_control_changes_both_pictures(explorer, control, value):
    before = explorer.viewer.left, explorer.viewer.right
    widget = getattr(explorer, control)
    widget.value = widget.options[value] if control in ("photo", "network") else value
    assert explorer.viewer.left != before[0]
    assert explorer.viewer.right != before[1]
    assert "⚠" not in explorer.status.value


def test_scale_follows_the_network(explorer):
    for name, scale in (("tiny_x2", 2), ("tiny_x4", 4)):
        explorer.network.value = name
        assert explorer.result.scale == scale
        explorer.mode.value = panels.AS_IS
        assert size_of(explorer.viewer.right) == (256 * scale, 256 * scale)
        explorer.mode.value = panels.RESTORE
        assert size_of(explorer.viewer.right) == (256, 256)


def test_numbers_only_where_an_original_exists(compared):
    assert compared.mode.value == panels.RESTORE
    assert "PSNR-Y" in compared.readout.value
    assert compared.result.scores["network"]["psnr_y"] > 5
    compared.mode.value = panels.AS_IS
    assert panels.NO_ORIGINAL in compared.readout.value
    assert compared.result.scores == {}
    assert compared.viewer.original == b""
    assert ">ms</th>" in compared.readout.value and ">MB</th>" in compared.readout.value


def test_left_side_can_be_the_original(compared):
    bicubic = compared.viewer.left
    result = compared.result
    compared.compare_with.value = "original"
    assert compared.viewer.left == compared.viewer.original != bicubic
    assert compared.viewer.left_label == "original"
    assert compared.result is result, "showing another side must not compute anything again"
    compared.mode.value = panels.AS_IS
    assert compared.compare_with.value == "bicubic"
    assert "original" not in compared.compare_with.options


def test_two_networks_against_each_other(explorer):
    explorer.network.value, explorer.compare_with.value = "tiny_x4", "tiny_x2"
    result = explorer.result
    assert result.other.shape == result.network.shape and not torch.equal(result.other, result.network)
    assert explorer.viewer.left_label.startswith("tiny_x2, ") and explorer.viewer.right_label.startswith("tiny_x4, ")
    assert list(result.scores) == list(result.milliseconds) == ["bicubic", "other", "network"]
    for name in ("bicubic", "tiny_x2", "tiny_x4"):
        assert f"<th scope='row'>{name}</th>" in explorer.readout.value
    left = explorer.viewer.left
    explorer.compare_with.value = "bicubic"
    assert explorer.viewer.left != left
    assert explorer.result is result, "showing another side must not compute anything again"
    assert "<th scope='row'>tiny_x2</th>" in explorer.readout.value
    explorer.mode.value = panels.AS_IS  # computed anew, and nobody asks for a second network now
    assert explorer.result.other is None


def test_noise_is_the_same_each_time(compared):
    compared.noise.value = 15
    first = compared.viewer.right
    compared.noise.value = 0
    compared.noise.value = 15
    assert compared.viewer.right == first
    assert "noise 15 of 255" in compared.readout.value


def test_memory_and_time_of_each_side(compared):
    assert set(compared.result.bytes) == set(compared.result.milliseconds) == {"bicubic", "network"}
    weights = sum(p.nbytes for p in tiny_network(4).parameters())
    features = 4 * 8 * 64 * 64  # of the first layer, 8 channels in fp32
    assert compared.result.bytes["network"] > weights + features
    assert compared.result.bytes["network"] > compared.result.bytes["bicubic"] > 4 * 3 * 256 * 256


def test_an_error_of_any_kind_is_told_in_words():
    class Broken(torch.nn.Module):
        scale, halo = 2, 1

        def forward(self, x):
            raise KeyError("a layer that <nobody> made")

    photos = {"noise": np.zeros((64, 64, 3), np.uint8)}
    panel = panels.compare_panel({"broken": Broken(), "tiny": tiny_network(2)}, photos, device="cpu")
    assert "KeyError" in panel.status.value and "&lt;nobody&gt;" in panel.status.value
    assert panel.result is None and panel.viewer.message and panel.readout.value == ""
    panel.network.value = "tiny"
    assert panel.result is not None and "⚠" not in panel.status.value


def test_result_equals_the_package_protocol(compared):
    from nbhelpers import degrade, metrics

    original = compared.result.original
    bicubic = degrade.upscale_bicubic(degrade.downscale(original, 4), 4)
    assert compared.result.scores["bicubic"]["psnr_y"] == pytest.approx(metrics.psnr_y(bicubic, original, 4))


def test_too_small_a_picture_is_told_in_words_and_recovers(explorer):
    explorer.add_photo("dot.png", np.zeros((9, 9, 3), np.uint8))
    assert "dot.png shows only 9 x 9 pixels" in explorer.status.value
    assert explorer.viewer.right == b""
    assert explorer.viewer.message
    with pytest.raises(ValueError, match="no picture to draw"):
        explorer.figure()
    explorer.photo.value = explorer.photo.options[1]
    assert explorer.viewer.right
    assert "⚠" not in explorer.status.value


def test_a_damaged_network_is_told_in_words(explorer):
    (runtime.CHECKPOINTS / "tiny_x4.safetensors").write_bytes(b"damaged")
    explorer.network.value = "tiny_x4"
    assert "tiny_x4" in explorer.status.value
    assert explorer.result is None


def test_a_huge_photo_is_shown_in_part(explorer, monkeypatch):
    monkeypatch.setattr(comparison, "MOST_SHOWN", 200 * 200)
    explorer.size.value = 0
    assert "too large" in explorer.status.value
    assert size_of(explorer.viewer.right) == (200, 200)


def test_without_any_network_bicubic_remains(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "CHECKPOINTS", tmp_path)
    panel = panels.explorer_panel(device="cpu")
    assert panel.network.value == panels.BICUBIC_ONLY
    assert panel.viewer.left
    assert panel.viewer.right == b""
    assert "nbhelpers train" in panel.viewer.message
    assert list(panel.result.scores) == ["bicubic"]
    assert panel.figure().axes


def test_the_scale_is_hidden_for_networks_for_one_scale(compared, explorer):
    for panel in (compared, explorer):
        assert panel.scale.layout.display == "none"
        assert panel.working.layout.display == "none"


def test_figure_holds_every_picture(compared):
    titles = " ".join(axis.get_title() for axis in compared.figure().axes)
    assert "original" in titles
    assert "bicubic" in titles
    assert "tiny" in titles


def test_text_form_is_short_and_stable(compared):
    text = compared._repr_mimebundle_()["text/plain"]
    assert text == repr(compared.root)
    assert len(text) < 110


def test_a_control_shows_another_picture(networks):
    """``pytest -s -k test_a_control`` prints the time from control to picture (budget: 300 ms on two idle cores)."""
    panel = panels.compare_panel(models.build("ESPCN", scale=4), device="cpu")
    for mode in (panels.RESTORE, panels.AS_IS):
        panel.mode.value = mode
        seconds, pictures = [], []
        for quality in (90, 80, 70, 60, 50):
            start = time.perf_counter()
            panel.quality.value = quality
            seconds.append(time.perf_counter() - start)
            pictures.append(bytes(panel.viewer.right))
        print(f"{mode}: median {statistics.median(seconds) * 1000:.0f} ms, best {min(seconds) * 1000:.0f} ms")
        assert len(set(pictures)) == len(pictures)
