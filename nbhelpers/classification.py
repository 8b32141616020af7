"""Training of classifiers with pytorch-lightning: one module and one ``fit_classifier`` for every study of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from . import loop, runtime
from .datasets.classification import LabelledPictures, batch_loader
from .experiments import TrainingError


@dataclass
class ClassifierTraining:
    """How a classifier is trained: Adam, one learning-rate cycle (up to ``lr`` over a fifth of the steps, then down to
    zero), the last epoch's weights. ``precision`` and ``device`` as in ``runtime``."""

    epochs: int = 12
    batch: int = 128
    lr: float = 1e-2
    weight_decay: float = 0.0
    precision: str = "auto"
    device: str = "auto"


@dataclass
class ClassifierResult:
    """The network of the last epoch (on the CPU, eval), one history row per epoch, seconds of training and testing."""

    model: nn.Module
    history: list[dict[str, float]]
    steps: int
    seconds: float


def to_float(images: Tensor) -> Tensor:
    """uint8 "b c h w" → float in [0, 1], channels last."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate_classifier(model: nn.Module, pictures: LabelledPictures, batch: int = 500) -> dict[str, float]:
    """``accuracy`` (share of right answers, 0…1) and mean cross-entropy ``loss`` in fp32; leaves ``model`` in eval."""
    device = next(model.parameters()).device
    accuracy = MulticlassAccuracy(pictures.classes, average="micro").to(device)
    loss = MeanMetric().to(device)
    model.eval()
    with torch.autocast(device.type, enabled=False):
        for rows in torch.arange(len(pictures)).split(batch):
            images, labels = (x.to(device) for x in pictures[rows])
            logits = model(to_float(images))
            accuracy.update(logits, labels)
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
    return {"accuracy": float(accuracy.compute()), "loss": float(loss.compute())}


class ClassifierModule(pl.LightningModule):
    """Trains ``model`` ("b c h w" in [0, 1] → logits) on batches (uint8 images, labels) with cross-entropy.

    ``test`` is scored after every epoch for the record; nothing is chosen by it. A subclass may have an ``optimizer``,
    ways to ``prepare`` training pictures and ``scores`` of its own.
    """

    def __init__(self, model: nn.Module, settings: ClassifierTraining, test: LabelledPictures):
        super().__init__()
        self.model, self.settings, self.test = model, settings, test
        self.history: list[dict[str, float]] = []
        self.epoch_loss = MeanMetric(nan_strategy="disable")  # a NaN must show

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), self.settings.lr, weight_decay=self.settings.weight_decay)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 training pictures as the network gets them."""
        return to_float(images)

    def scores(self) -> dict[str, float]:
        """What is measured after an epoch; leaves the network in eval mode."""
        return {f"test_{key}": value for key, value in evaluate_classifier(self.model, self.test).items()}

    def configure_optimizers(self):
        optimizer, steps = self.optimizer(), self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.settings.lr, steps, pct_start=0.2, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(self.prepare(images)).float(), labels)
        self.epoch_loss.update(loss.detach(), len(labels))
        return loss

    def on_train_epoch_end(self) -> None:
        loss = float(self.epoch_loss.compute())
        self.epoch_loss.reset()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in epoch {self.current_epoch + 1} (learning rate {self.settings.lr}); lower lr"
            )
        scores = self.scores()
        self.model.train()
        self.history.append({"epoch": self.current_epoch + 1, "step": self.global_step, "train_loss": loss, **scores})


def fit_classifier(
    model: nn.Module,
    train: LabelledPictures,
    test: LabelledPictures,
    settings: ClassifierTraining,
    seed: int = 0,
    progress: bool = True,
) -> ClassifierResult:
    """Train ``model`` in place; ``seed`` decides the order of the pictures (seed before building the network).

    Nothing is written. Raises TrainingError for impossible settings or a loss that is not finite, DataError for a
    batch larger than the data, ValueError for an unknown device or precision; KeyboardInterrupt on Ctrl-C.
    """
    _check(settings)
    device = runtime.pick_device(settings.device)
    precision = runtime.pick_precision(device, settings.precision)
    batches = batch_loader(train, settings.batch, seed)
    module = ClassifierModule(model.to(memory_format=torch.channels_last), settings, test)
    started = time.perf_counter()
    loop.fit(
        lambda: _trainer(settings, device, precision, progress),
        lambda: f"stopped in epoch {module.current_epoch + 1}; nothing was kept",
        module,
        batches,
    )
    seconds = time.perf_counter() - started
    return ClassifierResult(module.model.cpu().eval(), module.history, module.global_step, seconds)


def _check(settings: ClassifierTraining) -> None:
    if settings.epochs < 1:
        raise TrainingError(f"epochs={settings.epochs} must be at least 1")
    if not settings.lr > 0:
        raise TrainingError(f"lr={settings.lr} must be above 0")


def _trainer(settings: ClassifierTraining, device: torch.device, precision: str, progress: bool) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=settings.epochs,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        **loop.common_options(device, precision),
    )
