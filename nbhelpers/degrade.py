"""How low-resolution pictures are made: one named protocol (MATLAB-style bicubic) and the other ways beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

JPEG_QUALITIES = (50, 70, 80, 90, 95, 99)


def _batched(x: Tensor) -> tuple[Tensor, bool]:
    if x.dim() not in (3, 4):
        raise ValueError(f"expected a picture 'c h w' or a batch 'b c h w', got shape {tuple(x.shape)}")
    return (x[None], True) if x.dim() == 3 else (x, False)


def crop_to_multiple(x: Tensor, n: float) -> Tensor:
    """Crop (…, h, w) at the bottom and right so that both sides are multiples of ``n``.

    For a fractional scale n: the largest round(k·n) that fit, with a whole k, the small picture's side.
    """
    small = [int(side / n + 1e-9) for side in x.shape[-2:]]
    h, w = (min(side, round(k * n)) for side, k in zip(x.shape[-2:], small, strict=True))
    if 0 in small:
        raise ValueError(f"picture of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than the scale {n}")
    return x[..., :h, :w]


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """MATLAB-style bicubic (Keys a = -0.5, antialiased, replicated border) to ``size`` = (h, w); not clamped.

    torch's antialiased kernel is MATLAB's; padding by replication first makes the borders agree as well
    (at most 2 grey levels from the files published with Set5). For a ratio that is not the same whole number
    on both axes the padding would shift the grid, so only torch's own border rule is used there.
    """
    x, single = _batched(x)
    h, w = x.shape[-2:]
    up = max(1, -(-size[0] // h), -(-size[1] // w))
    down = max(1, -(-h // size[0]), -(-w // size[1]))
    whole = (size[0] == h * up and size[1] == w * up) or (h == size[0] * down and w == size[1] * down)
    pad = 4 * down if whole else 0
    padded = F.pad(x, (pad,) * 4, mode="replicate") if pad else x
    extra = 2 * pad * up // down
    out = F.interpolate(
        padded, size=(size[0] + extra, size[1] + extra), mode="bicubic", align_corners=False, antialias=True
    )
    cut = extra // 2
    out = out[..., cut : cut + size[0], cut : cut + size[1]]
    return out[0] if single else out


def upscale_bicubic(x: Tensor, scale: float) -> Tensor:
    """Bicubic enlargement of (3, h, w) or (b, 3, h, w) by ``scale``; the baseline of every table."""
    return resize_bicubic(x, (round(x.shape[-2] * scale), round(x.shape[-1] * scale)))


def _interpolate(mode: str, antialias: bool) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
        x, single = _batched(x)
        corners = None if mode == "area" else False  # interpolate takes no such option there
        out = F.interpolate(x, size=size, mode=mode, align_corners=corners, antialias=antialias)
        return out[0] if single else out

    return resize


def _pillow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic on 8-bit pictures, as document 002 prepares its data."""
    x, single = _batched(x)
    out = []
    for picture in x:
        array = picture.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        small = Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        out.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).to(x.device).float() / 255)
    return out[0] if single else torch.stack(out)


def srgb_to_linear(x: Tensor) -> Tensor:
    """sRGB values in [0, 1] → linear light in [0, 1] (IEC 61966-2-1)."""
    x = x.clamp(0, 1)
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(x: Tensor) -> Tensor:
    """Linear light in [0, 1] → sRGB values in [0, 1] (IEC 61966-2-1)."""
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, x * 12.92, 1.055 * x.clamp_min(1e-8) ** (1 / 2.4) - 0.055)


def _linear_light(x: Tensor, size: tuple[int, int]) -> Tensor:
    return linear_to_srgb(resize_bicubic(srgb_to_linear(x), size))


DOWNSCALERS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "matlab": resize_bicubic,
    "pillow": _pillow,
    "torch_antialias": _interpolate("bicubic", True),
    "torch_no_antialias": _interpolate("bicubic", False),
    "bilinear_antialias": _interpolate("bilinear", True),
    "linear_light": _linear_light,
}


# What damage may resize by, up or down: also what an ordinary program does, without a care for aliasing.
RESIZERS = DOWNSCALERS | {
    "bilinear_no_antialias": _interpolate("bilinear", False),
    "area": _interpolate("area", False),
}


def downscale(x: Tensor, scale: float, method: str = "matlab") -> Tensor:
    """Shrink (3, h, w) or (b, 3, h, w) in [0, 1] and round to 8-bit levels, as a stored picture would be.

    Methods: see ``DOWNSCALERS``; ``matlab`` is the protocol, ``bilinear_antialias`` is the one document 002 uses
    inside training. Raises ValueError for an unknown method or a size that is none of ``crop_to_multiple``'s.
    """
    if method not in DOWNSCALERS:
        raise ValueError(f"downscaler {method!r} is unknown; choose one of {list(DOWNSCALERS)}")
    h, w = x.shape[-2:]
    size = (round(h / scale), round(w / scale))
    if (round(size[0] * scale), round(size[1] * scale)) != (h, w) or 0 in size:
        raise ValueError(f"picture of {h}x{w} pixels does not divide by scale {scale}; use crop_to_multiple first")
    small = DOWNSCALERS[method](x, size)
    return small.clamp(0, 1).mul(255).round().div(255)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """JPEG round trip of a picture (3, h, w) or batch in [0, 1] at ``quality`` 1–100 (4:2:0, torchvision's codec)."""
    from torchvision.io import decode_jpeg, encode_jpeg

    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality {quality} is outside 1..100")
    x, single = _batched(x)
    bytes_ = x.detach().clamp(0, 1).mul(255).round().byte().cpu()
    out = torch.stack([decode_jpeg(encode_jpeg(p, quality)) for p in bytes_]).to(x.device).float() / 255
    return out[0] if single else out


def random_jpeg(x: Tensor, generator: torch.Generator, qualities: tuple[int, ...] = JPEG_QUALITIES) -> Tensor:
    """JPEG damage with a quality drawn per picture of the batch (b, 3, h, w)."""
    draw = torch.randint(len(qualities), (x.shape[0],), generator=generator).tolist()
    return torch.stack([jpeg(p, qualities[i]) for p, i in zip(x, draw, strict=True)])


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (c, h, w) or a batch, ``sigma`` in pixels, replicated border; 0 leaves the picture as it is."""
    if sigma <= 0:
        return x
    x, single = _batched(x)
    radius, channels = int(3 * sigma + 0.5), x.shape[1]
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(channels, 1, 1, -1)
    # Replication, not torchvision's reflection, which fails on pictures smaller than the kernel.
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, taps, groups=channels), taps.mT, groups=channels)
    return x[0] if single else x


def add_noise(x: Tensor, sigma: float, generator: torch.Generator | None = None, grey: bool = False) -> Tensor:
    """Add white Gaussian noise with standard deviation ``sigma`` in grey levels of 255; clamped to [0, 1].

    With ``grey`` the channels of (…, c, h, w) get the same noise.
    """
    shape = (*x.shape[:-3], 1, *x.shape[-2:]) if grey else x.shape
    noise = torch.randn(shape, generator=generator, dtype=x.dtype).to(x.device)
    return (x + noise * (sigma / 255)).clamp(0, 1)


def add_shot_noise(x: Tensor, strength: float, generator: torch.Generator | None = None, grey: bool = False) -> Tensor:
    """Add ``strength`` times the Poisson noise of counting 255·x photons in each value; clamped to [0, 1].

    At strength 1 white has a deviation of 16 grey levels, black none. With ``grey`` the channels of (…, c, h, w) get
    the same noise, that of their mean.
    """
    light = (x.mean(-3, keepdim=True) if grey else x).clamp(0, 1).mul(255)
    noise = torch.poisson(light.cpu(), generator=generator).to(x.device) - light
    return (x + noise * (strength / 255)).clamp(0, 1)
