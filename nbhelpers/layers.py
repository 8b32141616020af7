"""Layers that more than one network uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _keys_cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _upsampling_kernel(scale: int, channels: int, profile: Callable[[Tensor], Tensor], radius: int) -> Tensor:
    """Interpolation by a whole number as a depthwise kernel "c·scale² 1 2r+1 2r+1", to be followed by a shuffle."""
    offset = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = profile(offset[:, None] - torch.arange(-radius, radius + 1, dtype=torch.float64))
    kernel = torch.einsum("ay,bx->abyx", taps, taps).reshape(scale * scale, 1, 2 * radius + 1, 2 * radius + 1)
    return kernel.float().repeat(channels, 1, 1, 1)


class BicubicUpsample(nn.Module):
    """Bicubic enlargement by a whole number as one fixed 5x5 convolution and a pixel shuffle.

    "b c h w" in [0, 1] → "b c h·scale w·scale"; equals :func:`nbhelpers.degrade.upscale_bicubic` (Keys a = -0.5,
    replicated border). Being a convolution, it gives a tile the very values it gives the whole picture,
    which an interpolation with floating-point coordinates does not. Always computed in fp32.

    ``details`` "b c·scale² h w" are a network's sub-pixels: one shuffle serves both, to the same digits as two.
    """

    halo = 2

    def __init__(self, scale: int, channels: int = 3):
        super().__init__()
        self.scale, self.channels = scale, channels
        self.register_buffer("kernel", _upsampling_kernel(scale, channels, _keys_cubic, 2), persistent=False)

    def forward(self, x: Tensor, details: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.float(), (2, 2, 2, 2), mode="replicate")
            x = F.conv2d(x, self.kernel, groups=self.channels)
            # In place, which saves a picture of memory: a convolution's gradient does not need its output.
            return F.pixel_shuffle(x if details is None else x.add_(details), self.scale)


class BilinearUpsample(nn.Module):
    """Bilinear enlargement of features "b c h w" by a whole number, made like :class:`BicubicUpsample`.

    Equals ``F.interpolate(x, scale_factor=scale, mode="bilinear")`` to rounding; computed in autocast's precision.
    """

    def __init__(self, scale: int, channels: int):
        super().__init__()
        self.scale, self.channels = scale, channels
        kernel = _upsampling_kernel(scale, channels, lambda x: (1 - x.abs()).clamp_min(0), 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(x, self.kernel, groups=self.channels), self.scale)


class DilatedConv2d(nn.Conv2d):
    """``nn.Conv2d``, padded for an odd kernel so that the size stays, with bf16 gradients one can trust on a CPU.

    oneDNN's bf16 weight gradient of a dilated convolution reads and writes beyond its memory (garbage, NaN or a crash)
    unless the numbers of channels are multiples of 16: seen with torch 2.15 on AVX512 from pictures 32 wide. Such a
    layer computes in fp32 there, whatever autocast says.
    """

    def __init__(self, before: int, after: int, kernel: int = 3, dilation: int = 1, **options: object):
        super().__init__(before, after, kernel, padding=dilation * (kernel // 2), dilation=dilation, **options)
        self.full = dilation > 1 and bool(before % 16 or after % 16)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.full and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise ``nn.Conv2d`` with an odd kernel, padded so that the size stays, whose training is fast on a CPU.

    oneDNN has no fast weight gradient for depthwise kernels above 3x3 (16.5 ms instead of 0.2 ms for 16 pictures of
    48 channels, 32x32 in bf16). Here a larger kernel's gradient is put together from those of 3x3 windows.
    Raises ValueError for an even kernel.
    """

    def __init__(self, channels: int, kernel: int = 3, **options: object):
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd and at least 1")
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        by_windows = self.training and torch.is_grad_enabled() and x.device.type == "cpu" and self.kernel_size[0] > 3
        if not by_windows:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        out = _ByWindows.apply(x.to(dtype), self.weight.to(dtype))
        return out if self.bias is None else out + self.bias.to(dtype)[:, None, None]


class _ByWindows(torch.autograd.Function):
    """Depthwise convolution "b c h w" with a kernel "c 1 k k", k odd and above 3, padded by k // 2."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        channels, side = weight.shape[0], weight.shape[-1]
        pad, (h, w) = side // 2, x.shape[-2:]

        def convolution_backward(x: Tensor, weight: Tensor, pad: int, *wanted: bool) -> tuple[Tensor, ...]:
            shape = [[1, 1], [pad, pad], [1, 1], False, [0, 0], channels, [*wanted, False]]
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *shape)

        of_x = convolution_backward(x, weight, pad, True, False)[0] if ctx.needs_input_grad[0] else None
        padded, of_weight = F.pad(x, (pad,) * 4), torch.empty_like(weight)
        window = weight[..., :3, :3].contiguous()
        starts = sorted({*range(0, side - 3, 3), side - 3})  # the last window may overlap; both give the same values
        for i in starts:
            for j in starts:
                seen = padded[..., i : i + h + 2, j : j + w + 2]
                of_weight[..., i : i + 3, j : j + 3] = convolution_backward(seen, window, 0, False, True)[1]
        return of_x, of_weight
