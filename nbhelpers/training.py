"""Training with pytorch-lightning: one ``fit`` for every experiment, exact resume, the exported networks and cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, loop, models, pruning, runtime
from .adversarial import AdversarialModule, build_discriminator
from .datasets.pairs import open_pairs
from .datasets.photos import DataError, check_pair, match_lr, resolve_root, split
from .datasets.scales import ScalePairs, no_small_pictures
from .degradation import Degradation
from .degrade import crop_to_multiple, downscale
from .experiments import check, compose, refuse_to_replace, run_folder
from .images import ImageError, find_images, load_image
from .loop import StepData, is_main_process, trainer_for
from .metrics import protocol
from .pixel import PixelModule
from .scales import ScaleModule, validated


def validation_pictures(
    cfg: DictConfig, paths: Sequence[Path], lr_paths: Mapping[Path, Path] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(lr, hr) pictures for validation: LR from ``lr_paths``, else by the experiment's degradation or downscaler.

    A degradation's damage is fixed: it depends on the file's name, not on the run's seed. With a section ``scales``
    all pictures at one scale of :func:`nbhelpers.scales.validated` follow those at another.
    """
    degradation = _degradation(cfg)

    def pair(path: Path, scale: float) -> tuple[Tensor, Tensor]:
        hr = load_image(path)
        if lr_paths is not None:
            lr = load_image(lr_paths[path])
            check_pair(path, hr.shape[-2:], lr_paths[path], lr.shape[-2:], scale)
            return lr, hr
        hr = crop_to_multiple(hr, scale)
        if degradation is not None:
            return degradation.of_file(hr, scale, path), hr
        return downscale(hr, scale, cfg.data.downscaler), hr

    pictures, skipped = [], []
    for path in paths[: cfg.data.val_limit]:
        try:
            pictures.append([pair(path, scale) for scale in validated(cfg)])
        except ImageError as error:
            skipped.append(str(error))
    if skipped:
        tqdm.write(f"validation photos left out: {'; '.join(skipped)}")
    if not pictures and cfg.data.val_limit != 0:
        raise DataError(f"no readable validation pictures (data.val_root={cfg.data.val_root})")
    return [picture for at_one_scale in zip(*pictures, strict=True) for picture in at_one_scale]


def _degradation(cfg: DictConfig) -> Degradation | None:
    settings = OmegaConf.select(cfg, "degradation")
    return None if settings is None else Degradation.of(settings)


def open_data(cfg: DictConfig, progress: bool = True):
    """(pairs, validation pictures, report) of a configuration; see ``open_pairs`` for the report.

    Validation photos come from ``data.val_root``, or with ``data.valid_fraction`` from the training photos. Optional
    keys: ``data.lr_roots`` and ``data.val_lr_root``, folders of small pictures made elsewhere; a section
    ``degradation``, by which small pictures are made on the fly.
    """
    d, scale = cfg.data, cfg.model.scale
    roots, lr_roots = _roots(cfg, "data.roots"), _roots(cfg, "data.lr_roots")
    lr_paths = None
    if d.valid_fraction:
        if lr_roots is not None:
            lr_paths = match_lr(roots, lr_roots, scale)
        files = find_images([resolve_root(r) for r in roots]) if lr_paths is None else list(lr_paths)
        roots, validation = split(files, d.valid_fraction, cfg.seed)
        lr_roots = None if lr_paths is None else [lr_paths[path] for path in roots]
    else:
        validation = find_images(resolve_root(d.val_root))
        if (val_lr := OmegaConf.select(cfg, "data.val_lr_root")) is not None:
            lr_paths = match_lr(d.val_root, val_lr, scale)
    options = {k: d[k] for k in ("patch", "batch", "downscaler", "jpeg", "augment", "limit", "shuffle_seed")}
    options |= {"memory_limit_gb": d.memory_limit_gb, "lr_roots": lr_roots, "degradation": _degradation(cfg)}
    if (scales := OmegaConf.select(cfg, "scales")) is not None:
        scale, options["degradation"] = math.ceil(scales.range[1]), no_small_pictures
    pairs, report = open_pairs(roots, scale, progress=progress, seed=cfg.seed, **options)
    if scales is not None:
        batches = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
        pairs = ScalePairs(pairs, *scales.range, grow_steps=round(scales.grow * batches))
    return pairs, validation_pictures(cfg, validation, lr_paths), report


def _roots(cfg: DictConfig, key: str) -> list[str] | None:
    value = OmegaConf.select(cfg, key)
    return None if value is None else [value] if isinstance(value, str) else list(value)


def _lr_source(cfg: DictConfig) -> str:
    """Where the validation's small pictures come from, for the protocol on the card."""
    if _degradation(cfg) is not None:
        return "damaged as the section degradation says, seed 0"
    given = "data.lr_roots" if cfg.data.valid_fraction else "data.val_lr_root"
    if OmegaConf.select(cfg, given) is not None:
        return "given files"
    return "MATLAB-style bicubic" if cfg.data.downscaler == "matlab" else f"downscaler {cfg.data.downscaler}"


@dataclass
class FitResult:
    """What :func:`fit` returns.

    model: the network kept (averaged weights, eval mode, on the CPU); ``kept`` is its row of ``history``.
    best: the highest PSNR-Y in dB of all validations. data: report on the training data. discriminator: None where
    none was trained.
    """

    model: nn.Module
    history: list[dict[str, float]]
    best: float
    seconds: float
    folder: Path
    data: dict[str, object]
    kept: dict[str, float]
    discriminator: nn.Module | None = None


def _network(cfg: DictConfig) -> nn.Module:
    """The network at the start of its training; seeded, warm where ``init_from`` names a donor."""
    runtime.seed_everything(cfg.seed)
    if OmegaConf.select(cfg, "prune") is not None:
        return pruning.pruned(cfg).train().requires_grad_(True).to(memory_format=torch.channels_last)
    network = models.build(cfg.arch, **OmegaConf.to_container(cfg.model, resolve=True))
    if cfg.init_from:
        copied = checkpoints.copy_matching(network, cfg.init_from)
        if cfg.trainer.progress:
            tqdm.write(f"warm start: {len(copied)} of {len(network.state_dict())} tensors from {cfg.init_from}")
    return network.to(memory_format=torch.channels_last)


def _module(cfg: DictConfig) -> PixelModule:
    """The Lightning module of an experiment, without its validation pictures and files."""
    network = _network(cfg)
    if OmegaConf.select(cfg, "scales") is not None:
        return ScaleModule(network, cfg)
    if OmegaConf.select(cfg, "adversarial") is None:
        return PixelModule(network, cfg)
    return AdversarialModule(network, build_discriminator(cfg), cfg)


def fit(cfg: DictConfig, data: tuple | None = None, keep: bool = True, callbacks: Sequence[Callback] = ()) -> FitResult:
    """Train the network a configuration describes; with a section ``adversarial`` against a discriminator.

    ``data`` (from :func:`open_data`) may be passed to share photos between runs. With ``keep`` the run writes
    checkpoints and logs to ``runs/train/NAME`` and continues there after an interruption with the same result;
    without it nothing is written. ``callbacks`` are run beside ours. Raises TrainingError, DataError;
    KeyboardInterrupt says where it stopped.
    """
    check(cfg)
    device = runtime.pick_device(cfg.trainer.device)
    precision = runtime.pick_precision(device, cfg.trainer.precision)
    if device.type == "cpu":
        runtime.set_threads(cfg.trainer.threads)
    module = _module(cfg)  # before the folder: wrong settings must not cost an old run
    folder, resume = run_folder(cfg) if keep else (Path(), None)
    pairs, module.validation, report = data or open_data(cfg, cfg.trainer.progress)
    module.history_file = folder / "history.csv" if keep else None
    again = "the same command continues from the last validation" if keep else "nothing was kept"
    loop.fit(
        lambda: trainer_for(cfg, folder if keep else None, device, precision, callbacks),
        lambda: f"stopped at step {module.steps}; {again}",
        module,
        datamodule=StepData(pairs, cfg),
        ckpt_path=resume,
        weights_only=True,
    )
    kept = _load_kept(module, folder, cfg.keep if keep else "last")
    best = max((r["val_psnr_y"] for r in module.history), default=math.nan)
    result = FitResult(_finished(module.final), module.history, best, module.seconds, folder, report, kept)
    if not math.isnan(kept.get("d_loss", math.nan)):  # the game may not have begun by then
        result.discriminator = _finished(module.discriminator)
    return result


def _finished(network: nn.Module) -> nn.Module:
    return network.cpu().eval().requires_grad_(True)


def _load_kept(module: PixelModule, folder: Path, which: str) -> dict[str, float]:
    """Bring the weights that become the network into the module; returns their history row."""
    scored = [row for row in module.history if not math.isnan(row["val_psnr_y"])]
    best = folder / "best.ckpt"
    if which == "last" or not scored or not best.is_file():
        return module.history[-1]
    module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    return max(scored, key=lambda row: row["val_psnr_y"])


def train(cfg: DictConfig, command: str | None = None) -> FitResult:
    """:func:`fit`, then export ``data/checkpoints/NAME`` (in half precision) with its card and history.

    Raises TrainingError also where NAME exists, of another kind or configuration, and ``resume`` is not ``never``.
    """
    refuse_to_replace(cfg)
    result = fit(cfg)
    if not is_main_process():
        return result
    scale, config = cfg.model.scale, OmegaConf.to_container(cfg, resolve=True)
    shared = {
        "scale": scale,
        "training": {"seconds": round(result.seconds), "machine": runtime.machine(), "data": result.data},
        "command": command or f"python -m nbhelpers train experiment={cfg.name}",
        "config": config,
    }
    if result.discriminator is not None:  # first: whoever finds the network finds its discriminator too
        state = {k: round(result.kept[k], 3) for k in ("d_accuracy", "logit_gap")}
        card = {"kind": "discriminator", "metrics": state, **shared}
        judge, a = f"{cfg.name}_discriminator", config["adversarial"]
        checkpoints.save(judge, result.discriminator, a["arch"], a["model"], card, [], half=True)
    scores = {"val_psnr_y": round(result.kept["val_psnr_y"], 3)}
    if not math.isnan(lpips := result.kept.get("val_lpips", math.nan)):
        scores["val_lpips"] = round(lpips, 4)
    if "scales" in config:  # val_psnr_y is then the mean of those at these scales
        scores |= {key: round(value, 3) for key, value in result.kept.items() if key.startswith("val_psnr_y_x")}
        shared["scales"] = config["scales"]["range"]
    card = {"metrics": scores | {"data": cfg.data.val_root, "protocol": protocol(scale, _lr_source(cfg))}, **shared}
    checkpoints.save(str(cfg.name), result.model, cfg.arch, config["model"], card, result.history, half=True)
    return result


def train_or_load(name: str, retrain: bool = False, overrides: Sequence[str] = ()) -> nn.Module:
    """The committed network ``name`` in eval mode; with ``retrain`` (or none committed) train it and replace it."""
    if retrain or name not in checkpoints.available():
        train(compose(name, [*overrides, "resume=never"]))
    return checkpoints.load(name)
