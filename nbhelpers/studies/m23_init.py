"""Does the M23 spectrum beat ordinary initialisation? The comparisons of notebook 05 (document 000; M2-M4, M7).

Five tables: what the weights do before training (see ``m23_signal``), how fast a 24-layer upscaler learns, how well a
24-layer classifier does, and the document's loss and schedule on its own network. Each start gets the best of three
learning rates (:func:`best_rates`); the same seed means the same pictures, so differences can be taken in pairs.
M23 against a random spectrum is the comparison that shows whether the algebra matters.
"""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from torch.nn.utils import get_total_norm

from .. import experiments, losses, runtime
from ..classification import ClassifierResult, ClassifierTraining, fit_classifier
from ..datasets.classification import FOLDS, open_pictures
from ..datasets.pairs import Pairs, resolve_root
from ..degrade import downscale
from ..experiments import TrainingError
from ..images import find_images, load_image
from ..layers import BicubicUpsample
from ..metrics import psnr_y
from ..models.plain import PlainMLP
from ..training import FitResult, fit, open_data
from . import Row, Study, run_study, score
from .m23_signal import LAYERS, SHAPES, SIGNAL, STARTS, options

ROOT2 = 1.4142
# Gains of 1.41 (and of 2 before a ReLU) give back what taking the real part loses.
GAINED: dict[str, tuple[str, bool, float]] = {
    "M23 x1.41": ("m23", True, ROOT2),
    "M23 x1.41, independent": ("m23", False, ROOT2),
    "random spectrum x1.41": ("random_spectrum", True, ROOT2),
    "random spectrum x1.41, independent": ("random_spectrum", False, ROOT2),
    "M23 x2": ("m23", True, 2.0),
    "M23 x2, independent": ("m23", False, 2.0),
    "random spectrum x2, independent": ("random_spectrum", False, 2.0),
    "delta-orthogonal x1.41": ("delta_orthogonal", False, ROOT2),
    "Fixup": ("fixup", False, 1.0),
}
ALL = STARTS | GAINED
PAIRS = {  # each with its control: the same construction from random numbers
    "M23": "random spectrum",
    "M23, independent": "random spectrum, independent",
    "M23 x1.41": "random spectrum x1.41",
    "M23 x1.41, independent": "random spectrum x1.41, independent",
    "M23 x2, independent": "random spectrum x2, independent",
}


def _variants(
    net: str, starts: Sequence[str], rates: Sequence[str], key: str, prefix: str = "", extra: Sequence[str] = ()
) -> dict[str, list[str]]:
    return {
        f"{net}: {start}, lr {rate}": [*extra, *options(ALL[start], prefix), f"{key}={rate}"]
        for start in starts
        for rate in rates
    }


def best_rates(rows: Sequence[Row], key: str, largest: bool = False) -> list[Row]:
    """Of each start only the rows of its best learning rate, by the mean of ``key`` over the seeds.

    The rate leaves the name ("plain tanh: M23, lr 1e-3" → "plain tanh: M23"), so that :func:`studies.summary` compares
    each start at its best. Ties go to the rate that comes first.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        start, _, rate = str(row["variant"]).rpartition(", lr ")
        found.setdefault(start, {}).setdefault(rate, []).append(row | {"variant": start})
    choose = max if largest else min
    best = [choose(rates.values(), key=lambda r: sum(float(x[key]) for x in r) / len(r)) for rates in found.values()]
    return [row for rows in best for row in rows]


# --- A 24-layer upscaler ----------------------------------------------------------------------------------

TARGET = 0.97  # of bicubic's loss on the same patches, mean of WINDOW steps
WINDOW, TENTHS, CROP = 20, 10, 96
_CONTROLS = ["Re(Haar)", "0.707 orthogonal", "Gaussian with M23's row norms"]
_USUAL = ["orthogonal", "orthogonal, shared", "delta-orthogonal", "Xavier", "He", "PyTorch default"]
_TANH = [*PAIRS][:4] + [*PAIRS.values()][:4] + ["M23 of 40", *_CONTROLS, *_USUAL]
_RELU = ["M23", "M23 x2", "He", "delta-orthogonal x1.41"]
_RESIDUAL = ["M23", "M23, independent", "random spectrum", "He", "PyTorch default", "Fixup"]
_sr = functools.partial(_variants, key="optimizer.lr", prefix="model.")
VARIANTS = (
    _sr("plain tanh", _TANH, ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3"))
    | _sr("plain ReLU", _RELU, ("3e-5", "1e-4", "3e-4", "1e-3"), extra=["model.activation=relu"])
    | _sr("residual ReLU", _RESIDUAL, ("3e-4", "1e-3", "3e-3"), extra=["model.activation=relu", "model.residual=true"])
)


class Watch(Callback):
    """Loss and norm of the whole gradient (before clipping) at every step of a run."""

    def __init__(self):
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_after_backward(self, trainer: object, module: torch.nn.Module) -> None:
        self.norms.append(float(get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))

    def on_train_batch_end(self, trainer: object, module: object, outputs: dict, *rest: object) -> None:
        self.losses.append(float(outputs["loss"]))


@dataclass
class Run:
    """A finished training, or (``result`` None) one that ended in a loss that is not finite."""

    result: FitResult | None
    watch: Watch


@functools.lru_cache(maxsize=2)
def _photos(data: str, scale: int) -> tuple[Pairs, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Training pairs of a section ``data``; for validation the middle of each photo: (lr, hr), hr 96x96."""
    pairs, _, _ = open_data(
        OmegaConf.create({"data": OmegaConf.create(data), "model": {"scale": scale}, "seed": 0}), False
    )
    pictures = []
    for path in find_images(resolve_root("bundled_val")):
        hr = load_image(path)
        y, x = ((n - CROP) // 2 for n in hr.shape[-2:])
        hr = hr[:, y : y + CROP, x : x + CROP]
        pictures.append((downscale(hr, scale), hr))
    return pairs, pictures


def photos(cfg: DictConfig) -> tuple[Pairs, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Training pairs in the order of the run's seed, and the validation pictures; read once for all runs."""
    pairs, pictures = _photos(OmegaConf.to_yaml(cfg.data, resolve=True), cfg.model.scale)
    return _ordered(pairs, cfg.seed), pictures


def _ordered(pairs: Pairs, seed: int) -> Pairs:
    pairs = copy.copy(pairs)
    pairs.seed = seed
    return pairs


def train(cfg: DictConfig) -> Run:
    """One upscaler; a run that diverges is a result, too."""
    watch = Watch()
    try:
        return Run(fit(cfg, (*photos(cfg), {}), keep=False, callbacks=[watch]), watch)
    except TrainingError:
        return Run(None, watch)


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def _bicubic(data: str, scale: int, seed: int, steps: int) -> tuple[torch.Tensor, float]:
    """What bicubic enlargement gives: the L1 loss on the patches of every step, PSNR-Y on the validation pictures."""
    pairs, pictures = _photos(data, scale)
    enlarge, found = BicubicUpsample(scale), []
    for step in range(steps):
        lr, hr = (x.float() / 255 for x in _ordered(pairs, seed)[step])
        found.append(F.l1_loss(enlarge(lr), hr))
    psnr = [psnr_y(enlarge(lr[None])[0], hr, scale) for lr, hr in pictures]
    return torch.stack(found), sum(psnr) / len(psnr)


def measure(run: Run, cfg: DictConfig) -> dict[str, list[Row]]:
    """Losses as parts of bicubic's on the same patches: 1 is bicubic, below is better; infinite where it diverged.

    steps_to_target: steps until the mean of the last 20 is at most 0.97 (all of them where ``reached`` is 0).
    loss_1 … loss_10: means over tenths of the run; the last is the final loss. psnr_gain: dB over bicubic, Y, on the
    middles of the validation photos. gradient_mean and gradient_std: of the gradient's norm over the steps.
    """
    steps = cfg.trainer.max_steps
    expected, psnr = _bicubic(OmegaConf.to_yaml(cfg.data, resolve=True), cfg.model.scale, cfg.seed, steps)
    ratio, gain = torch.full((steps,), math.inf), -math.inf
    if run.result is not None:
        ratio, gain = torch.tensor(run.watch.losses) / expected, run.result.best - psnr
    hit = (ratio.unfold(0, WINDOW, 1).mean(1) <= TARGET).nonzero()
    norms = torch.tensor(run.watch.norms, dtype=torch.float64)
    numbers = {"gradient_mean": norms.mean(), "gradient_std": norms.std()}
    row: Row = {
        "lr": cfg.optimizer.lr,
        "steps_to_target": int(hit[0]) + WINDOW if len(hit) else steps,
        "reached": int(len(hit) > 0),
        "psnr_gain": round(gain, 4),
        **{key: float(f"{value:.4g}") for key, value in numbers.items()},
    }
    parts = [round(float(part.mean()), 5) for part in ratio.tensor_split(TENTHS)]
    row |= {f"loss_{i}": part for i, part in enumerate(parts, start=1)} | {"final_loss": parts[-1]}
    return {"": [row | {"seconds": round(getattr(run.result, "seconds", 0.0), 1)}]}


_experiment = functools.cache(functools.partial(experiments.compose, "m23_study"))


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The experiment ``m23_study`` with ``key=value`` overrides; Hydra reads it once, not for each of 420 runs."""
    return OmegaConf.merge(_experiment(), OmegaConf.from_dotlist(list(overrides)))


STUDY = Study(
    "m23_init_study", None, VARIANTS, measure, seeds=range(5), compose=compose, train=train,
    quick=["trainer.max_steps=60", "trainer.val_every=60"],
)  # fmt: skip

# --- A 24-layer classifier --------------------------------------------------------------------------------


@dataclass
class ClassifierSettings:
    """One classifier. ``seed`` decides weights, order of the digits and, as in the pooling study, the held-out fold."""

    seed: int = 0
    limit: int | None = None
    width: int = 64
    depth: int = 24
    activation: str = "tanh"
    residual: bool = False
    init: str = "m23"
    shared: bool = True
    gain: float = 1.0
    training: ClassifierTraining = field(
        default_factory=lambda: ClassifierTraining(epochs=4, batch=100, precision="fp32", device="cpu")
    )


def compose_classifier(overrides: Sequence[str] = ()) -> DictConfig:
    """``ClassifierSettings`` with ``key=value`` overrides, types checked by OmegaConf."""
    return OmegaConf.merge(OmegaConf.structured(ClassifierSettings), OmegaConf.from_dotlist(list(overrides)))


def train_classifier(cfg: DictConfig) -> ClassifierResult | None:
    """One network of 24 linear layers on the bundled digits; None where it diverged."""
    digits, test = open_pictures("mnist10k", fold=cfg.seed % FOLDS)
    runtime.seed_everything(cfg.seed)
    keys = ("width", "depth", "activation", "residual", "init", "shared", "gain")
    network = PlainMLP(classes=digits.classes, **{key: cfg[key] for key in keys})
    settings = OmegaConf.to_object(cfg.training)
    try:
        return fit_classifier(network, digits.take(slice(cfg.limit)), test, settings, cfg.seed, progress=False)
    except TrainingError:
        return None


def measure_classifier(result: ClassifierResult | None, cfg: DictConfig) -> dict[str, list[Row]]:
    """Accuracy on the held-out fold after every epoch and at the end; chance and an infinite loss where it diverged."""
    lost = [{"test_accuracy": 0.1, "train_loss": math.inf}] * cfg.training.epochs
    history = lost if result is None else result.history
    row: Row = {"lr": cfg.training.lr, "test_accuracy": round(history[-1]["test_accuracy"], 4)}
    row["train_loss"] = round(history[-1]["train_loss"], 5)
    row |= {f"accuracy_{i}": round(r["test_accuracy"], 4) for i, r in enumerate(history, start=1)}
    return {"": [row | {"seconds": round(getattr(result, "seconds", 0), 1)}]}


_digits = functools.partial(_variants, key="training.lr", rates=("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"))
_MLP_TANH = [*PAIRS][:4] + [*PAIRS.values()][:4] + ["0.707 orthogonal", "orthogonal", "Xavier", "He", "PyTorch default"]
_MLP_RELU = ["M23", "M23 x2, independent", "random spectrum x2, independent", "He", "PyTorch default"]
ACCURACY = Study(
    "m23_accuracy", None,
    _digits("plain tanh", _MLP_TANH) | _digits("plain ReLU", _MLP_RELU, extra=["activation=relu"]),
    measure_classifier, seeds=range(5), compose=compose_classifier, train=train_classifier,
    quick=["limit=2000", "training.epochs=2"],
)  # fmt: skip

# --- Loss and schedule of the document --------------------------------------------------------------------

ABLATION_REFERENCE = "frequency loss, stages"
_LOSSES = {"frequency loss": [], "no frequency loss": ["~loss.frequency"]}
_SCHEDULES = {name: [f"optimizer.schedule={name}"] for name in ("stages", "cosine", "constant")}
ABLATION_VARIANTS = {f"{x}, {y}": [*a, *b] for x, a in _LOSSES.items() for y, b in _SCHEDULES.items()}


@torch.no_grad()
def measure_ablation(result: FitResult, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on the validation photos, and both terms of the loss on the middles of them."""
    middles = [(result.model(lr[None]), hr[None]) for lr, hr in photos(cfg)[1]]
    row = {"steps": cfg.trainer.max_steps, "lr": cfg.optimizer.lr} | score(result.model)
    for name in ("charbonnier", "frequency"):
        row[name] = round(sum(float(losses.LOSSES[name](sr, hr)) for sr, hr in middles) / len(middles), 6)
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


def train_ablation(cfg: DictConfig) -> FitResult:
    """One small M23-RLFN."""
    return fit(cfg, (*photos(cfg), {}), keep=False)


ABLATION = Study(
    "m23_ablation", "m23_ablation", ABLATION_VARIANTS, measure_ablation, seeds=range(5), train=train_ablation,
    quick=["trainer.max_steps=30", "trainer.val_every=30"],
)  # fmt: skip

STUDIES = {study.name: study for study in (STUDY, ACCURACY, ABLATION, SIGNAL, LAYERS)}  # the longest first
# What the quick form keeps of each: enough to see every table and the comparison that matters.
_BRIEF = ("M23", "random spectrum", "He")
QUICK_VARIANTS = {
    SIGNAL.name: _BRIEF,
    LAYERS.name: [f"{start}: {SHAPES[1]}" for start in (*_BRIEF, "M23 of 40")],
    STUDY.name: [f"plain tanh: {start}, lr 1e-3" for start in _BRIEF],
    ACCURACY.name: [f"plain tanh: {start}, lr 1e-3" for start in _BRIEF],
    ABLATION.name: [ABLATION_REFERENCE, "no frequency loss, stages"],
}


def _table(name: str, fresh: bool, quick: bool) -> Path:
    study = STUDIES[name]
    if quick:
        study = replace(study, variants={v: study.variants[v] for v in QUICK_VARIANTS[name]})
    return run_study(study, fresh, quick)


def run(
    fresh: bool = False, quick: bool = False, tables: Sequence[str] = tuple(STUDIES), processes: int | None = None
) -> Path:
    """``python -m nbhelpers study m23_init``: five tables, 1,542 runs; about an hour on two cores.

    The networks are too small to share their work between cores, so tables are made side by side in ``processes`` (by
    default as many as there are cores), one core each. The quick form takes half a minute in this process.
    """
    threads = torch.get_num_threads()
    processes = processes or (1 if quick else min(runtime.set_threads(), len(tables)))
    make = functools.partial(_table, fresh=fresh, quick=quick)
    runtime.set_threads(1)
    try:
        if processes == 1:
            paths = [make(name) for name in tables]
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(processes, spawn, runtime.set_threads, (1,)) as pool:
                paths = list(pool.map(make, tables))
    finally:
        torch.set_num_threads(threads)
    return paths[0].parent / "m23_*.csv"
