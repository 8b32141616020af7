"""EfficientSRNet, its attentions, and LeanSRNet: document 003's own checks, counts, and what each can see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nbhelpers import models
from nbhelpers.degrade import upscale_bicubic
from nbhelpers.inference import upscale
from nbhelpers.models.efficient_srnet import ATTENTION, CELL, ECA, ECALite, ERBlock, LocalECA, merge
from nbhelpers.profiling import flops

KINDS = sorted(ATTENTION)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("kernel", [3, 5])
def test_block_keeps_the_shape_and_adds_something(attention, kernel):
    x = torch.randn(1, 32, 64, 64)
    out = ERBlock(32, attention, kernel)(x)
    assert out.shape == x.shape
    assert (out - x).abs().max() > 0


@pytest.mark.parametrize("kind", [ECALite, ECA, LocalECA])
def test_attention_lies_between_0_and_1_and_differs_by_channel(kind):
    x = torch.randn(2, 32, 16, 24) * torch.linspace(0, 3, 32)[:, None, None] + torch.linspace(-2, 2, 32)[:, None, None]
    mask = kind(32).mask(x)
    assert mask.min() > 0 and mask.max() < 1
    assert mask.var(1).min() > 0
    assert kind(32)(x).shape == x.shape


def test_eca_lite_is_squeeze_and_excitation_without_bottleneck():
    layer, x = ECALite(8), torch.rand(3, 8, 5, 7)
    weight, bias = layer.mix.weight[:, :, 0, 0], layer.mix.bias
    expected = torch.sigmoid(F.linear(x.flatten(2).mean(2), weight, bias))
    assert torch.allclose(layer(x), x * expected[..., None, None], atol=1e-6)


@pytest.mark.parametrize(("channels", "length"), [(8, 3), (32, 3), (64, 3), (256, 5)])
def test_eca_mixes_as_many_neighbours_as_the_paper_says(channels, length):
    assert ECA(channels).mix.weight.numel() == length


@pytest.mark.parametrize(("h", "w"), [(8, 8), (24, 16), (17, 30), (3, 5), (1, 1)])
def test_local_attention_is_the_mean_of_cells_enlarged(h, w):
    layer, x = LocalECA(4), torch.rand(2, 4, h, w)
    mask = layer.mask(x)
    assert mask.shape == x.shape
    cells = [[x[..., i : i + CELL, j : j + CELL].mean((2, 3)) for j in range(0, w, CELL)] for i in range(0, h, CELL)]
    coarse = torch.sigmoid(layer.mix(torch.stack([torch.stack(row, -1) for row in cells], -2)))
    expected = F.interpolate(coarse, scale_factor=CELL, mode="bilinear")[..., :h, :w]
    assert torch.allclose(mask, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "arguments", "expected"),
    [
        ("EfficientSRNet", {"scale": 4}, 104_451),
        ("EfficientSRNet", {"scale": 2}, 104_451 - 36_992),
        ("EfficientSRNet", {"attention": "none"}, 104_451 - 8 * (32 * 32 + 32)),
        ("EfficientSRNet", {"attention": "eca"}, 104_451 - 8 * (32 * 32 + 32) + 8 * 3),
        ("EfficientSRNet", {"attention": "local"}, 104_451),
        ("LeanSRNet", {}, 1_344 + 16 * 3_600 + 480 + 2_352),
    ],
)
def test_parameter_counts(arch, arguments, expected):
    count = models.count_parameters(models.build(arch, **arguments))
    assert count == expected
    assert count < 2_000_000


def test_most_arithmetic_is_in_the_upsampling():
    """0.90 GMAC for 64x64 pixels; 84 % in the two wide convolutions."""
    net = models.build("EfficientSRNet")
    macs = flops(net, (1, 3, 64, 64)) / 2
    assert macs == pytest.approx(0.90e9, rel=0.01)
    wide = 32 * 128 * 9 * (64**2 + 128**2)
    assert wide / macs == pytest.approx(0.84, abs=0.005)


@pytest.mark.parametrize("arch", ["EfficientSRNet", "LeanSRNet"])
@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("scale", [2, 4])
def test_shapes_and_finite_values(arch, attention, scale):
    net = models.build(arch, scale=scale, attention=attention)
    for h, w in ((16, 24), (5, 7), (1, 1)):
        out = net(torch.rand(2, 3, h, w))
        assert out.shape == (2, 3, h * scale, w * scale)
        assert torch.isfinite(out).all()


def test_lean_network_with_nothing_to_add_is_bicubic():
    net, x = models.build("LeanSRNet", scale=3), torch.rand(1, 3, 9, 11)
    torch.nn.init.zeros_(net.to_subpixels[1].weight)
    torch.nn.init.zeros_(net.to_subpixels[1].bias)
    assert torch.allclose(net(x), upscale_bicubic(x, 3), atol=1e-5)


def test_merged_branches_compute_the_same_with_the_plain_networks_tensors():
    torch.manual_seed(0)
    net, x = models.build("LeanSRNet", channels=8, blocks=2, branches=True), torch.rand(1, 3, 12, 9)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)  # also the smaller kernels, which begin at zero
    before = net(x)
    parts = net.body[0].depthwise.parametrizations.weight
    assert [tuple(k.shape[-2:]) for k in parts[0].smaller] == [(1, 1), (3, 3)]
    assert torch.allclose(merge(net)(x), before, atol=1e-5)
    assert net.state_dict().keys() == models.build("LeanSRNet", channels=8, blocks=2).state_dict().keys()


def test_branches_all_learn():
    net = models.build("LeanSRNet", channels=8, blocks=1, branches=True)
    net(torch.rand(1, 3, 12, 9)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.body[0].depthwise.parameters())


@pytest.mark.parametrize("arch", ["EfficientSRNet", "LeanSRNet"])
@pytest.mark.parametrize("attention", ["none", "local"])
def test_tiles_equal_the_whole_where_attention_is_local(arch, attention):
    torch.manual_seed(0)
    size = {"nf": 8} if arch == "EfficientSRNet" else {"channels": 8}
    net = models.build(arch, scale=2, blocks=3, attention=attention, **size).eval()
    picture = torch.rand(3, 160, 150)
    assert torch.equal(upscale(net, picture, tile=50), upscale(net, picture, tile=0))


def test_tiles_differ_from_the_whole_where_attention_is_global():
    torch.manual_seed(0)
    net = models.build("EfficientSRNet", nf=8, blocks=3, scale=2).eval()
    picture = torch.rand(3, 160, 150) * torch.linspace(0, 1, 150)
    assert net.halo is None
    assert (upscale(net, picture, tile=50) - upscale(net, picture, tile=0)).abs().max() > 0


@pytest.mark.parametrize("arch", ["EfficientSRNet", "LeanSRNet"])
def test_receptive_field_is_the_stated_halo(arch):
    torch.manual_seed(0)
    net = models.build(arch, scale=2, blocks=2, attention="none")
    x = torch.rand(1, 3, 31, 31)
    y = x.clone()
    y[..., 15, 15] += 1
    changed = ((net(y) - net(x)).abs().amax(1)[0] > 0).nonzero() // 2
    assert (changed - 15).abs().max() <= net.halo
    assert (changed - 15).abs().max() >= net.halo - 1  # parts of pixels are rounded up


@pytest.mark.parametrize(
    ("arch", "arguments", "quoted"),
    [
        ("EfficientSRNet", {"scale": 3}, "scale 3"),
        ("EfficientSRNet", {"nf": 0}, "width 0"),
        ("EfficientSRNet", {"attention": "se"}, "'se'.*eca_lite"),
        ("LeanSRNet", {"kernel": 4}, "kernel 4"),
        ("LeanSRNet", {"blocks": 0}, "blocks 0"),
        ("LeanSRNet", {"scale": 9}, "scale 9"),
    ],
)
def test_wrong_arguments_are_quoted(arch, arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        models.build(arch, **arguments)
