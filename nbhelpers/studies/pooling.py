"""Max-pooling or a strided convolution? Document 002's comparison on MNIST digits (claim K10).

Three ways to halve the size, at two learning rates (which rate is best differs between them, so equal rates alone
would not be fair), and the cheapest way once more with the width that costs as much as max-pooling. The document's
notebook reports the best of 20 epochs on the test set; here the last epoch counts, and the best stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from .. import profiling, runtime
from ..classification import ClassifierResult, ClassifierTraining, fit_classifier
from ..datasets.classification import FOLDS, open_pictures
from ..models import count_parameters
from ..models.classifiers import DigitNet
from . import Row, Study, run_study

REFERENCE = "max-pool"
_EXTRA, _STRIDE, _LOW = "downsampling=convolution", "downsampling=stride", "training.lr=3e-3"
VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "extra convolution": [_EXTRA],
    "stride on previous": [_STRIDE],
    "stride on previous, equal MACs": [_STRIDE, "channels=12"],
    "max-pool, lower lr": [_LOW],
    "extra convolution, lower lr": [_EXTRA, _LOW],
    "stride on previous, lower lr": [_STRIDE, _LOW],
}
QUICK = ["limit=512", "training.epochs=1"]
TIMED_BATCH = 250


@dataclass
class Settings:
    """One run. ``seed`` decides the initial weights, the order of the digits and, in ``mnist10k``, the fold that is
    held out: five folds, so five seeds test every digit once. ``limit`` cuts the training digits."""

    seed: int = 0
    data: str = "mnist10k"  # or mnist: all 70,000, downloaded
    limit: int | None = None
    channels: int = 8
    downsampling: str = "max_pool"
    # So narrow a network gains nothing from bf16; fp32 on the CPU is the same on every machine but for rounding.
    training: ClassifierTraining = field(default_factory=lambda: ClassifierTraining(precision="fp32", device="cpu"))


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """``Settings`` with ``key=value`` overrides, types checked by OmegaConf."""
    return OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(list(overrides)))


def train(cfg: DictConfig) -> ClassifierResult:
    """One digit network, from its initial weights to the last epoch."""
    digits, test = open_pictures(cfg.data, fold=cfg.seed % FOLDS)
    runtime.seed_everything(cfg.seed)
    network = DigitNet(cfg.channels, cfg.downsampling, digits.classes)
    settings = OmegaConf.to_object(cfg.training)
    return fit_classifier(network, digits.take(slice(cfg.limit)), test, settings, cfg.seed, progress=False)


def measure(result: ClassifierResult, cfg: DictConfig) -> dict[str, list[Row]]:
    """Score and cost of a run (``mmacs``: millions of multiply-adds per digit; time of a batch), and its curve."""
    last = result.history[-1]
    batch = torch.zeros(TIMED_BATCH, 1, 28, 28)
    with torch.inference_mode():
        forward_ms = profiling.median_ms(lambda: result.model(batch), repeats=12)
    main = {
        "lr": cfg.training.lr,
        "steps": result.steps,
        "test_accuracy": round(last["test_accuracy"], 4),
        "best_accuracy": round(max(r["test_accuracy"] for r in result.history), 4),
        "test_loss": round(last["test_loss"], 5),
        "train_loss": round(last["train_loss"], 6),
        "parameters": count_parameters(result.model),
        "mmacs": round(profiling.flops(result.model, (1, 1, 28, 28)) / 2e6, 3),
        "forward_ms": round(forward_ms, 2),
        "seconds": round(result.seconds, 1),
    }
    curve = [
        {"epoch": r["epoch"], "train_loss": round(r["train_loss"], 5), "test_accuracy": round(r["test_accuracy"], 4)}
        for r in result.history
    ]
    return {"": [main], "curves": curve}


STUDY = Study(
    "pooling", None, VARIANTS, measure, seeds=range(5), tables=("", "curves"),
    compose=compose, train=train, quick=QUICK,
)  # fmt: skip


def run(fresh: bool = False, quick: bool = False, data: str = "mnist10k") -> Path:
    """``python -m nbhelpers study pooling``: 7 variants x 5 seeds, about 5 minutes on two cores.

    ``data="mnist"`` takes all of MNIST (downloaded; about eight times as long) and writes ``pooling_mnist.csv``.
    """
    runtime.set_threads()
    study = STUDY
    if data != "mnist10k":
        variants = {name: [*overrides, f"data={data}"] for name, overrides in VARIANTS.items()}
        study = replace(STUDY, name=f"{STUDY.name}_{data}", variants=variants)
    return run_study(study, fresh, quick)
