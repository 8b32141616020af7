"""The viewer of cross-scale attention: its weights are the network's, controls change the picture, errors in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbhelpers import models
from nbhelpers.attention_viewer import attention_at, attention_panel
from nbhelpers.models.continuous import ContinuousSR


@pytest.fixture
def network():
    torch.manual_seed(0)
    encoder = {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}
    return models.build("LMLTE", encoder=encoder, non_local_attn=True, multi_scale=[1, 2], softmax_scale=9.0).eval()


def test_weights_are_those_of_the_network(network):
    """The attention's output at the pixel is its input and the values, weighted so."""
    picture, attention = torch.rand(3, 8, 10), network.attention
    maps = attention_at(network, picture, 2, 7)
    assert {s: tuple(m.shape) for s, m in maps.items()} == {1: (8, 10), 2: (4, 5)}
    with torch.no_grad():
        before = ContinuousSR.encode(network, picture[None])
        expected = before[0, :, 2, 7]
        for weights, small in zip(maps.values(), attention.shrunk(before), strict=True):
            expected = expected + (attention.value(small)[0] * weights).sum((1, 2))
        torch.testing.assert_close(network.encode(picture[None])[0, :, 2, 7], expected, atol=1e-5, rtol=1e-4)


def test_controls_change_the_picture(network):
    rng = np.random.default_rng(0)
    panel = attention_panel(network, {k: rng.integers(0, 256, (110, 130, 3), dtype=np.uint8) for k in "ab"})
    seen = [panel.image.value]
    for control, value in ((panel.across, 10), (panel.down, 90), (panel.photo, "b")):
        control.value = value
        seen.append(panel.image.value)
    assert len(set(seen)) == 4 and all(seen)
    assert panel.place == (round(95 * 0.9), round(95 * 0.1)) and "of 9216 places" in panel.status.value
    assert len([axis for axis in panel.figure().axes if axis.images]) == 2


def test_problems_are_said_in_words(network, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    panel = attention_panel(network, {"a": np.zeros((40, 40, 3), np.uint8), "broken": str(tmp_path / "broken.png")})
    panel.photo.value = "broken"
    assert panel.image.layout.display == "none"  # no sign of a broken picture
    assert panel.maps is None and "broken.png" in panel.status.value
    with pytest.raises(ValueError, match="status line"):
        panel.figure()
    panel.photo.value = "a"
    assert panel.image.value and panel.image.layout.display is None
    plain = models.build("LMLTE", encoder={"preset": "EDSR-b", "n_feats": 4, "n_blocks": 1})
    with pytest.raises(ValueError, match="no cross-scale attention; build an LMLTE with non_local_attn=True"):
        attention_at(plain, torch.rand(3, 4, 4), 0, 0)
    with pytest.raises(ValueError, match="row 9, column 0 lies outside the picture of 4x4"):
        attention_at(network, torch.rand(3, 4, 4), 9, 0)
