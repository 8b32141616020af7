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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from torch.nn.utils import get_total_norm

from .. import losses, runtime
from ..classification import ClassifierResult, ClassifierTraining, fit_classifier
from ..datasets.classification import FOLDS, open_pictures
from ..datasets.pairs import Pairs, open_pairs, resolve_root
from ..degrade import crop_to_multiple, downscale
from ..experiments import TrainingError
from ..images import find_images, load_image
from ..layers import BicubicUpsample
from ..metrics import psnr_y
from ..models.plain import PlainMLP
from ..training import FitResult, fit
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
WINDOW, TENTHS, CROP = 20, 10, 128
_CONTROLS = ["Re(Haar)", "0.707 orthogonal", "Gaussian with M23's row norms"]
_USUAL = ["orthogonal", "orthogonal, shared", "delta-orthogonal", "Xavier", "He", "He, shared", "PyTorch default"]
_TANH = [*PAIRS][:4] + [*PAIRS.values()][:4] + ["M23 of 40", *_CONTROLS, *_USUAL]
_RELU = ["M23", "M23 x2", "He", "delta-orthogonal x1.41"]
_RESIDUAL = ["M23", "M23, independent", "random spectrum", "random spectrum, independent", "He", "PyTorch default"]
_RESIDUAL += ["Fixup"]
_sr = functools.partial(_variants, key="optimizer.lr", prefix="model.")
VARIANTS = (
    _sr("plain tanh", _TANH, ("1e-4", "3e-4", "1e-3"))
    | _sr("plain ReLU", _RELU, ("1e-4", "3e-4", "1e-3"), extra=["model.activation=relu"])
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
def _photos(roots: tuple[str, ...], scale: int, patch: int, batch: int) -> tuple[Pairs, list]:
    """Training pairs, and for validation the middle of each photo: (lr, hr) pictures, hr 128x128."""
    pairs, _ = open_pairs(list(roots), scale, patch=patch, batch=batch, progress=False)
    pictures = []
    for path in find_images(resolve_root("bundled_val")):
        hr = load_image(path)
        y, x = ((n - CROP) // 2 for n in hr.shape[-2:])
        hr = crop_to_multiple(hr[:, y : y + CROP, x : x + CROP], scale)
        pictures.append((downscale(hr, scale), hr))
    return pairs, pictures


def _data(cfg: DictConfig) -> tuple[Pairs, list]:
    pairs, pictures = _photos(tuple(cfg.data.roots), cfg.model.scale, cfg.data.patch, cfg.data.batch)
    pairs = copy.copy(pairs)
    pairs.seed = cfg.seed
    return pairs, pictures


def train(cfg: DictConfig) -> Run:
    """One upscaler; a run that diverges is a result, too."""
    watch = Watch()
    try:
        return Run(fit(cfg, (*_data(cfg), {}), keep=False, callbacks=[watch]), watch)
    except TrainingError:
        return Run(None, watch)


@torch.no_grad()
def bicubic_losses(cfg: DictConfig) -> torch.Tensor:
    """The L1 loss of bicubic enlargement on the patches of every step."""
    pairs, _ = _data(cfg)
    bicubic, found = BicubicUpsample(cfg.model.scale), []
    for step in range(cfg.trainer.max_steps):
        lr, hr = (x.float() / 255 for x in pairs[step])
        found.append((bicubic(lr) - hr).abs().mean())
    return torch.stack(found)


@functools.lru_cache(maxsize=8)
def _bicubic(data: str, scale: int, seed: int, steps: int) -> torch.Tensor:
    cfg = {"data": OmegaConf.create(data), "model": {"scale": scale}, "seed": seed, "trainer": {"max_steps": steps}}
    return bicubic_losses(OmegaConf.create(cfg))


def measure(run: Run, cfg: DictConfig) -> dict[str, list[Row]]:
    """Losses as parts of bicubic's on the same patches: 1 is bicubic, below is better; infinite where it diverged.

    steps_to_target: steps until the mean of the last 20 is at most 0.97 (all of them where ``reached`` is 0).
    loss_1 … loss_10: means over tenths of the run; the last is the final loss. psnr_gain: dB over bicubic, Y, on the
    middles of the validation photos. gradient_std and gradient_mean: of the gradient's norm over the steps.
    """
    steps = cfg.trainer.max_steps
    data = OmegaConf.to_yaml(cfg.data, resolve=True)
    ratio = torch.full((steps,), math.inf)
    if run.result is not None:
        ratio = torch.tensor(run.watch.losses) / _bicubic(data, cfg.model.scale, cfg.seed, steps)
    hit = (ratio.unfold(0, min(WINDOW, steps), 1).mean(1) <= TARGET).nonzero()
    norms = torch.tensor(run.watch.norms, dtype=torch.float64)
    row: Row = {
        "lr": cfg.optimizer.lr,
        "steps_to_target": int(hit[0]) + min(WINDOW, steps) if len(hit) else steps,
        "reached": int(len(hit) > 0),
        "psnr_gain": -math.inf if run.result is None else round(run.result.best - _bicubic_psnr(cfg), 4),
        "gradient_mean": float(f"{norms.mean():.4g}"),
        "gradient_std": float(f"{norms.std():.4g}"),
        "gradient_first": float(f"{norms[0]:.4g}"),
    }
    parts = [float(part.mean()) for part in ratio.tensor_split(TENTHS) if len(part)]
    row |= {f"loss_{i}": round(part, 5) for i, part in enumerate(parts, start=1)}
    return {
        "": [row | {"final_loss": row[f"loss_{len(parts)}"], "seconds": round(getattr(run.result, "seconds", 0), 1)}]
    }


def _bicubic_psnr(cfg: DictConfig) -> float:
    _, pictures = _data(cfg)
    bicubic = BicubicUpsample(cfg.model.scale)
    return sum(psnr_y(bicubic(lr[None])[0], hr, cfg.model.scale) for lr, hr in pictures) / len(pictures)


STUDY = Study(
    "m23_init_study", "m23_study", VARIANTS, measure, seeds=range(5), train=train,
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


_digits = functools.partial(_variants, key="training.lr", rates=("3e-4", "1e-3", "3e-3"))
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
_NO_FREQUENCY = "~loss.frequency"
_SCHEDULES = {"stages": [], "cosine": ["optimizer.schedule=cosine"], "constant": ["optimizer.schedule=constant"]}
ABLATION_VARIANTS: Mapping[str, list[str]] = {
    f"{'frequency loss' if weighted else 'no frequency loss'}, {name}": [*extra, *([] if weighted else [_NO_FREQUENCY])]
    for weighted in (True, False)
    for name, extra in _SCHEDULES.items()
} | {
    f"no frequency loss, {name}, lr / 4": [*extra, _NO_FREQUENCY, "optimizer.lr=5e-4"]
    for name, extra in _SCHEDULES.items()
}


@torch.no_grad()
def measure_ablation(result: FitResult, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on the validation photos, and both terms of the loss on the middles of them."""
    middles = [(result.model(lr[None]), hr[None]) for lr, hr in _data(cfg)[1]]
    row = {"steps": cfg.trainer.max_steps, "lr": cfg.optimizer.lr} | score(result.model)
    for name in ("charbonnier", "frequency"):
        row[name] = round(sum(float(losses.LOSSES[name](sr, hr)) for sr, hr in middles) / len(middles), 6)
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


def train_ablation(cfg: DictConfig) -> FitResult:
    """One small M23-RLFN."""
    return fit(cfg, (*_data(cfg), {}), keep=False)


ABLATION = Study(
    "m23_ablation", "m23_ablation", ABLATION_VARIANTS, measure_ablation, seeds=range(5), train=train_ablation,
    quick=["trainer.max_steps=30", "trainer.val_every=30"],
)  # fmt: skip

STUDIES = (SIGNAL, LAYERS, STUDY, ACCURACY, ABLATION)
# What the quick form keeps of each: enough to see every table and the comparison that matters.
_BRIEF = ("M23", "random spectrum", "He")
QUICK_VARIANTS = {
    SIGNAL.name: _BRIEF,
    LAYERS.name: [f"{start}: {SHAPES[1]}" for start in (*_BRIEF, "M23 of 40")],
    STUDY.name: [f"plain tanh: {start}, lr 1e-3" for start in _BRIEF],
    ACCURACY.name: [f"plain tanh: {start}, lr 1e-3" for start in _BRIEF],
    ABLATION.name: [ABLATION_REFERENCE, "no frequency loss, stages"],
}


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study m23_init``: five tables; 35 minutes on two cores, the quick form one."""
    runtime.set_threads()
    for study in STUDIES:
        if quick:
            study = replace(study, variants={name: study.variants[name] for name in QUICK_VARIANTS[study.name]})
        path = run_study(study, fresh, quick)
    return path.parent / "m23_*.csv"
