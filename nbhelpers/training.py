"""Training with pytorch-lightning: one module, one ``fit`` for every experiment, exact resume, the exported card."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoints, models, runtime
from .datasets.pairs import loader, open_pairs, read_photos, resolve_root
from .degrade import crop_to_multiple, downscale
from .images import find_images
from .losses import WeightedLoss
from .metrics import protocol, psnr_y

CONFIGS = Path(__file__).resolve().parent / "configs"
LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class TrainingError(RuntimeError):
    """A run that cannot go on (loss not finite, another configuration in its folder); says what to do."""


def compose(experiment: str | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration the command line would use: ``configs/train.yaml`` + experiment + overrides.

    Raises TrainingError for an unknown experiment or key, listing the experiments there are.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    first = [f"experiment={experiment}"] if experiment else []
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra_compose("train", [*first, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise TrainingError(f"{error}\nexperiments: {experiments()}; all keys: `nbhelpers train --show`") from None


def experiments() -> list[str]:
    """Names of the experiments under ``configs/experiment``."""
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))


class PixelModule(pl.LightningModule):
    """Trains an upscaler on a pixel loss; keeps an exponential average of its weights, which is what is validated.

    Batches are (lr, hr) uint8 "b 3 h w". ``validation`` is a list of (lr, hr) float pictures "3 h w" in [0, 1].
    """

    def __init__(self, model: nn.Module, cfg: DictConfig, validation: Sequence[tuple[Tensor, Tensor]]):
        super().__init__()
        self.model, self.cfg, self.validation = model, cfg, list(validation)
        self.loss = WeightedLoss(cfg.loss)
        decay = cfg.optimizer.ema_decay
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        if self.average is not None:
            self.average.requires_grad_(False)  # DDP waits for a gradient of every parameter that could have one
        self.history: list[dict[str, float]] = []
        self._sum, self._count, self._seconds, self._started = 0.0, 0, 0.0, time.perf_counter()

    @property
    def final(self) -> nn.Module:
        """The weights to keep: the average where there is one."""
        return self.average.module if self.average is not None else self.model

    def configure_optimizers(self):
        o = self.cfg.optimizer
        last = list(self.model.to_subpixels.parameters()) if o.last_layer_factor != 1 else []
        ids = {id(p) for p in last}
        groups = [{"params": [p for p in self.model.parameters() if id(p) not in ids], "lr": o.lr}]
        if last:
            groups.append({"params": last, "lr": o.lr * o.last_layer_factor})
        adam = torch.optim.Adam(groups, betas=tuple(o.betas), weight_decay=o.weight_decay)
        total, warmup = self.cfg.trainer.max_steps, o.warmup_steps

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (warmup + 1))
            if o.schedule == "constant":
                return rise
            done = min(1.0, step / total)
            return rise * (o.final_factor + (1 - o.final_factor) * 0.5 * (1 + math.cos(math.pi * done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        # Reseeding per step keeps anything random inside a network the same after a resume.
        torch.manual_seed(self.cfg.seed * 1_000_003 + self.trainer.current_epoch * 100_003 + batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        lr, hr = (x.float().div_(255) for x in batch)
        sr = self.model(lr.contiguous(memory_format=torch.channels_last))
        total, _ = self.loss(sr.float(), hr)
        value = float(total.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {self.global_step} (learning rate {self.cfg.optimizer.lr}); "
                "the last good state is kept in last.ckpt: lower optimizer.lr or set trainer.gradient_clip_val, "
                "then start with resume=never"
            )
        self._sum, self._count = self._sum + value, self._count + 1
        return total

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.average is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.average.update_parameters(self.model)

    def on_train_epoch_end(self) -> None:
        # One "epoch" is trainer.val_every steps: validate, note the history row, then Lightning writes its checkpoint.
        score = self.validate()
        self._seconds += time.perf_counter() - self._started
        self._started = time.perf_counter()
        row = {
            "step": self.global_step,
            "train_loss": self._sum / max(1, self._count),
            "val_psnr_y": score,
            "lr": self.optimizers().param_groups[0]["lr"],
            "seconds": round(self._seconds, 1),
        }
        self._sum, self._count = 0.0, 0
        self.history.append(row)
        self.log("val_psnr_y", score, prog_bar=True, rank_zero_only=True)
        self.log("train_loss", row["train_loss"], rank_zero_only=True)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean PSNR-Y in dB over the validation pictures, in fp32."""
        if not self.validation:
            return float("nan")
        net = self.final.eval()
        with torch.autocast(self.device.type, enabled=False):
            scores = []
            for lr, hr in self.validation:
                x = lr[None].to(self.device).contiguous(memory_format=torch.channels_last)
                scores.append(psnr_y(net(x)[0].cpu(), hr, net.scale))
        self.model.train()
        return sum(scores) / len(scores)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["nb_history"] = {"rows": self.history, "seconds": self._seconds}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = list(checkpoint["nb_history"]["rows"])
        self._seconds = checkpoint["nb_history"]["seconds"]

    def on_fit_start(self) -> None:
        self._started = time.perf_counter()


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


def validation_pictures(cfg: DictConfig) -> list[tuple[Tensor, Tensor]]:
    """(lr, hr) pictures for validation, made by the experiment's own downscaler."""
    photos, _ = read_photos(find_images(resolve_root(cfg.data.val_root))[: cfg.data.val_limit], progress=False)
    out = []
    for photo in photos:
        hr = crop_to_multiple(photo.float() / 255, cfg.model.scale)
        out.append((downscale(hr, cfg.model.scale, cfg.data.downscaler), hr))
    return out


def open_data(cfg: DictConfig, progress: bool = True):
    """Training pairs and validation pictures of a configuration, with a report (see ``open_pairs``)."""
    d = cfg.data
    pairs, report = open_pairs(
        list(d.roots),
        cfg.model.scale,
        limit=d.limit,
        shuffle_seed=d.shuffle_seed,
        memory_limit_gb=d.memory_limit_gb,
        progress=progress,
        patch=d.patch,
        batch=d.batch,
        seed=cfg.seed,
        downscaler=d.downscaler,
        jpeg=d.jpeg,
        augment=d.augment,
    )
    return pairs, validation_pictures(cfg), report


@dataclass
class FitResult:
    """What :func:`fit` returns: the network (averaged weights, eval), its history rows, the best validation PSNR-Y."""

    model: nn.Module
    history: list[dict[str, float]]
    best: float
    seconds: float
    folder: Path


def _run_folder(cfg: DictConfig) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to resume from; refuses a folder made with another configuration."""
    folder = runtime.RUNS / "train" / str(cfg.name)
    last, config = folder / "last.ckpt", folder / "config.yaml"
    if cfg.resume == "never" or not last.is_file():
        for old in folder.glob("*.ckpt"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with runtime.atomic_path(config) as part:
            part.write_text(OmegaConf.to_yaml(cfg, resolve=True))
        return folder, None
    before = OmegaConf.to_container(OmegaConf.load(config))
    now = OmegaConf.to_container(cfg, resolve=True)
    if changed := _differences(before, now):
        raise TrainingError(
            f"the unfinished run in runs/train/{cfg.name} has another configuration ({'; '.join(changed)}); "
            "use resume=never to start again, or another name="
        )
    return folder, last


def _differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    out = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += _differences(x, y, f"{prefix}{key}.")
        elif x != y and f"{prefix}{key}" not in ("resume", "trainer.progress"):
            out.append(f"{prefix}{key}: {x} before, {y} now")
    return out


def _loggers(folder: Path) -> list:
    loggers: list = [CSVLogger(folder, name="logs", version="")]
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    except ModuleNotFoundError:
        pass  # training works without TensorBoard; the CSV holds the same curves
    return loggers


def _trainer(cfg: DictConfig, folder: Path | None, device: torch.device, precision: str) -> pl.Trainer:
    t = cfg.trainer
    callbacks: list = [TQDMProgressBar(refresh_rate=10, leave=True)] if t.progress else []
    if folder:
        keep = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False}
        best = ModelCheckpoint(filename="best", monitor="val_psnr_y", mode="max", save_top_k=1, **keep)
        last = ModelCheckpoint(filename="last", save_top_k=1, **keep)
        callbacks += [best, last]
        if t.save_every:
            callbacks.append(
                ModelCheckpoint(
                    filename="step_{step}",
                    every_n_epochs=max(1, t.save_every // t.val_every),
                    save_top_k=-1,
                    auto_insert_metric_name=False,
                    **keep,
                )
            )
    return pl.Trainer(
        max_epochs=math.ceil(t.max_steps / t.val_every),
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=t.strategy,
        precision=LIGHTNING_PRECISION[precision],
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        logger=_loggers(folder) if folder else False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=t.progress,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,  # StepData already deals the batches out
    )


def fit(cfg: DictConfig, data: tuple | None = None, keep: bool = True) -> FitResult:
    """Train the network a configuration describes.

    ``data`` (from :func:`open_data`) may be passed to share photos between runs. With ``keep`` the run writes
    checkpoints and logs to ``runs/train/NAME`` and continues there after an interruption with the same result;
    without it nothing is written. Raises TrainingError, DataError.
    """
    if cfg.trainer.max_steps % cfg.trainer.val_every:
        raise TrainingError(
            f"trainer.max_steps={cfg.trainer.max_steps} is not a multiple of trainer.val_every={cfg.trainer.val_every}"
        )
    device = runtime.pick_device(cfg.trainer.device)
    precision = runtime.pick_precision(device, cfg.trainer.precision)
    if device.type == "cpu":
        runtime.set_threads(cfg.trainer.threads)
    folder, resume = _run_folder(cfg) if keep else (Path(), None)
    pairs, validation, _ = data or open_data(cfg, cfg.trainer.progress)
    runtime.seed_everything(cfg.seed)
    network = models.build(cfg.arch, **OmegaConf.to_container(cfg.model, resolve=True))
    if cfg.init_from:
        checkpoints.copy_matching(network, cfg.init_from)
    module = PixelModule(network.to(memory_format=torch.channels_last), cfg, validation)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = _trainer(cfg, folder if keep else None, device, precision)
        trainer.fit(module, datamodule=StepData(pairs, cfg), ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt(f"stopped at step {module.global_step}; the same command continues from last.ckpt")
    if keep:
        _load_best(module, folder)
    scores = [r["val_psnr_y"] for r in module.history]
    best = max(scores) if scores else float("nan")
    return FitResult(module.final.cpu().eval().requires_grad_(True), module.history, best, module._seconds, folder)


def _load_best(module: PixelModule, folder: Path) -> None:
    """Put the weights of the best validation score into the module."""
    if (path := folder / "best.ckpt").is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)


def is_main_process() -> bool:
    """False in the helper processes of a distributed run, which must neither write nor print."""
    return rank_zero_only.rank == 0


def train(cfg: DictConfig, command: str | None = None) -> FitResult:
    """:func:`fit`, then export ``data/checkpoints/NAME`` with its card and history."""
    data = open_data(cfg, cfg.trainer.progress)
    result = fit(cfg, data)
    if not is_main_process():
        return result
    scale = cfg.model.scale
    card = {
        "scale": scale,
        "metrics": {"val_psnr_y": round(result.best, 3), "data": cfg.data.val_root, "protocol": protocol(scale)},
        "training": {"seconds": round(result.seconds), "machine": runtime.machine(), "data": data[2]},
        "command": command or f"python -m nbhelpers train experiment={cfg.name}",
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    arguments = OmegaConf.to_container(cfg.model, resolve=True)
    checkpoints.save(cfg.name, result.model, cfg.arch, arguments, card, result.history)
    return result


def train_or_load(name: str, retrain: bool = False, overrides: Sequence[str] = ()) -> nn.Module:
    """The committed network ``name`` in eval mode; with ``retrain`` (or none committed) train it first."""
    if retrain or name not in checkpoints.available():
        train(compose(name, overrides))
    return checkpoints.load(name)
