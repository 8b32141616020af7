"""Networks on clean and on damaged validation photos, x4 (notebook 06; document 003, claim E4)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import checkpoints, metrics, runtime
from ..configs import experiments
from ..datasets.photos import resolve_root
from ..degradation import Degradation
from ..degrade import crop_to_multiple, downscale
from ..images import find_images, load_image
from ..inference import EVALUATED, get_model, upscale
from . import Row, write

NAME = "damaged.csv"
SCALE = 4
SETS = ("clean", "light", "real_esrgan")  # the protocol's bicubic, and presets of the degradation


@lru_cache(maxsize=len(SETS))
def pictures(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{photo: (lr, hr)} "3 h w" in [0, 1] in one of ``SETS``; the damage depends on the photo's name alone."""
    out = {}
    for path in find_images(resolve_root("bundled_val")):
        hr = crop_to_multiple(load_image(path), SCALE)
        damage = None if kind == "clean" else Degradation.preset(kind)
        out[path.stem] = (downscale(hr, SCALE) if damage is None else damage.of_file(hr, SCALE, path), hr)
    return out


def rows(model: nn.Module, kind: str) -> list[Row]:
    """Scores of a network on every photo of a set, and their "mean"."""
    found = {}
    for photo, (lr, hr) in pictures(kind).items():
        scores = metrics.compare(upscale(model, lr), hr, SCALE)
        found[photo] = {key: scores[key] for key in EVALUATED}
    found["mean"] = metrics.mean(list(found.values()))
    rounded = {k: {key: None if v is None else round(v, 4) for key, v in row.items()} for k, row in found.items()}
    return [{"set": kind, "image": photo, **row} for photo, row in rounded.items()]


def score(model: nn.Module, kind: str) -> dict[str, float | None]:
    """Means over the photos of a set: ``psnr_y`` (dB), ``lpips`` (None without its weights)."""
    mean = rows(model, kind)[-1]
    return {key: mean[key] for key in ("psnr_y", "lpips")}


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study damaged``: one row per x4 network, set and photo, and their means."""
    runtime.set_threads()
    known = [n for n in checkpoints.available() if n in experiments() and checkpoints.card(n)["scale"] == SCALE]
    jobs = [(name, kind) for name in ["bicubic", *known][: 1 if quick else None] for kind in SETS]
    table = []
    for name, kind in tqdm(jobs, desc="damaged", unit="set"):
        table += [{"model": name, **row} for row in rows(get_model(name, SCALE), kind)]
    target = (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / NAME
    write(target, table)
    return target
