"""The pooling study: the document's networks, equal budgets, resumable table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nbhelpers import profiling, runtime
from nbhelpers.models import count_parameters
from nbhelpers.models.classifiers import DOWNSAMPLING, DigitNet
from nbhelpers.studies import pooling, read, run_study, summary

SHAPE = (1, 1, 28, 28)


@pytest.mark.parametrize(
    ("downsampling", "channels", "count"),
    [  # printed by the document's two notebooks (kernel 3, no widening for the added convolution)
        ("max_pool", 4, 3_502), ("max_pool", 8, 13_362), ("max_pool", 64, 820_042),
        ("convolution", 4, 4_258), ("convolution", 8, 16_314), ("convolution", 64, 1_004_938),
        ("stride", 8, 13_362), ("stride", 64, 820_042),
    ],
)  # fmt: skip
def test_parameters_are_the_documents(downsampling, channels, count):
    assert count_parameters(DigitNet(channels, downsampling)) == count


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
def test_digit_network_gives_one_logit_per_class(downsampling):
    assert DigitNet(4, downsampling, classes=7)(torch.rand(3, 1, 28, 28)).shape == (3, 7)


def test_unknown_downsampling_is_quoted():
    with pytest.raises(ValueError, match=r"'mean' is unknown.*max_pool"):
        DigitNet(downsampling="mean")


@torch.no_grad()
def test_stride_is_what_the_documents_notebook_computes_by_dropping_pixels():
    torch.manual_seed(0)
    strided, full = DigitNet(4, "stride").eval(), DigitNet(4, "max_pool").eval()
    full.load_state_dict(strided.state_dict())
    for stage in full.layers[:2]:
        stage[2] = torch.nn.MaxPool2d(kernel_size=1, stride=2)  # every second pixel, nothing else
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(strided(x), full(x))


def test_equal_macs_are_equal():
    macs = {}
    for name in ("max-pool", "stride on previous", "stride on previous, equal MACs"):
        cfg = pooling.compose(pooling.VARIANTS[name])
        macs[name] = profiling.flops(DigitNet(cfg.channels, cfg.downsampling).eval(), SHAPE)
    assert macs["stride on previous, equal MACs"] / macs["max-pool"] == pytest.approx(1, abs=0.03)
    assert macs["stride on previous"] < 0.5 * macs["max-pool"]


def test_study_trains_each_run_once_and_holds_out_the_fold_of_its_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "RESULTS", tmp_path)
    monkeypatch.setattr(pooling, "TIMED_BATCH", 2)
    folds = []
    monkeypatch.setattr(pooling, "open_pictures", lambda name, fold: folds.append(fold) or digits(name, fold))
    tiny = {name: [*pooling.VARIANTS[name], *pooling.QUICK, "channels=2"] for name in ("max-pool", "extra convolution")}
    study = replace(pooling.STUDY, variants=tiny, seeds=(1, 8))
    rows = read(run_study(study))
    assert folds == [1, 1, 3, 3]
    assert read(run_study(study)) == rows and len(folds) == 4
    assert [(r["variant"], r["seed"], r["steps"]) for r in rows] == [(v, s, 4) for s in (1, 8) for v in tiny]
    assert len(read(study.path("curves"))) == 4
    assert summary(rows, "test_loss", reference="max-pool")["extra convolution"]["n"] == 2
    assert rows[0]["parameters"] < rows[1]["parameters"] and rows[0]["mmacs"] < rows[1]["mmacs"]


def digits(name: str, fold: int):
    from nbhelpers.datasets.classification import open_pictures

    train, test = open_pictures(name, fold)
    return train, test.take(slice(100))


def test_all_of_mnist_gets_a_table_of_its_own(monkeypatch):
    monkeypatch.setattr(pooling, "run_study", lambda study, fresh, quick: study)
    study = pooling.run(data="mnist")
    assert study.path().name == "pooling_mnist.csv"
    assert {study.compose(overrides).data for overrides in study.variants.values()} == {"mnist"}
    assert pooling.run().path().name == "pooling.csv"


def test_committed_runs_have_converged():
    """The training digits are learnt, and the last epoch is no worse than the best by half a point."""
    rows = read(pooling.STUDY.path())
    assert len(read(pooling.STUDY.path("curves"))) == pooling.Settings().training.epochs * len(rows) > 0
    for r in rows:
        assert r["best_accuracy"] - r["test_accuracy"] < 0.005 and r["train_loss"] < 0.05, r
