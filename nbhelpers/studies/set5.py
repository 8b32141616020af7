"""Every committed network and bicubic on the benchmark Set5: a table to report, not to tune on."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoints, readme, runtime
from ..configs import experiments
from ..inference import evaluate
from . import write

NAME = "set5.csv"
SCALES = (2, 3, 4)


def folders(scale: int) -> tuple[Path, Path]:
    """(HR, LR) folders of Set5. Raises FileNotFoundError where the optional pack is missing."""
    pack = runtime.shared()
    if pack is None:
        raise FileNotFoundError("Set5 is not on this machine: ../shared (or NB_SHARED) with data/bench/Set5 is missing")
    base = pack / "data" / "bench" / "Set5"
    return base / "HR", base / "LR_bicubic" / f"X{scale}"


def committed() -> list[str]:
    """Names of the networks that have an experiment, and of those pruned from one (NAME_pruned).

    What a reader trained under another name stays out of the README.
    """
    return [n for n in checkpoints.available() if n.removesuffix("_pruned") in experiments()]


def jobs() -> list[tuple[str, int]]:
    """(name, scale) of bicubic and of every committed network; those for any scale come with each of ``SCALES``."""
    cards = [checkpoints.card(n) for n in committed()]
    own = [(c["name"], s) for c in cards for s in (SCALES if "scales" in c else (c["scale"],))]
    return [("bicubic", s) for s in SCALES] + own


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study set5``: one row per network and picture, their mean, and the README's table."""
    runtime.set_threads()
    rows = []
    for name, scale in jobs()[: 1 if quick else None]:
        result = evaluate(name, *folders(scale), scale)
        for image, values in [*result["images"].items(), ("mean", result["mean"])]:
            rounded = {k: None if v is None else round(v, 4) for k, v in values.items()}
            rows.append({"model": name, "scale": scale, "image": image.removesuffix(".png"), **rounded})
    path = (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / NAME
    write(path, rows)
    if not quick:
        readme.update("scores")
        print("updated: the table of scores in README.md")
    return path
