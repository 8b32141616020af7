"""Losses: the perceptual loss against independent computations, its options and errors; the weighted sum of terms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from nbhelpers import losses, metrics, training
from nbhelpers.losses import PerceptualLoss, WeightedLoss, half_size, random_shift_crop
from nbhelpers.tests.test_training import BreaksAtStep3

from . import test_features
from .conftest import needs_shared
from .test_features import CAFFE_MEAN, by_torchvision, random_state

home, vgg, pair = test_features.home, test_features.vgg, test_features.pair  # fixtures


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_sum_against_an_independent_computation(vgg, pair):
    sr, hr = pair
    loss = PerceptualLoss(layer_weights=[1, 0.5, 0, 2], full_size=0.7, half_size=0.3)
    state, expected = random_state("conv2_2"), 0.0
    for weight, (a, b) in ((0.7, (sr, hr)), (0.3, (half_size(sr), half_size(hr)))):
        own, other = (by_torchvision(state, x, CAFFE_MEAN, (1 / 255,) * 3) for x in (a, b))
        for layer_weight, u, v in zip([1, 0.5, 0, 2], own, other, strict=True):
            expected += weight * layer_weight * float((u - v).double().square().mean())
    expected /= (255 * 0.226) ** 2
    assert float(loss(sr, hr)) == pytest.approx(expected, rel=1e-3)


def test_equal_pictures_give_zero_and_l1_is_no_mse(vgg, pair):
    both = {"half_size": True, "shift_crop": True}
    assert float(PerceptualLoss(**both)(pair[1], pair[1].clone())) == 0
    mse, l1 = (PerceptualLoss(criterion=c).parts(*pair)["full"] for c in ("mse", "l1"))
    assert all(0 < float(b) ** 2 < float(a) for a, b in zip(mse, l1, strict=True)), "mean|d|² ≤ mean d²"


def test_parts_name_sizes_and_layers(vgg, pair):
    loss = PerceptualLoss(half_size=True)
    parts = loss.parts(*pair)
    assert list(parts) == ["full", "half"] and all(len(v) == len(loss.layers) == 4 for v in parts.values())
    assert list(PerceptualLoss(full_size=False, half_size=2).parts(*pair)) == ["half"]
    alone = PerceptualLoss(full_size=False, half_size=2)
    assert float(alone(*pair)) == pytest.approx(2 * sum(float(v) for v in parts["half"]), rel=1e-5)


def test_half_size_averages_light():
    x = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    srgb = x.double().numpy()[..., :6]
    light = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    light = light.reshape(1, 3, 3, 2, 3, 2).mean((3, 5))
    wanted = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.allclose(half_size(x).numpy(), wanted, atol=1e-6)
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    assert round(float(half_size(board)) * 255) == 188, "half the light of white is grey level 188, not 128"


def test_gradients_are_finite_at_and_beyond_black_and_white(vgg):
    values = torch.tensor([-0.5, 0.0, 1e-9, 1e-4, 0.0031308, 0.04045, 1.0, 1.5])
    sr = values.repeat(1, 3, 16, 2).requires_grad_()
    hr = torch.full_like(sr, 0.5).detach()
    PerceptualLoss(full_size=False, half_size=True)(sr, hr).backward()
    assert torch.isfinite(sr.grad).all()
    assert float(sr.grad[..., 2:6].abs().min()) > 0
    assert float(sr.grad[..., 0].abs().max()) == 0 == float(sr.grad[..., 7].abs().max()), "clamped, as it is shown"


def test_shift_crop_bounds_and_seed():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    picture = torch.stack([y, x]).expand(1, 2, 20, 30)
    seen = set()
    for seed in range(400):
        torch.manual_seed(seed)
        a, b = random_shift_crop(picture, -picture)
        assert a.shape == (1, 2, 13, 23) and torch.equal(a, -b)
        assert torch.equal(a[0, 0, :, 0], a[0, 0, 0, 0] + torch.arange(13.0))
        seen.add((int(a[0, 0, 0, 0]), int(a[0, 1, 0, 0])))
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(8)) and len(seen) == 64
    torch.manual_seed(399)
    assert torch.equal(random_shift_crop(picture)[0], a)


def test_shift_crop_of_the_loss_follows_the_seed(vgg, pair):
    loss = PerceptualLoss(shift_crop=True)

    def value(seed: int) -> float:
        torch.manual_seed(seed)
        return float(loss(*pair))

    assert value(3) == value(3) and len({value(s) for s in range(6)}) > 1


def test_presets_give_layer_weights_and_some_the_weight(vgg):
    def preset(name, depth="conv2_2"):
        loss = PerceptualLoss(layer_weights=name, depth=depth)
        return loss.layer_weights, loss.weight

    assert preset("uniform") == ([1, 1, 1, 1], None)
    assert preset("srgan") == ([1, 1, 1, 1], 0.001) and preset("author") == ([1, 1, 1, 1], 0.0001)
    assert preset("halving", "conv3_1") == ([1, 0.5, 0.25, 0.125, 0.0625], None)
    assert preset("real_esrgan", "conv3_1") == ([0.1, 0.1, 1, 1, 1], None)
    assert preset("real_esrgan") == ([0.1, 0.1, 1, 1], None)


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"layer_weights": [1, 1, 1]}, r"\[1, 1, 1\] has 3 numbers, but depth conv2_2 has 4 convolutions"),
        ({"layer_weights": "real_esrgan", "depth": "conv4_1"}, "'real_esrgan' has 5 numbers, but depth conv4_1 has 8"),
        ({"layer_weights": "linear"}, "'linear' is unknown; choose from .*halving"),
        ({"layer_weights": [1, -1, 1, 1]}, "a layer weight must be a number of at least 0, not -1"),
        ({"criterion": "l2"}, r"criterion 'l2' is unknown; choose one of \['mse', 'l1'\]"),
        ({"half_size": -0.5}, "half_size must be a number of at least 0, not -0.5"),
        ({"full_size": False}, "full_size=False and half_size=False leave no size"),
    ],
)
def test_wrong_options_are_quoted(vgg, options, quoted):
    with pytest.raises(ValueError, match=quoted):
        PerceptualLoss(**options)


@pytest.mark.parametrize(
    ("options", "smallest"),
    [
        ({"depth": "conv3_1"}, 4),
        ({"depth": "conv3_1", "half_size": True}, 8),
        ({"half_size": 1, "shift_crop": True}, 11),
    ],
)
def test_smallest_picture(vgg, options, smallest):
    loss = PerceptualLoss(**options)
    x = torch.rand(1, 3, smallest, smallest + 3)
    assert torch.isfinite(loss(x, x.flip(-1)))
    with pytest.raises(ValueError, match=rf"{smallest - 1}x{smallest + 3} pixels.*needs {smallest}x{smallest}"):
        loss(x[..., 1:, :], x[..., 1:, :])
    with pytest.raises(ValueError, match=r"\(1, 3, \d+, \d+\) and \(1, 1, "):
        loss(x, x[:, :1])


def test_differences_are_fp32_under_autocast(vgg, pair):
    loss = PerceptualLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.network(pair[0])["conv1_1"].dtype == torch.bfloat16, "the convolutions use the training's precision"
        low = loss.parts(*pair)["full"]
    assert all(v.dtype == torch.float32 for v in low)
    assert [float(v) for v in low] == pytest.approx([float(v) for v in loss.parts(*pair)["full"]], rel=0.02)


def test_hr_gets_no_gradient(vgg, pair):
    sr, hr = (x.clone().requires_grad_() for x in pair)
    PerceptualLoss()(sr, hr).backward()
    assert hr.grad is None and sr.grad is not None


def test_frozen_and_in_no_state_dict(vgg, pair):
    loss = WeightedLoss({"vgg": 1.0})
    assert not list(loss.parameters()) and not loss.state_dict()
    sr = pair[0].requires_grad_()
    loss(sr, pair[1])[0].backward()
    assert float(sr.grad.abs().max()) > 0
    assert all(b.grad is None and not b.requires_grad for b in loss.buffers())
    assert len(list(loss.to("cpu").buffers())) == 2 + 2 * 4


def test_networks_move_with_the_loss(vgg):
    loss = WeightedLoss({"mse": 1.0, "vgg": 1.0})
    loss.to("meta")
    assert {b.device.type for b in loss.terms["vgg"].buffers()} == {"meta"}


# --- weighted sum -----------------------------------------------------------------------------------------


def test_mapping_number_and_dictconfig_mean_the_same(vgg, pair):
    options = {"weight": 1e-3, "depth": "conv2_1", "layer_weights": [1, 0.5, 2], "half_size": True, "shift_crop": True}
    values = []
    for config in ({"l1": 0.5, "vgg": options}, OmegaConf.create({"l1": 0.5, "vgg": options})):
        torch.manual_seed(0)
        total, terms = WeightedLoss(config)(*pair)
        assert float(total) == pytest.approx(0.5 * float(terms["l1"]) + 1e-3 * float(terms["vgg"]))
        values.append(float(terms["vgg"]))
    assert values[0] == values[1] > 0
    plain, mapped = WeightedLoss({"vgg": 2.0}), WeightedLoss({"vgg": {"weight": 2}})
    assert float(plain(*pair)[0]) == float(mapped(*pair)[0])


def test_options_of_a_pixel_term(pair):
    total, _ = WeightedLoss({"charbonnier": {"weight": 2.0, "epsilon": 0.5}})(*pair)
    d = pair[0] - pair[1]
    assert float(total) == pytest.approx(2 * float((d**2 + 0.25).sqrt().mean()))


def test_weight_comes_from_the_preset_unless_given(vgg):
    assert WeightedLoss({"vgg": {"layer_weights": "author"}}).weights == {"vgg": 1e-4}
    assert WeightedLoss({"vgg": {"layer_weights": "srgan", "weight": 0.5}}).weights == {"vgg": 0.5}


@pytest.mark.parametrize(
    ("config", "quoted"),
    [
        ({"vgg": {"weight": 1, "layers": 3}}, r"'vgg' has no option \['layers'\]; it has \['weight', 'depth'"),
        ({"mse": {"weight": 1, "reduction": "sum"}}, r"'mse' has no option \['reduction'\]; it has \['weight'\]"),
        ({"vgg": {"layer_weights": "halving"}}, "'vgg' has no weight; give vgg: NUMBER"),
        ({"mse": None}, "'mse' has no weight"),
        ({"mse": "much"}, "'mse': weight must be a number of at least 0, not 'much'"),
        ({"mse": float("nan")}, "'mse': weight must be a number of at least 0, not nan"),
    ],
)
def test_wrong_terms_are_quoted(vgg, config, quoted):
    with pytest.raises(ValueError, match=quoted):
        WeightedLoss(config)


def test_total_variation_looks_at_sr_only(pair):
    x = torch.tensor([[0.0, 1.0], [0.5, 0.5]])[None, None]
    assert float(losses.total_variation(x, pair[1])) == pytest.approx((0.5 + 0.5) / 2 + (1 + 0) / 2)
    assert "tv" in losses.LOSSES


# --- frequency and LPIPS ----------------------------------------------------------------------------------


def test_frequency_loss_is_its_formula(pair):
    sr, hr = pair
    a, b = (np.fft.rfft2(x.double().numpy(), norm="ortho") for x in (sr, hr))
    amplitude = np.abs(np.abs(a) - np.abs(b)).mean()
    phase = (np.minimum(np.abs(a), np.abs(b)) * (1 - np.cos(np.angle(a) - np.angle(b)))).mean()
    assert float(losses.frequency(sr, hr)) == pytest.approx(amplitude + phase, rel=1e-4)
    total, _ = WeightedLoss({"charbonnier": 1.0, "frequency": {"weight": 0.05, "phase": 0.1}})(sr, hr)
    charbonnier = float((((sr - hr).double()) ** 2 + 1e-6).sqrt().mean())
    assert float(total) == pytest.approx(charbonnier + 0.05 * (amplitude + 0.1 * phase), rel=1e-4)
    assert float(losses.frequency(hr, hr)) < 1e-6


def test_phase_has_no_jump_at_pi_and_empty_frequencies_do_not_count():
    """Two waves a little on either side of phase π, and one of them turned by half a period."""
    x = torch.arange(16) * (2 * torch.pi * 3 / 16)

    def wave(phase: float, size: float = 0.2) -> torch.Tensor:
        return (0.5 + size * torch.cos(x + phase)).expand(1, 3, 16, 16)

    near, far = (float(losses.frequency(wave(torch.pi - 0.01), wave(p))) for p in (-torch.pi + 0.01, 0.0))
    assert near < 1e-3 * far
    flat = torch.full((1, 3, 16, 16), 0.5)
    only_amplitude = float(losses.frequency(wave(0.3), flat, phase=0.0))
    assert float(losses.frequency(wave(0.3), flat)) == pytest.approx(only_amplitude, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_frequency_gradient_is_finite_at_empty_frequencies(value):
    """A flat picture has no other frequency than 0, a black one has none at all."""
    hr = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    sr = torch.full_like(hr, value).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.frequency(sr.bfloat16(), hr)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(sr.grad).all() and sr.grad.abs().max() < 1


def test_frequency_gradient_points_downhill(pair):
    sr, hr = pair[0].clone().requires_grad_(), pair[1]
    before = losses.frequency(sr, hr)
    before.backward()
    after = losses.frequency(sr.detach() - sr.grad, hr)
    assert float(after) < before.item()


@needs_shared
def test_lpips_loss_is_the_metric_with_a_gradient(pair):
    loss = WeightedLoss({"lpips": 1.0})
    assert not list(loss.parameters()) and not loss.state_dict()
    sr, hr = ((x * 255).round() / 255 for x in pair)
    sr.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(sr, hr)
    expected = sum(metrics.lpips_squeeze(a, b) for a, b in zip(sr, hr, strict=True)) / len(sr)
    assert total.item() == pytest.approx(expected, rel=1e-4)
    total.backward()
    assert torch.isfinite(sr.grad).all() and sr.grad.abs().max() > 0
    assert all(not b.requires_grad for b in loss.buffers())
    with pytest.raises(ValueError, match="31x40 pixels are too small; it needs at least 32x32"):
        loss(sr[..., 1:, :], hr[..., 1:, :])
    loss.to("meta")
    assert {b.device.type for b in loss.buffers()} == {"meta"}
    assert metrics.lpips_squeeze(hr[0], hr[0]) == 0, "the metric has a network of its own"


def test_lpips_without_its_weights_says_how_to_get_them(home):
    with pytest.raises(FileNotFoundError, match=r"LPIPS not available.*nbhelpers download lpips.*torch"):
        WeightedLoss({"lpips": 1.0})


def test_pixel_losses_need_no_vgg(home, pair):
    """An empty TORCH_HOME and no network: nothing of VGG is touched unless it is asked for."""
    loss = WeightedLoss({"mse": 1.0})
    assert not list(loss.buffers()) and list(loss.networks) == []
    assert float(loss(*pair)[0]) == float(F.mse_loss(*pair))
    assert float(copy.deepcopy(loss)(*pair)[0]) == float(F.mse_loss(*pair))


def test_a_training_with_vgg_resumes_exactly_and_keeps_no_vgg(vgg, runs):
    """A run that dies at step 3 goes on from step 2 to the weights of one that did not, shift crops included."""
    overrides = [
        "init_from=null", "data.roots=[bundled]", "data.limit=2", "data.val_limit=1", "data.patch=12", "data.batch=2",
        "model.channels=8", "trainer.max_steps=4", "trainer.val_every=2", "trainer.progress=false",
        "trainer.threads=1", "+loss.vgg={weight: 1.0e-3, half_size: true, shift_crop: true}",
    ]  # fmt: skip
    whole, broken = (training.compose("espcn_x2", [*overrides, f"name={name}"]) for name in ("whole", "broken"))
    pairs, *rest = training.open_data(whole, progress=False)

    expected = training.fit(whole, (pairs, *rest))
    with pytest.raises(OSError, match="cable"):
        training.fit(broken, (BreaksAtStep3(pairs), *rest))
    resumed = training.fit(broken, (pairs, *rest))
    assert [r["train_loss"] for r in resumed.history] == [r["train_loss"] for r in expected.history]
    checkpoints = list(resumed.folder.glob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state and not [key for key in state if key.startswith("loss")]


def test_document_003s_training_logs_each_of_its_terms(runs):
    """Weights 1.0 / 0.5 / 0.1 and batch 8; the terms, unweighted, stand beside their sum in history and TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert training.compose("efficient_srnet_doc").loss == {"l1": 1.0, "charbonnier": 0.5, "tv": 0.1}
    small = [
        "data.roots=[bundled]", "data.limit=2", "data.val_limit=1", "data.patch=12", "model.nf=8", "model.blocks=1",
        "trainer.max_steps=4", "trainer.val_every=2", "trainer.progress=false", "trainer.threads=1",
    ]  # fmt: skip
    cfg = training.compose("efficient_srnet_doc", small)
    assert cfg.data.batch == 8
    result = training.fit(cfg)
    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    for i, row in enumerate(result.history):
        assert row["train_loss"] == pytest.approx(row["l1"] + 0.5 * row["charbonnier"] + 0.1 * row["tv"], rel=1e-5)
        for name in ("train_loss", "l1", "charbonnier", "tv"):
            assert events.Scalars(name)[i].value == pytest.approx(row[name], rel=1e-5), name
            assert events.Scalars(name)[i].step == row["step"]
