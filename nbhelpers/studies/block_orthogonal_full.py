"""The block-orthogonal comparison at the document's full size, for a GPU: ResNet-18, all of CIFAR-10, 20 epochs.

Some of the variants of :mod:`.block_orthogonal`, at full width and batch; on an H100-like GPU a run takes minutes, on
two CPU cores hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from .. import classify, runtime, tracking
from . import block_orthogonal as small
from . import run_study

BASE = [
    "data_module.dataset=cifar10_jpeg", "learning_rate=0.002", "keep=last", "half=false", "trainer.progress=false",
    "mlflow.experiment=block_orthogonal_full",
]  # fmt: skip
VARIANTS = {
    small.REFERENCE: ["model.kind=plain", "name=plain"],
    "1 matrix": ["name=1_matrix"],
    "3 matrices": ["model.num_matrices=3", "name=3_matrices"],
    "thin as 1 matrix": ["model.kind=plain", "model.width=23", "name=thin"],
}


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The study's setting with ``key=value`` overrides."""
    return classify.compose([*BASE, *overrides])


STUDY = replace(small.STUDY, name="block_orthogonal_full", variants=VARIANTS, seeds=range(3), compose=compose)


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study block_orthogonal_full``: 4 variants x 3 seeds, on whatever device there is."""
    runtime.set_threads()
    if not quick:
        tracking.prepare(compose())
    return run_study(STUDY, fresh, quick)
