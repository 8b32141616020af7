"""Every committed network and bicubic on the benchmark Set5: the one table that reports, never tunes."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoints, runtime
from ..inference import evaluate
from . import write

NAME = "set5.csv"


def folders(scale: int) -> tuple[Path, Path]:
    """(HR, LR) folders of Set5. Raises FileNotFoundError where the optional pack is missing."""
    pack = runtime.shared()
    if pack is None:
        raise FileNotFoundError("Set5 is not on this machine: it is expected in ../shared/data/bench/Set5")
    base = pack / "data" / "bench" / "Set5"
    return base / "HR", base / "LR_bicubic" / f"X{scale}"


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study set5``: one row per network and picture, and their mean."""
    runtime.set_threads()
    jobs = [("bicubic", s) for s in (2, 3, 4)]
    jobs += [(n, checkpoints.card(n)["scale"]) for n in checkpoints.available()]
    rows = []
    for name, scale in jobs[: 1 if quick else None]:
        result = evaluate(name, *folders(scale), scale)
        for image, values in [*result["images"].items(), ("mean", result["mean"])]:
            rounded = {k: None if v is None else round(v, 4) for k, v in values.items()}
            rows.append({"model": name, "scale": scale, "image": image.removesuffix(".png"), **rounded})
    path = (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / NAME
    write(path, rows)
    return path
