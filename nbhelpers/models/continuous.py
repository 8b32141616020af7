"""The base of networks that enlarge by any scale: encode a picture once, render any grid or points of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ..layers import BicubicUpsample
from . import sampling
from .encoders import build_encoder

CHUNK = 2**12  # output pixels decoded at once without a gradient: the values in between then fit a CPU's cache
LATENTS = 2**16  # input pixels whose latents are made at once, about 6 KB each on the way
MOST_PIXELS = 2**25  # output pixels of one rendering, 100 bytes each at the most: 3.4 GB


Axes = tuple[sampling.Axis, sampling.Axis]


class AnyScale(nn.Module):
    """An upscaler with a free ``scale``, a number or (y, x): "b 3 h w" → "b 3 round(h·scale) round(w·scale)".

    Raises ValueError for a scale that is not a finite number above 0.
    """

    def __init__(self, scale: float | tuple[float, float]):
        super().__init__()
        self.scale = _checked_scale(scale)

    def at(self, scale: float | tuple[float, float]) -> AnyScale:
        """This network (the same weights) enlarging by another scale, also below 1 or fractional."""
        view = copy.copy(self)
        view.scale = _checked_scale(scale)
        return view

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width this network makes of h x w; ValueError where that is an empty picture."""
        sy, sx = self.scale if isinstance(self.scale, tuple) else (self.scale, self.scale)
        return sampling.check_size((round(h * sy), round(w * sx)), 2**62)

    def at_grid(self, x: Tensor, axes: Axes, ratio: tuple[float, float]) -> Tensor:
        """Output pixels "b 3 rows columns" at ``axes`` between the pixels of ``x``; ``ratio`` is (y, x) enlargement."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        whole = tuple(x.shape[-2:])
        return self.region(x, _all(whole), whole, _all(self.output_size(*whole)))

    def region(
        self, x: Tensor, seen: tuple[slice, slice], whole: tuple[int, int], place: tuple[slice, slice]
    ) -> Tensor:
        """Part of the output for a tile: rows and columns ``place`` of what ``whole`` = (h, w) input pixels become.

        ``x`` "b 3 …" are the input pixels ``seen``, those around the part as far as ``halo``. Gives the whole
        picture's values, also where a scale is fractional and the grids of input and output never meet. Raises
        ValueError for more than ``MOST_PIXELS``.
        """
        size = self.output_size(*whole)
        axes = sampling.output_axes(size, whole, x.device)
        axes = tuple(a.cut(p, s.start) for a, p, s in zip(axes, place, seen, strict=True))
        sampling.check_size((len(axes[0].low), len(axes[1].low)), MOST_PIXELS)
        return self.at_grid(x, axes, (size[0] / whole[0], size[1] / whole[1]))


class Bicubic(nn.Module):
    """The baseline as a network, so that every tool takes it under the name ``bicubic``."""

    halo = 2

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        self.resize = BicubicUpsample(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x)


class AnyBicubic(AnyScale):
    """Bicubic enlargement by any scale; at whole ones :class:`Bicubic` is faster."""

    halo = 2

    def at_grid(self, x: Tensor, axes: Axes, ratio: tuple[float, float]) -> Tensor:
        return sampling.interpolate_grid(x.float(), axes, "bicubic")


class ContinuousSR(AnyScale):
    """An upscaler for any scale, not the same on both axes if need be; LIIF, LTE and LMLTE are its decoders.

    As one of the workbook's upscalers it takes "b 3 h w" in [0, 1] and returns "b 3 round(h·scale) round(w·scale)",
    unclamped; ``at`` gives the same network with another ``scale``. ``halo`` is its reach in input pixels.
    Nothing is kept between calls: :meth:`encode` once and :meth:`render` at many sizes.

    Args:
        encoder: as for :func:`nbhelpers.models.encoders.build_encoder`.
        scale: enlargement where none is asked for, a number or (y, x).
        skip: "bilinear" or "bicubic" interpolation of the input that the network adds details to; None: none.
        local_ensemble, local_size: mix what the 2 x 2 input pixels around an output pixel say (size 2, as CiaoSR and
            document 001 count it), or believe the nearest one.
        cell_decode: tell the decoder the size of an output pixel.
        max_scale: the largest scale of the training; above it the decoder is told the cell of ``max_scale``.

    A decoder says ``latent`` and ``decode``. Raises ValueError for what an argument cannot be.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, object],
        scale: float | tuple[float, float],
        skip: str | None,
        local_ensemble: bool,
        cell_decode: bool,
        max_scale: float,
        local_size: int = 2,
    ):
        super().__init__(scale)
        if skip is not None and skip not in sampling.SKIPS:
            raise ValueError(f"skip {skip!r} is unknown; choose one of {[*sampling.SKIPS, None]}")
        if local_size not in (1, 2):
            raise ValueError(f"local_size {local_size} must be 2, or 1 for the nearest pixel alone")
        self.max_scale = _checked_scale(max_scale)
        self.skip, self.cell_decode, self.local_ensemble = skip, cell_decode, local_ensemble and local_size == 2
        self.encoder = build_encoder(encoder)
        self.grid = getattr(self.encoder, "grid", 1)
        # One pixel for the decoder's 3x3 convolution, one for the neighbour an output pixel asks.
        self.halo = None if self.encoder.halo is None else max(self.encoder.halo + 2, sampling.SKIPS.get(skip, 0))

    # ---- what a decoder says ----
    def latent(self, features: Tensor, ratio: tuple[float, float]) -> Tensor:
        """What the decoder needs of every input pixel, "b h w c", from features; ``ratio`` is (y, x) enlargement."""
        raise NotImplementedError

    def decode(self, latent: Tensor, offsets: Tensor, ratio: tuple[float, float]) -> Tensor:
        """Colours "n q 3", -1 … 1, from latents "n c" at q ``offsets`` "n q 2" from each, in input pixels."""
        raise NotImplementedError

    def cell(self, ratio: tuple[float, float] | Tensor, like: Tensor) -> Tensor:
        """Size of an output pixel (y, x) in halves of an input pixel, as the papers count it, not below training's."""
        if isinstance(ratio, Tensor):  # "2": an exported program is told when it runs
            return 2 / ratio.clamp_max(self.max_scale)
        return like.new_tensor([2 / min(r, self.max_scale) for r in ratio], dtype=torch.float32)

    # ---- the network ----
    def encode(self, x: Tensor) -> Tensor:
        """Features "b c h w" of pictures "b 3 h w" in [0, 1]: the part of the work that no scale changes."""
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"expected pictures 'b 3 h w' of at least one pixel, got shape {tuple(x.shape)}")
        return self.encoder(x * 2 - 1)

    def render(
        self,
        features: Tensor,
        lr: Tensor,
        size: tuple[int, int],
        coords: Tensor | None = None,
        *,
        rows: Tensor | slice | None = None,
        columns: Tensor | slice | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """An output picture of ``size`` (h', w') from ``features`` of :meth:`encode` and its input ``lr`` "b 3 h w".

        Args:
            coords: "b q 2" (y, x) in [-1, 1]; gives "b 3 q" at these places instead of "b 3 h' w'".
            rows, columns: only these of the picture, in rising order; gives "b 3 rows columns".
            chunk: output pixels decoded at once; None: 4,096, and with a gradient everything.

        fp32, unclamped, differentiable. Raises ValueError for an empty size, more than ``MOST_PIXELS`` at once,
        coordinates outside [-1, 1], rows or columns out of order, and a chunk below 1.
        """
        h, w = check_pair(features, lr)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk} must be at least 1 pixel")
        ratio = (size[0] / h, size[1] / w)
        if coords is not None:
            sampling.check_size(size, 2**62)
            return self._points(features, lr, ratio, sampling.axes_of(coords, (h, w)), chunk)
        part = rows is not None or columns is not None
        size = sampling.check_size(size, 2**62 if part else MOST_PIXELS)
        axes = sampling.output_axes(size, (h, w), features.device)
        axes = tuple(a if part is None else a.cut(part) for a, part in zip(axes, (rows, columns), strict=True))
        return self._grid(features, lr, ratio, axes, chunk)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures "b 3 h w" in [0, 1] enlarged to ``size`` (h', w'); None: by ``scale``. Unclamped, fp32."""
        return self.render(self.encode(x), x, self.output_size(*x.shape[-2:]) if size is None else size)

    def at_grid(self, x: Tensor, axes: Axes, ratio: tuple[float, float]) -> Tensor:
        return self._grid(self.encode(x), x, ratio, axes, None)

    # ---- rendering ----
    def _grid(
        self,
        features: Tensor,
        lr: Tensor,
        ratio: tuple[float, float],
        axes: Axes,
        chunk: int | None,
    ) -> Tensor:
        parts = []
        for place, seen in _strips(axes[0], features):
            strip = (axes[0].cut(place, seen.start), axes[1])
            parts.append(self.details(self.latent(features[:, :, seen], ratio), strip, ratio, chunk))
        return self.finish(parts[0] if len(parts) == 1 else torch.cat(parts, 2), lr, axes)

    def details(
        self,
        latent: Tensor,
        axes: Axes,
        ratio: tuple[float, float],
        chunk: int | None = None,
    ) -> Tensor:
        """What the decoder says at a grid of output pixels, "b 3 rows columns", in units of [-1, 1].

        Each input pixel decodes all its output pixels at once, so that its latent is copied for none of them.
        """
        ys, xs = (sampling.slots(a, n, self.local_ensemble) for a, n in zip(axes, latent.shape[1:3], strict=True))
        latent, parts = latent[:, ys.pixels, xs.pixels], []
        for part in _row_blocks(ys, latent, xs, chunk):
            decoded = self.decode_slots(latent[:, part], ys.offsets[part], xs.offsets, ratio)
            parts.append(xs.combine(decoded, 2))
        return ys.combine(parts[0] if len(parts) == 1 else torch.cat(parts, 1), 1).permute(0, 3, 1, 2)

    def finish(self, details: Tensor, lr: Tensor, axes: Axes) -> Tensor:
        """The picture in [0, 1] from its details and the skip."""
        base = None if self.skip is None else sampling.interpolate_grid(lr.float(), axes, self.skip)
        return _finish(details, base)

    def decode_slots(self, latent: Tensor, rows: Tensor, columns: Tensor, ratio: tuple[float, float]) -> Tensor:
        """Colours "b h·i w·j 3" of latents "b h w c" at the offsets ``rows`` "h i" by ``columns`` "w j" of each."""
        b, h, w, c = latent.shape
        i, j = rows.shape[1], columns.shape[1]
        offsets = torch.stack(
            torch.broadcast_tensors(rows[:, None, :, None], columns[None, :, None, :]), -1
        )  # h w i j 2
        offsets = offsets.view(1, h * w, i * j, 2).expand(b, -1, -1, -1).reshape(-1, i * j, 2)
        decoded = self.decode(latent.reshape(-1, c), offsets, ratio)
        return decoded.view(b, h, w, i, j, 3).permute(0, 1, 3, 2, 4, 5).reshape(b, h * i, w * j, 3)

    def at_points(self, features: Tensor, lr: Tensor, ratio: tuple[float, float] | Tensor, axes: Axes) -> Tensor:
        """Output pixels "b q 3" at single places, each axis "b q"; ``ratio`` may be a tensor (y, x)."""
        base = None if self.skip is None else sampling.interpolate_points(lr.float(), axes, self.skip)
        return _finish(self._mix(self.latent(features, ratio), axes, ratio), base)

    def _points(
        self,
        features: Tensor,
        lr: Tensor,
        ratio: tuple[float, float],
        axes: Axes,
        chunk: int | None,
    ) -> Tensor:
        """Output pixels at single places "b q": "b 3 q"."""
        latent = self.latent(features, ratio)
        q = axes[0].low.shape[1]
        step = q if chunk is None and torch.is_grad_enabled() else max(1, (chunk or CHUNK) // latent.shape[0])
        parts = []
        for start in range(0, q, step):
            part = tuple(a.cut((slice(None), slice(start, start + step))) for a in axes)
            base = None if self.skip is None else sampling.interpolate_points(lr.float(), part, self.skip)
            parts.append(_finish(self._mix(latent, part, ratio), base))
        return torch.cat(parts, 1).transpose(1, 2)

    def _mix(self, latent: Tensor, axes: Axes, ratio: tuple[float, float]) -> Tensor:
        """What the input pixels around each place say, mixed: "b q 3"."""
        (h, w), total = latent.shape[1:3], 0
        y, x = axes if self.local_ensemble else (a.nearest() for a in axes)
        corners = (0, 1) if self.local_ensemble else (0,)
        for i in corners:
            for j in corners:
                row, column = (y.low + i).clamp(0, h - 1), (x.low + j).clamp(0, w - 1)
                offsets = torch.stack([(a.low - p) + a.fraction for a, p in ((y, row), (x, column))], -1)
                own = sampling.gather(latent, row, column).flatten(0, 1)
                said = self.decode(own, offsets.view(-1, 1, 2), ratio).view(*row.shape, 3)
                if self.local_ensemble:
                    said = said * ((y.fraction - 1 + i).abs() * (x.fraction - 1 + j).abs())[..., None]
                total = total + said
        return total


def check_pair(features: Tensor, lr: Tensor) -> tuple[int, int]:
    """(h, w) of both; raises ValueError where ``lr`` is not of the size of the picture that gave ``features``."""
    h, w = features.shape[-2:]
    if lr.shape[-2:] != (h, w):
        raise ValueError(f"the features are of {h}x{w} pixels, but lr is {tuple(lr.shape)}; give what was encoded")
    return h, w


def _strips(ys: sampling.Axis, features: Tensor) -> list[tuple[slice, slice]]:
    """(output rows, input rows that their latents need): latents are wide, so without a gradient a few at a time."""
    b, _, h, w = features.shape
    step = max(1, LATENTS // (b * w))
    if torch.is_grad_enabled() or step >= h:
        return [(slice(0, len(ys.low)), slice(0, h))]
    starts = range(0, h, step)
    edges = [0, *torch.searchsorted(ys.low.cpu(), torch.tensor(starts[1:])).tolist(), len(ys.low)]
    # An output row asks the input rows at and after it, and a latent is made of three rows of features.
    seen = [slice(max(0, start - 1), min(h, start + step + 2)) for start in starts]
    return [(slice(a, b), s) for a, b, s in zip(edges[:-1], edges[1:], seen, strict=True) if a < b]


def _row_blocks(ys: sampling.Slots, latent: Tensor, xs: sampling.Slots, chunk: int | None) -> list[slice]:
    """Input rows to decode together, about ``chunk`` output pixels."""
    count = ys.offsets.shape[0]
    if chunk is None and torch.is_grad_enabled():
        return [slice(0, count)]
    in_row = latent.shape[0] * ys.offsets.shape[1] * xs.offsets.numel() / 4  # an output pixel is decoded four times
    step = max(1, int((chunk or CHUNK) / in_row))
    return [slice(top, min(top + step, count)) for top in range(0, count, step)]


def _finish(details: Tensor, base: Tensor | None) -> Tensor:
    """Colours in [0, 1] from a decoder's, which are in [-1, 1], and what they are added to."""
    return details.float() * 0.5 + (0.5 if base is None else base)


def _all(size: tuple[int, int]) -> tuple[slice, slice]:
    return slice(0, size[0]), slice(0, size[1])


def _checked_scale(scale: float | Sequence[float]) -> float | tuple[float, float]:
    numbers = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    right = all(isinstance(s, Real) and math.isfinite(s) and s > 0 for s in numbers)
    if not right or len(numbers) > 2 or isinstance(scale, str) or not numbers:
        raise ValueError(f"scale {scale!r} must be a number above 0, or two of them for height and width")
    numbers = tuple(int(s) if isinstance(s, Integral) else float(s) for s in numbers)  # NumPy's numbers count, too
    return numbers[0] if len(set(numbers)) == 1 else numbers
