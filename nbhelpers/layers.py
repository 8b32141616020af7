"""Layers that more than one network uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _keys_cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


class BicubicUpsample(nn.Module):
    """Bicubic enlargement by a whole number as one fixed 5x5 convolution and a pixel shuffle.

    "b c h w" in [0, 1] → "b c h·scale w·scale"; equals :func:`nbhelpers.degrade.upscale_bicubic` (Keys a = -0.5,
    replicated border). Being a convolution, it gives a tile the very values it gives the whole picture,
    which an interpolation with floating-point coordinates does not. Always computed in fp32.
    """

    halo = 2

    def __init__(self, scale: int, channels: int = 3):
        super().__init__()
        self.scale, self.channels = scale, channels
        offset = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
        taps = _keys_cubic(offset[:, None] - torch.arange(-2, 3, dtype=torch.float64))
        kernel = torch.einsum("ay,bx->abyx", taps, taps).reshape(scale * scale, 1, 5, 5)
        self.register_buffer("kernel", kernel.float().repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.float(), (2, 2, 2, 2), mode="replicate")
            return F.pixel_shuffle(F.conv2d(x, self.kernel, groups=self.channels), self.scale)
