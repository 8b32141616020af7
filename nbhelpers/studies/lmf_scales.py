"""Quality against scale: bicubic, networks for one scale, and one network for all (notebook 08; claim L2)."""

from __future__ import annotations

import functools
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import checkpoints, metrics, runtime
from ..comparison import crop_window
from ..datasets.photos import resolve_root
from ..degrade import crop_to_multiple, downscale, resize_bicubic
from ..images import find_images, load_image
from ..inference import upscale
from . import Row, write
from .set5 import folders

NAME = "lmf_scales.csv"
SCALES = (1.5, 2, 2.7, 3, 4, 6, 8, 12)
NETWORK = "lmlte_rlfn"  # for any scale
ONE_SCALE = ("espcn_x4", "m23_rlfn_x2", "m23_rlfn_x3", "m23_rlfn_x4")


@functools.lru_cache(maxsize=5)
def pictures(folder: Path, scale: float, side: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(lr, hr) "3 h w" in [0, 1] of every picture in a folder, by the protocol's downscaler; with ``side`` of its
    middle, so many pixels wide and high."""
    pairs = []
    for path in find_images(folder):
        photo = load_image(path)
        hr = crop_to_multiple(photo[(slice(None), *crop_window(*photo.shape[-2:], side))], scale)
        pairs.append((downscale(hr, scale), hr))
    return pairs


def enlarge(network: nn.Module | None, lr: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture "3 h w" to ``size``: by bicubic (None), a network for any scale, or one for its own scale and then
    bicubic, smaller or larger."""
    if network is None:
        return resize_bicubic(lr, size).clamp(0, 1)
    if hasattr(network, "at"):
        return upscale(network, lr, size=size)
    sr = upscale(network, lr)
    return sr if tuple(sr.shape[-2:]) == size else resize_bicubic(sr, size).clamp(0, 1)


def scores(network: nn.Module | None, folder: Path, scale: float) -> dict[str, float]:
    """Means over a folder: ``psnr_y`` in dB, ``ssim_y``."""
    found = []
    for lr, hr in pictures(folder, scale):
        found.append(metrics.compare(enlarge(network, lr, tuple(hr.shape[-2:])), hr, scale, lpips=False))
    mean = metrics.mean(found)
    return {key: round(mean[key], 4) for key in ("psnr_y", "ssim_y")}


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study lmf_scales``: one row for each set (val, and Set5 where it is), scale and network."""
    runtime.set_threads()
    sets = {"val": resolve_root("bundled_val")}
    if runtime.shared() is not None:
        sets["set5"] = folders(2)[0]
    names = [n for n in (NETWORK, *ONE_SCALE) if n in checkpoints.available()]
    networks = {"bicubic": None, **{name: checkpoints.load(name) for name in names}}
    jobs = [(s, scale) for s in sets for scale in SCALES][-1 if quick else None :]
    rows: list[Row] = []
    for name, scale in tqdm(jobs, desc="scales", unit="scale"):
        for model, network in networks.items():
            rows.append({"set": name, "scale": scale, "model": model, **scores(network, sets[name], scale)})
    path = (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / NAME
    write(path, rows)
    return path
