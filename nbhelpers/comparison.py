"""One photo enlarged by bicubic and by a network, with times and scores: what the panels show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from . import degrade, inference, metrics

AS_IS, RESTORE = "as is", "shrink then restore"


@dataclass(frozen=True)
class Comparison:
    """One photo enlarged by bicubic and by a network; pictures are float (3, h, w), nominally in [0, 1]."""

    scale: float
    low: Tensor  # what both received
    bicubic: Tensor
    network: Tensor | None
    original: Tensor | None  # None in mode "as is"
    milliseconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def pictures(self) -> dict[str, Tensor]:
        """The pictures that exist, in reading order."""
        named = {"original": self.original, "bicubic": self.bicubic, "network": self.network}
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
    quality: int = 100,
    lpips: bool = False,
    precision: str = "fp32",
) -> Comparison:
    """Enlarge ``picture`` (3, h, w) in [0, 1] by bicubic and by ``model`` (None: bicubic only).

    ``as is`` enlarges the picture itself; ``shrink then restore`` shrinks it by ``scale`` first, so that the original
    stands ready for the metrics. ``quality`` below 100 damages what is enlarged by JPEG. Raises ValueError for an
    unknown mode and for a picture too small to measure.
    """
    if mode not in (AS_IS, RESTORE):
        raise ValueError(f"mode {mode!r} is unknown; choose {AS_IS!r} or {RESTORE!r}")
    original = degrade.crop_to_multiple(picture, scale) if mode == RESTORE else None
    low = picture if original is None else degrade.downscale(original, scale)
    if quality < 100:
        low = degrade.jpeg(low, quality)
    bicubic, ms_bicubic = timed(lambda: degrade.upscale_bicubic(low, scale).clamp(0, 1))
    milliseconds, network = {"bicubic": ms_bicubic}, None
    if model is not None:
        network, milliseconds["network"] = timed(lambda: inference.upscale(model, low, precision=precision).cpu())
    result = Comparison(scale, low, bicubic, network, original, milliseconds)
    if original is not None:
        for name in milliseconds:
            result.scores[name] = metrics.compare(result.pictures()[name], original, scale, lpips=lpips)
    return result
