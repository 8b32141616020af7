"""Training of classifiers: defaults of document 004, learning, exact resume after a kill, the exported network."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file
from torch import nn

from nbhelpers import checkpoints, classify, runtime
from nbhelpers.block_orthogonal import BlockOrthogonalConv2d, orthogonality_error
from nbhelpers.classify import RunModule, compose, fit, predict, scores, train
from nbhelpers.datasets.classification import DataError, LabelledPictures, ShuffledBatches
from nbhelpers.datasets.small_pictures import Collection
from nbhelpers.experiments import TrainingError, differences

COLOURS = ("red", "green", "blue")
TINY = [
    "data_module.batch_size=16", "model.width=4", "max_epochs=4", "learning_rate=0.01", "logger=none",
    "trainer.device=cpu", "trainer.precision=fp32", "trainer.threads=1", "trainer.progress=false",
]  # fmt: skip


def coloured(n: int, seed: int) -> LabelledPictures:
    """Noise of 12×12 pixels, brighter in the colour of its class."""
    images = torch.randint(0, 120, (n, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 100
    return LabelledPictures(images, labels, 3)


COLLECTION = Collection(coloured(80, 0), coloured(45, 1), COLOURS, "coloured noise")


def tiny(name: str, *overrides: str):
    return compose([*TINY, f"name={name}", *overrides])


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_keys_and_defaults_are_the_documents():
    cfg = compose()
    d, m = cfg.data_module, cfg.model
    assert (d.data_dir, d.batch_size, d.num_workers, d.subset_fraction, d.valid_size) == ("data", 128, 4, 1.0, 0.1)
    assert (cfg.learning_rate, cfg.max_epochs, cfg.baseline_name) == (0.001, 20, "Resnet-18")
    assert (m.odk_layers, m.num_matrices, m.r, m.placement, m.stem) == ([3, 4], 1, 1, "left_zeros", "cifar")
    model = classify.network(cfg, 10)
    assert sum(p.numel() for p in model.parameters()) == 1_505_866


# --- training ---------------------------------------------------------------------------------------------


def test_a_short_run_learns_and_keeps_its_blocks_orthogonal(runs):
    result = fit(tiny("learn", "max_epochs=8"), COLLECTION)
    assert result.test["accuracy"] > 0.9 and result.test["roc_auc"] > 0.95
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.pictures == (72, 8, 45) and result.steps == 8 * 4
    assert result.confusion.sum(1).tolist() == [15, 15, 15]
    assert int(result.confusion.diagonal().sum()) == round(45 * result.test["accuracy"])
    convolutions = [m for m in result.model.modules() if isinstance(m, BlockOrthogonalConv2d)]
    assert len(convolutions) == 8 and max(map(orthogonality_error, convolutions)) < 1e-5  # 16-bit angles, too
    assert result.counts.free == sum(p.numel() for p in result.model.parameters()) < result.counts.dense
    assert {p.name for p in result.folder.glob("*")} == {"best.ckpt", "last.ckpt", "config.yaml", "history.csv"}


def test_same_seed_same_weights_other_seed_other_and_nothing_is_written(runs):
    one, two, other = (fit(tiny("a", f"seed={s}"), COLLECTION, keep=False) for s in (0, 0, 1))
    assert torch.equal(weights(one.model), weights(two.model)) and untimed(one.history) == untimed(two.history)
    assert not torch.equal(weights(one.model), weights(other.model))
    assert not runtime.RUNS.exists()


def test_best_or_last_epoch_is_kept(runs):
    """The run is made to get worse at the end: its answers are turned around before the last epoch."""

    class Spoil(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 7:
                with torch.no_grad():
                    module.model.fc.weight.neg_()

    def run(keep: str):
        cfg = tiny(keep, f"keep={keep}", "max_epochs=8", "data_module.valid_size=0.3")
        return fit(cfg, COLLECTION, callbacks=[Spoil()])

    best, last = run("best"), run("last")
    assert untimed(best.history) == untimed(last.history)
    top = max(row["val_accuracy"] for row in best.history)
    assert best.kept["val_accuracy"] == top > last.kept["val_accuracy"] == last.history[-1]["val_accuracy"]
    assert best.test["accuracy"] > last.test["accuracy"]


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    """A real SIGKILL in a real process, in the middle of an epoch; then the same command again."""
    file = tmp_path / "mine.npz"
    pictures = {"train": coloured(320, 0), "test": COLLECTION.test}
    np.savez(
        file,
        **{f"x_{part}": p.images.permute(0, 2, 3, 1).numpy() for part, p in pictures.items()},
        **{f"y_{part}": p.labels.numpy() for part, p in pictures.items()},
    )
    env = os.environ | {"NB_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    script = (
        "import sys; from pathlib import Path; from nbhelpers import runtime; from nbhelpers.__main__ import main;"
        "runtime.CHECKPOINTS = Path(sys.argv[1]); sys.exit(main(['classify', 'train', *sys.argv[2:]]))"
    )
    settings = [*TINY, "max_epochs=12", f"data_module.dataset={file}"]

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", script, str(tmp_path / name), *settings, f"name={name}"]

    victim = subprocess.Popen(command("killed"), env=env, stderr=subprocess.PIPE)
    last = tmp_path / "runs" / "train" / "killed" / "last.ckpt"
    deadline = time.monotonic() + 600
    while not last.is_file() and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    assert victim.poll() is None, f"the run ended before it could be killed: {victim.stderr.read().decode()[-2000:]}"
    victim.kill()
    victim.wait()
    assert 0 < torch.load(last, weights_only=True)["epoch"] + 1 < 12
    subprocess.run(command("killed"), env=env, check=True, capture_output=True)
    subprocess.run(command("whole"), env=env, check=True, capture_output=True)
    resumed, whole = (load_file(tmp_path / n / f"{n}.safetensors") for n in ("killed", "whole"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[k], whole[k]) for k in whole)
    first, second = (untimed(checkpoints.history(n, tmp_path / n)) for n in ("killed", "whole"))
    assert first == second and [row["epoch"] for row in first] == [*range(1, 13)]
    with (tmp_path / "runs" / "train" / "killed" / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_ctrl_c_says_where_it_stopped_and_the_same_call_goes_on(runs):
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch 3; the same command continues"):
        fit(tiny("stopped"), COLLECTION, callbacks=[Stop()])
    with pytest.raises(TrainingError, match=r"learning_rate: 0\.01 before, 0\.02 now.*resume=never"):
        fit(tiny("stopped", "learning_rate=0.02"), COLLECTION)
    resumed, whole = fit(tiny("stopped"), COLLECTION), fit(tiny("whole"), COLLECTION)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert untimed(resumed.history) == untimed(whole.history)


def test_angles_and_vectors_are_not_decayed(runs):
    cfg = tiny("decay", "weight_decay=0.1")
    model = classify.network(cfg, 3)
    adam = RunModule(model, cfg, COLLECTION.test, "fp32").optimizer()
    decayed, rest = adam.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kernels = {names[id(p)] for p in decayed["params"]}
    assert {"conv1.weight", "layer3.0.downsample.0.weight", "fc.weight"} <= kernels
    others = {names[id(p)] for p in rest["params"]}
    assert {"layer4.1.conv2.free", "bn1.weight", "fc.bias"} <= others and len(kernels | others) == len(names)


def test_processes_share_every_batch():
    batches = ShuffledBatches(50, 7, seed=3)
    parts = [classify._Share(batches, rank, 2) for rank in (0, 1)]
    for part in parts:
        part.set_epoch(4)
        assert len(part) == 7
    for whole, first, second in zip(batches, *parts, strict=True):
        assert sorted([*first.tolist(), *second.tolist()]) == sorted(whole.tolist())


def test_numbers_that_do_not_fit_into_16_bits_are_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight.fill_(1e5)
    assert float(classify._finished(model, half=False).weight[0, 0]) == 1e5
    with pytest.raises(TrainingError, match=r"too large for 16 bits; use half=false"):
        classify._finished(model, half=True)


# --- scores -----------------------------------------------------------------------------------------------


def test_scores_agree_with_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    found, chances = scores(logits, labels), logits.softmax(1)
    assert found["accuracy"] == pytest.approx(sum(logits.argmax(1) == labels).item() / 60)
    areas = []  # the share of pairs (picture of the class, picture of another) in the right order
    for c in range(4):
        inside, outside = chances[labels == c, c], chances[labels != c, c]
        areas.append(float((inside[:, None] > outside).float().mean()))
    assert found["roc_auc"] == pytest.approx(sum(areas) / 4, abs=1e-6)
    picked = chances[torch.arange(60), labels]
    assert found["loss"] == pytest.approx(-float(picked.log().mean()), rel=1e-5)
    without = labels != 2
    some = scores(logits[without], labels[without])["roc_auc"]
    rest = [float((chances[(labels == c), c][:, None] > chances[(labels != c) & without, c]).float().mean())
            for c in (0, 1, 3)]  # fmt: skip
    assert some == pytest.approx(sum(rest) / 3, abs=1e-6)


def test_scores_of_nothing_and_of_one_class():
    assert all(math.isnan(v) for v in scores(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).values())
    one = scores(torch.eye(3), torch.zeros(3, dtype=torch.long))
    assert one["accuracy"] == pytest.approx(1 / 3) and math.isnan(one["roc_auc"])


def test_predictions_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(432, 3))
    whole = predict(model, COLLECTION.test.images)
    torch.testing.assert_close(predict(model, COLLECTION.test.images, batch=7), whole)
    assert whole.shape == (45, 3) and not model.training


# --- the exported network ---------------------------------------------------------------------------------


def test_exported_network_gives_the_scores_of_its_card(runs, monkeypatch):
    monkeypatch.setattr(classify, "open_collection", lambda *_: COLLECTION)
    result = train(tiny("mine", "model.num_matrices=2", "baseline_name=resnet18"), "the command")
    card, model = checkpoints.card("mine"), checkpoints.load("mine")
    assert card["kind"] == "classifier" and card["classes"] == list(COLOURS) and card["size"] == [12, 12]
    assert card["command"] == "the command" and card["metrics"]["data"] == "coloured noise"
    assert card["parameters"] == card["counts"]["free"] < card["counts"]["stored"] < card["counts"]["dense"]
    assert card["training"]["data"] == {"train": 72, "valid": 8, "test": 45}
    logits = predict(model, COLLECTION.test.images)
    assert torch.equal(logits, predict(result.model, COLLECTION.test.images))
    assert card["metrics"]["test_accuracy"] == round(scores(logits, COLLECTION.test.labels)["accuracy"], 4)
    assert checkpoints.available(kind="classifier") == ["mine"] and checkpoints.available() == []
    history = checkpoints.history("mine")
    assert len(history) == 4 and {"train_loss", "val_accuracy", "val_roc_auc", "lr"} <= set(history[0])
    with pytest.raises(TrainingError, match=r"mine was trained with another configuration \(max_epochs: 4 before, 5"):
        train(tiny("mine", "model.num_matrices=2", "baseline_name=resnet18", "max_epochs=5"))


@pytest.mark.parametrize("name", checkpoints.available(kind="classifier"))
def test_committed_classifiers_can_be_trained_again_by_their_command(name):
    card = checkpoints.card(name)
    overrides = card["command"].removeprefix("python -m nbhelpers classify train").split()
    now = OmegaConf.to_container(compose(overrides), resolve=True)
    assert differences(card["config"], now) == []


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("resume=maybe", TrainingError, r"resume=maybe is unknown.*auto"),
        ("keep=all", TrainingError, r"keep=all is unknown.*best"),
        ("max_epochs=0", TrainingError, r"max_epochs=0 must be a whole number of at least 1"),
        ("data_module.batch_size=1.5", TrainingError, r"data_module\.batch_size=1\.5 must be a whole number"),
        ("data_module.batch_size=73", DataError, r"batch=73 must lie between 1 and .* 72"),
        ("data_module.subset_fraction=2", DataError, r"subset_fraction=2"),
        ("learning_rate=0", TrainingError, r"learning_rate=0 must be a number above 0"),
        ("learning_rate=fast", TrainingError, r"learning_rate=fast must be a number"),
        ("weight_decay=-1", TrainingError, r"weight_decay=-1 must be a number of at least 0"),
        ("name=a/b", TrainingError, r"name=a/b cannot be a file name"),
        ("model.num_matrices=99", ValueError, r"num_matrices=99 fits no convolution"),
        ("logger=paper", TrainingError, r"logger=paper is unknown.*tensorboard"),
        ("trainer.device=tpu", ValueError, r"'tpu' is not available"),
    ],
)
def test_settings_that_cannot_work_are_refused(runs, override, error, message):
    with pytest.raises(error, match=message):
        fit(tiny("refused", override), COLLECTION)


def test_unknown_keys_and_files_that_are_no_configuration_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"model\.rr.*--show` prints all keys"):
        compose(["model.rr=3"])
    for name, text in {"strange.yaml": "model: {rr: 3}\n", "broken.yaml": "model: [1\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(TrainingError, match=r"--show` prints all keys"):
            compose(config=tmp_path / name)
    with pytest.raises(TrainingError, match=r"none\.yaml|none"):
        compose(config=tmp_path / "none.yaml")


def test_a_saved_configuration_is_read_back(tmp_path):
    cfg = tiny("saved", "model.r=4")
    (tmp_path / "saved.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert compose(config=tmp_path / "saved.yaml") == cfg
    assert compose(["model.r=2"], tmp_path / "saved.yaml").model.r == 2
