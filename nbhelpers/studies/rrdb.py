"""What do dilated residual-dense blocks buy? The comparisons of notebook 04 (document 002; claims K9, K11-K15)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from .. import models, runtime
from ..degrade import jpeg
from . import Row, Study, run_study, score

REFERENCE = "reference"
X4 = "model.scale=4"
QUALITY = 60  # of the JPEG test inputs; training draws from 50 to 99
damaged = partial(jpeg, quality=QUALITY)
# Equal parameters (171 · channels² plus the ends): two steps of two save 72 · channels², spent on convolutions.
STAGED = "experiment=staged_study"
TWICE = ["model.stages=[2,2]", "model.body=5", "model.between=5"]
# Repeating pixels needs no wide convolution before the enlargement; more convolutions take its place.
NEAREST = "model.upsampler=nearest"

VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "no dilated blocks": ["model.dilations=[]", "model.pairs=3"],
    "ESRGAN's dense blocks": ["model.dilations=[]", "model.pairs=3", "model.dense_layers=5", "model.growth=11"],
    "five dense layers, full growth": ["model.dilations=[]", "model.pairs=1", "model.dense_layers=5"],
    "residual scale 1": ["model.res_scale=1.0"],
    "no bicubic skip": ["model.skip=false"],
    "two blocks": ["model.blocks=2"],
    "one block twice": ["model.blocks=2", "model.shared=true"],
    "trained on JPEG": ["data.jpeg=true"],
    "fp32": ["trainer.precision=fp32"],
    "x4 network": [X4],
    "x4 as G(G(x))": [X4, "model.passes=2"],
    "x4 at once": [STAGED],
    "x2 twice": [STAGED, *TWICE],
    "x4 at once, nothing after": [STAGED, "model.after=0", "model.body=3"],
    "x2 twice, nothing after": [STAGED, *TWICE, "model.after=0", "model.body=6"],
    "x4 at once, nearest": [STAGED, NEAREST, "model.body=17"],
    "x2 twice, nearest": [STAGED, NEAREST, "model.stages=[2,2]", "model.body=9", "model.between=7"],
}


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """Clean and JPEG-damaged validation photos; a x2 network also at x4, applied twice."""
    model = result.model
    row = {"parameters": models.count_parameters(model), "steps": cfg.trainer.max_steps} | score(model)
    row |= {f"{key}_jpeg": value for key, value in score(model, damaged).items()}
    if cfg.arch == "DilatedRRDBNet" and cfg.model.scale == 2:
        twice = models.build(cfg.arch, **OmegaConf.to_container(cfg.model) | {"scale": 4, "passes": 2})
        twice.load_state_dict(model.state_dict())
        row |= {f"{key}_x4": value for key, value in score(twice.eval()).items()}
    else:
        row |= {f"{key}_x4": row[key] for key in ("psnr_y", "ssim_y", "lpips")}
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


STUDY = Study("rrdb_study", "rrdb_study", VARIANTS, measure)


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study rrdb``: 18 variants x 3 seeds."""
    runtime.set_threads()
    return run_study(STUDY, fresh, quick)
