"""What do attention, wide blocks and the upsampler buy? The comparisons of notebook 06 (document 003; claim E5)."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from .. import models, profiling, runtime
from . import Row, Study, damaged, run_study, score

REFERENCE = "ECA-Lite"
LEAN = "experiment=lean_study"
SIDE = 64  # of the input whose multiply-adds are counted

VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "ECA": ["model.attention=eca"],
    "local attention": ["model.attention=local"],
    "no attention": ["model.attention=none"],
    "as drawn, no bicubic": ["model.skip=false"],
    "lean": [LEAN],
    "lean, 3x3 kernels": [LEAN, "model.kernel=3"],
    "lean, 7x7 kernels": [LEAN, "model.kernel=7"],
    "lean, training branches": [LEAN, "model.branches=true"],
    "lean, local attention": [LEAN, "model.attention=local"],
    "lean, local attention, half the blocks": [LEAN, "model.attention=local", "model.blocks=8"],
    "lean, half the blocks": [LEAN, "model.blocks=8"],
    "lean, 64 channels, 10 blocks": [LEAN, "model.channels=64", "model.blocks=10"],
    "lean, 32 channels, 26 blocks": [LEAN, "model.channels=32", "model.blocks=26"],
    "ESPCN, 64 channels": [
        LEAN,
        "arch=ESPCN",
        "model.channels=64",
        *(f"~model.{k}" for k in ("blocks", "kernel", "attention", "branches")),
    ],
}


def _steps(n: int) -> list[str]:
    return [f"trainer.max_steps={n}", f"trainer.val_every={n}"]


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on the validation photos, parameters, and mega-multiply-adds for a 64x64 input."""
    model = result.model
    macs = profiling.flops(model, (1, 3, SIDE, SIDE)) / 2e6
    row: Row = {"parameters": models.count_parameters(model), "mmacs": round(macs, 1), "steps": cfg.trainer.max_steps}
    return {"": [row | score(model) | {"seconds": round(result.seconds, 1)}]}


STUDY = Study("erblock_study", "erblock_study", VARIANTS, measure)

# Real-ESRGAN's generator at a size that trains here, document 003's network and ours, on the same damaged pictures for
# about the same time: the numbers of steps come from the time of a step. "seconds" tells how equal it was.
_NO_LEAN = [f"~model.{key}" for key in ("channels", "blocks", "kernel", "attention", "branches")]
REAL_VARIANTS: dict[str, list[str]] = {
    "lean": [],
    "EfficientSRNet": ["arch=EfficientSRNet", *_NO_LEAN, "+model.skip=true", *_steps(1100)],
    "RRDBNet, 2 blocks of 32": ["arch=RRDBNet", *_NO_LEAN, "+model.channels=32", "+model.blocks=2", *_steps(450)],
}


def measure_real(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on clean and on damaged validation photos."""
    row: Row = {"parameters": models.count_parameters(result.model), "steps": cfg.trainer.max_steps}
    for kind in damaged.SETS:
        row |= {f"{key}_{kind}": value for key, value in damaged.score(result.model, kind).items()}
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


REAL_STUDY = Study("real_study", "real_study", REAL_VARIANTS, measure_real)
STUDIES = {study.name: study for study in (STUDY, REAL_STUDY)}


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study erblock``: every variant of both studies x 3 seeds."""
    runtime.set_threads()
    for study in STUDIES.values():
        run_study(study, fresh, quick)
    return (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / "{erblock,real}_study.csv"
