"""Quality of a restored picture against its original, under one printed protocol.

PSNR and SSIM are those of the super-resolution papers: luma Y of BT.601, a border of ``scale`` pixels cut off, both
pictures clamped and rounded to 8 bits. ``data/README.md`` states which downscaler belongs to it.
"""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import runtime

LPIPS_FILE = "squeezenet1_1-b8a52dc0.pth"
LPIPS_SIDE = 32  # SqueezeNet's pooling leaves nothing of smaller pictures
LPIPS_MISSING = "not available: weights not downloaded (run `python -m nbhelpers download lpips`)"
NAMES = {
    "psnr_y": "PSNR-Y (dB)",
    "ssim_y": "SSIM-Y",
    "psnr_rgb": "PSNR-RGB (dB)",
    "psnr_y_full": "PSNR-Y full range (dB)",
    "lpips": "LPIPS-Squeeze",
}


def protocol(scale: float, lr: str = "MATLAB-style bicubic") -> str:
    """The line that belongs under every table of results."""
    border = math.ceil(scale)
    return (
        f"x{scale:g}; LR: {lr}; PSNR and SSIM on Y (BT.601, 16-235), border {border} px cut, pictures rounded to "
        "8 bits, SSIM 11x11 Gaussian sigma 1.5 valid region; LPIPS: SqueezeNet 1.1 on RGB, whole picture"
    )


def to_8bit(x: Tensor) -> Tensor:
    """Clamp and round values in [0, 1] to 8-bit levels, as float64 in [0, 255]."""
    return x.detach().to("cpu", torch.float64).clamp(0, 1).mul(255).round()


def rgb_to_y(rgb: Tensor, full_range: bool = False) -> Tensor:
    """RGB (…, 3, h, w) in 0–255 → luma (…, 1, h, w); studio range 16–235 of BT.601, or full range 0–255."""
    weights = [0.299, 0.587, 0.114] if full_range else [65.481 / 255, 128.553 / 255, 24.966 / 255]
    y = (rgb * rgb.new_tensor(weights)[:, None, None]).sum(-3, keepdim=True)
    return y if full_range else y + 16


def _prepare(sr: Tensor, hr: Tensor, border: float) -> tuple[Tensor, Tensor]:
    border = math.ceil(border)  # of a fractional scale
    if sr.shape != hr.shape or sr.dim() != 3:
        raise ValueError(f"need two pictures 'c h w' of the same shape, got {tuple(sr.shape)} and {tuple(hr.shape)}")
    if not (sr.is_floating_point() and hr.is_floating_point()):
        raise ValueError(f"need float pictures in [0, 1], got {sr.dtype} and {hr.dtype}; divide 8-bit values by 255")
    if min(sr.shape[-2:]) <= 2 * border:
        raise ValueError(f"picture of {sr.shape[-2]}x{sr.shape[-1]} pixels is all border ({border} pixels a side)")
    cut = (..., slice(border, sr.shape[-2] - border), slice(border, sr.shape[-1] - border))
    return to_8bit(sr)[cut], to_8bit(hr)[cut]


def _psnr(a: Tensor, b: Tensor) -> float:
    """dB for values in 0–255; equal pictures give ``inf``."""
    mse = (a - b).square().mean()
    return float(10 * torch.log10(255.0**2 / mse))


def _ssim(a: Tensor, b: Tensor) -> float:
    # scikit-image filters rows, then columns: 6 ms for 256x256 where a two-dimensional convolution takes 150.
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255.0}
    return float(structural_similarity(a[0].numpy(), b[0].numpy(), **options))


def psnr_y(sr: Tensor, hr: Tensor, border: int) -> float:
    """PSNR in dB on studio-range Y of two pictures (3, h, w) in [0, 1]; ``border`` pixels cut on each side."""
    a, b = _prepare(sr, hr, border)
    return _psnr(rgb_to_y(a), rgb_to_y(b))


def psnr_y_full(sr: Tensor, hr: Tensor, border: int) -> float:
    """The same on full-range Y; reads about 1.3 dB lower than :func:`psnr_y`."""
    a, b = _prepare(sr, hr, border)
    return _psnr(rgb_to_y(a, full_range=True), rgb_to_y(b, full_range=True))


def psnr_rgb(sr: Tensor, hr: Tensor, border: int) -> float:
    """PSNR in dB over all three channels."""
    return _psnr(*_prepare(sr, hr, border))


def ssim_y(sr: Tensor, hr: Tensor, border: int) -> float:
    """SSIM (Wang et al. 2004) on studio-range Y, 11x11 Gaussian window, sigma 1.5, valid region."""
    a, b = _prepare(sr, hr, border)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 pixels inside the border, got {tuple(a.shape[-2:])}")
    return _ssim(rgb_to_y(a), rgb_to_y(b))


def lpips_available() -> bool:
    """True when SqueezeNet's weights are in the torch cache; nothing is ever downloaded silently."""
    return (runtime.torch_home() / "hub" / "checkpoints" / LPIPS_FILE).is_file()


def lpips_network() -> torch.nn.Module:
    """LPIPS-Squeeze, frozen: ``net(a, b, normalize=True)`` of pictures "b 3 h w" in [0, 1] → distances "b 1 1 1".

    Raises FileNotFoundError where the weights are not on this machine.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    if not lpips_available():
        raise FileNotFoundError(f"LPIPS {LPIPS_MISSING}; looked in {runtime.torch_home() / 'hub' / 'checkpoints'}")
    torch.hub.set_dir(str(runtime.torch_home() / "hub"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own call inside torchmetrics is deprecated there
        return LearnedPerceptualImagePatchSimilarity(net_type="squeeze", normalize=True).eval().net


_lpips_network = functools.lru_cache(maxsize=1)(lpips_network)


@torch.no_grad()
def lpips_squeeze(sr: Tensor, hr: Tensor) -> float | None:
    """LPIPS distance (Zhang et al. 2018, SqueezeNet 1.1; 0 = same) of two pictures (3, h, w) in [0, 1].

    None for pictures below ``LPIPS_SIDE`` pixels, and where the weights are not on this machine; ``LPIPS_MISSING`` is
    the text to show then.
    """
    if not lpips_available():
        return None
    if min(sr.shape[-2:]) < LPIPS_SIDE:
        return None
    a, b = (to_8bit(x).float()[None] / 255 for x in (sr, hr))
    return float(_lpips_network()(a, b, normalize=True).mean())


def compare(sr: Tensor, hr: Tensor, scale: float, lpips: bool = True) -> dict[str, float | None]:
    """All metrics of one picture: keys of ``NAMES``. Pictures (3, h, w), nominally in [0, 1]."""
    a, b = _prepare(sr, hr, scale)
    ya, yb = rgb_to_y(a), rgb_to_y(b)
    return {
        "psnr_y": _psnr(ya, yb),
        "ssim_y": _ssim(ya, yb) if min(ya.shape[-2:]) >= 11 else None,
        "psnr_rgb": _psnr(a, b),
        "psnr_y_full": _psnr(rgb_to_y(a, full_range=True), rgb_to_y(b, full_range=True)),
        "lpips": lpips_squeeze(sr, hr) if lpips else None,
    }


def mean(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each metric over pictures (of decibels, as the papers do); None where a picture has none."""
    out: dict[str, float | None] = {}
    for key in rows[0] if rows else ():
        values = [row[key] for row in rows]
        out[key] = None if any(v is None for v in values) else sum(values) / len(values)
    return out


def download_lpips(target: Path | None = None) -> Path:
    """Fetch SqueezeNet 1.1's ImageNet weights (5 MB, hash-checked) into the torch cache; returns the path.

    Raises DownloadError with URL, folder and hash where the machine has no internet or the hash is wrong.
    """
    from torchvision.models import SqueezeNet1_1_Weights

    from .datasets.download import fetch_weights

    folder = target or runtime.torch_home() / "hub" / "checkpoints"
    return fetch_weights(SqueezeNet1_1_Weights.IMAGENET1K_V1.url, folder)
