"""Discriminator, adversarial losses, and the training that plays one network against the other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import open_dict
from safetensors.torch import load_file

from nbhelpers import adversarial, checkpoints, losses, models, runtime, training
from nbhelpers.metrics import lpips_available
from nbhelpers.tests.test_training import GAN, TINY, weights

LN2 = math.log(2)
INF = math.inf


def tiny(name: str, *overrides: str):
    """Three photos, 12-pixel patches, 8 and 4 channels: about a second."""
    short = ["trainer.max_steps=6", "trainer.val_every=2"]
    return training.compose("espcn_gan_x4", [*TINY, *GAN, *short, f"name={name}", *overrides])


def discriminator(**arguments) -> torch.nn.Module:
    return models.build("DilatedDiscriminator", models.DISCRIMINATORS, **arguments)


# --- Discriminator ----------------------------------------------------------------------------------------


def test_parameter_count_of_document_002():
    assert models.count_parameters(discriminator()) == 2_504_001
    assert models.count_parameters(discriminator(downsample="strided")) == 2_504_001  # a fair comparison
    assert models.count_parameters(discriminator(depth=3)) > 2_504_001


@pytest.mark.parametrize(
    "arguments", [{}, {"downsample": "strided"}, {"norm": "none"}, {"depth": 1}, {"depth": 3, "dropout": 0.5}]
)
def test_one_logit_for_8x8_pixels(arguments):
    d = discriminator(channels=4, **arguments)
    assert d(torch.rand(2, 3, 47, 64)).shape == (2, 1, 5, 8)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in d.modules()) == (arguments.get("norm") != "none")


def test_the_view_is_wide_but_finite():
    """A logit sees beyond its own block, by the dilated convolutions; and not the whole of a large picture."""
    d = discriminator(channels=4, norm="none").double()
    x = torch.rand(1, 3, 320, 320, dtype=torch.double, requires_grad=True)
    d(x)[0, 0, 20, 20].backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert 60 < rows[-1] - rows[0] < 200


def test_dropout_makes_the_judgement_noisy_in_training_only():
    d, x = discriminator(channels=4, dropout=0.3), torch.rand(2, 3, 32, 32)
    assert not torch.equal(d(x), d(x))
    d.eval()
    assert torch.equal(d(x), d(x))


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [({"norm": "layer"}, "'layer'"), ({"downsample": "area"}, "'area'"), ({"channels": 0}, "channels 0"),
     ({"depth": 0}, "depth 0"), ({"dropout": 1.0}, "dropout 1.0"), ({"width": 3}, "width")],
)  # fmt: skip
def test_wrong_arguments_are_quoted(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        discriminator(**arguments)


def test_a_picture_below_one_block_is_refused():
    with pytest.raises(ValueError, match="7x30"):
        discriminator(channels=4)(torch.rand(1, 3, 7, 30))


# --- Losses -----------------------------------------------------------------------------------------------


def authors_bounded(pred_y, pred_label):
    """Document 002's loss_for_generator, without its weight."""
    y_more_real = pred_y > pred_label
    diff = y_more_real * 9000 + ~y_more_real * (pred_y - pred_label)
    return F.binary_cross_entropy_with_logits(diff, torch.ones_like(diff))


def test_losses_agree_with_the_documents_code():
    fake, real = torch.randn(2, 1, 6, 6) * 5, torch.randn(2, 1, 6, 6) * 5
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like(fake), torch.zeros_like(fake)
    g, d = losses.generator_loss, losses.discriminator_loss
    assert torch.allclose(g("bounded", fake, real), authors_bounded(fake, real))
    assert torch.allclose(g("relativistic", fake, real), bce(fake - real, one))
    assert torch.allclose(g("classic", fake, real), bce(fake, one))
    assert torch.allclose(d("classic", fake, real), (bce(fake, zero) + bce(real, one)) / 2)
    for kind in ("relativistic", "bounded", "bounded_smooth"):
        assert torch.allclose(d(kind, fake, real), bce(fake - real, zero))
    gap = (real - fake).double()
    smooth = torch.where(gap > 0, 2 * torch.log(torch.cosh(gap / 2)), 0.0).mean()
    assert float(g("bounded_smooth", fake, real)) == pytest.approx(float(smooth), abs=1e-6)


def test_equal_logits_cost_ln_2_but_nothing_in_the_smooth_form():
    x = torch.randn(1, 1, 4, 4)
    for kind, value in (("relativistic", LN2), ("bounded", LN2), ("bounded_smooth", 0.0)):
        assert float(losses.generator_loss(kind, x, x)) == pytest.approx(value, abs=1e-6)
    for kind in losses.ADVERSARIAL_LOSSES:
        at_zero = losses.discriminator_loss(kind, torch.zeros(3), torch.zeros(3))
        assert float(at_zero) == pytest.approx(LN2)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_give_no_nan(kind, dtype):
    values = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=dtype)
    fake, real = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    for loss in (losses.generator_loss, losses.discriminator_loss):
        leaf = fake.clone().requires_grad_()
        out = loss(kind, leaf, real)
        out.backward()
        assert out.dtype == torch.float32 and out.isfinite() and leaf.grad.isfinite().all()


def test_infinite_logits_where_the_documents_form_gives_nan():
    fake, real = torch.tensor([INF, 1.0]), torch.tensor([0.0, -INF])  # both look more real than the original
    assert authors_bounded(fake, real).isnan()
    for kind in ("bounded", "bounded_smooth"):
        leaf = fake.clone().requires_grad_()
        loss = losses.generator_loss(kind, leaf, real)
        loss.backward()
        assert float(loss.detach()) == 0 and torch.equal(leaf.grad, torch.zeros(2))
    assert losses.generator_loss("bounded_smooth", real, fake) == INF  # and a NaN would hide that something broke


def gradient(kind: str, gap: float) -> float:
    """d loss / d (real - fake) of one place at that gap."""
    fake = torch.zeros(1, dtype=torch.double, requires_grad=True)
    losses.generator_loss(kind, fake, torch.full((1,), gap, dtype=torch.double)).backward()
    return -float(fake.grad)


def test_no_reward_beyond_the_original():
    assert gradient("relativistic", -1) > 0.2
    for kind in ("bounded", "bounded_smooth"):
        assert gradient(kind, -1) == 0 and gradient(kind, -1e-3) == 0 and gradient(kind, 8) > 0.99
    assert gradient("bounded", 1e-3) == pytest.approx(0.5, abs=1e-3)  # the jump
    assert gradient("bounded_smooth", 1e-3) == pytest.approx(5e-4, rel=1e-2)
    assert gradient("bounded_smooth", 1) == pytest.approx(math.tanh(0.5), rel=1e-4)


def test_unknown_loss_and_unlike_logits_are_refused():
    with pytest.raises(ValueError, match=r"'hinge' is unknown.*bounded_smooth"):
        losses.generator_loss("hinge", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        losses.discriminator_loss("classic", torch.zeros(1), torch.zeros(2))


# --- Module -----------------------------------------------------------------------------------------------


def module(*overrides: str) -> adversarial.AdversarialModule:
    cfg = tiny("module", *overrides)
    torch.manual_seed(0)
    return adversarial.AdversarialModule(
        models.build("ESPCN", scale=4, channels=8), adversarial.build_discriminator(cfg), cfg
    )


def pictures(side: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, side, side, generator=generator) for _ in range(2))


def test_joint_and_separate_passes_differ_by_batch_norm_only():
    fake, real = pictures()
    for norm, same in (("none", True), ("batch", False)):
        options = ("adversarial.shift_crop=false", f"adversarial.model.norm={norm}")
        joint, apart = (module(f"adversarial.joint={j}", *options).judge(fake, real) for j in ("true", "false"))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(joint, apart, strict=True)) == same
        assert joint[0].shape == (2, 1, 6, 6)


def test_separate_passes_hide_brightness_that_a_joint_pass_shows():
    """Claim K8: batch norm takes a constant offset out of a pass of its own."""
    fake, _ = pictures(192)
    gaps = {}
    for joint in ("true", "false"):
        m = module(f"adversarial.joint={joint}", "adversarial.shift_crop=false")
        a, b = m.judge(fake, fake + 0.2)
        gaps[joint] = float(
            (a - b).detach()[..., 9:-9, 9:-9].mean().abs()
        )  # zeros around the picture give the offset away
    assert gaps["false"] < gaps["true"] / 3, gaps


def test_both_pictures_are_shifted_alike():
    m = module("adversarial.model.norm=none")
    fake, _ = pictures()
    logits = [m.judge(fake, fake) for _ in range(12)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in logits)
    assert any(not torch.equal(logits[0][0], a) for a, _ in logits[1:])


@pytest.mark.parametrize("joint", ["true", "false"])
def test_each_step_trains_its_own_network(joint):
    m = module(f"adversarial.joint={joint}")
    lr, hr = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 48, 48)
    sr, loss = m.generator_objective(lr, hr)
    loss.backward()
    assert all(p.grad is None for p in m.discriminator.parameters())
    before = [p.grad.clone() for p in m.model.parameters()]
    m.discriminator_objective(sr.detach(), hr).backward()
    assert all(p.grad is not None for p in m.discriminator.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(m.model.parameters(), before, strict=True))
    pixel_only = m.loss(sr.detach(), hr)[0]
    assert float(loss.detach()) == pytest.approx(float(pixel_only) + 1e-3 * m.means.take(["g_gan"])["g_gan"], rel=1e-5)


def test_weight_0_is_pixel_training_to_the_last_bit(runs):
    cfg = tiny("plain")
    with open_dict(cfg):
        del cfg["adversarial"]
    plain = training.fit(cfg, keep=False)
    off = training.fit(tiny("off", "adversarial.weight=0"), keep=False)
    assert torch.equal(weights(plain.model), weights(off.model)) and off.discriminator is None
    on = training.fit(tiny("on", "adversarial.weight=1"), keep=False)
    assert not torch.equal(weights(plain.model), weights(on.model))


def test_run_exports_both_networks_and_counts_generator_steps(runs):
    overrides = ("adversarial.d_steps=2", "trainer.sample_every=4", "trainer.save_every=4", "+loss.mse=1.0")
    result = training.train(tiny("game", *overrides))
    folder = runtime.RUNS / "train" / "game"
    assert [r["step"] for r in result.history] == [2, 4, 6]
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6 and (folder / "step_4.ckpt").is_file()
    assert [int(s["state"][0]["step"]) for s in state["optimizer_states"]] == [6, 12]
    assert [p.name for p in (folder / "samples").iterdir()] == ["step_000004.png"]
    row = checkpoints.history("game")[-1]
    assert list(row) == [
        "step", "train_loss", "l1", "mse", "g_gan", "d_loss", "d_accuracy", "logit_gap", "g_grad_norm", "d_grad_norm",
        "val_psnr_y", "flat_energy", "lr", "d_lr", "seconds",
    ]  # fmt: skip
    assert all(map(math.isfinite, row.values())) and 0 <= row["d_accuracy"] <= 1
    card = checkpoints.card("game_discriminator")
    assert card["kind"] == "discriminator" and card["scale"] == 4 and card["arguments"]["channels"] == 4
    judge = discriminator(**card["arguments"])
    checkpoints.load_weights(judge, runtime.CHECKPOINTS / "game_discriminator.safetensors")
    torch.testing.assert_close(weights(judge), weights(result.discriminator), rtol=1e-3, atol=1e-4)  # stored as fp16
    assert not result.discriminator.training
    assert "kind" not in checkpoints.card("game") or checkpoints.card("game")["kind"] == "upscaler"


def test_keep_last_and_keep_best(runs):
    """A rate that wrecks the network: the best validation is the first one."""
    wild = ("optimizer.lr=0.5", "optimizer.warmup_steps=0", "optimizer.ema_decay=0", "trainer.gradient_clip_val=null")
    last = training.train(tiny("last", *wild))
    best = training.train(tiny("best", *wild, "keep=best"))
    assert [r["val_psnr_y"] for r in last.history] == [r["val_psnr_y"] for r in best.history]
    assert last.kept is last.history[-1]
    assert best.kept["val_psnr_y"] == best.best > last.kept["val_psnr_y"]
    assert not torch.equal(weights(best.model), weights(last.model))
    assert not torch.equal(weights(best.discriminator), weights(last.discriminator))
    saved = checkpoints.card("last")["metrics"]["val_psnr_y"]
    assert saved == pytest.approx(last.kept["val_psnr_y"], abs=1e-3)


def test_the_game_begins_at_start_step(runs):
    untouched = adversarial.build_discriminator(tiny("late"))
    result = training.fit(tiny("late", "adversarial.start_step=4"))
    assert [math.isnan(r["d_loss"]) for r in result.history] == [True, True, False]
    assert result.history[1]["d_lr"] == pytest.approx(1e-4)  # its schedule begins with it
    state = torch.load(result.folder / "last.ckpt", weights_only=True)
    assert int(state["optimizer_states"][1]["state"][0]["step"]) == 2
    assert not torch.equal(weights(result.discriminator), weights(untouched))
    never = training.fit(tiny("never", "adversarial.start_step=6"), keep=False)
    assert never.discriminator is None


def test_gradients_are_clipped_for_each_network():
    """Each by its own key; the history notes the norms before."""
    clips = ("trainer.gradient_clip_val=1e-3", "adversarial.gradient_clip_val=1e-2")
    m, steps = module(*clips), {}

    class Watched:
        def __init__(self):
            self.optimizers = [torch.optim.SGD(x.parameters(), 0.1) for x in (m.model, m.discriminator)]

    watched = Watched()
    m.trainer = watched
    lr, hr = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 48, 48)
    sr, loss = m.generator_objective(lr, hr)
    loss.backward()
    m.discriminator_objective(sr.detach(), hr).backward()
    for name, optimizer in zip("gd", watched.optimizers, strict=True):
        m.on_before_optimizer_step(optimizer)
        parameters = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        steps[name] = float(torch.cat(parameters).norm())
    assert steps["g"] == pytest.approx(1e-3, rel=1e-2) and steps["d"] == pytest.approx(1e-2, rel=1e-2)
    before = m.means.take(["g_grad_norm", "d_grad_norm"])
    assert before["g_grad_norm"] > 1e-3 and before["d_grad_norm"] > 1e-2


def test_fp16_with_a_scaler_trains_like_fp32(monkeypatch):
    """On a GPU Lightning makes this scaler itself; norms and clipping must see gradients in true units."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    cfg = tiny("half", "trainer.precision=fp32", "trainer.max_steps=2")
    single = training.fit(cfg, keep=False).history[-1]
    scaler, trainer_for = torch.amp.GradScaler("cpu", init_scale=1024.0), training.trainer_for

    def with_scaler(*arguments):
        trainer = trainer_for(*arguments)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(training, "trainer_for", with_scaler)
    half = training.fit(cfg, keep=False).history[-1]
    assert scaler.state_dict()["_growth_tracker"] == 4  # two steps of each network, none left out
    for key in ("train_loss", "d_loss", "g_grad_norm", "d_grad_norm"):
        assert half[key] == pytest.approx(single[key], rel=0.1) and half[key] != single[key]


@pytest.mark.skipif(not lpips_available(), reason="needs SqueezeNet's weights (nbhelpers download lpips)")
def test_lpips_is_validated_on_request(runs):
    result = training.train(tiny("lpips", "trainer.val_lpips=true", "trainer.max_steps=2"))
    score = result.history[0]["val_lpips"]
    assert 0 < score < 1 and checkpoints.card("lpips")["metrics"]["val_lpips"] == pytest.approx(score, abs=1e-4)


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["generator", "discriminator"])
def test_nan_in_either_loss_names_it_and_keeps_the_last_good_state(runs, monkeypatch, who):
    real, calls = getattr(adversarial, f"{who}_loss"), []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(adversarial, f"{who}_loss", broken)
    with pytest.raises(training.TrainingError, match=rf"the {who}'s loss became nan at step 5 .*lower .*optimizer.lr"):
        training.fit(tiny("nan"))
    state = torch.load(runtime.RUNS / "train" / "nan" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values() if v.is_floating_point())


def test_a_gradient_that_is_not_finite_stops_the_run(runs, monkeypatch):
    real = adversarial.discriminator_loss
    # Finite loss, infinite gradient: the square root at 0.
    monkeypatch.setattr(
        adversarial, "discriminator_loss", lambda k, f, r: real(k, f, r) + ((f - f) * 0).abs().sqrt().sum()
    )
    with pytest.raises(training.TrainingError, match=r"the discriminator's gradient became nan at step 0"):
        training.fit(tiny("steep"))


def test_resume_refuses_another_adversarial_configuration(runs):
    training.fit(tiny("twice"))
    with pytest.raises(training.TrainingError, match=r"adversarial.weight: 0.001 before, 0.5 now.*resume=never"):
        training.fit(tiny("twice", "adversarial.weight=0.5"))


@pytest.mark.parametrize(
    ("overrides", "quoted"),
    [
        (["adversarial.loss=hinge"], "hinge"),
        (["adversarial.weight=-1"], "adversarial.weight=-1"),
        (["adversarial.d_steps=0"], "adversarial.d_steps=0"),
        (["adversarial.start_step=-1"], "adversarial.start_step=-1"),
        (["adversarial.optimizer.schedule=x"], "adversarial.optimizer.schedule=x"),
        (["trainer.accumulate_grad_batches=2"], r"accumulate_grad_batches=2 .*adversarial"),
        (["trainer.sample_every=3"], "sample_every=3 is not a multiple of trainer.val_every=2"),
        (["keep=first"], "keep=first"),
        (["data.patch=5"], r"data.patch=5 at model.scale=4 .*20x20.*DilatedDiscriminator.*multiple of 8, at least 24"),
        (["data.patch=4"], "16x16"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(runs, overrides, quoted):
    with pytest.raises(training.TrainingError, match=quoted):
        training.fit(tiny("refused", *overrides), data=())
    assert not (runtime.RUNS / "train" / "refused").exists()


def test_small_patches_do_without_the_shift_crop(runs):
    training.fit(tiny("small", "data.patch=4", "adversarial.shift_crop=false", "trainer.max_steps=2"), keep=False)


def test_a_trained_discriminator_can_begin(runs):
    training.train(tiny("first", "trainer.max_steps=2"))
    start = adversarial.build_discriminator(tiny("second", "adversarial.init_from=first_discriminator"))
    saved = load_file(runtime.CHECKPOINTS / "first_discriminator.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in start.state_dict().items())
    for overrides, quoted in (
        (["model.scale=2"], r"first_discriminator judges pictures enlarged x4.*ESPCN enlarges x2"),
        (["adversarial.model.channels=6"], r"'channels': 4.*'channels': 6"),
        (["adversarial.init_from=first"], r"init_from=first is of kind upscaler"),
    ):
        cfg = tiny("second", "adversarial.init_from=first_discriminator", *overrides)
        with pytest.raises(training.TrainingError, match=quoted):
            adversarial.build_discriminator(cfg)
    with pytest.raises(checkpoints.CheckpointError, match="nobody"):
        adversarial.build_discriminator(tiny("second", "adversarial.init_from=nobody"))


def test_benchmark_times_both_forms_of_the_step():
    from nbhelpers.profiling import adversarial_step_times

    rows = adversarial_step_times(1, 2, ["data.patch=8", "model.channels=8", "adversarial.model.channels=4"])
    assert rows[0]["precision"] == "fp32" and not rows[0]["channels_last"] and rows[0]["speedup"] == 1
    assert rows[-1]["channels_last"] and all(row["ms"] > 0 for row in rows)
