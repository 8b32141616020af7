"""Coordinates of arbitrary-scale networks (document 001, LIIF): where output pixels lie between input pixels.

A picture covers [-1, 1] on both axes, y first, whatever its size; a pixel is a square, its coordinate that of its
centre, and a cell is the size of one output pixel in these units. Positions on one axis are also counted in input
pixels: input pixel p has its centre at p. They are split into a whole number and a fraction in [0, 1] in double
precision, so that a tile gets the very numbers of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-4  # of positions made from float32 coordinates, in pixels of a picture up to about 3,000 wide
SKIPS = {"bilinear": 1, "bicubic": 2}  # interpolations of the small picture: how many pixels away they see


def make_coord(size: tuple[int, int]) -> Tensor:
    """Centres of an h x w picture's pixels, "h·w 2" (y, x) in [-1, 1], row by row."""
    y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2).float()


def make_cell(size: tuple[int, int]) -> tuple[float, float]:
    """Height and width of one pixel of an h x w picture, where the picture covers [-1, 1]."""
    return 2 / size[0], 2 / size[1]


@dataclass(frozen=True)
class Axis:
    """Where output pixels lie on one axis; ``low`` and ``fraction`` have one shape.

    low: the input pixel at or before each centre, int64, -1 … n - 1 (-1 lies before the first centre).
    fraction: how far behind it, in input pixels, 0 … 1, float32.
    """

    low: Tensor
    fraction: Tensor

    def cut(self, where: slice | Tensor, origin: int = 0) -> Axis:
        """Some of the output pixels, between input pixels counted from ``origin``."""
        return Axis(self.low[where] - origin, self.fraction[where])

    def to(self, device: torch.device) -> Axis:
        """The same on a device."""
        return Axis(self.low.to(device), self.fraction.to(device))

    def nearest(self) -> Axis:
        """The same positions, counted from the nearest input pixel: ``fraction`` is about -0.5 … 0.5.

        Halfway is the next pixel's, also where float32 coordinates miss it by rounding.
        """
        up = (self.fraction >= 0.5 - ROUNDING).long()
        return Axis(self.low + up, self.fraction - up)


def axis(n_in: int, n_out: int) -> Axis:
    """All ``n_out`` output pixels over ``n_in`` input pixels; exact: at whole scales every pixel is like the next."""
    position = (2 * torch.arange(n_out) + 1) * n_in - n_out  # in units of 1 / (2 n_out)
    low = position.div(2 * n_out, rounding_mode="floor")
    return Axis(low, ((position - low * 2 * n_out).double() / (2 * n_out)).float())


def _split(position: Tensor) -> Axis:
    low = position.floor()
    return Axis(low.long(), (position - low).float())


def axes_of(coords: Tensor, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Coordinates "… 2" (y, x) in [-1, 1] over an input of h x w pixels, as the two axes of "…".

    Raises ValueError for coordinates outside [-1, 1], and for another dtype than float32 or float64: in bf16 they
    would be off by up to half a pixel of 512.
    """
    if coords.shape[-1:] != (2,) or coords.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 coordinates '… 2', got {coords.dtype} of shape {tuple(coords.shape)}")
    if not coords.numel() or not bool((coords.abs() <= 1).all()):  # also NaN
        worst = "none" if not coords.numel() else f"{float(coords.abs().max()):.6g}"
        raise ValueError(f"coordinates must lie in [-1, 1] and be at least one; the largest is {worst}")
    # MPS has no float64; the CPU has, and the numbers are few.
    y, x = axes_between(coords.cpu(), size)
    return y.to(coords.device), x.to(coords.device)


def axes_between(coords: Tensor, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """:func:`axes_of` without its checks, which a program that is exported cannot make."""
    y, x = ((coords[..., i].double() + 1) * (size[i] / 2) - 0.5 for i in range(2))
    return _split(y), _split(x)


def output_axes(size: tuple[int, int], shape: tuple[int, int], device: torch.device) -> tuple[Axis, Axis]:
    """Both axes of a whole output picture of ``size`` over an input of ``shape``."""
    return axis(shape[0], size[0]).to(device), axis(shape[1], size[1]).to(device)


def span(start: int, stop: int, n_in: int, n_out: int) -> slice:
    """The output pixels whose centres lie in input pixels ``start`` … ``stop`` - 1."""
    return slice(math.ceil(start * n_out / n_in - 0.5), math.ceil(stop * n_out / n_in - 0.5))


def lattice(n_in: int, n_out: int, each: int = 1) -> Tensor:
    """Output pixels of one axis drawn at random, in rising order: ``each`` between any two neighbouring input pixels.

    Rows and columns drawn so make a grid that covers the picture evenly and asks every input pixel the same number of
    questions, which is what :class:`Slots` are cheapest for.
    """
    low, gaps = axis(n_in, n_out).low, torch.arange(-1, n_in)
    start, stop = torch.searchsorted(low, gaps), torch.searchsorted(low, gaps, right=True)
    start, stop = start[stop > start], stop[stop > start]  # a scale below 1 leaves some empty
    share = (torch.arange(each) + torch.rand(len(start), each)) / each
    drawn = start[:, None] + (share * (stop - start)[:, None]).long()
    return torch.minimum(drawn, stop[:, None] - 1).flatten()


# --- Grids: all output pixels an input pixel has a say in -------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """One axis of a grid of output pixels, sorted by the input pixels that have a say in each.

    Input pixel ``first`` + p has a say in those output pixels that lie less than one pixel away (with the local
    ensemble; without it half a pixel). Their number differs by one or two between input pixels of a fractional
    scale; k is the largest, and the places left over are filled with copies that ``combine`` never reads.

    offsets: "p k", position of each output pixel relative to the input pixel, in input pixels.
    """

    first: int
    offsets: Tensor
    _sources: tuple[tuple[Tensor, Tensor | None], ...]

    @property
    def pixels(self) -> slice:
        """The input pixels in use."""
        return slice(self.first, self.first + self.offsets.shape[0])

    def combine(self, values: Tensor, dim: int) -> Tensor:
        """From a value for each slot, "p·k" along ``dim``, to one for each output pixel: their weighted sum."""
        shape = [1] * values.dim()
        shape[dim] = -1
        parts = []
        for index, weight in self._sources:
            part = values.index_select(dim, index)
            parts.append(part if weight is None else part * weight.view(shape))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def slots(where: Axis, n: int, ensemble: bool = True) -> Slots:
    """Slots of one axis of a grid over ``n`` input pixels.

    With ``ensemble`` the two input pixels around an output pixel share it by bilinear weights; without, the nearest
    has it. Raises ValueError where ``where`` is not in rising order.
    """
    # low and low + 1 with weights 1 - fraction and fraction; a border pixel that counts twice has weight 1.
    base = where if ensemble else where.nearest()
    if base.low.dim() != 1 or bool((base.low.diff() < 0).any()):
        raise ValueError("the rows and columns of a grid must be given in rising order")
    reach = 1 if ensemble else 0
    owners = [(base.low + i).clamp(0, n - 1) for i in range(reach + 1)]
    pixels = torch.arange(int(owners[0][0]), int(owners[-1][-1]) + 1, device=base.low.device)
    start = torch.searchsorted(owners[-1], pixels)  # the first output pixel each has a say in
    stop = torch.searchsorted(owners[0], pixels, right=True)
    k = int((stop - start).max())
    index = torch.minimum(start[:, None] + torch.arange(k, device=start.device), stop[:, None].sub(1).clamp_min(0))
    offsets = (base.low[index] - pixels[:, None]) + base.fraction[index]
    numbers = torch.arange(len(base.low), device=base.low.device)
    first = int(pixels[0])
    places = [(owner - first) * k + numbers - start[owner - first] for owner in owners]
    weights = [1 - base.fraction, base.fraction] if ensemble else [None]
    return Slots(first, offsets, tuple(zip(places, weights, strict=True)))


# --- The small picture, interpolated ----------------------------------------------------------------------


def taps(where: Axis, n: int, mode: str) -> list[tuple[Tensor, Tensor]]:
    """(input pixel, weight) pairs whose weighted sum interpolates at each position; borders are replicated.

    ``bicubic`` is Keys' kernel with a = -0.5, as :func:`nbhelpers.degrade.upscale_bicubic` has it. Raises ValueError
    for an unknown mode.
    """
    t = where.fraction
    if mode == "bilinear":
        weights = [1 - t, t]
    elif mode == "bicubic":
        weights = [
            ((-0.5 * t + 1) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1,
            ((-1.5 * t + 2) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        ]
    else:
        raise ValueError(f"interpolation {mode!r} is unknown; choose one of {list(SKIPS)}")
    first = 1 - SKIPS[mode]
    return [((where.low + first + i).clamp(0, n - 1), weight) for i, weight in enumerate(weights)]


def interpolate_grid(x: Tensor, axes: tuple[Axis, Axis], mode: str) -> Tensor:
    """A map "b c h w" at a grid of positions: "b c rows columns", fp32."""
    for dim, where in zip((2, 3), axes, strict=True):
        shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
        pairs = taps(where, x.shape[dim], mode)
        x = sum(x.index_select(dim, index) * weight.view(shape) for index, weight in pairs)
    return x


def gather(x: Tensor, y: Tensor, column: Tensor) -> Tensor:
    """Values "b q c" of a map "b h w c" at pixels (y, column), each int64 "b q"."""
    b, h, w, c = x.shape
    place = (torch.arange(b, device=x.device)[:, None] * h + y) * w + column
    # An embedding's gradient adds whole rows; that of plain indexing takes several times as long on a CPU.
    return F.embedding(place, x.reshape(-1, c))


def interpolate_points(x: Tensor, axes: tuple[Axis, Axis], mode: str) -> Tensor:
    """A map "b c h w" at single positions, each axis "b q": "b q c", fp32."""
    h, w = x.shape[-2:]
    values = x.permute(0, 2, 3, 1)
    columns = taps(axes[1], w, mode)
    out = 0
    for row, v in taps(axes[0], h, mode):
        out = out + sum(gather(values, row, column) * (v * weight)[..., None] for column, weight in columns)
    return out


def check_size(size: Sequence[int], most: int) -> tuple[int, int]:
    """A picture size (height, width) as whole numbers; ValueError where it is empty or above ``most`` pixels."""
    if len(size) != 2 or any(int(n) != n for n in size):
        raise ValueError(f"size {tuple(size)} must be two whole numbers, height and width")
    h, w = (int(n) for n in size)
    if h < 1 or w < 1:
        raise ValueError(f"size {h}x{w} is an empty picture; use a larger scale or picture")
    if h * w > most:
        raise ValueError(
            f"{h}x{w} pixels are more than the {most:,} rendered at once; enlarge in tiles, or render a part"
        )
    return h, w
