"""The viewer of layers: names, outputs, pages, words instead of tracebacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nbhelpers import models, show
from nbhelpers.block_orthogonal import BlockError, BlockOrthogonalConv2d
from nbhelpers.images import to_tensor
from nbhelpers.panel import read_photo
from nbhelpers.viewers import SHOWN, feature_panel, kernel_panel, layers, output_of


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.build("EfficientSRNet", nf=16, blocks=2, scale=2)


def test_layers_are_listed_in_the_order_of_the_pass(network):
    names = layers(network)
    assert names[0] == "head" and names[-1] == "tail"
    assert names.index("body.0.depthwise") < names.index("body.0.attention.gate") < names.index("body.1.depthwise")


def test_output_is_what_the_layer_gives(network):
    x = torch.rand(3, 20, 24)
    assert torch.allclose(output_of(network, x, "head"), network.head(x[None])[0])
    gate = output_of(network, x, "body.0.attention.gate")
    assert gate.shape == (16, 1, 1) and gate.min() > 0 and gate.max() < 1
    assert not network.head._forward_hooks


def test_whole_blocks_can_be_shown_too(network):
    assert output_of(network, torch.rand(3, 20, 24), "body.0.attention").shape == (16, 20, 24)


def test_unknown_layer_is_quoted(network):
    with pytest.raises(ValueError, match=r"'nothing' is unknown.*body\.0\.depthwise"):
        output_of(network, torch.rand(3, 20, 24), "nothing")


def test_controls_change_the_picture(network):
    rng = np.random.default_rng(0)
    photos = {name: rng.integers(0, 256, (90, 150, 3), dtype=np.uint8) for name in ("a", "b")}
    panel = feature_panel(network, photos)
    seen = [panel.image.value]
    for control, value in ((panel.page, 2), (panel.photo, "b"), (panel.layer, "body.1.attention.gate")):
        control.value = value
        seen.append(panel.image.value)
    assert len(set(seen)) == 4 and all(seen)
    assert panel.page.max == 1  # bars need one page
    assert "16 channels" in panel.status.value
    assert repr(panel.root) == repr(feature_panel(network, photos, "tail").root)


@torch.no_grad()
def test_photos_may_be_paths_as_text_tensors_and_transparent_files(network, tmp_path):
    rgba = np.zeros((40, 50, 4), np.uint8)
    rgba[..., 0], rgba[10:20, :, 3] = 200, 255
    file = tmp_path / "clear.png"
    Image.fromarray(rgba).save(file)
    opaque = read_photo(file)
    assert len(np.unique(opaque.reshape(-1, 3), axis=0)) == 2  # the red and what is seen through it
    expected = feature_panel(network, {"a": opaque}).maps
    for photos in ([str(file)], {"a": str(file)}, {"a": to_tensor(opaque)}):
        assert torch.equal(feature_panel(network, photos).maps, expected)


def test_unreadable_photo_is_said_in_words(network, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    panel = feature_panel(network, {"a": np.zeros((40, 40, 3), np.uint8), "broken": broken})
    panel.photo.value = "broken"
    assert panel.image.layout.display == "none"  # no sign of a broken picture
    assert panel.maps is None and panel.image.value == b"" and "broken.png" in panel.status.value
    with pytest.raises(ValueError, match="status line"):
        panel.figure()
    panel.photo.value = "a"
    assert panel.image.value and panel.image.layout.display is None


@pytest.mark.parametrize(("shape", "axes"), [((30, 5, 7), 12), ((4, 5, 7), 6), ((9, 1, 1), 1)])
def test_figure_has_a_picture_per_channel(shape, axes):
    fig = show.feature_maps(torch.randn(shape), most=SHOWN)
    drawn = [a for a in fig.axes if a.images or a.patches]
    assert len(fig.axes) >= min(axes, shape[0])
    assert sum(bool(a.images) for a in drawn) == (0 if shape[-1] == 1 else min(SHOWN, shape[0]))


# --- kernels ----------------------------------------------------------------------------------------------


def test_kernel_panel_builds_the_layer_that_the_sliders_ask_for():
    panel = kernel_panel(16, 32, 3)
    assert panel.num_matrices.max == 4 and panel.r.options == (1, 2, 4, 8, 16, 32)
    seen = [panel.image.value]
    for control, value in ((panel.num_matrices, 3), (panel.r, 4), (panel.placement, "spread")):
        control.value = value
        seen.append(panel.image.value)
    assert len(set(seen)) == 4 and all(seen)
    assert (panel.conv.num_matrices, panel.conv.r, panel.conv.placement) == (3, 4, "spread")
    free, stored = 3 * 4 * 8 * 7 // 2, 3 * 32 * 8
    assert f"{free} free numbers, {stored} stored, 4,608 in an ordinary kernel; reads 16 of 16" in panel.text()
    assert panel.text() in panel.status.value


def test_kernel_panel_says_how_many_channels_are_read_and_leaves_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    panel = kernel_panel(64, 64, 3)
    assert "reads 8 of 64 input channels" in panel.text()  # 64 columns of nine for each channel
    assert torch.equal(torch.rand(1), expected)
    assert repr(panel.root) == repr(kernel_panel(8, 8, 3).root)


def test_kernel_without_room_is_refused():
    with pytest.raises(BlockError, match=r"kernel of 32 x 16·1 has no room"):
        kernel_panel(16, 32, 1)


def test_kernel_figure_shows_matrix_and_channels():
    conv = BlockOrthogonalConv2d(8, 8, 3, 2, 2, bias=False).requires_grad_(False)
    fig = show.kernel_matrices({"a": conv.weight, "zeros": torch.zeros(4, 8, 3, 3)}, "title")
    matrix, bars, empty = fig.axes[:3]
    assert np.array_equal(matrix.images[0].get_array(), conv.weight.flatten(1).numpy())
    heights = [bar.get_height() for bar in bars.patches]
    # Of 72 columns the last 16 are used, each of length 1: channels 6 (all but two taps) and 7.
    assert heights[:6] == [0] * 6 and heights[6:] == pytest.approx([7**0.5, 3.0], abs=1e-5)
    assert empty.images[0].get_clim() == matrix.images[0].get_clim()


def test_many_channels_leave_no_gaps_between_their_bars():
    fig = show.kernel_matrices({"wide": torch.ones(2, 200, 1, 1)})
    assert len(fig.axes[1].patches) == 1  # one outline; 200 bars would leave gaps of half a pixel
    assert len(show.kernel_matrices({"narrow": torch.ones(2, 20, 1, 1)}).axes[1].patches) == 20
