"""Adversarial training (document 002): the upscaler against a discriminator, two optimizers in one Lightning module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from . import checkpoints, models, probes, runtime
from .experiments import TrainingError
from .losses import SHIFTS, discriminator_loss, generator_loss, random_shift_crop
from .pixel import PixelModule, adam

LEAST_LOGITS = 2  # per side: batch norm needs more than one value


class AdversarialModule(PixelModule):
    """Trains an upscaler on its loss plus ``adversarial.weight`` times the adversarial term, and the discriminator.

    A step is one step of the generator, then ``adversarial.d_steps`` of the discriminator on the same batch, each
    with a shift crop of its own. Steps of the run, its history and checkpoints count the generator's. Networks run
    under the trainer's precision, losses in fp32. The discriminator sees the generated picture unclamped.
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        cfg: DictConfig,
        validation: Sequence[tuple[Tensor, Tensor]] = (),
        history_file: Path | None = None,
    ):
        super().__init__(model, cfg, validation, history_file)
        self.automatic_optimization = False
        self.discriminator = discriminator
        self._flat = probes.probe_patches(model.scale)["flat"]
        self._steps = 0

    @property
    def steps(self) -> int:
        """Steps of the generator; Lightning's own count has the discriminator's in it."""
        return self._steps

    @property
    def playing(self) -> bool:
        """Whether the next step has the adversarial term and trains the discriminator."""
        return self.cfg.adversarial.weight > 0 and self.steps >= self.cfg.adversarial.start_step

    @property
    def columns(self) -> list[str]:
        """The pixel training's, the game's and both gradient norms (before clipping)."""
        game = ("g_gan", "d_loss", "d_accuracy", "logit_gap", "g_grad_norm", "d_grad_norm")
        return [*super().columns, *game]

    def configure_optimizers(self):
        a = self.cfg.adversarial
        total = max(1, self.cfg.trainer.max_steps - a.start_step)
        g, g_schedule = self.upscaler_optimizer()
        d, d_schedule = adam([{"params": list(self.discriminator.parameters())}], a.optimizer, total)
        return [g, d], [g_schedule, d_schedule]

    def rates(self) -> dict[str, float]:
        """Both learning rates for the history."""
        return super().rates() | {"d_lr": self.trainer.optimizers[1].param_groups[0]["lr"]}

    def judge(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (fp32) of generated and real pictures "b 3 h w", in one pass or two, after one shift crop."""
        a = self.cfg.adversarial
        if a.shift_crop:
            fake, real = random_shift_crop(fake, real)
        if a.joint:
            both = torch.cat([fake, real]).contiguous(memory_format=self.layout)
            fake_logits, real_logits = self.discriminator(both).float().chunk(2)
        else:
            fake_logits, real_logits = (
                self.discriminator(x.contiguous(memory_format=self.layout)).float() for x in (fake, real)
            )
        return fake_logits, real_logits

    def generator_objective(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        """(sr, loss) of one generator step; lr and hr "b 3 h w" in [0, 1]. Needs no Trainer."""
        sr = self.model(lr.contiguous(memory_format=self.layout)).float()
        total, terms = self.loss(sr, hr)
        if self.playing:
            self.discriminator.requires_grad_(False)
            fake, real = self.judge(sr, hr)
            # In a joint pass batch norm ties the original's logits to the generated picture; spoiling them is no aim.
            terms["g_gan"] = generator_loss(self.cfg.adversarial.loss, fake, real.detach())
            total = total + self.cfg.adversarial.weight * terms["g_gan"]
        advice = f"lower optimizer.lr (now {self.cfg.optimizer.lr}) or adversarial.weight"
        self.note("the generator's loss", advice, train_loss=total, **terms)
        return sr, total

    def discriminator_objective(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Loss of one discriminator step; sr (without gradient) and hr "b 3 h w". Needs no Trainer."""
        self.discriminator.requires_grad_(True)
        fake, real = self.judge(sr, hr)
        loss = discriminator_loss(self.cfg.adversarial.loss, fake, real)
        with torch.no_grad():
            state = {"d_accuracy": (real > fake).float().mean(), "logit_gap": (real - fake).mean()}
        rate = self.cfg.adversarial.optimizer.lr
        advice = f"lower adversarial.optimizer.lr (now {rate}) or set adversarial.gradient_clip_val"
        self.note("the discriminator's loss", advice, d_loss=loss, **state)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        lr, hr = (x.float().div_(255) for x in batch)
        (g, d), (g_schedule, d_schedule) = self.optimizers(), self.lr_schedulers()
        playing = self.playing
        sr, loss = self.generator_objective(lr, hr)
        self._optimize(g, loss)
        g_schedule.step()
        if playing:
            for _ in range(self.cfg.adversarial.d_steps):
                self._optimize(d, self.discriminator_objective(sr.detach(), hr))
            d_schedule.step()
        self._steps += 1

    def _optimize(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning calls this after fp16 gradients are scaled back, so norms and clipping are in true units.
        is_d = optimizer is self.trainer.optimizers[1]
        clip = (self.cfg.adversarial if is_d else self.cfg.trainer).gradient_clip_val
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, clip or math.inf))
        if math.isfinite(norm):
            self.means.add(**{"d_grad_norm" if is_d else "g_grad_norm": norm})
        elif getattr(self.trainer.precision_plugin, "scaler", None) is None:  # fp16's scaler leaves such a step out
            who, key = ("discriminator", "adversarial.optimizer.lr") if is_d else ("generator", "optimizer.lr")
            raise TrainingError(
                f"the {who}'s gradient became {norm} at step {self.steps}; the last good state is kept in last.ckpt: "
                f"lower {key}, then start with resume=never"
            )

    def validate(self) -> dict[str, float]:
        """The pixel training's scores and ``flat_energy``, what is added to flat patches (see ``probes``)."""
        return super().validate() | {"flat_energy": probes.measure(self.final, {"flat": self._flat})["flat"]["energy"]}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._steps = checkpoint["global_step"]


def build_discriminator(cfg: DictConfig) -> nn.Module:
    """The discriminator of an experiment at the start of its training; seeded, or read from ``adversarial.init_from``.

    Raises TrainingError where it does not fit the generator: patches it cannot judge, a file of another scale,
    another size, or of an upscaler; ValueError for unknown arguments.
    """
    a = cfg.adversarial
    runtime.seed_everything(cfg.seed)
    arguments = OmegaConf.to_container(a.model, resolve=True)
    network = models.build(a.arch, models.DISCRIMINATORS, **arguments)
    _check_patch(cfg, network)
    if a.init_from:
        _check_card(cfg, arguments)
        checkpoints.load_weights(network, runtime.CHECKPOINTS / f"{a.init_from}.safetensors")
    return network.to(memory_format=torch.channels_last)


def _check_patch(cfg: DictConfig, network: nn.Module) -> None:
    side, cell = cfg.data.patch * cfg.model.scale, network.cell
    cut = SHIFTS - 1 if cfg.adversarial.shift_crop else 0
    if side % cell or (side - cut) // cell < LEAST_LOGITS:
        least = -(-(LEAST_LOGITS * cell + cut) // cell) * cell
        shifted = " with adversarial.shift_crop" if cut else ""
        raise TrainingError(
            f"data.patch={cfg.data.patch} at model.scale={cfg.model.scale} gives originals of {side}x{side} pixels, "
            f"but {cfg.adversarial.arch} judges blocks of {cell}x{cell}: it needs a multiple of {cell}, at least "
            f"{least}{shifted}"
        )


def _check_card(cfg: DictConfig, arguments: dict) -> None:
    name = cfg.adversarial.init_from
    card = checkpoints.card(name)
    kind = card.get("kind", "upscaler")
    if kind != "discriminator":
        raise TrainingError(
            f"adversarial.init_from={name} is of kind {kind}, not a discriminator; use a NAME_discriminator"
        )
    if card["scale"] != cfg.model.scale:
        raise TrainingError(
            f"adversarial.init_from={name} judges pictures enlarged x{card['scale']}, but the generator {cfg.arch} "
            f"enlarges x{cfg.model.scale}; choose a discriminator of that scale or adversarial.init_from=null"
        )
    free = {"dropout"}  # has no weights
    before, now = ({k: v for k, v in x.items() if k not in free} for x in (card["arguments"], arguments))
    if (card["arch"], before) != (cfg.adversarial.arch, now):
        raise TrainingError(
            f"adversarial.init_from={name} is a {card['arch']} with {before}, but adversarial.arch and "
            f"adversarial.model describe a {cfg.adversarial.arch} with {now}; make them the same"
        )
