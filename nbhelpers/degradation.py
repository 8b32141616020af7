"""Damage in Real-ESRGAN's manner (Wang et al. 2021): blur, resize, noise, JPEG, twice, with strengths drawn at random.

A :class:`Degradation` makes the low-resolution pictures of training batches and of damaged test sets. Its sections are
those of the configuration (``configs/degradation/NAME.yaml``); a section that is left out or null is switched off, and
with all of them off what remains is the protocol's bicubic. Sides and deviations of blur are in pixels of the picture
that the section gets, noise in grey levels of 255.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from .degrade import RESIZERS, add_noise, add_shot_noise, crop_to_multiple, jpeg

PRESETS = Path(__file__).resolve().parent / "configs" / "degradation"
SINC_RADIUS = 10  # pixels; Real-ESRGAN's largest kernel is 21x21
Interval = tuple[float, float]  # least and most; values are drawn uniformly between them


class DegradationError(ValueError):
    """Settings of a degradation that cannot work; the message quotes the key and its value."""


def _share(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DegradationError(f"{name}={value} must be a number from 0 to 1")


def _together(section: object, one: str, two: str) -> None:
    values = getattr(section, one), getattr(section, two)
    if sum(values) > 1 + 1e-9:
        raise DegradationError(f"{one}={values[0]} and {two}={values[1]} are shares of one whole: at most 1 together")


def _interval(section: object, name: str, least: float, most: float) -> None:
    value = getattr(section, name)
    numbers = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    if not numbers or not least <= value[0] <= value[1] <= most:
        shown = list(value) if isinstance(value, tuple) else value
        raise DegradationError(f"{name}={shown} must be [least, most], least first, from {least} to {most}")


def _resizers(section: object) -> None:
    modes = section.modes
    if not isinstance(modes, tuple) or not modes or not set(modes) <= set(RESIZERS):
        shown = list(modes) if isinstance(modes, tuple) else modes
        raise DegradationError(f"modes={shown} must be a list of resizers: {', '.join(RESIZERS)}")


@dataclass(frozen=True)
class Blur:
    """One convolution with a random kernel.

    ``sigma``: deviation in pixels, drawn for each axis where the kernel is ``anisotropic`` (a share of the kernels,
    which are then turned by a random angle). Shares ``generalized`` and ``plateau`` have these shapes with exponents
    drawn from ``generalized_beta`` and ``plateau_beta``, the rest is Gaussian; the share ``sinc`` of all is a
    low-pass filter instead, which gives the ringing of oversharpened pictures.
    """

    sigma: Interval
    probability: float = 1.0
    anisotropic: float = 0.0
    generalized: float = 0.0
    generalized_beta: Interval = (0.5, 4.0)
    plateau: float = 0.0
    plateau_beta: Interval = (1.0, 2.0)
    sinc: float = 0.0

    def __post_init__(self):
        _interval(self, "sigma", 0.01, 50)
        _interval(self, "generalized_beta", 0.1, 20)
        _interval(self, "plateau_beta", 0.1, 20)
        _share(self, "probability", "anisotropic", "generalized", "plateau", "sinc")
        _together(self, "generalized", "plateau")

    def apply(self, x: Tensor, dice: random.Random) -> Tensor:
        """Blur a picture "3 h w"."""
        if dice.random() >= self.probability:
            return x
        if dice.random() < self.sinc:
            return convolve(x, sinc_kernel(dice.uniform(math.pi / 5, math.pi)))
        a = b = dice.uniform(*self.sigma)
        angle = 0.0
        if dice.random() < self.anisotropic:
            b, angle = dice.uniform(*self.sigma), dice.uniform(0, math.pi)
        shape = dice.random()
        if shape < self.plateau:
            return convolve(x, blur_kernel(a, b, angle, dice.uniform(*self.plateau_beta), plateau=True))
        if shape < self.plateau + self.generalized:
            return convolve(x, blur_kernel(a, b, angle, dice.uniform(*self.generalized_beta)))
        return convolve(x, blur_kernel(a, b, angle))


@dataclass(frozen=True)
class Resize:
    """Enlarge (share ``up``), shrink (``down``) or keep, by a factor from ``range`` and a resizer out of ``modes``.

    The factor is of the original's sides in section ``first``, of the low-resolution picture's in ``second``.
    """

    range: Interval
    modes: tuple[str, ...]
    up: float = 0.0
    down: float = 0.0

    def __post_init__(self):
        _interval(self, "range", 0.05, 8)
        if not self.range[0] <= 1 <= self.range[1]:
            raise DegradationError(f"range={list(self.range)} must hold 1 (the size kept) between its ends")
        _resizers(self)
        _share(self, "up", "down")
        _together(self, "up", "down")

    def apply(self, x: Tensor, size: tuple[int, int], dice: random.Random) -> Tensor:
        """Bring a picture "3 h w" to ``size`` times the factor drawn."""
        draw, factor = dice.random(), 1.0
        if draw < self.up:
            factor = dice.uniform(1, self.range[1])
        elif draw < self.up + self.down:
            factor = dice.uniform(self.range[0], 1)
        return _resize(x, tuple(max(1, round(side * factor)) for side in size), self.modes, dice)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise (share ``gaussian``) of deviation ``sigma`` in grey levels, else Poisson noise.

    ``poisson`` multiplies the noise of counting 255 photons where a pixel is white. The share ``grey`` of both has
    the same noise in all three channels.
    """

    sigma: Interval
    poisson: Interval
    probability: float = 1.0
    gaussian: float = 0.5
    grey: float = 0.0

    def __post_init__(self):
        _interval(self, "sigma", 0, 255)
        _interval(self, "poisson", 0, 100)
        _share(self, "probability", "gaussian", "grey")

    def apply(self, x: Tensor, dice: random.Random, generator: torch.Generator) -> Tensor:
        """Add noise to a picture "3 h w"; the result is within [0, 1]."""
        if dice.random() >= self.probability:
            return x
        grey = dice.random() < self.grey
        if dice.random() < self.gaussian:
            return add_noise(x, dice.uniform(*self.sigma), generator, grey)
        return add_shot_noise(x, dice.uniform(*self.poisson), generator, grey)


@dataclass(frozen=True)
class Jpeg:
    """JPEG compression with a ``quality`` from 1 to 100."""

    quality: Interval
    probability: float = 1.0

    def __post_init__(self):
        _interval(self, "quality", 1, 100)
        _share(self, "probability")

    def apply(self, x: Tensor, dice: random.Random) -> Tensor:
        """Compress and decompress a picture "3 h w"."""
        return jpeg(x, round(dice.uniform(*self.quality))) if dice.random() < self.probability else x


@dataclass(frozen=True)
class Stage:
    """One of the two rounds; what is None is left out."""

    blur: Blur | None = None
    resize: Resize | None = None
    noise: Noise | None = None
    jpeg: Jpeg | None = None

    def before_jpeg(self, x: Tensor, size: tuple[int, int], dice: random.Random, generator: torch.Generator) -> Tensor:
        """Blur, resize relative to ``size``, noise."""
        x = x if self.blur is None else self.blur.apply(x, dice)
        x = x if self.resize is None else self.resize.apply(x, size, dice)
        return x if self.noise is None else self.noise.apply(x, dice, generator)

    def compress(self, x: Tensor, dice: random.Random) -> Tensor:
        """JPEG."""
        return x if self.jpeg is None else self.jpeg.apply(x, dice)


@dataclass(frozen=True)
class Final:
    """Resizing to the low-resolution size by one of ``modes``, and with probability ``sinc`` a low-pass filter.

    With probability ``jpeg_last`` the second JPEG comes after both, else before.
    """

    modes: tuple[str, ...] = ("matlab",)
    sinc: float = 0.0
    jpeg_last: float = 1.0

    def __post_init__(self):
        _resizers(self)
        _share(self, "sinc", "jpeg_last")

    def apply(self, x: Tensor, size: tuple[int, int], dice: random.Random) -> Tensor:
        """Bring a picture "3 h w" to ``size``."""
        x = _resize(x, size, self.modes, dice)
        if dice.random() < self.sinc:
            x = convolve(x, sinc_kernel(dice.uniform(math.pi / 3, math.pi)))
        return x


@dataclass(frozen=True)
class Degradation:
    """The whole pipeline: ``degradation(hr, scale, generator)``.

    As Real-ESRGAN's published code: the second round's sizes are relative to the low-resolution picture, and the last
    resizing may come before or after the last JPEG. Ours: every picture of a batch draws its own sizes (there one for
    the whole batch), kernels reach 3 sigma instead of a random number of pixels, Poisson noise counts the same photons
    in every picture, and the original stays as it is (there it is sharpened for some networks).
    """

    first: Stage = Stage()
    second: Stage = Stage()
    final: Final = Final()

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Degradation:
        """From a mapping or a section of a configuration; DegradationError quotes a key and value that cannot work."""
        if OmegaConf.is_config(settings):
            settings = OmegaConf.to_container(settings, resolve=True)
        return _build(cls, settings, "degradation")

    @classmethod
    def preset(cls, name: str | Path) -> Degradation:
        """From ``configs/degradation/NAME.yaml``, or a YAML file of one's own. DegradationError for an unknown name."""
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            path = Path(name)
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise DegradationError(f"no degradation {str(name)!r}; choose from {names}, or give a .yaml file")
        return cls.of(OmegaConf.load(path))

    def __call__(self, hr: Tensor, scale: int, generator: torch.Generator) -> Tensor:
        """Originals "b 3 H W" in [0, 1] → "b 3 H/scale W/scale" in 8-bit levels, a function of the generator's state.

        Pictures are worked on one by one, since each has a size of its own from the first resizing on; what is left to
        batch saves no time. Raises ValueError for another shape, or a size that ``scale`` does not divide.
        """
        if hr.dim() != 4 or hr.shape[1] != 3:
            raise ValueError(f"expected a batch 'b 3 h w', got shape {tuple(hr.shape)}")
        h, w = hr.shape[-2:]
        if scale < 1 or h % scale or w % scale:
            raise ValueError(f"pictures of {h}x{w} pixels do not divide by scale {scale}; use crop_to_multiple first")
        lr = torch.stack([self._one(x, (h // scale, w // scale), generator) for x in hr.contiguous()])
        return lr.clamp(0, 1).mul(255).round().div(255)

    def _one(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        dice = random.Random(int(torch.randint(2**62, (), generator=generator)))
        x = self.first.before_jpeg(x, tuple(x.shape[-2:]), dice, generator)
        x = self.first.compress(x, dice)
        x = self.second.before_jpeg(x, size, dice, generator)
        if dice.random() < self.final.jpeg_last:
            return self.second.compress(self.final.apply(x, size, dice), dice)
        return self.final.apply(self.second.compress(x, dice), size, dice)

    def of_file(self, hr: Tensor, scale: int, path: str | Path, seed: int = 0) -> Tensor:
        """One picture "3 H W" of a test set, damaged by its file's name (without suffix) and ``seed`` alone.

        So other files beside it change nothing, and training validates on what ``nbhelpers damage`` writes.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {Path(path).stem}".encode()))
        return self(hr[None], scale, generator)[0]


_SECTIONS = {"first": Stage, "second": Stage, "final": Final, "blur": Blur, "resize": Resize, "noise": Noise}
_SECTIONS |= {"jpeg": Jpeg}


def _build(kind: type, settings: object, where: str) -> object:
    known = {f.name: f.default is MISSING for f in fields(kind)}
    if not isinstance(settings, Mapping):
        raise DegradationError(f"{where}={settings} must be a section with keys from {list(known)}, or null")
    given = {}
    for name, value in settings.items():
        if name not in known:
            raise DegradationError(f"{where}.{name} is unknown; choose from {list(known)}")
        if value is not None:  # null is what the key would be if it were not there
            if name in _SECTIONS:
                value = _build(_SECTIONS[name], value, f"{where}.{name}")
            given[name] = tuple(value) if isinstance(value, list) else value
    if missing := [name for name, needed in known.items() if needed and name not in given]:
        raise DegradationError(f"{where} lacks {', '.join(missing)}; give it, or {where}: null to switch this off")
    try:
        return kind(**given)
    except DegradationError as error:
        raise DegradationError(f"{where}.{error}") from None


def _resize(x: Tensor, size: tuple[int, int], modes: tuple[str, ...], dice: random.Random) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else RESIZERS[dice.choice(modes)](x, size)


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(-radius, radius + 1.0)
    return torch.meshgrid(steps, steps, indexing="ij")


def blur_kernel(a: float, b: float, angle: float = 0.0, beta: float = 1.0, plateau: bool = False) -> Tensor:
    """Blur kernel "k k" of sum 1, cut at 3 sigma: exp(-q^β / 2), or 1 / (1 + q^β) with ``plateau``.

    q is the squared distance in units of the deviations ``a`` and ``b`` (pixels) along two axes, the first turned by
    ``angle`` (radians). β = 1 without plateau is a Gaussian.
    """
    y, x = _grid(max(1, math.ceil(3 * max(a, b))))
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    q = ((along / a).square() + (across / b).square()) ** beta
    kernel = 1 / (1 + q) if plateau else torch.exp(-q / 2)
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float) -> Tensor:
    """Circular low-pass filter "21 21" of sum 1; ``cutoff`` in radians per pixel, π keeps almost everything."""
    r = torch.hypot(*_grid(SINC_RADIUS))
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    kernel[SINC_RADIUS, SINC_RADIUS] = cutoff**2 / (4 * math.pi)  # the limit at r = 0
    return kernel / kernel.sum()


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """A picture "3 h w" convolved with a kernel "k k" (k odd), border replicated.

    By Fourier transform: for a picture's three channels torch's convolution takes 3 times as long with two Gaussians
    of 19 values in a row, and 6 times with 21x21.
    """
    from scipy.fft import next_fast_len  # not for those who damage nothing

    r, (h, w) = kernel.shape[-1] // 2, x.shape[-2:]
    padded = F.pad(x[None], (r,) * 4, mode="replicate")[0]
    size = [next_fast_len(side, real=True) for side in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel.to(x), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * r : 2 * r + h, 2 * r : 2 * r + w]


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers damage``: small, damaged PNG files of pictures, for test sets."""
    from tqdm.auto import tqdm

    from .images import ImageError, load_image, save_image
    from .inference import plan_outputs

    degradation, plan = Degradation.preset(args.preset), plan_outputs(args.inputs, args.output)
    if not plan:
        raise FileNotFoundError(f"no pictures in {', '.join(map(str, args.inputs))}")
    if args.scale < 1:
        raise ValueError(f"scale {args.scale} must be a whole number of at least 1")
    skipped = []
    for source, target in tqdm(plan.items(), desc="damaging", unit="picture"):
        try:
            hr = load_image(source)
            if min(hr.shape[-2:]) < args.scale:
                raise ImageError(source, f"is smaller than the scale {args.scale}")
            hr = crop_to_multiple(hr, args.scale)
            save_image(degradation.of_file(hr, args.scale, source, args.seed), target)
        except ImageError as error:
            skipped.append(str(error))
    print(f"{len(plan) - len(skipped)} of {len(plan)} pictures written to {args.output}")
    if skipped:
        print(f"{len(skipped)} skipped:", *skipped, sep="\n  ", file=sys.stderr)
    return 1 if skipped else 0
