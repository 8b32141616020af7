"""Training runs of picture classifiers (document 004): configuration, exact resume, the exported network and card.

cfg = compose(["data_module.dataset=cifar10", "model.num_matrices=2", "name=mine"])   # configs/classify.yaml
result = fit(cfg)            # runs/train/mine; train(cfg) also writes data/checkpoints/mine.safetensors
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc, multiclass_confusion_matrix

from . import checkpoints, loop, runtime, tracking
from .block_orthogonal import Counts, MaskedConv2d, parameter_counts
from .classification import ClassifierModule, ClassifierTraining, to_float
from .configs import CONFIGS
from .datasets.classification import LabelledPictures, ShuffledBatches
from .datasets.small_pictures import Collection, augment, hold_out, open_collection
from .experiments import TrainingError, refuse_to_replace, run_folder
from .loop import is_main_process
from .models.resnet import resnet

ARCH = "ResNet"
CHOICES = {"resume": ("auto", "never"), "keep": ("best", "last")}


def compose(overrides: Sequence[str] = (), config: Path | None = None) -> DictConfig:
    """``configs/classify.yaml``, or a whole configuration saved by a run (``config``), with ``key=value`` overrides.

    Raises TrainingError for an unknown key or a file that is none, saying how to see all keys.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    source = (config or CONFIGS / "classify.yaml").absolute()
    try:
        with initialize_config_dir(str(source.parent), version_base="1.3"):
            cfg = hydra_compose(source.stem, list(overrides))
        if config is None:
            return cfg
        return OmegaConf.merge(compose(), cfg)  # refuses keys that there are not
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = str(error).splitlines()[0]
        raise TrainingError(f"{text}; `python -m nbhelpers classify train --show` prints all keys") from None


def check(cfg: DictConfig) -> None:
    """Raise TrainingError, quoting key and value, for settings that could only fail later."""
    for key, allowed in CHOICES.items():
        if cfg[key] not in allowed:
            raise TrainingError(f"{key}={cfg[key]} is unknown; choose one of {list(allowed)}")
    for key in ("max_epochs", "data_module.batch_size"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise TrainingError(f"{key}={value} must be a whole number of at least 1")
    for key, least in (("learning_rate", "above 0"), ("weight_decay", "of at least 0")):
        value = cfg[key]
        if not isinstance(value, int | float) or not (0 < value < math.inf or (value == 0 and "least" in least)):
            raise TrainingError(f"{key}={value} must be a number {least}")
    if not str(cfg.name) or set(str(cfg.name)) & set('/\\:*?"<>|'):
        raise TrainingError(f"name={cfg.name} cannot be a file name; use letters, digits, '_' and '-'")


# --- scores -----------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, precision: str = "fp32", batch: int = 500) -> Tensor:
    """Logits "n classes" in fp32, on the CPU, of uint8 "n 3 h w"; leaves the network in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    with runtime.autocast(device, precision):
        return torch.cat([model(to_float(part.to(device))).float().cpu() for part in images.split(batch)])


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy`` (0…1), ``roc_auc`` (one class against the rest, mean over the classes that occur) and ``loss``.

    NaN for no picture, and for ROC-AUC where all pictures have one class.
    """
    if not len(labels):
        return dict.fromkeys(("accuracy", "roc_auc", "loss"), math.nan)
    classes = logits.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
        area = multiclass_auroc(logits.softmax(1), labels, classes, average=None)
    there = labels.bincount(minlength=classes) > 0  # torchmetrics counts a class that does not occur as 0
    return {
        "accuracy": float(multiclass_accuracy(logits, labels, classes, average="micro")),
        "roc_auc": float(area[there].mean()) if there.sum() > 1 else math.nan,
        "loss": float(F.cross_entropy(logits, labels)),
    }


# --- training ---------------------------------------------------------------------------------------------


class RunModule(ClassifierModule):
    """The Lightning module of a run: augmentation by step, validation after every epoch, history, resume."""

    def __init__(self, model: nn.Module, cfg: DictConfig, valid: LabelledPictures, precision: str):
        settings = ClassifierTraining(cfg.max_epochs, cfg.data_module.batch_size, cfg.learning_rate, cfg.weight_decay)
        super().__init__(model, settings, valid)
        self.cfg, self.precision_name = cfg, precision
        self.history_file: Path | None = None
        self.seconds, self._started = 0.0, time.perf_counter()

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; decay only where a number is a weight, and zero is its neutral value."""
        angles = {m.free for m in self.model.modules() if isinstance(m, MaskedConv2d) and hasattr(m, "triangle")}
        decayed = [p for p in self.parameters() if p.ndim > 1 and p not in angles]
        rest = [p for p in self.parameters() if p.ndim <= 1 or p in angles]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, self.settings.lr, weight_decay=self.settings.weight_decay)

    def prepare(self, images: Tensor) -> Tensor:
        """Training pictures as the network gets them."""
        if self.cfg.data_module.augment:
            world, rank = self.trainer.world_size, self.trainer.global_rank
            images = augment(images, self.cfg.seed, self.global_step * world + rank)
        return to_float(images)

    def scores(self) -> dict[str, float]:
        """Scores of the validation pictures, in the precision of the training."""
        found = scores(predict(self.model, self.test.images, self.precision_name), self.test.labels)
        return {f"val_{key}": value for key, value in found.items()}

    def on_fit_start(self) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().on_train_epoch_end()
        self.seconds += time.perf_counter() - self._started
        self._started = time.perf_counter()
        self.history[-1] |= {"lr": rate, "seconds": round(self.seconds, 1)}
        if self.history_file and is_main_process():
            runtime.write_csv(self.history_file, self.history)  # whole, so a resumed run continues the same file
        # "step" is what TensorBoard and MLflow place points by.
        self.log_dict({k: float(v) for k, v in self.history[-1].items() if k != "epoch"}, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["nb_history"] = {"rows": self.history, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = list(checkpoint["nb_history"]["rows"])
        self.seconds = checkpoint["nb_history"]["seconds"]


class _Share(torch.utils.data.Sampler):
    """Of every batch the part of one process of a distributed run."""

    def __init__(self, batches: ShuffledBatches, rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self):
        return (rows[self.rank :: self.world] for rows in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class PicturesData(pl.LightningDataModule):
    """Batches (uint8 "b 3 h w", int64 "b") in memory, in an order given by seed and epoch."""

    def __init__(self, pictures: LabelledPictures, batch: int, seed: int):
        super().__init__()
        self.pictures, self.batches = pictures, ShuffledBatches(len(pictures), batch, seed)

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        share = self.batches if world == 1 else _Share(self.batches, rank, world)
        share.set_epoch(self.trainer.current_epoch)  # Lightning says it too late for a resumed run's first order
        return DataLoader(self.pictures, batch_size=None, sampler=share)


@dataclass
class RunResult:
    """What :func:`fit` returns.

    model: the network kept (eval mode, on the CPU, rounded to 16 bits with ``half``); ``kept`` is its row of
    ``history``. test: accuracy, roc_auc and loss of the test pictures in fp32; confusion: how many of them, "class
    answer". seconds: of training, all parts of a resumed run. pictures: how many were trained on, validated on, tested
    on.
    """

    model: nn.Module
    history: list[dict[str, float]]
    kept: dict[str, float]
    test: dict[str, float]
    confusion: Tensor
    counts: Counts
    steps: int
    seconds: float
    folder: Path
    collection: Collection
    pictures: tuple[int, int, int]


def network(cfg: DictConfig, classes: int) -> nn.Module:
    """The network of a configuration at the start of its training."""
    runtime.seed_everything(cfg.seed)
    return resnet(cfg.baseline_name, classes, **OmegaConf.to_container(cfg.model, resolve=True))


def fit(
    cfg: DictConfig, collection: Collection | None = None, keep: bool = True, callbacks: Sequence[Callback] = ()
) -> RunResult:
    """Train the classifier a configuration describes and test it.

    ``collection`` may be passed to share pictures between runs. With ``keep`` the run writes checkpoints, curves and
    its configuration to ``runs/train/NAME`` and continues there after an interruption with the same result; without,
    only MLflow (where ``logger`` names it) gets to know, and the last epoch's weights are kept. Raises TrainingError,
    DataError, ValueError for impossible settings; KeyboardInterrupt says where it stopped.
    """
    check(cfg)
    device = runtime.pick_device(cfg.trainer.device)
    precision = runtime.pick_precision(device, cfg.trainer.precision)
    if device.type == "cpu":
        runtime.set_threads(cfg.trainer.threads)
    d = cfg.data_module
    collection = collection or open_collection(d.dataset, d.data_dir, d.num_workers)
    train, valid = hold_out(collection.train, d.subset_fraction, d.valid_size, cfg.seed)
    data = PicturesData(train, d.batch_size, cfg.seed)
    model = network(cfg, len(collection.names)).to(memory_format=torch.channels_last)
    module = RunModule(model, cfg, valid, precision)
    folder, resume = run_folder(cfg) if keep else (None, None)  # last: wrong settings must not cost an old run
    module.history_file = folder / "history.csv" if folder else None
    found = tracking.loggers(cfg, folder, resumed=resume is not None) if is_main_process() else []
    counts = parameter_counts(model)
    for logger in found:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True) | {"parameters": vars(counts)})
    again = "the same command continues from the last whole epoch" if keep else "nothing was kept"
    loop.fit(
        lambda: _trainer(cfg, folder, device, precision, found, callbacks),
        lambda: f"stopped in epoch {module.current_epoch + 1}; {again}",
        module,
        datamodule=data,
        ckpt_path=resume,
        weights_only=True,
    )
    kept = _load_kept(module, folder, cfg.keep)
    model = _finished(module.model, cfg.half)
    logits, labels = predict(model, collection.test.images), collection.test.labels
    test, confusion = scores(logits, labels), multiclass_confusion_matrix(logits, labels, logits.shape[1])
    if is_main_process():
        tracking.report(found, {f"test_{key}": value for key, value in test.items()}, module.global_step)
    sizes = (len(train), len(valid), len(collection.test))
    return RunResult(
        model,
        module.history,
        kept,
        test,
        confusion,
        counts,
        module.global_step,
        module.seconds,
        folder or Path(),
        collection,
        sizes,
    )


def _finished(model: nn.Module, half: bool) -> nn.Module:
    """On the CPU, in eval mode; ``half``: the very numbers that will be read back from a 16-bit file."""
    model = model.cpu().eval()
    if half:
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                if x.is_floating_point():
                    x.copy_(x.half())
                    if not x.isfinite().all():
                        raise TrainingError("a number of the network is too large for 16 bits; use half=false")
    return model


def _load_kept(module: RunModule, folder: Path | None, which: str) -> dict[str, float]:
    """Bring the weights that become the network into the module; returns their history row."""
    scored = [row for row in module.history if not math.isnan(row["val_accuracy"])]
    if which == "last" or not scored or folder is None or not (folder / "best.ckpt").is_file():
        return module.history[-1]
    state = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    return state["nb_history"]["rows"][-1]


def _trainer(
    cfg: DictConfig, folder: Path | None, device: torch.device, precision: str, found: list, more: Sequence[Callback]
) -> pl.Trainer:
    callbacks = list(more)
    if folder:
        keep = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False, "save_top_k": 1}
        callbacks.append(ModelCheckpoint(filename="best", monitor="val_accuracy", mode="max", **keep))
        callbacks.append(ModelCheckpoint(filename="last", **keep))
    t = cfg.trainer
    return pl.Trainer(
        max_epochs=cfg.max_epochs,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=t.strategy,
        logger=found or False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=t.progress,
        reload_dataloaders_every_n_epochs=1,  # or a resumed run begins with the order of epoch 0
        **loop.common_options(device, precision),
    )


def measured(result: RunResult) -> dict[str, object]:
    """One row of a table: scores of the test and validation pictures, the three sizes, steps and seconds."""
    row = {f"test_{key}": value for key, value in result.test.items()}
    row |= {key: result.kept[key] for key in ("val_accuracy", "val_roc_auc", "train_loss")}
    row = {key: round(value, 5) for key, value in row.items()}
    return row | vars(result.counts) | {"steps": result.steps, "seconds": round(result.seconds, 1)}


# --- the exported network ---------------------------------------------------------------------------------


def train(cfg: DictConfig, command: str | None = None) -> RunResult:
    """:func:`fit`, then write ``data/checkpoints/NAME`` with its card, history and, beside the run, its configuration.

    Raises TrainingError also where NAME exists, of another kind or configuration, and ``resume`` is not ``never``.
    """
    name = str(cfg.name)
    config = OmegaConf.to_container(cfg, resolve=True)
    refuse_to_replace(cfg, "classifier")
    result = fit(cfg)
    if is_main_process():
        arguments = {"baseline_name": cfg.baseline_name, "classes": len(result.collection.names), **config["model"]}
        card = _card(result, config, command)
        checkpoints.save(name, result.model, ARCH, arguments, card, result.history, half=cfg.half)
    return result


def _card(result: RunResult, config: dict, command: str | None) -> dict:
    test = {f"test_{key}": round(value, 4) for key, value in result.test.items()}
    valid = {key: round(result.kept[key], 4) for key in ("val_accuracy", "val_roc_auc")}
    data = dict(zip(("train", "valid", "test"), result.pictures, strict=True))
    return {
        "kind": "classifier",
        "classes": list(result.collection.names),
        "size": list(result.collection.test.images.shape[-2:]),
        "counts": vars(result.counts),
        "metrics": test | valid | {"data": result.collection.description},
        "training": {"seconds": round(result.seconds), "machine": runtime.machine(), "data": data},
        "command": command or f"python -m nbhelpers classify train name={config['name']}",
        "config": config,
    }
