"""All committed networks and published ones in one table, and what follows from it (notebook 09)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from . import checkpoints, runtime
from .studies import damaged, scoreboard, set5

PUBLISHED = "published.csv"  # in data/: published networks on Set5; ``origin`` weights: measured from them
BICUBIC, OURS, THEIRS = "bicubic", "this workbook", "published"  # kinds of rows


@dataclass(frozen=True)
class Axis:
    """A quantity of the scoreboard: its column, a label, how to print it, which direction is better, and within what
    share measurements of it count as equal."""

    key: str
    label: str
    form: str
    more_is_better: bool = False
    logarithmic: bool = True
    tolerance: float = 0.0


QUALITY = (
    Axis("psnr_y", "PSNR-Y (dB), Set5", ".2f", more_is_better=True, logarithmic=False),
    Axis("ssim_y", "SSIM-Y, Set5", ".4f", more_is_better=True, logarithmic=False),
    Axis("lpips", "LPIPS-Squeeze, Set5", ".3f", logarithmic=False),
)
COSTS = (
    Axis("parameters", "parameters", ",.0f"),
    Axis("flops", "FLOPs per output pixel", ",.0f"),
    Axis("ms", "ms per output megapixel", ",.0f", tolerance=0.1),
    Axis("ms_fp32", "ms per output megapixel, fp32", ",.0f", tolerance=0.1),
    Axis("memory", "peak memory, MB per output megapixel", ",.0f", tolerance=0.1),
    Axis("file", "file (kB)", ",.0f"),
)
AXES: Mapping[str, Axis] = {axis.key: axis for axis in (*QUALITY, *COSTS)}


def _read(path: Path, study: str) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing in data/results; make it: python -m nbhelpers study {study}")
    return pd.read_csv(path)


def table(folder: Path | None = None) -> pd.DataFrame:
    """One row per network and scale: "name", "scale", "kind", the keys of ``AXES``, "any_scale", "source", "machine".

    From the tables of the studies ``set5`` and ``scoreboard`` in ``folder`` (default: ``data/results``), the
    networks' files and cards, and ``data/published.csv``. "ms" and "memory" are of the fast precision measured,
    "ms_fp32" of fp32; what is not known is NaN. Raises FileNotFoundError, naming the study to run.
    """
    folder = folder or runtime.RESULTS
    scores = _read(folder / set5.NAME, "set5").query("image == 'mean'").drop(columns=["image", "psnr_rgb"])
    costs = _costs(_read(folder / scoreboard.NAME, "scoreboard"))
    keys = ["model", "scale"]
    cards = {name: checkpoints.card(name) for name in checkpoints.available()}
    of_ours = costs[costs.model.isin(["bicubic", *cards])]
    ours = scores.merge(of_ours.drop(columns="parameters"), on=keys, how="outer")
    ours["kind"] = [BICUBIC if name == "bicubic" else OURS for name in ours.model]
    ours["parameters"] = [cards.get(name, {}).get("parameters") for name in ours.model]
    ours["file"] = [_kilobytes(name) if name in cards else None for name in ours.model]
    ours["any_scale"] = ["scales" in cards.get(name, {}) for name in ours.model]
    theirs = pd.read_csv(runtime.DATA / PUBLISHED).rename(columns={"name": "model"})
    theirs = theirs.merge(costs.drop(columns="parameters"), on=keys, how="left").assign(kind=THEIRS, any_scale=False)
    both = pd.concat([ours, theirs], ignore_index=True).rename(columns={"model": "name"})
    return both[["name", "scale", "kind", *AXES, "any_scale", "source", "machine"]]


def _kilobytes(name: str) -> float:
    """Of a committed network's weights, 10^3 bytes."""
    return (runtime.CHECKPOINTS / f"{name}.safetensors").stat().st_size / 1e3


def _costs(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per network and scale of the study's one per network, scale and form."""
    height, width = rows.output.str.split("x", expand=True).astype(int).T.values
    rows = rows.assign(
        pixels=height * width,
        flops=rows.flops / (height * width),
        ms=rows.ms_per_output_megapixel,
        memory=rows.peak_mb / (height * width) * 1e6,
    )
    fp32 = rows[rows.form.str.startswith("fp32")].set_index(["model", "scale"])
    fast = rows.groupby(["model", "scale"], sort=False).last()  # fp32 where a machine has no other precision
    columns = ["parameters", "flops", "ms", "memory", "machine", "form"]
    return fast[columns].assign(ms_fp32=fp32.ms).reset_index()


def label(row: pd.Series, scales: bool) -> str:
    """A row's name in a figure; with ``scales``, what it enlarges by."""
    return f"{row['name']} ×{row['scale']}" if scales else row["name"]


def better(a: float, b: float, axis: Axis) -> bool:
    """Whether a value is better than another."""
    return a > b if axis.more_is_better else a < b


def front(rows: pd.DataFrame, cost: Axis, quality: Axis) -> pd.DataFrame:
    """The rows that no other beats in both, the cheapest first; rows that lack one of the numbers stay out.

    Of rows equal in both the first stays.
    """
    best = rows.dropna(subset=[cost.key, quality.key])
    best = best.sort_values([cost.key, quality.key], ascending=[not cost.more_is_better, not quality.more_is_better])
    kept: list[int] = []
    for i, row in best.iterrows():
        if not kept or better(row[quality.key], best.loc[kept[-1], quality.key], quality):
            kept.append(i)
    return best.loc[kept]


def choose(rows: pd.DataFrame, need: str, key: str, condition: pd.Series | None = None) -> dict[str, str]:
    """The network of this workbook that is best in ``key`` among the rows that fit: {"need", "network", "because"}.

    Of several that are equal there (within the axis's tolerance) the one with the highest PSNR. "because" gives its
    number, and that of the next network that differs. Where none fits, "network" is "none".
    """
    axis = AXES[key]
    fit = rows[(rows.kind == OURS) & rows[key].notna() & (True if condition is None else condition)]
    if fit.empty:
        return {"need": need, "network": "none", "because": "no committed network fits"}
    ranked = fit.sort_values(key, ascending=not axis.more_is_better)
    equal = (ranked[key] - ranked[key].iloc[0]).abs() <= axis.tolerance * ranked[key].iloc[0]
    first = ranked[equal].sort_values("psnr_y", ascending=False).iloc[0]
    because = f"{axis.label}: {first[key]:{axis.form}}"
    if not equal.all():
        second = ranked[~equal].iloc[0]
        because += f"; next {second['name']}, {second[key]:{axis.form}}"
    return {"need": need, "network": first["name"], "because": because}


def needs(rows: pd.DataFrame, scale: int, budget_ms: float, few: int) -> list[dict[str, str]]:
    """Which network for which need at one scale, from the numbers: rows of :func:`choose`.

    ``budget_ms`` per output megapixel, in the table's fast precision; ``few`` parameters.
    """
    at = rows[rows.scale == scale]
    return [
        choose(at, "closest to the original, pixel by pixel", "psnr_y"),
        choose(at, "closest to it for the eye", "lpips"),
        choose(at, f"best PSNR within {budget_ms:,.0f} ms per megapixel", "psnr_y", at.ms <= budget_ms),
        choose(at, f"best PSNR below {few:,} parameters", "psnr_y", at.parameters < few),
        choose(at, "fastest", "ms"),
        choose(at, "smallest file", "file"),
        choose(at, "least memory", "memory"),
        choose(at, "any scale, fractions too", "psnr_y", at.any_scale),
    ]


def for_damaged(folder: Path | None = None, kind: str = "real_esrgan", key: str = "lpips") -> dict[str, str]:
    """The x4 network that restores damaged photos best, a row as of ``choose``: for the eye, or by another ``key``.

    From the table of the study ``damaged`` on the bundled validation photos; where that is missing, "network" is
    "none" and "because" says how to make it.
    """
    how = "for the eye" if key == "lpips" else "pixel by pixel"
    need, path = f"damaged photos (blur, noise, JPEG), {how}", (folder or runtime.RESULTS) / damaged.NAME
    if not path.is_file():
        return {"need": need, "network": "none", "because": "not measured yet: python -m nbhelpers study damaged"}
    rows = pd.read_csv(path).query("image == 'mean' and set == @kind").rename(columns={"model": "name"})
    rows["kind"] = [BICUBIC if name == "bicubic" else OURS for name in rows.name]
    found = choose(rows, need, key)
    return found | {"because": found["because"].replace(", Set5", ", damaged validation photos")}


def gains(folder: Path | None = None) -> pd.DataFrame:
    """What each network gains over bicubic on each bundled photo: "name", "scale", "image", "psnr_y", "gain" in dB.

    Raises FileNotFoundError where the study ``scoreboard`` has not run.
    """
    rows = _read((folder or runtime.RESULTS) / scoreboard.PHOTOS_NAME, "scoreboard").rename(columns={"model": "name"})
    base = rows[rows.name == "bicubic"].set_index(["scale", "image"]).psnr_y
    own = rows[rows.name != "bicubic"]
    places = pd.MultiIndex.from_frame(own[["scale", "image"]])
    return own.assign(gain=own.psnr_y.values - base.loc[places].values).reset_index(drop=True)


def extremes(photos: pd.DataFrame) -> pd.DataFrame:
    """Each network's best and worst photo by gain: "name", "scale", "best", "worst", "best_gain", "worst_gain"."""
    found = []
    for (name, scale), mine in photos.groupby(["name", "scale"], sort=False):
        best, worst = mine.loc[mine.gain.idxmax()], mine.loc[mine.gain.idxmin()]
        row = {"name": name, "scale": scale, "best": best.image, "worst": worst.image}
        found.append(row | {"best_gain": best.gain, "worst_gain": worst.gain})
    return pd.DataFrame(found)
