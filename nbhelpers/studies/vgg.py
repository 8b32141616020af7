"""What does a feature loss buy, and what does it cost in PSNR? Notebook 02 (document 002; claims K4, K5)."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from .. import probes, runtime
from ..inference import upscale
from . import Row, Study, run_study, score, validation

REFERENCE = "pixels and features"
_WEIGHTS = "loss.vgg.layer_weights"

VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "pixels only": ["~loss.vgg"],
    "features only": ["~loss.mse"],
    "weight x10 (SRGAN)": [f"{_WEIGHTS}=srgan"],
    "weight x100": ["loss.vgg.weight=1.0e-2"],
    "halving layer weights": [f"{_WEIGHTS}=halving", "loss.vgg.weight=1.0e-4"],
    "Real-ESRGAN's layer weights": [f"{_WEIGHTS}=real_esrgan", "loss.vgg.weight=1.0e-4"],
    "full size only": ["loss.vgg.half_size=false"],
    "half size only": ["loss.vgg.full_size=false"],
    "no shift crop": ["loss.vgg.shift_crop=false"],
    "depth conv1_1": ["loss.vgg.depth=conv1_1"],
    "depth conv1_2": ["loss.vgg.depth=conv1_2"],
    "depth conv2_1": ["loss.vgg.depth=conv2_1"],
    "absolute differences": ["loss.vgg.criterion=l1"],
}


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """PSNR-Y, SSIM-Y, LPIPS and lattice on the validation photos; detail added to flat, defocused and text patches."""
    row = {"steps": cfg.trainer.max_steps} | score(result.model)
    row |= {f"energy_{group}": round(v["energy"], 3) for group, v in probes.measure(result.model).items()}
    scale = result.model.scale
    lattice = [probes.lattice(upscale(result.model, lr), hr, scale) for lr, hr in validation(scale)]
    row["lattice"] = round(sum(lattice) / len(lattice), 3)
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


STUDY = Study("vgg_study", "vgg_study", VARIANTS, measure)


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study vgg``: 14 variants x 3 seeds."""
    runtime.set_threads()
    return run_study(STUDY, fresh, quick)
