"""Any scale in the panels: features encoded once, the live slider, the explorer, words instead of tracebacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbhelpers import checkpoints, inference, models, panels, runtime
from nbhelpers.comparison import RESTORE
from nbhelpers.feature_cache import FeatureCache
from nbhelpers.models.encoders import EDSR
from nbhelpers.scale_panel import SIDE, scale_panel

SMALL = {"encoder": {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}, "skip": "bicubic", "start": "default"}


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build("LMLTE", **SMALL).eval()


@pytest.fixture
def encoded(monkeypatch):
    """Counts the pictures that went through an encoder."""
    calls, forward = [], EDSR.forward
    monkeypatch.setattr(EDSR, "forward", lambda self, x: calls.append(tuple(x.shape)) or forward(self, x))
    return calls


# --- features kept ----------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once_and_rendered_at_any_scale(encoded):
    model, cache, picture = network(), FeatureCache(), torch.rand(3, 9, 11)
    for scale in (1, 2.7, 4, (2, 3.5)):
        expected = inference.upscale(model, picture, scale=scale)
        encoded.clear()
        torch.testing.assert_close(cache.upscale(model, picture, scale), expected, atol=1e-6, rtol=0)
        assert len(encoded) == (scale == 1)
    assert cache.upscale(model, picture, size=(5, 30)).shape == (3, 5, 30)
    assert cache.upscale(model, picture).shape == (3, 36, 44)  # the network's own scale
    assert (cache.hits, cache.misses, len(cache)) == (5, 1, 1)


def test_other_pictures_networks_weights_and_arithmetic_are_encoded_anew():
    model, other, cache, x = network(), network(1), FeatureCache(), torch.rand(1, 3, 6, 7)
    cache.features(model, x)
    cache.features(model, x.flip(2))
    cache.features(other, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.features(model, x)
    other.encoder = model.encoder  # what it encodes may still differ: attention comes after the encoder
    cache.features(other, x)
    with torch.no_grad():
        model.encoder.tail.bias.add_(1)
    changed = cache.features(model, x)
    assert (cache.hits, cache.misses) == (0, 6)
    torch.testing.assert_close(changed, model.encode(x))
    assert cache.features(model.at(2), x) is changed and cache.hits == 1


def test_the_store_is_bounded_and_drops_what_was_not_used():
    model, pictures = network(), [torch.rand(1, 3, 4, 5) for _ in range(4)]
    one = model.encode(pictures[0]).nbytes
    cache = FeatureCache(3 * one)
    for i in (0, 1, 2, 0, 3):  # 1 is the least recently used when 3 comes
        cache.features(model, pictures[i])
    assert (len(cache), cache.bytes, cache.misses) == (3, 3 * one, 4)
    cache.features(model, pictures[0])
    cache.features(model, pictures[1])
    assert (cache.hits, cache.misses) == (2, 5)
    cache.features(model, torch.rand(1, 3, 8, 8))  # larger than everything: used, not kept
    assert cache.bytes <= 3 * one
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_wrong_calls_are_quoted():
    with pytest.raises(ValueError, match="max_bytes -1 must not be negative"):
        FeatureCache(-1)
    with pytest.raises(ValueError, match=r"scale=2 or size=\(4, 4\), not both"):
        FeatureCache().upscale(network(), torch.rand(3, 4, 4), 2, (4, 4))
    with pytest.raises(ValueError, match="scale 0 must be a number above 0"):
        FeatureCache().upscale(network(), torch.rand(3, 4, 4), 0)


# --- the live slider --------------------------------------------------------------------------------------------


@pytest.fixture
def panel():
    rng = np.random.default_rng(0)
    photos = {name: rng.integers(0, 256, (120 + 4 * SIDE, 4 * SIDE, 3), dtype=np.uint8) for name in ("a", "b")}
    return scale_panel({"one": network(), "two": network(1)}, photos, device="cpu")


def test_the_slider_renders_and_does_not_encode(panel, encoded):
    assert panel.result.small.shape == (3, SIDE, SIDE)
    seen = {panel.viewer.right}
    for scale in (1.0, 2.7, 5.35, 8.0):
        panel.scale.value = scale
        side = round(SIDE * scale)
        assert panel.result.network.shape == panel.result.bicubic.shape == (3, side, side)
        assert not panel.result.encoded and f"x{scale:.2f}: {SIDE} x {SIDE} to {side} x {side}" in panel.text()
        seen.add(panel.viewer.right)
    assert len(seen) == 5 and not encoded


@pytest.mark.parametrize(("control", "value"), [("photo", "b"), ("network", "two"), ("down", 90)])
def test_the_other_controls_change_the_picture(panel, control, value):
    before = panel.viewer.right
    getattr(panel, control).value = value
    assert panel.viewer.right != before and panel.result.encoded
    assert panel.text() in panel.status.value
    assert len(panel.figure().axes) == 2


def test_an_unreadable_photo_is_said_in_words(panel, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    panel.photos["broken"] = tmp_path / "broken.png"
    panel.photo.options = list(panel.photos)
    panel.photo.value = "broken"
    assert panel.result is None and "broken.png" in panel.status.value and panel.viewer.right == b""
    with pytest.raises(ValueError, match="status line"):
        panel.figure()
    panel.photo.value = "a"
    assert panel.result is not None


def test_a_network_for_one_scale_is_refused():
    fixed = models.build("ESPCN", scale=3, channels=8)
    with pytest.raises(ValueError, match="'tiny' enlarges by 3 only"):
        scale_panel({"tiny": fixed})


# --- the explorer -----------------------------------------------------------------------------------------------


def test_the_explorer_has_a_slider_for_networks_for_any_scale(tmp_path, monkeypatch):
    checkpoints.save("any", network(), "LMLTE", SMALL, {"scale": 4, "scales": [1, 4]}, [], tmp_path)
    sizes = {"scale": 2, "channels": 8}
    checkpoints.save("twice", models.build("ESPCN", **sizes), "ESPCN", sizes, {"scale": 2}, [], tmp_path)
    monkeypatch.setattr(runtime, "CHECKPOINTS", tmp_path)
    checkpoints.cached.cache_clear()
    explorer = panels.explorer_panel({"noise": torch.rand(3, 300, 280)}, device="cpu")
    explorer.network.value = "any"
    assert explorer.scale.layout.display is None and explorer.result.scale == 4
    before = explorer.viewer.right
    explorer.scale.value = 2.7
    assert explorer.mode.value == RESTORE and explorer.result.scale == 2.7 and explorer.viewer.right != before
    assert "x2.7" in explorer.readout.value and explorer.result.scores["network"]["psnr_y"] > 0
    explorer.mode.value = panels.AS_IS
    assert explorer.result.network.shape[-1] == round(256 * 2.7)
    explorer.network.value = "twice"
    assert explorer.scale.layout.display == "none" and explorer.result.scale == 2
    checkpoints.cached.cache_clear()


@pytest.mark.parametrize(("scale", "plain"), [(np.int64(2), 2), (np.float32(2.5), 2.5), ((np.int64(2), 3.5), (2, 3.5))])
def test_a_scale_may_be_a_number_of_numpy(scale, plain):
    model = network()
    view = inference.get_model(model, scale)
    assert view.scale == plain and repr(view.scale) == repr(plain)
    x = torch.rand(3, 7, 11)
    assert torch.equal(inference.upscale(view, x), inference.upscale(model.at(plain), x))
