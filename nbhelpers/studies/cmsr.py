"""What does cheaper rendering of easy regions cost? Quality lost against time saved, both forms of CMSR (claim L5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import checkpoints, metrics, profiling, runtime
from ..datasets.photos import read_photos, resolve_root
from ..degrade import crop_to_multiple, downscale
from ..images import find_images
from ..models import cmsr
from ..models.lmf import LMLTE
from . import Row, validation, write
from .lmf_scales import NETWORK

NAME = "cmsr.csv"
SCALES = (4, 8, 12)
CALIBRATED_ON = 8  # training photos: the table must not know the pictures it is measured on
MSES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 1e-3)  # what levels may lose; the publication takes 2e-5
THRESHOLDS = (1e-5, 1e-4, 1e-3, 3e-3, 4e-3, 5e-3, 1e-2, 3e-2)  # how unlike pixels that share may be
REPEATS = 3


def _small(photos: Sequence[Tensor], scale: float) -> list[Tensor]:
    return [downscale(crop_to_multiple(photo.float() / 255, scale), scale) for photo in photos]


def _ways(
    model: LMLTE, errors: Tensor, levels: Sequence[float], mses: Sequence[float], thresholds: Sequence[float]
) -> dict[tuple[str, float, str], Callable[..., cmsr.Cheap]]:
    """{(method, setting, table as text): how it renders features, their picture, to a size}; the plain one first."""
    ways = {("plain", 0.0, ""): lambda f, x, size: cmsr.Cheap(model.render(f, x, size), 1.0)}
    for mse in mses:
        table = cmsr.make_table(errors, mse, levels)
        text = " ".join(f"{level:g}:{limit:.4g}" for level, limit in table.items())
        ways["levels", mse, text] = functools.partial(cmsr.render, model, table=table)
    for limit in thresholds:
        ways["shared", limit, ""] = functools.partial(cmsr.render_shared, model, threshold=limit)
    return ways


@torch.no_grad()
def curve(
    model: LMLTE,
    pictures: Sequence[tuple[Tensor, Tensor]],
    calibration: Sequence[Tensor],
    scale: float,
    mses: Sequence[float] = MSES,
    thresholds: Sequence[float] = THRESHOLDS,
    repeats: int = REPEATS,
) -> list[Row]:
    """One row for each setting of both forms, on (small, original) ``pictures`` "3 h w" in [0, 1] at one ``scale``.

    ``calibration`` are the small pictures that tables are made on. Keys: method ("plain", "levels", "shared"), scale,
    setting (the mean squared error allowed), psnr_y in dB, lost (dB against plain), ms of rendering all pictures from
    their features (median of ``repeats``, taken in turns), speedup, decoded (share of the plain evaluations), table.
    """
    model = model.eval()
    levels = [level for level in cmsr.LEVELS if level < scale]
    errors = torch.cat([cmsr.level_errors(model, p[None], scale, levels) for p in calibration], 1)
    inputs = [(model.encode(lr[None]), lr[None], tuple(hr.shape[-2:])) for lr, hr in pictures]
    ways = _ways(model, errors, levels, mses, thresholds)
    runs = [lambda way=way: [way(*one) for one in inputs] for way in ways.values()]
    times = profiling.medians_ms(runs, repeats, warmup=1)
    rows: list[Row] = []
    for (method, setting, text), run, ms in zip(ways, runs, times, strict=True):
        done = run()
        scores = [metrics.psnr_y(r.picture[0], hr, scale) for r, (_, hr) in zip(done, pictures, strict=True)]
        row: Row = {"method": method, "scale": scale, "setting": setting, "psnr_y": sum(scores) / len(scores)}
        row |= {"ms": round(ms, 1), "decoded": round(sum(r.decoded for r in done) / len(done), 4), "table": text}
        rows.append(row)
    for row in rows:
        row["lost"] = round(rows[0]["psnr_y"] - row["psnr_y"], 4)
        row["speedup"] = round(rows[0]["ms"] / max(row["ms"], 0.1), 3)
        row["psnr_y"] = round(row["psnr_y"], 4)
    return rows


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study cmsr``: the curves of the committed network on the bundled validation photos."""
    runtime.set_threads()
    model = checkpoints.load(NETWORK)
    photos, _ = read_photos(find_images(resolve_root("bundled"))[: 1 if quick else CALIBRATED_ON], progress=False)
    settings = {"mses": MSES[:2], "thresholds": THRESHOLDS[:2], "repeats": 1} if quick else {}
    rows: list[Row] = []
    for scale in tqdm(SCALES[1:2] if quick else SCALES, desc="cmsr", unit="scale"):
        pictures = validation(scale)[: 1 if quick else None]
        rows += curve(model, pictures, _small(photos, scale), scale, **settings)
    path = (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / NAME
    write(path, rows)
    return path
