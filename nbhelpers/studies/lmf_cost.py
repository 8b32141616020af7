"""What does rendering any scale cost? Decoders, encoders, growth with the picture (notebook 08; claims L1, L4, L7)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .. import benchmark, checkpoints, counting, models, profiling, runtime
from ..models.cross_scale import CrossScaleAttention
from ..models.encoders import PRESETS, build_encoder
from . import Row, write
from .lmf_scales import NETWORK

NAME = "lmf_decoders.csv"
TABLES = (NAME, "lmf_encoders.csv", "lmf_growth.csv", "lmf_large.csv")
DECODERS = ("LIIF", "LTE", "LMLTE")
SCALES = (2, 3, 4, 6, 8)
SIDE = 48  # of the small picture whose features are decoded
ENCODED = 64  # side of the picture for the comparison of encoders
SIDES = (32, 48, 64, 96, 128)  # for the growth with the picture
MEGAPIXELS = (2, 8)
REPEATS = 5


def precisions() -> list[str]:
    """fp32, and the fast arithmetic of this machine's CPU where it has one."""
    return list(dict.fromkeys(["fp32", runtime.pick_precision(torch.device("cpu"))]))


def _run(work: Callable[[], object], precision: str) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        with runtime.autocast(torch.device("cpu"), precision):
            work()

    return run


def _macs(work: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def decoders(side: int = SIDE, scales: Sequence[int] = SCALES, repeats: int = REPEATS) -> list[Row]:
    """The three decoders, published sizes, on the same features of EDSR-baseline; timed in turns at each scale.

    Rows {"decoder", "scale", "precision", "macs" (of an output pixel), "ms", "ms_per_output_megapixel"}.
    """
    lr = torch.rand(1, 3, side, side)
    networks = {name: models.build(name).eval() for name in DECODERS}
    with torch.no_grad():
        features = networks["LMLTE"].encode(lr)
    rows: list[Row] = []
    for scale in tqdm(scales, desc="decoders", unit="scale"):
        size = (side * scale, side * scale)
        works = [functools.partial(net.render, features, lr, size) for net in networks.values()]
        macs = [round(_macs(work) / math.prod(size)) for work in works]
        for precision in precisions():
            times = profiling.medians_ms([_run(work, precision) for work in works], repeats, warmup=1)
            for name, count, ms in zip(networks, macs, times, strict=True):
                row: Row = {"decoder": name, "scale": scale, "precision": precision, "macs": count, "ms": round(ms, 2)}
                rows.append(row | {"ms_per_output_megapixel": round(ms / math.prod(size) * 1e6, 1)})
    return rows


def encoders(side: int = ENCODED, repeats: int = REPEATS) -> list[Row]:
    """Every preset: {"encoder", "precision", "parameters", "macs" (of an input pixel), "ms"}, timed in turns."""
    x = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    networks = {name: build_encoder(name).eval().to(memory_format=torch.channels_last) for name in PRESETS}
    works = {name: functools.partial(network, x) for name, network in networks.items()}
    counts = {
        name: (models.count_parameters(networks[name]), round(_macs(work) / side**2)) for name, work in works.items()
    }
    rows: list[Row] = []
    for precision in precisions():
        times = profiling.medians_ms([_run(work, precision) for work in works.values()], repeats, warmup=1)
        for name, ms in zip(works, times, strict=True):
            row: Row = {"encoder": name, "precision": precision, "parameters": counts[name][0], "macs": counts[name][1]}
            rows.append(row | {"ms": round(ms, 2)})
    return rows


class _AllWeights(nn.Module):
    """Cross-scale attention as the formula is written: all weights, pixels x pixels of the small map, at once."""

    def __init__(self, attention: CrossScaleAttention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        a, out = self.attention, x
        query = a.query(x).flatten(2).mT
        for small in a.shrunk(x):
            key, value = (layer(small).flatten(2) for layer in (a.key, a.value))
            out = out + ((query @ key * a.scale).softmax(-1) @ value.mT).mT.unflatten(2, x.shape[-2:])
        return out


def growing() -> dict[str, Callable[[Tensor], object]]:
    """{part: what it does to features "1 64 h w" (the encoders: to their first three)}, published sizes."""
    network, attention = models.build("LMLTE").eval(), CrossScaleAttention(64).eval()
    found = {f"encoder {name}": build_encoder(name).eval() for name in ("EDSR-b", "SwinIR")}
    works: dict[str, Callable[[Tensor], object]] = {
        name: lambda x, encoder=encoder: encoder(x[:, :3]) for name, encoder in found.items()
    }
    works["attention, all weights at once"] = _AllWeights(attention)
    works["attention, fused"] = attention
    works["renderer x4"] = lambda x: network.render(x, x[:, :3], tuple(4 * n for n in x.shape[-2:]))
    return works


def growth(sides: Sequence[int] = SIDES, repeats: int = REPEATS) -> list[Row]:
    """Time (fp32, the sides in turns) and memory by picture: {"part", "pixels", "ms", "peak_mb"}, 10^6 bytes.

    Memory is what tensors hold at once beside the input, without what a fused operation keeps inside.
    """
    inputs, rows = [torch.rand(1, 64, side, side) for side in sides], []
    for part, work in tqdm(growing().items(), desc="growth", unit="part"):
        runs = [_run(functools.partial(work, x), "fp32") for x in inputs]
        times = profiling.medians_ms(runs, repeats, warmup=1)
        for x, ms in zip(inputs, times, strict=True):
            peak = counting.peak_activations(work, x)
            rows.append({"part": part, "pixels": x[0, 0].numel(), "ms": round(ms, 3), "peak_mb": round(peak / 1e6, 3)})
    return rows


def exponents(rows: Sequence[Row], key: str = "ms") -> dict[str, tuple[float, float]]:
    """{part: (p, half of its 95 % interval)} of the best fit ``key`` = c · pixels^p to the rows of :func:`growth`."""
    from scipy.stats import linregress, t

    found = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        points = [(math.log(row["pixels"]), math.log(max(row[key], 1e-9))) for row in rows if row["part"] == part]
        fit = linregress(*zip(*points, strict=True))
        found[part] = (float(fit.slope), float(fit.stderr * t.ppf(0.975, len(points) - 2)))
    return found


def large(name: str, megapixels: Sequence[float]) -> list[Row]:
    """Time and memory of the ``upscale`` command by megapixels of output; see ``benchmark.large_picture``."""
    rows: list[Row] = []
    for mp in megapixels:
        found = benchmark.large_picture(name, mp)
        rows.append({"megapixels": mp, **{k: found[k] for k in ("model", "output", "precision", "threads", "seconds")}})
        rows[-1]["peak_mb"] = round(found["peak_mb"])
    return rows


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study lmf_cost``: the four tables of this machine, minutes."""
    runtime.set_threads()
    short = {"repeats": 1} if quick else {}
    tables = [
        decoders(**short | ({"side": 8, "scales": (2, 8)} if quick else {})),
        encoders(**short | ({"side": 16} if quick else {})),
        growth(**short | ({"sides": (8, 16, 24)} if quick else {})),
    ]
    if NETWORK in checkpoints.available():
        tables.append(large(NETWORK, (0.2,) if quick else MEGAPIXELS))
    folder = runtime.RUNS / "quick_results" if quick else runtime.RESULTS
    for name, rows in zip(TABLES, tables, strict=False):
        write(folder / name, [row | {"machine": runtime.machine()} for row in rows])
    return folder / NAME
