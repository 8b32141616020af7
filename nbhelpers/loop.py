"""How Lightning runs a training: batches by step, progress bar, sample pictures, checkpoints, the Trainer itself."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from tqdm.auto import tqdm

from .datasets.pairs import loader
from .degrade import upscale_bicubic
from .images import save_image
from .inference import upscale

if TYPE_CHECKING:
    from .pixel import PixelModule

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
SAMPLES, SAMPLE_SIDE = 4, 128  # pictures on a sample sheet, and their side in pixels


def is_main_process() -> bool:
    """False in the helper processes of a distributed run, which must neither write nor print."""
    return rank_zero_only.rank == 0


class StepData(pl.LightningDataModule):
    """Serves ``val_every`` optimizer steps per epoch; epoch e begins at step e·val_every, also after a resume."""

    def __init__(self, pairs: torch.utils.data.Dataset, cfg: DictConfig):
        super().__init__()
        self.pairs, self.cfg = pairs, cfg

    def train_dataloader(self):
        t, d = self.cfg.trainer, self.cfg.data
        per_epoch = t.val_every * t.accumulate_grad_batches
        start = self.trainer.current_epoch * per_epoch
        # Each process of a distributed run reads its own share of the batches.
        world, rank = self.trainer.world_size, self.trainer.global_rank
        pairs = self.pairs if world == 1 else _EveryNth(self.pairs, world, rank)
        workers = d.num_workers if getattr(self.pairs, "paths", None) is not None else 0
        cuda = self.trainer.strategy.root_device.type == "cuda"
        return loader(pairs, start, start + per_epoch, workers, pin_memory=cuda)


class _EveryNth(torch.utils.data.Dataset):
    def __init__(self, pairs: torch.utils.data.Dataset, n: int, k: int):
        self.pairs, self.n, self.k = pairs, n, k

    def __getitem__(self, step: int):
        return self.pairs[step * self.n + self.k]

    def __len__(self) -> int:
        return len(self.pairs) // self.n


class StepBar(Callback):
    """One progress bar for the whole run, in the upscaler's steps, with the last loss and validation score."""

    def on_train_start(self, trainer: pl.Trainer, module: PixelModule) -> None:
        """Begin where a resumed run stands."""
        total, name = module.cfg.trainer.max_steps, str(module.cfg.name)
        hidden = not is_main_process()
        self.bar = tqdm(total=total, initial=module.steps, desc=name, unit="step", disable=hidden)

    def on_train_batch_end(self, trainer: pl.Trainer, module: PixelModule, *rest: object) -> None:
        """Count optimizer steps, not micro-batches."""
        self.bar.update(module.steps - self.bar.n)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: PixelModule) -> None:
        """Show the newest history row; Lightning runs a callback's end of epoch before the module's, too early."""
        if module.history:
            row = module.history[-1]
            self.bar.set_postfix_str(f"loss {row['train_loss']:.5f}, validation {row['val_psnr_y']:.2f} dB")

    def on_train_end(self, trainer: pl.Trainer, module: PixelModule) -> None:
        """Show the last row."""
        self.on_train_epoch_start(trainer, module)

    def teardown(self, trainer: pl.Trainer, module: PixelModule, stage: str) -> None:
        """Close the bar also after an error."""
        if hasattr(self, "bar"):
            self.bar.close()


class SamplePictures(Callback):
    """Every ``trainer.sample_every`` steps: ``samples/step_000250.png`` in the run's folder, and in TensorBoard.

    One row per validation picture (its centre): bicubic, network, original.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "samples"

    def on_train_epoch_end(self, trainer: pl.Trainer, module: PixelModule) -> None:
        """Lightning's epoch is ``trainer.val_every`` steps."""
        step = module.steps
        if step % module.cfg.trainer.sample_every or not is_main_process() or not module.validation:
            return
        scale = module.final.scale  # a network for any scale is validated at others too
        pairs = [(lr, hr) for lr, hr in module.validation if hr.shape[-1] == lr.shape[-1] * scale]
        sheet = sample_sheet(module.final, pairs[:SAMPLES])
        save_image(sheet, self.folder / f"step_{step:06d}.png")
        if trainer.logger:
            trainer.logger.experiment.add_image("bicubic, network, original", sheet, step)


def sample_sheet(model: torch.nn.Module, pairs: list[tuple[Tensor, Tensor]], side: int = SAMPLE_SIDE) -> Tensor:
    """Centres of (lr, hr) pictures as one picture "3 rows·h 3·w" in [0, 1]: bicubic | network | original."""
    scale = model.scale
    n = min(side // scale, *(s for lr, _ in pairs for s in lr.shape[-2:]))
    rows = []
    for lr, hr in pairs:
        y, x = ((s - n) // 2 for s in lr.shape[-2:])
        small = lr[:, y : y + n, x : x + n]
        big = hr[:, y * scale : (y + n) * scale, x * scale : (x + n) * scale]
        rows.append(torch.cat([upscale_bicubic(small, scale).clamp(0, 1), upscale(model, small), big], 2))
    return torch.cat(rows, 1)


def _tensorboard(folder: Path) -> object:
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError:
        return False  # training works without TensorBoard; history.csv holds the same curves


def _checkpoints(cfg: DictConfig, folder: Path) -> list[Callback]:
    keep = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val_psnr_y", mode="max", save_top_k=1, **keep)
    out = [best, ModelCheckpoint(filename="last", save_top_k=1, **keep)]
    t = cfg.trainer
    if t.save_every:
        every = max(1, t.save_every // t.val_every)
        # Lightning tells the states of its callbacks apart by such settings; here the mode has no other use.
        name = {"filename": "step_{step}", "auto_insert_metric_name": False, "mode": "max"}
        out.append(ModelCheckpoint(every_n_epochs=every, save_top_k=-1, **name, **keep))
    return out


def common_options(device: torch.device, precision: str) -> dict[str, object]:
    """What every Trainer of ours is given."""
    return {
        "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
        "precision": LIGHTNING_PRECISION[precision],
        "enable_model_summary": False,
        "log_every_n_steps": 50,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # our data already deals the batches out
    }


def fit(make: Callable[[], pl.Trainer], stopped: Callable[[], str], *what, **how) -> None:
    """``fit(*what, **how)`` of the Trainer that ``make`` gives, without Lightning's hints.

    Raises KeyboardInterrupt with the words of ``stopped`` on Ctrl-C.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric).*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = make()
        try:
            trainer.fit(*what, **how)
        except SystemExit:  # Lightning's answer to Ctrl-C; a notebook's kernel must survive it
            if not trainer.interrupted:
                raise
    if trainer.interrupted:
        raise KeyboardInterrupt(stopped())


def trainer_for(
    cfg: DictConfig, folder: Path | None, device: torch.device, precision: str, more: Sequence[Callback] = ()
) -> pl.Trainer:
    """The Trainer of a run, with ``more`` callbacks; without a folder it writes nothing."""
    t, adversarial = cfg.trainer, OmegaConf.select(cfg, "adversarial") is not None
    callbacks: list[Callback] = [StepBar(), *more] if t.progress else list(more)
    if folder:
        callbacks += _checkpoints(cfg, folder)
        if t.sample_every:
            callbacks.append(SamplePictures(folder))
    strategy = t.strategy
    if adversarial and strategy == "auto" and (t.devices != 1 or t.num_nodes != 1):
        strategy = "ddp_find_unused_parameters_true"  # each step trains one of two networks
    return pl.Trainer(
        max_epochs=math.ceil(t.max_steps / t.val_every),
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=strategy,
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=None if adversarial else t.gradient_clip_val,  # with two optimizers the module clips
        logger=_tensorboard(folder) if folder else False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        **common_options(device, precision),
    )
