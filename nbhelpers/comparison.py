"""One photo enlarged by bicubic and by one or two networks, with times, memory and scores: what the panels show."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import counting, degrade, inference, metrics
from .degradation import Blur, Jpeg, Noise, Stage
from .images import to_tensor, to_uint8
from .jobs import Job

AS_IS, RESTORE = "as is", "shrink then restore"
SIDES = {"other": "left side", "network": "right side"}
MOST_SHOWN = 16_000_000  # pixels of a picture on a page; more would keep the browser busy for seconds


@dataclass(frozen=True)
class Damage:
    """What is done to a picture before it is enlarged: blur, then noise, then JPEG, each as one slider sets it.

    ``blur`` is the deviation of a Gaussian in pixels, ``noise`` that of white noise in grey levels of 255, ``quality``
    JPEG's from 1 to 100; 0, 0 and 100 do nothing. The same ``seed`` gives the same noise.
    """

    quality: int = 100
    blur: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Damage a picture "3 h w" in [0, 1]; the result is in 8-bit levels. ValueError for a strength out of range."""
        stage = Stage(
            blur=Blur((self.blur, self.blur)) if self.blur else None,
            noise=Noise((self.noise, self.noise), (0, 0), gaussian=1) if self.noise else None,
            jpeg=Jpeg((self.quality, self.quality)) if self.quality < 100 else None,
        )
        dice, generator = random.Random(self.seed), torch.Generator().manual_seed(self.seed)
        x = stage.compress(stage.before_jpeg(x, tuple(x.shape[-2:]), dice, generator), dice)
        return x.clamp(0, 1).mul(255).round().div(255)

    def __str__(self) -> str:
        said = {"blur": f"blur {self.blur:g} px", "noise": f"noise {self.noise:g} of 255"}
        parts = [said[name] for name in said if getattr(self, name)]
        return ", ".join(parts + [f"JPEG quality {self.quality}"] * (self.quality < 100))


@dataclass(frozen=True)
class Comparison:
    """One photo enlarged by bicubic and by a network (or two); pictures are float (3, h, w), nominally in [0, 1].

    ``milliseconds``, ``bytes`` (weights, and the most that tensors held at once; None where a network's own runtime
    cannot be looked into) and ``scores`` have the keys bicubic, other, network. Where the enlarged picture is too large
    for a page, the pictures are smaller by ``reduced``, and ``whole`` is the network's, uint8 (h, w, 3).
    """

    scale: float
    low: Tensor  # what all received
    bicubic: Tensor
    network: Tensor | None
    original: Tensor | None  # None in mode "as is"
    milliseconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    other: Tensor | None = None
    bytes: dict[str, int | None] = field(default_factory=dict)
    reduced: float = 1.0
    whole: np.ndarray | None = None

    def pictures(self) -> dict[str, Tensor]:
        """The pictures that exist, in reading order."""
        named = {"original": self.original, "bicubic": self.bicubic, "other": self.other, "network": self.network}
        return {name: picture for name, picture in named.items() if picture is not None}


def crop_window(height: int, width: int, size: int, across: float = 0.5, down: float = 0.5) -> tuple[slice, slice]:
    """Rows and columns of a ``size`` x ``size`` window (0: everything), ``across``/``down`` in 0..1, 0.5 = centre."""
    h, w = (min(height, size), min(width, size)) if size else (height, width)
    top, left = round((height - h) * down), round((width - w) * across)
    return slice(top, top + h), slice(left, left + w)


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call gives, and the milliseconds it took."""
    start = time.perf_counter()
    return work(), (time.perf_counter() - start) * 1000


def compare_upscaling(
    picture: Tensor,
    model: nn.Module | None,
    scale: float,
    mode: str = RESTORE,
    damage: Damage = Damage(),
    lpips: bool = False,
    precision: str = "fp32",
    *,
    other: nn.Module | None = None,
    job: Job | None = None,
) -> Comparison:
    """Enlarge ``picture`` (3, h, w) in [0, 1] by bicubic, ``model`` (None: bicubic only) and ``other``.

    ``as is`` enlarges the picture itself; ``shrink then restore`` shrinks it by ``scale`` first, so that the original
    stands ready for the metrics. ``damage`` is done to what is enlarged. A network for another scale than ``scale``
    enlarges by its own, and bicubic does the rest. ``job`` is told of the progress, and may be cancelled. Raises
    ValueError for an unknown mode and for a picture too small to measure, Cancelled.
    """
    if mode not in (AS_IS, RESTORE):
        raise ValueError(f"mode {mode!r} is unknown; choose {AS_IS!r} or {RESTORE!r}")
    original = degrade.crop_to_multiple(picture, scale) if mode == RESTORE else None
    low = picture if original is None else degrade.downscale(original, scale)
    low = damage(low) if str(damage) else low
    size = tuple(round(side * scale) for side in low.shape[-2:])
    reduced = max(1.0, (size[0] * size[1] / MOST_SHOWN) ** 0.5) if original is None else 1.0
    run = _Run(low, scale, size, reduced, precision, job)
    pictures = {"bicubic": run.bicubic()}
    for name, network in {"other": other, "network": model}.items():
        pictures[name] = None if network is None else run.network(name, network)
    kept = run.whole if model is not None else None
    result = Comparison(scale, low, original=original, reduced=reduced, whole=kept, **run.found, **pictures)
    if original is not None:
        for name in result.milliseconds:
            run.say(f"measuring, {SIDES.get(name, name)}")
            result.scores[name] = metrics.compare(result.pictures()[name], original, scale, lpips=lpips)
    return result


class _Run:
    """The enlargements of one comparison: what they have in common, and what is found out about each."""

    def __init__(
        self, low: Tensor, scale: float, size: tuple[int, int], reduced: float, precision: str, job: Job | None
    ):
        self.low, self.scale, self.size, self.reduced, self.precision = low, scale, size, reduced, precision
        self.job = job
        # So large a picture is worked on in 8 bits: four times less memory.
        self.given = to_uint8(low) if reduced > 1 else low
        self.whole: np.ndarray | None = None
        self.found: dict[str, dict] = {"milliseconds": {}, "bytes": {}}

    def say(self, doing: str) -> None:
        if self.job is not None:
            self.job.stage(doing)

    def bicubic(self) -> Tensor:
        if self.reduced > 1:
            return self.network("bicubic", inference.get_model("bicubic", self.scale))
        return self._measured("bicubic", lambda: degrade.upscale_bicubic(self.low, self.scale).clamp(0, 1), 0)

    def network(self, name: str, model: nn.Module) -> Tensor:
        model = model.at(self.scale) if hasattr(model, "at") else model
        # An exported file (which has ``info``) computes outside torch, where nothing can be counted.
        weights = None if hasattr(model, "info") else sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
        progress = False if self.job is None else self.job.step
        watching = contextlib.nullcontext() if self.job is None else self.job.watching(model)

        def enlarged() -> Tensor | np.ndarray:
            return self._sized(inference.upscale(model, self.given, precision=self.precision, progress=progress))

        with watching:
            return self._measured(name, enlarged, weights)

    def _sized(self, out: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Brought to the size asked for, where a network has another scale."""
        if isinstance(out, np.ndarray):
            return out if out.shape[:2] == self.size else _resized(out, self.size)
        return out.cpu() if tuple(out.shape[-2:]) == self.size else degrade.resize_bicubic(out, self.size).clamp(0, 1)

    def _measured(self, name: str, work: Callable[[], Tensor | np.ndarray], weights: int | None) -> Tensor:
        self.say(f"enlarging, {SIDES.get(name, name)}")
        with counting.Ledger() as ledger:
            out, self.found["milliseconds"][name] = timed(work)
        arrays = out.nbytes if isinstance(out, np.ndarray) else 0
        self.found["bytes"][name] = None if weights is None else weights + ledger.peak + arrays
        if not arrays:
            return out
        self.whole = out
        return to_tensor(_resized(out, tuple(round(side / self.reduced) for side in self.size)))


def _resized(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """8-bit bicubic (antialiased) without a copy in floating point, which takes 12 bytes a pixel."""
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BICUBIC))
