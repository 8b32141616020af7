"""What every committed network costs and what it makes of each bundled photo: two tables (notebook 09)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import benchmark, models, profiling, runtime
from ..datasets.photos import resolve_root
from ..inference import evaluate, get_model
from . import Row, write
from .set5 import jobs

NAME, PHOTOS_NAME = "scoreboard.csv", "scoreboard_photos.csv"
SIDE = 384  # of the enlarged picture, in pixels: a multiple of 2, 3 and 4
REPEATS = 9
# Published networks that the library spandrel can build. Untrained: cost does not depend on the weights' values.
PEERS: dict[tuple[str, int], tuple[str, dict]] = {
    ("SPAN ch48", 4): ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 48}),
    ("DAT-light", 4): (
        "DAT",
        {
            "depth": [18], "embed_dim": 60, "num_heads": [6], "expansion_factor": 2, "split_size": [8, 32],
            "resi_connection": "3conv", "upsampler": "pixelshuffledirect",
        },
    ),
}  # fmt: skip
Job = tuple[str, int, str | nn.Module]  # name, scale, what to load


def peers() -> list[Job]:
    """The networks of ``PEERS``, untrained."""
    found = []
    for (name, scale), (arch, arguments) in PEERS.items():
        runtime.seed_everything(0)
        network = getattr(importlib.import_module(f"spandrel.architectures.{arch}"), arch)(upscale=scale, **arguments)
        network.scale = scale
        for parent in list(network.modules()):
            for key, child in list(parent.named_children()):
                if hasattr(child, "eval_conv"):  # SPAN's layers of three, which are one after training
                    child.update_params()
                    setattr(parent, key, child.eval_conv)
        found.append((name, scale, network.eval().requires_grad_(False)))
    return found


def costs(networks: Sequence[Job], side: int = SIDE, repeats: int = REPEATS) -> list[Row]:
    """One row per network and form, all for a picture enlarged to ``side`` x ``side``, timed in turns.

    Forms are fp32 and the fast precision of this machine, in the memory layout that ``upscale`` uses. "flops" is 2 per
    multiply-add, "ms" the median of ``repeats`` calls, "ms_low" and "ms_high" its quartiles, "peak_mb" (10^6 bytes)
    what a call takes beside weights and input. Raises ValueError for a side that is no multiple of a scale.
    """
    if wrong := sorted({scale for _, scale, _ in networks if side % scale}):
        raise ValueError(f"side {side} is no multiple of {wrong}: all networks must make pictures of one size")
    device, threads = runtime.pick_device(), torch.get_num_threads()
    forms = [form for form in benchmark.forms(device) if "channels_last" in form]
    plans = [(job, form) for job in sorted(networks, key=lambda job: job[1]) for form in forms]
    peaks = []
    for scale, group in itertools.groupby(plans, key=lambda plan: plan[0][1]):
        same = [(source, form) for (_, _, source), form in group]
        peaks += benchmark.peak_bytes(same, side // scale, device, threads, scale)
    runs = [benchmark.runner(s, form, device, scale)(side // scale) for (_, scale, s), form in plans]
    times = profiling.latencies_ms(runs, repeats, 2, "timing in turns")
    counted = {(name, scale): _counts(source, scale, side) for name, scale, source in networks}
    rows = []
    for ((name, scale, _), form), ms, peak in zip(plans, times, peaks, strict=True):
        row = {"model": name, "scale": scale, "form": form, "output": f"{side}x{side}", **counted[name, scale]}
        row |= {key: round(value, 3) for key, value in zip(("ms", "ms_low", "ms_high"), ms, strict=True)}
        row["ms_per_output_megapixel"] = round(ms.median / side**2 * 1e6, 2)
        rows.append(row | {"peak_mb": round(peak / 1e6, 2), "threads": threads, "machine": runtime.machine()})
    return rows


def _counts(source: str | nn.Module, scale: int, side: int) -> Row:
    model = get_model(source, scale)
    used = profiling.flops(model, (1, 3, side // scale, side // scale))
    return {"parameters": models.count_parameters(model), "flops": used}


def on_photos(networks: Sequence[tuple[str, int]]) -> list[Row]:
    """One row per network and bundled validation photo, by the protocol."""
    rows = []
    for name, scale in tqdm(networks, desc="photos", unit="network", leave=False):
        for image, values in evaluate(name, resolve_root("bundled_val"), scale=scale)["images"].items():
            rounded = {k: None if v is None else round(v, 4) for k, v in values.items()}
            rows.append({"model": name, "scale": scale, "image": Path(image).stem, **rounded})
    return rows


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study scoreboard``: the two tables of this machine, minutes."""
    runtime.set_threads()
    chosen = jobs()[: 4 if quick else None]
    folder = runtime.RUNS / "quick_results" if quick else runtime.RESULTS
    networks = [(name, scale, name) for name, scale in chosen] + peers()
    write(folder / NAME, costs(networks, *((48, 1) if quick else ())))
    write(folder / PHOTOS_NAME, on_photos(chosen[:1] if quick else chosen))
    return folder / NAME
