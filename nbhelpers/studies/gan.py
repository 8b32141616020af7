"""Does a discriminator help, and what keeps it honest? The comparisons of notebook 03 (document 002; K6-K8, K17)."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from .. import runtime
from . import Row, Study, run_study, vgg

REFERENCE = "bounded"
_SCRATCH = ["init_from=null", "optimizer.lr=1.0e-3"]

VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "no discriminator": ["adversarial.weight=0"],
    "classic 0/1": ["adversarial.loss=classic"],
    "relativistic": ["adversarial.loss=relativistic"],
    "bounded, smooth": ["adversarial.loss=bounded_smooth"],
    "relativistic, weight x4": ["adversarial.loss=relativistic", "adversarial.weight=1.2e-2"],
    "bounded, weight x4": ["adversarial.weight=1.2e-2"],
    "separate passes": ["adversarial.joint=false"],
    "no shift crop": ["adversarial.shift_crop=false"],
    "dropout 0.3": ["adversarial.model.dropout=0.3"],
    "three D steps": ["adversarial.d_steps=3"],
    "wider and deeper D": ["adversarial.model.channels=12", "adversarial.model.depth=3"],
    "D rate x3": ["adversarial.optimizer.lr=3.0e-3"],
    "D rate / 3": ["adversarial.optimizer.lr=3.3e-4"],
    "D without batch norm": ["adversarial.model.norm=none"],
    "D with strided convolutions": ["adversarial.model.downsample=strided"],
    "from scratch, at once": _SCRATCH,
    "from scratch, pixels first": [*_SCRATCH, "adversarial.start_step=100"],
    "from scratch, batch norm in G": [*_SCRATCH, "model.batch_norm=true"],
}


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """As in the feature-loss study, and the state of the game in the last validation interval."""
    (row,) = vgg.measure(result, cfg)[""]
    game = {key: result.history[-1][key] for key in ("d_accuracy", "logit_gap", "g_grad_norm", "d_grad_norm")}
    return {"": [row | {key: round(value, 4) for key, value in game.items()}]}


STUDY = Study("gan_study", "gan_study", VARIANTS, measure)


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study gan``: 19 variants x 3 seeds."""
    runtime.set_threads()
    return run_study(STUDY, fresh, quick)
