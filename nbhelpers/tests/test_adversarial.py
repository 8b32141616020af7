"""The training that plays one network against the other."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import open_dict
from safetensors.torch import load_file

from nbhelpers import adversarial, checkpoints, models, runtime, training
from nbhelpers.experiments import TrainingError
from nbhelpers.metrics import lpips_available
from nbhelpers.tests.test_training import GAN, TINY, weights


def tiny(name: str, *overrides: str):
    """Three photos, 12-pixel patches, 8 and 4 channels: about a second."""
    short = ["trainer.max_steps=6", "trainer.val_every=2"]
    return training.compose("espcn_gan_x4", [*TINY, *GAN, *short, f"name={name}", *overrides])


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
    judge = models.build("DilatedDiscriminator", models.DISCRIMINATORS, **card["arguments"])
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
    with pytest.raises(TrainingError, match=rf"the {who}'s loss became nan at step 5 .*lower .*optimizer.lr"):
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
    with pytest.raises(TrainingError, match=r"the discriminator's gradient became nan at step 0"):
        training.fit(tiny("steep"))


def test_resume_refuses_another_adversarial_configuration(runs):
    training.fit(tiny("twice"))
    with pytest.raises(TrainingError, match=r"adversarial.weight: 0.001 before, 0.5 now.*resume=never"):
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
    with pytest.raises(TrainingError, match=quoted):
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
        with pytest.raises(TrainingError, match=quoted):
            adversarial.build_discriminator(cfg)
    with pytest.raises(checkpoints.CheckpointError, match="nobody"):
        adversarial.build_discriminator(tiny("second", "adversarial.init_from=nobody"))


def test_benchmark_times_both_forms_of_the_step():
    from nbhelpers.profiling import adversarial_step_times

    rows = adversarial_step_times(1, 2, ["data.patch=8", "model.channels=8", "adversarial.model.channels=4"])
    assert rows[0]["precision"] == "fp32" and not rows[0]["channels_last"] and rows[0]["speedup"] == 1
    assert rows[-1]["channels_last"] and all(row["ms"] > 0 for row in rows)
