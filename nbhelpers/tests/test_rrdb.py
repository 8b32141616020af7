"""Document 002's generators, the two-stage ESPCN, and networks trained elsewhere."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from nbhelpers import checkpoints, models
from nbhelpers.checkpoints import CheckpointError
from nbhelpers.degrade import upscale_bicubic
from nbhelpers.layers import DilatedConv2d
from nbhelpers.models.external import load_external
from nbhelpers.models.rrdb import DenseBlock, DilatedBlock


def reach(model: nn.Module, side: int = 81) -> int:
    """Radius in input pixels of what one output pixel sees, by the gradient of the input."""
    x = torch.rand(1, 3, side, side, requires_grad=True)
    middle, s = side // 2, model.scale
    out = model(x)[..., middle * s : middle * s + s, middle * s : middle * s + s]
    seen = torch.autograd.grad(out.sum(), x)[0].abs().amax(1)[0].nonzero()
    return int((seen - middle).abs().max())


def test_published_generator_has_the_published_size():
    assert models.count_parameters(models.build("DilatedRRDBNet", channels=64, blocks=16)) == 16_293_763
    assert models.count_parameters(models.build("RRDBNet")) == 16_697_987


def test_dense_block_equals_the_formula_of_the_document():
    """One residual dense block with five convolutions, written out as in ESRGAN."""
    block = DenseBlock(4, growth=2, layers=5, slope=0.2)
    x, act = torch.randn(1, 4, 9, 9), nn.LeakyReLU(0.2)
    c1, c2, c3, c4, c5 = block.convs
    x1 = act(c1(x))
    x2 = act(c2(torch.cat((x, x1), 1)))
    x3 = act(c3(torch.cat((x, x1, x2), 1)))
    x4 = act(c4(torch.cat((x, x1, x2, x3), 1)))
    expected = x + 0.2 * c5(torch.cat((x, x1, x2, x3, x4), 1))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("block", [DilatedBlock(4), DenseBlock(4)])
def test_residual_scale_zero_is_identity(block):
    block.res_scale = 0.0
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_activation_changes_neither_output_nor_gradient(inplace):
    torch.manual_seed(0)
    model = models.build("DilatedRRDBNet", channels=4, blocks=1, pairs=1, inplace=inplace)
    x = torch.rand(1, 3, 8, 8)
    out = model(x)
    out.square().sum().backward()
    torch.manual_seed(0)
    other = models.build("DilatedRRDBNet", channels=4, blocks=1, pairs=1, inplace=not inplace)
    again = other(x)
    again.square().sum().backward()
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(other.first.weight.grad, model.first.weight.grad)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"passes": 2, "scale": 4},
        {"shared": True, "blocks": 2},
        {"dilations": ()},
        {"dilations": (3,)},
        {"scale": 4},
    ],
)
def test_rrdb_sees_as_far_as_it_says(arguments):
    model = models.build("DilatedRRDBNet", **({"channels": 4, "blocks": 1, "pairs": 1, "res_scale": 1.0} | arguments))
    assert reach(model) == model.halo


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "nearest"])
@pytest.mark.parametrize("stages", [(4,), (2, 2), (3,)])
@pytest.mark.parametrize("after", [0, 2])
def test_staged_espcn_size_and_reach(stages, upsampler, after):
    model = models.build(
        "StagedESPCN", scale=math.prod(stages), stages=stages, channels=4, upsampler=upsampler, after=after
    )
    x = torch.rand(1, 3, 5, 7)
    assert torch.allclose(model(x), model.skip(x) + model.layers[-1].bias[:, None, None])  # it starts as bicubic
    assert model(x).shape[-2:] == (5 * model.scale, 7 * model.scale)
    nn.init.normal_(model.layers[-1].weight)
    assert reach(model, 41) == model.halo


def test_shared_network_has_one_block_and_applies_it_often():
    one = models.build("DilatedRRDBNet", channels=4, blocks=1, pairs=1)
    shared = models.build("DilatedRRDBNet", channels=4, blocks=3, pairs=1, shared=True)
    assert models.count_parameters(one) == models.count_parameters(shared)
    calls = []
    shared.body[0].register_forward_hook(lambda *_: calls.append(1))
    shared(torch.rand(1, 3, 8, 8))
    assert len(calls) == 3


def test_two_passes_are_the_network_applied_twice():
    arguments = {"channels": 4, "blocks": 1, "pairs": 1, "skip": True}
    once, twice = (
        models.build("DilatedRRDBNet", **arguments),
        models.build("DilatedRRDBNet", scale=4, passes=2, **arguments),
    )
    twice.load_state_dict(once.state_dict())
    x = torch.rand(1, 3, 8, 8)
    assert twice.scale == 4
    torch.testing.assert_close(twice(x), once(once(x)))


def test_with_the_skip_training_starts_at_bicubic():
    model = models.build("DilatedRRDBNet", channels=4, blocks=1, pairs=1, skip=True)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(model(x), upscale_bicubic(x, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arch", "arguments", "quoted"),
    [
        ("DilatedRRDBNet", {"blocks": 0}, "blocks 0"),
        ("DilatedRRDBNet", {"passes": 0}, "passes 0"),
        ("DilatedRRDBNet", {"scale": 3}, "scale 3"),
        ("DilatedRRDBNet", {"scale": 2, "passes": 2}, "scale 2 with passes 2"),
        ("StagedESPCN", {"stages": (1, 4)}, r"\[1, 4\]"),
        ("StagedESPCN", {"stages": (2, 2), "scale": 2}, "scale 2"),
        ("StagedESPCN", {"upsampler": "bilinear"}, "'bilinear'"),
    ],
)
def test_wrong_arguments_are_quoted(arch, arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        models.build(arch, **arguments)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_published_weight_file_loads_and_gives_the_same_picture(tmp_path, scale):
    """A file in ESRGAN's format of layer names."""
    model = models.build("RRDBNet", channels=8, blocks=2, scale=scale).eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    loaded = checkpoints.load(tmp_path / "net.pth")
    x = torch.rand(1, 3, 9, 11)
    assert loaded.scale == scale and loaded.arch == "ESRGAN"
    assert torch.equal(loaded(x), model(x))


class _Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_weight_file_cannot_run_code(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": _Payload()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pth is not a readable weight file"):
        checkpoints.load(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


def test_damaged_and_unknown_weight_files(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match=r"cut\.pth is not a readable"):
        load_external(tmp_path / "cut.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no network"):
        load_external(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no such file: .*missing\.pth"):
        checkpoints.load(tmp_path / "missing.pth")


def test_dilated_gradients_in_bf16():
    """torch's own layer gives garbage here, or crashes, on CPUs with AVX512."""
    torch.manual_seed(0)
    conv = DilatedConv2d(24, 24, dilation=4).to(memory_format=torch.channels_last)
    x, push = (torch.randn(2, 24, 40, 40).contiguous(memory_format=torch.channels_last) for _ in range(2))
    gradients = []
    for fast in (True, False):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            out = conv(x)
        out.backward(push.to(out.dtype))
        gradients.append(conv.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=0.02, atol=0.02 * float(gradients[1].abs().max()))
