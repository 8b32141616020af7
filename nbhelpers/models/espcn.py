"""ESPCN: three convolutions in low resolution, then one pixel shuffle (Shi et al. 2016; document 002)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BicubicUpsample

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
}


class ESPCN(nn.Module):
    """Efficient sub-pixel network: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    Args:
        scale: whole-number enlargement.
        channels: width of the two hidden layers; 64 in the paper, 128 in document 002.
        activation: ``tanh`` (paper), ``relu`` or ``leaky_relu`` (slope 0.1, document 002).
        skip: add the bicubic enlargement, so that the network learns only what bicubic misses (ours).
        batch_norm: normalise after both hidden convolutions; document 002 leaves it out of generators (claim K8).
        output_activation: ``tanh`` maps the output to (0, 1), which document 002 tried first; None otherwise.

    Source: https://arxiv.org/abs/1609.05158; 212,656 parameters at 128 channels and scale 4.
    """

    halo = 4  # radius of the receptive field in input pixels: 2 + 1 + 1

    def __init__(
        self,
        scale: int = 4,
        channels: int = 128,
        activation: str = "leaky_relu",
        skip: bool = True,
        output_activation: str | None = None,
        batch_norm: bool = False,
    ):
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale {scale} must be a whole number of at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; choose one of {list(ACTIVATIONS)}")
        if output_activation not in (None, "tanh"):
            raise ValueError(f"output_activation {output_activation!r} is unknown; choose None or 'tanh'")
        if skip and output_activation:
            raise ValueError("skip=True adds bicubic to an unbounded output; use output_activation=None with it")
        act = ACTIVATIONS[activation]
        norm = [nn.BatchNorm2d] if batch_norm else []
        self.scale = scale
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=5, padding="same"),
            *(n(channels) for n in norm),
            act(),
            nn.Conv2d(channels, channels, kernel_size=3, padding="same"),
            *(n(channels) for n in norm),
            act(),
        )
        self.to_subpixels = nn.Conv2d(channels, 3 * scale**2, kernel_size=3, padding="same")
        self.shuffle = nn.PixelShuffle(scale)
        self.skip = BicubicUpsample(scale) if skip else None
        self.squash = nn.Tanh() if output_activation == "tanh" else None

    def forward(self, x: Tensor) -> Tensor:
        details = self.to_subpixels(self.features(x))
        if self.skip is not None:
            return self.skip(x, details)
        out = self.shuffle(details).float()
        return out if self.squash is None else (self.squash(out) + 1) / 2


class StagedESPCN(nn.Module):
    """ESPCN that enlarges in ``stages``, with residual 3x3 convolutions around them; "b 3 h w" → "b 3 h·s w·s".

    Args:
        scale: whole-number enlargement.
        stages: enlargement of each stage; (4,) is one step of four, (2, 2) twice two (document 002, claim K9).
        channels: width of all hidden layers.
        body: convolutions before the first enlargement.
        between: convolutions after each enlargement but the last.
        after: convolutions after the last enlargement.
        upsampler: ``pixelshuffle`` (a convolution to s² times the channels, then the shuffle) or ``nearest``
            (repeat pixels, then a convolution; ESRGAN's way).
        skip: add the bicubic enlargement.

    Raises ValueError for an unknown upsampler, or stages that do not multiply to ``scale``.
    """

    def __init__(
        self,
        scale: int = 4,
        stages: Sequence[int] = (2, 2),
        channels: int = 64,
        body: int = 2,
        between: int = 2,
        after: int = 1,
        upsampler: str = "pixelshuffle",
        skip: bool = True,
    ):
        super().__init__()
        if math.prod(stages) != scale or min(stages, default=0) < 2:
            raise ValueError(
                f"stages {list(stages)} must be whole numbers of at least 2 that multiply to scale {scale}"
            )
        if upsampler not in ("pixelshuffle", "nearest"):
            raise ValueError(f"upsampler {upsampler!r} is unknown; choose 'pixelshuffle' or 'nearest'")
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1)]
        reach, grown = 2.0, 1  # receptive radius in input pixels; enlargement so far
        for i, stage in enumerate(stages):
            width = between if i else body
            layers += [_Conv(channels) for _ in range(width)] + [_enlarge(channels, stage, upsampler)]
            reach += (width + (upsampler == "pixelshuffle")) / grown
            grown *= stage
            reach += (upsampler == "nearest") / grown
        layers += [_Conv(channels) for _ in range(after)] + [nn.Conv2d(channels, 3, 3, padding=1)]
        self.halo = math.ceil(reach + (after + 1) / grown)
        self.layers = nn.Sequential(*layers)
        self.skip = BicubicUpsample(self.scale) if skip else None
        nn.init.zeros_(layers[-1].weight)  # the first picture is bicubic's, or black

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x).float()
        return out if self.skip is None else out + self.skip(x)


class _Conv(nn.Conv2d):
    """x + LeakyReLU(3x3 convolution of x): a plain stack of twenty learns nothing within some hundred steps."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.leaky_relu(super().forward(x), 0.1)


def _enlarge(channels: int, factor: int, upsampler: str) -> nn.Module:
    if upsampler == "nearest":
        return nn.Sequential(
            nn.Upsample(scale_factor=factor), nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.1)
        )
    wide = nn.Conv2d(channels, channels * factor**2, 3, padding=1)
    return nn.Sequential(wide, nn.PixelShuffle(factor), nn.LeakyReLU(0.1))
