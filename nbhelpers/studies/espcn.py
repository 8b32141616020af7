"""What matters in a three-layer network? The comparisons of notebook 01 (document 002; claims K1, K2, K18)."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from .. import metrics, runtime
from ..datasets.pairs import resolve_root
from ..degrade import crop_to_multiple, downscale
from ..images import find_images, load_image
from ..inference import upscale
from . import Row, Study, run_study

# Photos of plants among the bundled ones: the "narrow data" of document 002's remark about flowers.
PLANTS = (
    "autumn_foliage", "bamboo_trunk", "dandelion_clock", "dandelion_seeds", "dune_grass", "forest_path",
    "forest_trunks", "green_maple_branch", "green_maple_canopy", "larch_meadow", "lichen_strands",
    "maple_leaf_veins", "oleander_stems", "red_maple_leaves",
)  # fmt: skip
PLANTS_VAL = ("haircap_moss", "striped_daisies")
BANDS = 10  # of the original's luma, full range
_PLANT_ROOTS = "data.roots=[" + ",".join(f"data/photos/train/{p}.png" for p in PLANTS) + "]"
_LAST = "optimizer.last_layer_factor=0.1"
_TANH_OUT = ["model.activation=tanh", "model.output_activation=tanh"]

REFERENCE = "reference"
VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "relu": ["model.activation=relu"],
    "tanh": ["model.activation=tanh"],
    "tanh, tanh output": _TANH_OUT,
    "last layer lr/10": [_LAST],
    "relu, last layer lr/10": ["model.activation=relu", _LAST],
    "tanh, last layer lr/10": ["model.activation=tanh", _LAST],
    "tanh, tanh output, last layer lr/10": [*_TANH_OUT, _LAST],
    "64 channels": ["model.channels=64"],
    "L1 loss": ["~loss.mse", "+loss.l1=1.0"],
    "bicubic skip": ["model.skip=true"],
    "batch 16, same lr": ["data.batch=16", "trainer.max_steps=560", "trainer.val_every=560"],
    "batch 16, lr/4": [
        "data.batch=16", "trainer.max_steps=560", "trainer.val_every=560", "optimizer.lr=2.5e-4",
    ],
    "patch 64, batch 9": ["data.patch=64", "data.batch=9"],
    "32 channels": ["model.channels=32"],
    "plants only": [_PLANT_ROOTS],
    "plants only, 32 channels": [_PLANT_ROOTS, "model.channels=32"],
}  # fmt: skip


def luminance_errors(sr: torch.Tensor, hr: torch.Tensor, bands: int = BANDS) -> torch.Tensor:
    """Sums per band of the original's luma: (bands, 3) = pixels, signed error, squared error; errors in 0–255."""
    y_sr, y_hr = (metrics.rgb_to_y(metrics.to_8bit(x), full_range=True).flatten() for x in (sr, hr))
    band = (y_hr / 256 * bands).long()
    error = y_sr - y_hr
    parts = torch.stack([torch.ones_like(error), error, error.square()], 1)
    return torch.zeros(bands, 3, dtype=parts.dtype).index_add_(0, band, parts)


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """PSNR-Y over all validation photos and over plants; bias and RMSE by luminance band."""
    scores, sums = {}, torch.zeros(BANDS, 3, dtype=torch.float64)
    for path in find_images(resolve_root("bundled_val")):
        hr = crop_to_multiple(load_image(path), cfg.model.scale)
        sr = upscale(result.model, downscale(hr, cfg.model.scale))
        scores[path.stem] = metrics.psnr_y(sr, hr, cfg.model.scale)
        sums += luminance_errors(sr, hr)
    main = {
        "steps": cfg.trainer.max_steps,
        "psnr_y": round(sum(scores.values()) / len(scores), 4),
        "psnr_y_plants": round(sum(scores[p] for p in PLANTS_VAL) / len(PLANTS_VAL), 4),
        "train_loss": round(result.history[-1]["train_loss"], 7),
        "seconds": round(result.seconds, 1),
    }
    bands = [
        {"band": i, "bias": round(float(e / n), 4), "rmse": round(float((q / n) ** 0.5), 4)}
        for i, (n, e, q) in enumerate(sums)
    ]
    return {"": [main], "bands": bands}


STUDY = Study("espcn_study", "espcn_study", VARIANTS, measure, tables=("", "bands"))


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study espcn``: 17 variants x 3 seeds, about 20 minutes on two cores."""
    runtime.set_threads()
    return run_study(STUDY, fresh, quick)
