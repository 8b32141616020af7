"""ESPCN, its building blocks, the losses, and warm starts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nbhelpers import checkpoints, losses, models
from nbhelpers.degrade import upscale_bicubic


@pytest.mark.parametrize(("scale", "channels", "expected"), [(4, 128, 212_656), (3, 128, 188_443), (2, 128, 171_148)])
def test_parameter_counts(scale, channels, expected):
    assert models.count_parameters(models.build("ESPCN", scale=scale, channels=channels)) == expected


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_untrained_last_layer_at_zero_gives_bicubic(scale):
    model = models.build("ESPCN", scale=scale, channels=8)
    torch.nn.init.zeros_(model.to_subpixels.weight)
    torch.nn.init.zeros_(model.to_subpixels.bias)
    x = torch.rand(2, 3, 9, 13)
    assert torch.allclose(model(x), upscale_bicubic(x, scale), atol=1e-5)


def test_receptive_field_is_the_stated_halo():
    """A changed input pixel must not reach further than ``halo``; and it does reach that far."""
    model = models.build("ESPCN", scale=2, channels=8)
    x = torch.zeros(1, 3, 21, 21)
    y = x.clone()
    y[..., 10, 10] = 1
    changed = ((model(y) - model(x)).abs().amax(1)[0] > 0).nonzero() // 2
    assert (changed - 10).abs().max() == model.halo


def test_tanh_output_stays_in_range_and_refuses_the_skip():
    model = models.build("ESPCN", skip=False, output_activation="tanh", channels=8)
    out = model(torch.randn(1, 3, 8, 8) * 50)
    assert out.min() >= 0 and out.max() <= 1
    with pytest.raises(ValueError, match="skip=True"):
        models.build("ESPCN", output_activation="tanh")


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"scale": 0}, "scale 0"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"width": 3}, "width"),
        ({"output_activation": "x"}, "'x'"),
    ],
)
def test_wrong_arguments_are_quoted(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        models.build("ESPCN", **arguments)


def test_batch_norm_is_an_option_that_adds_two_layers():
    kinds = [type(m).__name__ for m in models.build("ESPCN", channels=8, batch_norm=True).features]
    assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in models.build("ESPCN", channels=8).modules())


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match=r"'EDSR' is unknown.*ESPCN"):
        models.build("EDSR")


def test_losses_agree_with_their_formulas():
    sr, hr = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    d = sr - hr
    luma = 0.299 * d[:, 0] + 0.587 * d[:, 1] + 0.114 * d[:, 2]
    total, terms = losses.WeightedLoss({"l1": 0.5, "mse": 2.0, "charbonnier": 1.0, "mse_luma": 3.0, "psnr_luma": 1.0})(
        sr, hr
    )
    expected = {
        "l1": d.abs().mean(),
        "mse": (d**2).mean(),
        "charbonnier": (d**2 + 1e-6).sqrt().mean(),
        "mse_luma": (luma**2).mean(),
        "psnr_luma": (1 + (luma**2).mean((1, 2)) / 1e-5).log10().mean(),
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5), name
    weighted = 0.5 * terms["l1"] + 2 * terms["mse"] + terms["charbonnier"] + 3 * terms["mse_luma"] + terms["psnr_luma"]
    assert float(total) == pytest.approx(float(weighted))


@pytest.mark.parametrize("weights", [{}, {"l3": 1.0}])
def test_unknown_or_missing_loss_lists_the_known(weights):
    with pytest.raises(ValueError, match="charbonnier"):
        losses.WeightedLoss(weights)


def test_warm_start_copies_what_fits(tmp_path):
    donor, other = models.build("ESPCN", scale=4, channels=8), models.build("ESPCN", scale=2, channels=8)
    path = checkpoints.save("donor", donor, "ESPCN", {"scale": 4, "channels": 8}, {}, [], tmp_path)
    before = other.to_subpixels.weight.clone()
    copied = checkpoints.copy_matching(other, path)
    assert all(torch.equal(other.state_dict()[k], load_file(path)[k]) for k in copied) and len(copied) == 4
    assert torch.equal(other.to_subpixels.weight, before)
    with pytest.raises(checkpoints.CheckpointError, match="no tensor of donor"):
        checkpoints.copy_matching(models.build("ESPCN", channels=16, scale=5), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoints.CheckpointError, match=r"donor\.safetensors is not a readable safetensors file"):
        checkpoints.copy_matching(other, path)
