"""Training: batches are a function of seed and step, a killed run ends like an uninterrupted one, NaN stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nbhelpers import checkpoints, runtime, training
from nbhelpers.experiments import TrainingError
from nbhelpers.images import load_image

TINY = [
    "init_from=null", "data.roots=[bundled]", "data.limit=3", "data.val_limit=1", "data.patch=12", "data.batch=2",
    "model.channels=8", "trainer.max_steps=30", "trainer.val_every=5", "trainer.progress=false", "trainer.threads=1",
]  # fmt: skip
# What makes the adversarial experiment as small; in GAME, dropout and a late start are there to be resumed as well.
# What the experiment tunes is pinned, so that training it otherwise cannot change what a test means.
GAN = ["~loss", "+loss={l1: 1.0}", "adversarial.weight=1.0e-3", "optimizer.ema_decay=0.999"]
GAN += ["adversarial.model.channels=4", "trainer.val_lpips=false", "trainer.sample_every=0"]
GAME = [*GAN, "adversarial.model.dropout=0.2", "adversarial.start_step=7", "adversarial.d_steps=2"]


class BreaksAtStep3(torch.utils.data.Dataset):
    """Training pairs that cannot be read once the run has come to step 3."""

    def __init__(self, pairs: torch.utils.data.Dataset):
        self.pairs = pairs

    def __getitem__(self, step: int):
        if step == 3:
            raise OSError("a cable was pulled")
        return self.pairs[step]

    def __len__(self) -> int:
        return len(self.pairs)


def tiny(name: str, *overrides: str):
    return training.compose("espcn_x2", [*TINY, f"name={name}", *overrides])


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def test_a_short_run_learns(runs):
    result = training.fit(tiny("learn", "trainer.max_steps=120", "trainer.val_every=40", "optimizer.warmup_steps=0"))
    losses = [r["train_loss"] for r in result.history]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert result.best == max(r["val_psnr_y"] for r in result.history)


def test_same_seed_same_weights_other_seed_other(runs):
    one, two = (training.fit(tiny("a"), keep=False).model for _ in range(2))
    other = training.fit(tiny("a", "seed=1"), keep=False).model
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


STAGED = ["optimizer.schedule=stages", "+optimizer.stages=[1.0, 0.5, 0.25]"]


@pytest.mark.parametrize(
    ("experiment", "extra", "steps"),
    [("espcn_x2", [], 150), ("espcn_x2", STAGED, 150), ("espcn_gan_x4", GAME, 60)],
    ids=["cosine", "stages", "adversarial"],
)
def test_killed_run_resumes_to_the_same_weights(tmp_path, experiment, extra, steps):
    """A real SIGKILL in a real process, in the middle of an epoch; then the same command again."""
    env = os.environ | {"NB_RUNS": str(tmp_path / "runs"), "NB_THREADS": "1", "OMP_NUM_THREADS": "1"}
    script = (
        "import sys; from pathlib import Path; from nbhelpers import runtime, training;"
        "runtime.CHECKPOINTS = Path(sys.argv[1]); training.train(training.compose(sys.argv[2], sys.argv[3:]))"
    )
    settings = [o for o in TINY if "max_steps" not in o] + [f"trainer.max_steps={steps}", *extra]

    def command(out: str) -> list[str]:
        return [sys.executable, "-c", script, str(tmp_path / out), experiment, *settings, f"name={out}"]

    victim = subprocess.Popen(command("killed"), env=env, stderr=subprocess.PIPE)
    last = tmp_path / "runs" / "train" / "killed" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    assert victim.poll() is None, f"the run ended before it could be killed: {victim.stderr.read().decode()[-2000:]}"
    victim.kill()
    victim.wait()
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < steps
    subprocess.run(command("killed"), env=env, check=True, capture_output=True)
    subprocess.run(command("whole"), env=env, check=True, capture_output=True)
    suffixes = ["", "_discriminator"] if extra is GAME else [""]
    for suffix in suffixes:
        resumed, whole = (load_file(tmp_path / n / f"{n}{suffix}.safetensors") for n in ("killed", "whole"))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    histories = [checkpoints.history(n, tmp_path / n) for n in ("killed", "whole")]
    first, second = ([{k: str(v) for k, v in row.items() if k != "seconds"} for row in rows] for rows in histories)
    assert first == second and len(first) == steps // 5  # as text, in which NaN equals NaN


def test_nan_loss_stops_and_keeps_the_last_good_state(runs):
    cfg = tiny("nan", "trainer.val_every=5")
    data = training.open_data(cfg, progress=False)
    pairs = data[0]

    class Poisoned(torch.utils.data.Dataset):
        def __getitem__(self, step):
            lr, hr = pairs[step]
            return (lr.float() * float("nan"), hr) if step == 12 else (lr, hr)

        def __len__(self):
            return len(pairs)

    with pytest.raises(TrainingError, match=r"nan at step 12 .*lower optimizer.lr"):
        training.fit(cfg, (Poisoned(), *data[1:]))
    state = torch.load(runtime.RUNS / "train" / "nan" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 10
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values() if v.is_floating_point())


def test_a_network_that_gives_nan_is_not_kept():
    """The last step before a checkpoint can spoil the weights with a finite loss."""
    module = training.PixelModule(training.models.build("ESPCN", scale=2, channels=8), tiny("spoilt"))
    module.validation = [(torch.rand(3, 9, 9), torch.rand(3, 18, 18))]
    assert module.validate()["val_psnr_y"] > 0
    torch.nn.init.constant_(module.final.to_subpixels.bias, float("nan"))
    with pytest.raises(TrainingError, match=r"gives NaN at step 0.*last.ckpt"):
        module.validate()


def test_resume_refuses_another_configuration(runs):
    training.fit(tiny("twice"))
    with pytest.raises(TrainingError, match=r"data.batch: 2 before, 3 now.*resume=never"):
        training.fit(tiny("twice", "data.batch=3"))
    training.fit(tiny("twice", "data.batch=3", "resume=never"))


def test_accumulation_serves_different_batches(runs):
    """Two micro-batches of two make the gradient of one batch of four drawn from the same steps."""
    result = training.fit(tiny("accumulate", "trainer.accumulate_grad_batches=2", "trainer.max_steps=10"))
    assert [r["step"] for r in result.history] == [5, 10]


def test_two_learning_rates_reach_the_last_layer():
    cfg = tiny("rates", "optimizer.last_layer_factor=0.1", "optimizer.warmup_steps=0")
    module = training.PixelModule(training.models.build("ESPCN", scale=2, channels=8), cfg, [])
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [g["initial_lr"] for g in groups] == pytest.approx([cfg.optimizer.lr, cfg.optimizer.lr * 0.1])
    assert sum(len(g["params"]) for g in groups) == len(list(module.model.parameters()))


def test_stages_are_equal_shares_of_the_run():
    """The document's three by default; a list of other fractions; warm-up on top."""
    for given, expected in (([], [1, 1, 0.5, 0.5, 0.25, 0.25]), (["+optimizer.stages=[1,3]"], [1, 1, 1, 3, 3, 3])):
        cfg = tiny("stages", "optimizer.schedule=stages", "optimizer.warmup_steps=0", "trainer.max_steps=30", *given)
        _, schedule = training.PixelModule(training.models.build("ESPCN", scale=2), cfg).upscaler_optimizer()
        assert [schedule.lr_lambdas[0](step) for step in range(2, 30, 5)] == expected
        assert schedule.lr_lambdas[0](29) == schedule.lr_lambdas[0](30) == expected[-1]


@pytest.mark.parametrize("every", [10, 5])  # less often than validation, and as often
def test_step_checkpoints_are_kept(runs, every):
    training.fit(tiny("every", f"trainer.save_every={every}"))
    names = {p.name for p in (runtime.RUNS / "train" / "every").glob("*.ckpt")}
    assert names == {"best.ckpt", "last.ckpt", *(f"step_{step}.ckpt" for step in range(every, 31, every))}


def test_train_exports_network_card_and_history(runs):
    training.train(tiny("exported", "trainer.sample_every=15"), "the command")
    assert checkpoints.available() == ["exported"]
    card = checkpoints.card("exported")
    assert card["command"] == "the command" and card["config"]["seed"] == 0 and card["scale"] == 2
    rows = checkpoints.history("exported")
    assert len(rows) == 6
    # x2 trains on two losses: each has its column beside their weighted sum.
    assert all(r["train_loss"] == pytest.approx(r["mse"] + 2 * r["mse_luma"], rel=1e-5) for r in rows)
    samples = sorted((runtime.RUNS / "train" / "exported" / "samples").iterdir())
    assert [p.name for p in samples] == ["step_000015.png", "step_000030.png"]
    assert load_image(samples[0]).shape == (3, 128, 3 * 128)  # one validation picture: bicubic, network, original
    model = checkpoints.load("exported")
    assert not model.training and model(torch.rand(1, 3, 5, 7)).shape == (1, 3, 10, 14)


@pytest.mark.parametrize("override", ["experiment=nothing", "qqq.www=1"])
def test_wrong_configuration_names_the_experiments(override):
    with pytest.raises(TrainingError, match="espcn_x4"):
        training.compose(overrides=[override])


def test_misspelt_key_is_answered_with_its_neighbours():
    with pytest.raises(TrainingError, match=r"did you mean trainer.max_steps .*by trainer.max_step\?"):
        training.compose("espcn_x4", ["trainer.max_step=5"])


HIDE = """
import importlib.metadata, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in NAMES else PathFinder.find_spec(name, path, target)

NAMES = {"ipywidgets", "anywidget", "matplotlib", "tensorboard", "tensorboardX", "IPython", "mlflow"}
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
whole = importlib.metadata.distribution
def distribution(name):
    if name in NAMES:
        raise importlib.metadata.PackageNotFoundError(name)
    return whole(name)
importlib.metadata.distribution = distribution
"""


def test_training_runs_without_widgets_plots_or_tracking(tmp_path):
    """As on a cluster where only the training packages are installed: logs then go to CSV alone."""
    code = HIDE + (
        "from nbhelpers import training, __main__\n"
        f"training.fit(training.compose('espcn_x2', {[*TINY, 'trainer.max_steps=5', 'name=bare']!r}))\n"
    )
    env = os.environ | {"NB_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "train" / "bare"
    assert (folder / "history.csv").is_file() and not (folder / "tensorboard").exists()


def test_ctrl_c_says_where_it_stopped_and_exits_130(tmp_path):
    env = os.environ | {"NB_RUNS": str(tmp_path / "runs"), "NB_THREADS": "1", "OMP_NUM_THREADS": "1"}
    settings = [o for o in TINY if "max_steps" not in o] + ["trainer.max_steps=50000", "name=stopped"]
    command = [sys.executable, "-m", "nbhelpers", "train", "experiment=espcn_x2", *settings]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    last = tmp_path / "runs" / "train" / "stopped" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "stopped at step" in message and "same command continues" in message


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("optimizer.schedule=cosinus", "cosinus"),
        ("+optimizer.stages=[1.0,-0.5]", r"optimizer.stages=\[1.0, -0.5\] must be a list of fractions"),
        ("+optimizer.stages=0.5", "optimizer.stages=0.5 must be a list"),
        ("resume=neverr", "neverr"),
        ("data.batch=0", "data.batch=0"),
        ("trainer.max_steps=7", "7 is not a multiple of trainer.val_every=5"),
        ("name=a/b", "a/b"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(runs, override, quoted):
    with pytest.raises(TrainingError, match=quoted):
        training.fit(tiny("refused", override), data=())


def test_a_network_is_not_replaced_by_another_configuration(runs):
    training.train(tiny("mine"))
    before = checkpoints.card("mine")["sha256"]
    with pytest.raises(TrainingError, match=r"data.batch: 2 before, 3 now.*name="):
        training.train(tiny("mine", "data.batch=3"))
    assert checkpoints.card("mine")["sha256"] == before
    training.train(tiny("mine", "data.batch=3", "resume=never"))
    assert checkpoints.card("mine")["sha256"] != before


def test_a_network_is_not_replaced_by_one_of_another_kind(runs):
    checkpoints.save("mine", torch.nn.Linear(1, 1), "classifier", {}, {"kind": "classifier"}, [])
    before = checkpoints.card("mine")["sha256"]
    with pytest.raises(TrainingError, match=r"data/checkpoints/mine is of kind classifier; choose name="):
        training.train(tiny("mine"))
    assert checkpoints.card("mine")["sha256"] == before


def test_validation_photos_can_be_split_off(runs):
    _, validation, report = training.open_data(tiny("split", "data.limit=null", "data.valid_fraction=0.1"), False)
    assert report["photos"] == 36 and len(validation) == 1  # of 40 photos; val_limit=1


def test_missing_validation_photos_stop_the_run(runs, tmp_path):
    with pytest.raises(training.DataError, match="val_root"):
        training.fit(tiny("blind", f"data.val_root={tmp_path}"))


@pytest.mark.parametrize("name", [n for n in checkpoints.available() if "prune" not in checkpoints.card(n)["config"]])
def test_committed_networks_can_be_trained_again_by_their_configuration(name):
    from omegaconf import OmegaConf

    from nbhelpers.experiments import differences

    now = OmegaConf.to_container(training.compose(name), resolve=True)
    assert differences(checkpoints.card(name)["config"], now) == []
    assert checkpoints.card(name)["command"] == f"python -m nbhelpers train experiment={name}"
