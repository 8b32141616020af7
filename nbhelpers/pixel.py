"""The Lightning module of pixel training: loss, averaged weights, validation, history."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import runtime
from .experiments import TrainingError
from .inference import upscale
from .loop import is_main_process
from .losses import WeightedLoss
from .metrics import lpips_squeeze, psnr_y

STAGES = (1.0, 0.5, 0.25)  # document 000: 2e-4, 1e-4, 5e-5, a third of the run each


class Means:
    """Running means of named numbers, between one row of the history and the next."""

    def __init__(self):
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, **values: float) -> None:
        """Count each number once more."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def take(self, names: Iterable[str]) -> dict[str, float]:
        """Means of ``names``, NaN for one that was never added; begins anew."""
        sums, self._sums = self._sums, {}
        return {n: sums[n][0] / sums[n][1] if n in sums else math.nan for n in names}


def adam(groups: list[dict], o: DictConfig, total: int) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam and its schedule over ``total`` steps, from parameter groups and an ``optimizer`` section.

    Schedule ``stages`` keeps ``lr`` times each number of the optional list ``stages`` for an equal share of the steps.
    """
    stages = OmegaConf.select(o, "stages") or STAGES

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (o.warmup_steps + 1))
        if o.schedule == "constant":
            return rise
        if o.schedule == "stages":
            return rise * stages[min(len(stages) - 1, step * len(stages) // total)]
        done = min(1.0, step / total)
        return rise * (o.final_factor + (1 - o.final_factor) * 0.5 * (1 + math.cos(math.pi * done)))

    optimizer = torch.optim.Adam(groups, lr=o.lr, betas=tuple(o.betas), weight_decay=o.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class PixelModule(pl.LightningModule):
    """Trains an upscaler on a pixel loss; keeps an exponential average of its weights, which is what is validated.

    Batches are (lr, hr) uint8 "b 3 h w". ``validation`` is a list of (lr, hr) float pictures "3 h w" in [0, 1].
    """

    layout = torch.channels_last

    def __init__(
        self,
        model: nn.Module,
        cfg: DictConfig,
        validation: Sequence[tuple[Tensor, Tensor]] = (),
        history_file: Path | None = None,
    ):
        super().__init__()
        self.model, self.cfg, self.validation, self.history_file = model, cfg, list(validation), history_file
        self.loss = WeightedLoss(cfg.loss)
        decay = cfg.optimizer.ema_decay
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        if self.average is not None:
            self.average.requires_grad_(False)  # DDP waits for a gradient of every parameter that could have one
        self.history: list[dict[str, float]] = []
        self.means = Means()
        self.seconds, self._started = 0.0, time.perf_counter()

    @property
    def final(self) -> nn.Module:
        """The weights to keep: the average where there is one."""
        return self.average.module if self.average is not None else self.model

    @property
    def steps(self) -> int:
        """Steps of the upscaler's optimizer so far."""
        return self.global_step

    @property
    def columns(self) -> list[str]:
        """What the history gives the mean of: the loss, and its terms where there are several."""
        return ["train_loss", *(self.cfg.loss if len(self.cfg.loss) > 1 else ())]

    def configure_optimizers(self):
        optimizer, schedule = self.upscaler_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def upscaler_optimizer(self) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
        """Adam and schedule of the section ``optimizer``; the last layer may have a rate of its own."""
        o = self.cfg.optimizer
        last = list(self.model.to_subpixels.parameters()) if o.last_layer_factor != 1 else []
        ids = {id(p) for p in last}
        groups = [{"params": [p for p in self.model.parameters() if id(p) not in ids]}]
        if last:
            groups.append({"params": last, "lr": o.lr * o.last_layer_factor})
        return adam(groups, o, self.cfg.trainer.max_steps)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        # Reseeding per step keeps anything random inside a network or a loss the same after a resume.
        torch.manual_seed(self.cfg.seed * 1_000_003 + self.trainer.current_epoch * 100_003 + batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        lr, hr = (x.float().div_(255) for x in batch)
        return self.objective(lr, hr)[1]

    def predict(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        """(sr, what it should be): all of ``hr``, or the part of it that is trained on in this step."""
        return self.model(lr), hr

    def objective(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        """(sr, loss) of one step; lr and hr "b 3 h w" in [0, 1]. Needs no Trainer."""
        sr, hr = self.predict(lr.contiguous(memory_format=self.layout), hr)
        sr = sr.float()
        total, terms = self.loss(sr, hr)
        advice = f"lower optimizer.lr (now {self.cfg.optimizer.lr}) or set trainer.gradient_clip_val"
        self.note("the loss", advice, train_loss=total, **terms)
        return sr, total

    def note(self, what: str, advice: str, **values: Tensor) -> None:
        """Add scalars to the history's means; TrainingError, saying what to do, where one is not finite."""
        numbers = dict(zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist(), strict=True))
        if not all(map(math.isfinite, numbers.values())):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            raise TrainingError(
                f"{what} became {next(iter(numbers.values()))} at step {self.steps} ({parts}); the last good state is "
                f"kept in last.ckpt: {advice}, then start with resume=never"
            )
        self.means.add(**numbers)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.average is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.average.update_parameters(self.model)

    def on_train_epoch_end(self) -> None:
        # One "epoch" is trainer.val_every steps: validate, note the history row, then Lightning writes its checkpoint.
        scores = self.validate()
        self.seconds += time.perf_counter() - self._started
        self._started = time.perf_counter()
        row = {"step": self.steps, **self.means.take(self.columns), **scores, **self.rates()}
        self.history.append(row | {"seconds": round(self.seconds, 1)})
        if self.history_file and is_main_process():
            runtime.write_csv(self.history_file, self.history)  # whole, so a resumed run continues the same file
        # "step" is what Lightning names checkpoints and TensorBoard places points by.
        self.log_dict({k: float(v) for k, v in row.items()}, rank_zero_only=True)

    def rates(self) -> dict[str, float]:
        """Learning rates for the history."""
        return {"lr": self.trainer.optimizers[0].param_groups[0]["lr"]}

    def validate(self) -> dict[str, float]:
        """Mean PSNR-Y in dB over the validation pictures, in fp32; with ``trainer.val_lpips`` also LPIPS-Squeeze.

        NaN without pictures, and for LPIPS without its weights. Raises TrainingError where the network gives NaN.
        """
        return self.scores(self.final, self.validation)

    def scores(self, network: nn.Module, pictures: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """:meth:`validate` of a network on (lr, hr) pictures."""
        psnr, lpips = [], []
        for lr, hr in pictures:
            sr = upscale(network, lr)
            psnr.append(psnr_y(sr, hr, network.scale))
            if math.isnan(psnr[-1]):
                raise TrainingError(
                    f"the network gives NaN at step {self.steps}: its weights are damaged; the last good state is "
                    "kept in last.ckpt: lower optimizer.lr, then start with resume=never"
                )
            if self.cfg.trainer.val_lpips:
                lpips.append(lpips_squeeze(sr, hr))
        scores = {"val_psnr_y": _mean(psnr)}
        return scores | ({"val_lpips": _mean(lpips)} if self.cfg.trainer.val_lpips else {})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["nb_history"] = {"rows": self.history, "seconds": self.seconds}
        checkpoint["global_step"] = self.steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = list(checkpoint["nb_history"]["rows"])
        self.seconds = checkpoint["nb_history"]["seconds"]

    def on_fit_start(self) -> None:
        self._started = time.perf_counter()


def _mean(values: Sequence[float | None]) -> float:
    return math.nan if not values or None in values else sum(values) / len(values)


class StepTrainer:
    """One step at a time, for looking at a training from a notebook; the steps are those of :func:`training.fit`.

    Document 000's ``SRTrainer``, without checkpoints and validation. ``model`` is trained in place, on the device it
    is on; ``final`` is what ``fit`` would return (averaged weights). Only the seed of each step, which counts where a
    network or loss draws at random, is left to the caller.
    """

    def __init__(self, model: nn.Module, cfg: DictConfig):
        self.module, self.clip = PixelModule(model, cfg), cfg.trainer.gradient_clip_val
        self.optimizer, self.schedule = self.module.upscaler_optimizer()
        self.device = next(model.parameters()).device
        wanted = runtime.pick_precision(self.device, cfg.trainer.precision)
        self.precision = "fp32" if wanted == "fp16" else wanted  # fp16 would need its gradients scaled

    @property
    def final(self) -> nn.Module:
        """The network with averaged weights, where ``optimizer.ema_decay`` asks for them."""
        return self.module.final

    def train_step(self, lr: Tensor, hr: Tensor) -> dict[str, float]:
        """One optimizer step on a batch lr "b 3 h w", hr "b 3 h·scale w·scale", both uint8 as ``open_pairs`` gives.

        Returns ``loss``, ``psnr`` (mean PSNR-Y of the batch in dB, before the step) and ``lr``, the rate of this step.
        Raises TrainingError where the loss is not finite.
        """
        lr, hr = (x.to(self.device).float().div_(255) for x in (lr, hr))
        rate = self.optimizer.param_groups[0]["lr"]
        with runtime.autocast(self.device, self.precision):
            sr, loss = self.module.objective(lr, hr)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.module.average is not None:
            self.module.average.update_parameters(self.module.model)
        scores = [psnr_y(a, b, self.module.model.scale) for a, b in zip(sr, hr, strict=True)]
        return {"loss": loss.item(), "psnr": _mean(scores), "lr": rate}
