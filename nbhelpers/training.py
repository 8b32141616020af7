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
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from . import checkpoints, models, runtime
from .datasets.pairs import DataError, loader, open_pairs, read_photos, resolve_root, split
from .degrade import crop_to_multiple, downscale
from .experiments import TrainingError, check, compose, differences, run_folder
from .images import find_images
from .losses import WeightedLoss
from .metrics import protocol, psnr_y

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class PixelModule(pl.LightningModule):
    """Trains an upscaler on a pixel loss; keeps an exponential average of its weights, which is what is validated.

    Batches are (lr, hr) uint8 "b 3 h w". ``validation`` is a list of (lr, hr) float pictures "3 h w" in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: DictConfig,
        validation: Sequence[tuple[Tensor, Tensor]],
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
        if self.history_file and is_main_process():
            runtime.write_csv(self.history_file, self.history)  # whole, so a resumed run continues the same file
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


def validation_pictures(cfg: DictConfig, paths: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
    """(lr, hr) pictures for validation, made by the experiment's own downscaler."""
    photos, skipped = read_photos(paths[: cfg.data.val_limit], progress=False)
    if skipped:
        tqdm.write(f"validation photos left out: {'; '.join(skipped)}")
    if not photos and cfg.data.val_limit != 0:
        raise DataError(f"no readable validation pictures (data.val_root={cfg.data.val_root})")
    out = []
    for photo in photos:
        hr = crop_to_multiple(photo.float() / 255, cfg.model.scale)
        out.append((downscale(hr, cfg.model.scale, cfg.data.downscaler), hr))
    return out


def open_data(cfg: DictConfig, progress: bool = True):
    """(pairs, validation pictures, report) of a configuration; see ``open_pairs`` for the report.

    Validation photos come from ``data.val_root``, or with ``data.valid_fraction`` from the training photos.
    """
    d = cfg.data
    roots = d.roots if isinstance(d.roots, str) else list(d.roots)
    if d.valid_fraction:
        folders = [resolve_root(r) for r in ([roots] if isinstance(roots, str) else roots)]
        roots, validation = split(find_images(folders), d.valid_fraction, cfg.seed)
    else:
        validation = find_images(resolve_root(d.val_root))
    options = {k: d[k] for k in ("patch", "batch", "downscaler", "jpeg", "augment", "limit", "shuffle_seed")}
    pairs, report = open_pairs(
        roots, cfg.model.scale, memory_limit_gb=d.memory_limit_gb, progress=progress, seed=cfg.seed, **options
    )
    return pairs, validation_pictures(cfg, validation), report


@dataclass
class FitResult:
    """What :func:`fit` returns: the network (averaged weights, eval), history rows, best PSNR-Y, report on the data."""

    model: nn.Module
    history: list[dict[str, float]]
    best: float
    seconds: float
    folder: Path
    data: dict[str, object]


class StepBar(Callback):
    """One progress bar for the whole run, in optimizer steps, with the last loss and validation score."""

    def on_train_start(self, trainer: pl.Trainer, module: PixelModule) -> None:
        """Begin where a resumed run stands."""
        total, name = module.cfg.trainer.max_steps, str(module.cfg.name)
        hidden = not is_main_process()
        self.bar = tqdm(total=total, initial=module.global_step, desc=name, unit="step", disable=hidden)

    def on_train_batch_end(self, trainer: pl.Trainer, module: PixelModule, *rest: object) -> None:
        """Count optimizer steps, not micro-batches."""
        self.bar.update(module.global_step - self.bar.n)

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


def _tensorboard(folder: Path) -> object:
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError:
        return False  # training works without TensorBoard; history.csv holds the same curves


def _trainer(cfg: DictConfig, folder: Path | None, device: torch.device, precision: str) -> pl.Trainer:
    t = cfg.trainer
    callbacks: list = [StepBar()] if t.progress else []
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
        logger=_tensorboard(folder) if folder else False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,  # StepData already deals the batches out
    )


def _network(cfg: DictConfig) -> nn.Module:
    """The network at the start of its training; seeded, warm where ``init_from`` names a donor."""
    runtime.seed_everything(cfg.seed)
    network = models.build(cfg.arch, **OmegaConf.to_container(cfg.model, resolve=True))
    if cfg.init_from:
        copied = checkpoints.copy_matching(network, cfg.init_from)
        if cfg.trainer.progress:
            tqdm.write(f"warm start: {len(copied)} of {len(network.state_dict())} tensors from {cfg.init_from}")
    return network.to(memory_format=torch.channels_last)


def fit(cfg: DictConfig, data: tuple | None = None, keep: bool = True) -> FitResult:
    """Train the network a configuration describes.

    ``data`` (from :func:`open_data`) may be passed to share photos between runs. With ``keep`` the run writes
    checkpoints and logs to ``runs/train/NAME`` and continues there after an interruption with the same result;
    without it nothing is written. Raises TrainingError, DataError; KeyboardInterrupt says where it stopped.
    """
    check(cfg)
    device = runtime.pick_device(cfg.trainer.device)
    precision = runtime.pick_precision(device, cfg.trainer.precision)
    if device.type == "cpu":
        runtime.set_threads(cfg.trainer.threads)
    folder, resume = run_folder(cfg) if keep else (Path(), None)
    network = _network(cfg)
    pairs, validation, report = data or open_data(cfg, cfg.trainer.progress)
    module = PixelModule(network, cfg, validation, folder / "history.csv" if keep else None)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric).*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = _trainer(cfg, folder if keep else None, device, precision)
        try:
            trainer.fit(module, datamodule=StepData(pairs, cfg), ckpt_path=resume, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C; a notebook's kernel must survive it
            if not trainer.interrupted:
                raise
    if trainer.interrupted:
        again = "the same command continues from the last validation" if keep else "nothing was kept"
        raise KeyboardInterrupt(f"stopped at step {module.global_step}; {again}")
    if keep:
        _load_best(module, folder)
    best = max((r["val_psnr_y"] for r in module.history), default=float("nan"))
    network = module.final.cpu().eval().requires_grad_(True)
    return FitResult(network, module.history, best, module._seconds, folder, report)


def _load_best(module: PixelModule, folder: Path) -> None:
    """Put the weights of the best validation score into the module."""
    if (path := folder / "best.ckpt").is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)


def is_main_process() -> bool:
    """False in the helper processes of a distributed run, which must neither write nor print."""
    return rank_zero_only.rank == 0


def _refuse_to_replace(cfg: DictConfig) -> None:
    """A network trained with other settings is replaced only on request."""
    name = str(cfg.name)
    if cfg.resume == "never" or name not in checkpoints.available():
        return
    before = checkpoints.card(name).get("config", {})
    if changed := differences(before, OmegaConf.to_container(cfg, resolve=True)):
        raise TrainingError(
            f"data/checkpoints/{name} was trained with another configuration ({'; '.join(changed)}); "
            "choose name=... for a new network, or resume=never to replace it"
        )


def train(cfg: DictConfig, command: str | None = None) -> FitResult:
    """:func:`fit`, then export ``data/checkpoints/NAME`` with its card and history.

    Raises TrainingError also where NAME exists with another configuration and ``resume`` is not ``never``.
    """
    _refuse_to_replace(cfg)
    result = fit(cfg)
    if not is_main_process():
        return result
    scale = cfg.model.scale
    card = {
        "scale": scale,
        "metrics": {"val_psnr_y": round(result.best, 3), "data": cfg.data.val_root, "protocol": protocol(scale)},
        "training": {"seconds": round(result.seconds), "machine": runtime.machine(), "data": result.data},
        "command": command or f"python -m nbhelpers train experiment={cfg.name}",
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    arguments = OmegaConf.to_container(cfg.model, resolve=True)
    checkpoints.save(str(cfg.name), result.model, cfg.arch, arguments, card, result.history)
    return result


def train_or_load(name: str, retrain: bool = False, overrides: Sequence[str] = ()) -> nn.Module:
    """The committed network ``name`` in eval mode; with ``retrain`` (or none committed) train it and replace it."""
    if retrain or name not in checkpoints.available():
        train(compose(name, [*overrides, "resume=never"]))
    return checkpoints.load(name)
