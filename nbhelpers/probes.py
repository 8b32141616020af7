"""Does a network invent detail? Patches where there is none to find, and a measure of what was added.

Three groups: flat (sky, paper, walls), defocused (blurred beyond what the small picture holds) and text, where
invented strokes are plain to see. All come from the bundled validation photos and from Pillow's bundled font, by
fixed rules, so every network is asked the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from . import runtime
from .degrade import crop_to_multiple, downscale, gaussian_blur
from .images import find_images, load_image, to_tensor
from .inference import upscale
from .metrics import psnr_y, rgb_to_y, to_8bit

GROUPS = ("flat", "defocused", "text")
SIDE = 96  # of a patch in original pixels; divides by 2, 3, 4, 6 and 8
COUNT, PER_PHOTO = 12, 3  # patches of a group, and how many of them one photo may give
FLAT_LUMA = (24, 232)  # near black and white the clamp would hide what a network adds
HIGH_PASS_SIGMA = 1.5  # original pixels; keeps patterns of up to about 9 pixels
BORDER = 6  # left out of the energy: the filter's edge
LATTICE_WIDTH = 6  # frequencies to each side that still belong to a lattice whose strength varies
TINY = 1e-6  # squared grey levels: a picture without any detail
LINES = (
    "Super-Resolution",
    "quick brown fox",
    "0123456789 %&?",
    "iIl1 oO0 S5 B8",
    "jumps over lazy",
    "Hello, World! @#",
)
SIZES = (12, 18, 26, 38)  # of the letters in original pixels

Pair = tuple[Tensor, Tensor]
Window = tuple[int, tuple[int, int]]  # which photo, top and left


@functools.lru_cache(maxsize=8)
def probe_patches(scale: int, photos: Path | None = None) -> dict[str, list[Pair]]:
    """The patches by group (``GROUPS``): lists of (lr, hr) float pictures "3 h w" in [0, 1]; hr about 96x96.

    flat: the 12 windows of the validation photos with the least fine detail, neither black nor white, at most 3 of a
    photo. defocused: the 12 with the most, after a Gaussian blur of one small pixel (sigma = ``scale``), which leaves
    1 % of the finest pattern that the small picture can hold. text: dark on light and light on dark, four sizes.
    Small pictures are made by the protocol's downscaler. ``photos`` is another folder of photos. Deterministic; do not
    change the result in place. Raises FileNotFoundError without photos of that size.
    """
    if scale < 1:
        raise ValueError(f"scale {scale} must be a whole number of at least 1")
    folder = photos or runtime.PHOTOS / "val"
    pictures = [load_image(path) for path in find_images(folder)]
    pictures = [p for p in pictures if min(p.shape[-2:]) >= SIDE]
    if not pictures:
        raise FileNotFoundError(f"no photos of at least {SIDE}x{SIDE} pixels in {folder}")
    flat, detailed = _windows(pictures)
    blurred = [gaussian_blur(p, float(scale)).mul(255).round().div(255) for p in pictures]
    groups = {
        "flat": [_cut(pictures[i], corner) for i, corner in flat],
        "defocused": [_cut(blurred[i], corner) for i, corner in detailed],
        "text": [_text(size, dark) for size in SIZES for dark in (True, False)],
    }
    sized = {name: [crop_to_multiple(hr, scale) for hr in patches] for name, patches in groups.items()}
    return {name: [(downscale(hr, scale), hr) for hr in patches] for name, patches in sized.items()}


def _windows(photos: Sequence[Tensor]) -> tuple[list[Window], list[Window]]:
    """The windows of least fine detail that are neither black nor white, and those of most."""
    found: list[tuple[float, bool, Window]] = []
    step = SIDE // 4
    for i, photo in enumerate(photos):
        luma = rgb_to_y(to_8bit(photo), full_range=True)[0]
        detail = _high_pass(luma[None])[0].square().unfold(0, SIDE, step).unfold(1, SIDE, step).mean((-2, -1))
        mean = luma.unfold(0, SIDE, step).unfold(1, SIDE, step).mean((-2, -1))
        visible = (mean > FLAT_LUMA[0]) & (mean < FLAT_LUMA[1])
        for y, x in np.ndindex(*detail.shape):
            found.append((float(detail[y, x]), bool(visible[y, x]), (i, (y * step, x * step))))
    found.sort()
    return _apart(w for _, visible, w in found if visible), _apart(w for _, _, w in reversed(found))


def _apart(ranked: Iterable[Window]) -> list[Window]:
    """The first windows that do not overlap."""
    chosen: list[Window] = []
    for photo, (y, x) in ranked:
        here = [corner for i, corner in chosen if i == photo]
        if len(here) < PER_PHOTO and all(max(abs(y - v), abs(x - u)) >= SIDE for v, u in here):
            chosen.append((photo, (y, x)))
        if len(chosen) == COUNT:
            break
    return chosen


def _cut(photo: Tensor, corner: tuple[int, int]) -> Tensor:
    y, x = corner
    return photo[:, y : y + SIDE, x : x + SIDE]


def _text(size: int, dark: bool) -> Tensor:
    ink, paper = ((30, 30, 40), (235, 232, 225)) if dark else ((240, 240, 230), (40, 45, 60))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for i in range(SIDE // (size + 4) + 1):
        draw.text((4, 4 + i * (size + 4)), LINES[i % len(LINES)], fill=ink, font=font)
    return to_tensor(np.array(image))


def _high_pass(luma: Tensor) -> Tensor:
    return luma - gaussian_blur(luma, HIGH_PASS_SIGMA)


def energy(picture: Tensor) -> float:
    """High-frequency energy of a picture "3 h w" in [0, 1], in grey levels of 255.

    The RMS of luma (BT.601, full range, picture rounded to 8 bits) minus its Gaussian blur of sigma 1.5 pixels,
    without a border of 6 pixels. White noise of standard deviation s has about 0.95 s.
    """
    fine = _high_pass(rgb_to_y(to_8bit(picture), full_range=True))
    return float(fine[..., BORDER:-BORDER, BORDER:-BORDER].square().mean().sqrt())


def added_energy(sr: Tensor, hr: Tensor) -> float:
    """:func:`energy` of ``sr`` minus that of ``hr``, pictures "3 h w" in [0, 1], in grey levels of 255.

    Above 0: detail was invented. Below: detail (or the original's noise) is missing.
    """
    return energy(sr) - energy(hr)


def spectrum(picture: Tensor) -> Tensor:
    """Power spectrum (h, w) of the luma of a picture "3 h w" in [0, 1], in squared grey levels; frequency 0 first.

    The mean is taken out, and a Hann window keeps the borders from showing as lines.
    """
    luma = rgb_to_y(to_8bit(picture), full_range=True)[0]
    window = torch.hann_window(luma.shape[0], dtype=luma.dtype)[:, None] * torch.hann_window(
        luma.shape[1], dtype=luma.dtype
    )
    return torch.fft.fft2((luma - luma.mean()) * window).abs().square()


def lattice(sr: Tensor, hr: Tensor, scale: int) -> float:
    """How much of a pattern that repeats every ``scale`` pixels ``sr`` has, against ``hr``; pictures "3 h w" in [0, 1].

    A pixel shuffle writes ``scale`` x ``scale`` pixels from one, so a pattern on that grid is its cheapest texture. It
    stands in the spectrum at whole multiples of 1/``scale`` in both directions. Returns log2 of the power there
    against the original's: 0 for as much, 1 for twice, -1 for half. Raises ValueError for pictures of unequal size.
    """
    if sr.shape != hr.shape:
        raise ValueError(f"pictures differ in size: {tuple(sr.shape)} and {tuple(hr.shape)}")
    powers = []
    for picture in (sr, hr):
        power = spectrum(crop_to_multiple(picture, scale))
        h, w = power.shape
        rows, columns = (
            torch.cat([k * n // scale + torch.arange(-LATTICE_WIDTH, LATTICE_WIDTH + 1) for k in range(1, scale)]) % n
            for n in (h, w)
        )
        powers.append(float(power[rows][:, columns].mean()))
    return math.log2(max(powers[0], TINY) / max(powers[1], TINY))


def measure(
    model: nn.Module, patches: Mapping[str, Sequence[Pair]] | None = None, **options: object
) -> dict[str, dict[str, float]]:
    """What a network does to the probes: {group: {"energy": mean added energy, "psnr_y": mean PSNR-Y in dB}}.

    ``patches`` default to those of the network's scale; ``options`` go to :func:`nbhelpers.inference.upscale`.
    """
    if patches is None:
        patches = probe_patches(model.scale)
    out = {}
    for name, pairs in patches.items():
        done = [(upscale(model, lr, **options), hr) for lr, hr in pairs]
        out[name] = {
            "energy": sum(added_energy(sr, hr) for sr, hr in done) / len(done),
            "psnr_y": sum(psnr_y(sr, hr, model.scale) for sr, hr in done) / len(done),
        }
    return out
