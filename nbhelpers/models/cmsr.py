"""Cheaper rendering of easy regions: controllable multi-scale rendering (He and Jin 2024) and document 001's variant.

Where LMLTE's modulations are weak the picture is simple. CMSR renders the details there at a lower scale and enlarges
them; from which strength on which scale is needed is read from a table, made once per scale on photos. Document 001
describes something else under the same name: regions whose modulations are alike share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sampling
from .continuous import CHUNK, MOST_PIXELS, check_pair
from .lmf import LMLTE

LEVELS = (1, 1.5, 2, 3, 4, 6)  # scales that easy regions may be rendered at
BINS = 50  # of equally many input pixels each, in which the strength of modulation is looked at
BLOCKS = (8, 4, 2)  # sides of the squares of input pixels that may share one latent
Table = Mapping[float, float]


@dataclass(frozen=True)
class Cheap:
    """A picture "b 3 h' w'" unclamped, and ``decoded``: the share of the plain rendering's evaluations it took."""

    picture: Tensor
    decoded: float


def _check(model: LMLTE) -> None:
    if not isinstance(model, LMLTE) or not model.modulations:
        raise ValueError(f"CMSR needs an LMLTE with modulation=True, not {type(model).__name__}")


def strength(model: LMLTE, latent: Tensor) -> Tensor:
    """Mean size of the shifts among the modulations, "b h w c" → "b h w": how much an input pixel asks for."""
    return latent[..., model.modulations // 2 : model.modulations].float().abs().mean(-1)


def _plan(model: LMLTE, shape: tuple[int, int], size: tuple[int, int]) -> tuple:
    """(enlargement, axes) of an output of ``size`` over an input of ``shape``."""
    axes = sampling.output_axes(size, shape, next(model.parameters()).device)
    return (size[0] / shape[0], size[1] / shape[1]), axes


def _enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _level_size(shape: tuple[int, int], level: float) -> tuple[int, int]:
    return int(shape[0] * level), int(shape[1] * level)


# --- The table --------------------------------------------------------------------------------------------


@torch.no_grad()
def level_errors(model: LMLTE, lr: Tensor, scale: float, levels: Sequence[float] = LEVELS) -> Tensor:
    """What a picture "1 3 h w" in [0, 1] loses at each level: "1 + levels, h·w".

    The first row is each input pixel's strength, the others the mean squared error, in [0, 1]², of the output pixels
    nearest to it, against the rendering at ``scale``. Raises ValueError for a network without modulations.
    """
    _check(model)
    features, shape = model.encode(lr), tuple(lr.shape[-2:])
    size = model.at(scale).output_size(*shape)
    ratio, axes = _plan(model, shape, size)
    latent = model.latent(features, ratio)
    full = model.details(latent, axes, ratio)
    rows = [strength(model, latent).flatten()]
    for level in levels:
        level_ratio, level_axes = _plan(model, shape, _level_size(shape, level))
        found = _enlarge(model.details(latent, level_axes, level_ratio), size)
        rows.append(F.adaptive_avg_pool2d((found - full).square().mean(1) / 4, shape).flatten())
    return torch.stack(rows)


def make_table(errors: Tensor, mse: float, levels: Sequence[float] = LEVELS) -> dict[float, float]:
    """{level: strength up to which it serves} from :func:`level_errors` of some photos, joined along dimension 1.

    As published: pixels are sorted by strength into bins, and a level serves all bins before the first whose mean
    squared error is above ``mse``. Thresholds never fall from one level to the next. Raises ValueError for mse < 0.
    """
    if not mse >= 0:
        raise ValueError(f"mse {mse} must be at least 0")
    ordered = errors[:, errors[0].argsort()]
    bins = [part.mean(1) for part in ordered.tensor_split(BINS, 1) if part.shape[1]]
    ends = [float(part[0, -1]) for part in ordered.tensor_split(BINS, 1) if part.shape[1]]
    table, least = {}, 0.0
    for i, level in enumerate(levels, 1):
        good = [bool(b[i] <= mse) for b in bins]
        count = good.index(False) if False in good else len(good)
        least = max(least, ends[count - 1] if count else 0.0)
        table[level] = least
    return table


def calibrate(
    model: LMLTE, photos: Sequence[Tensor], scale: float, mse: float = 2e-5, levels: Sequence[float] = LEVELS
) -> dict[float, float]:
    """The table of one scale from small pictures "3 h w" in [0, 1]; see :func:`make_table`."""
    levels = [level for level in levels if level < scale]
    return make_table(torch.cat([level_errors(model, p[None], scale, levels) for p in photos], 1), mse, levels)


# --- Rendering --------------------------------------------------------------------------------------------


@torch.no_grad()
def render(model: LMLTE, features: Tensor, lr: Tensor, size: tuple[int, int], table: Table) -> Cheap:
    """:meth:`LMLTE.render`, but pixels of little strength at the levels of ``table``.

    Each level's details are enlarged bilinearly and replaced where the next level is needed, as published; unlike
    there the skip stays that of the full size, and a level also renders the pixels next to its own, which enlarging
    reads. Without a gradient, and with the latents of the whole picture at once, about 6 KB for each input pixel.
    Raises ValueError as ``LMLTE.render`` does, and for a network without modulations.
    """
    _check(model)
    shape = check_pair(features, lr)
    size = sampling.check_size(size, MOST_PIXELS)
    ratio, axes = _plan(model, shape, size)
    latent = model.latent(features, ratio)
    found, strong, low = None, strength(model, latent), -1.0
    levels = [(level, high) for level, high in sorted(table.items()) if level < min(ratio)]
    evaluated = 0
    for level, high in [*levels, (None, float("inf"))]:
        mask = (strong > low) & (strong <= high)
        low = max(low, high)
        if not bool(mask.any()):
            continue
        mask = mask if level is None else _widened(mask)
        here = size if level is None else _level_size(shape, level)
        level_ratio, level_axes = (ratio, axes) if level is None else _plan(model, shape, here)
        new, count = _details_where(model, latent, mask, level_axes, level_ratio)
        evaluated += count
        if found is not None:
            own = F.interpolate(mask[:, None].float(), here, mode="nearest-exact") > 0
            new = torch.where(own, new, _enlarge(found, here))
        found = new
    found = found if found.shape[-2:] == size else _enlarge(found, size)
    return Cheap(model.finish(found, lr, axes), evaluated / _evaluations(model, latent, axes))


def _widened(mask: Tensor) -> Tensor:
    """A mask "b h w" and the pixels around it."""
    return F.max_pool2d(mask.float(), 3, 1, 1) > 0


def _evaluations(model: LMLTE, latent: Tensor, axes: tuple[sampling.Axis, sampling.Axis]) -> int:
    """How often the plain rendering runs the render network."""
    ys, xs = (sampling.slots(a, n, model.local_ensemble) for a, n in zip(axes, latent.shape[1:3], strict=True))
    return latent.shape[0] * ys.offsets.numel() * xs.offsets.numel()


def _details_where(
    model: LMLTE,
    latent: Tensor,
    mask: Tensor,
    axes: tuple[sampling.Axis, sampling.Axis],
    ratio: tuple[float, float],
) -> tuple[Tensor, int]:
    """``model.details``, right at the output pixels nearest to the input pixels ``mask``; and the evaluations."""
    ys, xs = (sampling.slots(a, n, model.local_ensemble) for a, n in zip(axes, latent.shape[1:3], strict=True))
    if model.local_ensemble:  # those pixels ask their neighbours as well
        mask = _widened(mask)
    mask = mask[:, ys.pixels, xs.pixels]
    latent = latent[:, ys.pixels, xs.pixels]
    which = mask.nonzero().T
    decoded = _decode_each(model, latent[mask], ys.offsets[which[1]], xs.offsets[which[2]], ratio)
    everywhere = decoded.new_zeros(*mask.shape, *decoded.shape[1:])
    everywhere[mask] = decoded
    return _combine(everywhere, ys, xs), decoded.shape[0] * decoded.shape[1] * decoded.shape[2]


def _decode_each(model: LMLTE, latent: Tensor, rows: Tensor, columns: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Colours "n i j 3" of single input pixels "n c" at their own offsets "n i" and "n j"."""
    (n, i), j = rows.shape, columns.shape[1]
    step, parts = max(1, 4 * CHUNK // (i * j)), []
    for part in (slice(start, start + step) for start in range(0, n, step)):
        offsets = torch.stack(torch.broadcast_tensors(rows[part, :, None], columns[part, None, :]), -1)
        parts.append(model.decode(latent[part], offsets.flatten(1, 2), ratio).unflatten(1, (i, j)))
    return torch.cat(parts)


def _combine(decoded: Tensor, ys: sampling.Slots, xs: sampling.Slots) -> Tensor:
    """Details "b 3 rows columns" from what each input pixel says, "b h w i j 3"."""
    b, h, w, i, j, _ = decoded.shape
    decoded = decoded.permute(0, 1, 3, 2, 4, 5).reshape(b, h * i, w * j, 3)
    return ys.combine(xs.combine(decoded, 2), 1).permute(0, 3, 1, 2)


# --- Document 001's variant -------------------------------------------------------------------------------


def cluster(x: Tensor, threshold: float, blocks: Sequence[int] = BLOCKS) -> tuple[Tensor, Tensor]:
    """Squares of pixels that are alike: "b h w c" → (label "b h w", mean of each cluster "n c").

    The largest of ``blocks`` first, a square is one cluster where its pixels' mean squared distance from their mean,
    per channel, is at most ``threshold``; the pixels left over stay alone. Raises ValueError for threshold < 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold {threshold} must be at least 0")
    (b, h, w), maps, means = x.shape[:3], x.permute(0, 3, 1, 2), []
    label = torch.full((b, h, w), -1, device=x.device)
    for k in (*blocks, 1):
        if min(h, w) < k:
            continue
        mean = F.avg_pool2d(maps, k)
        spread = (F.avg_pool2d(maps.square(), k) - mean.square()).mean(1)
        free = F.avg_pool2d((label < 0)[:, None].float(), k)[:, 0] == 1
        new = free & (spread <= threshold) if k > 1 else free
        first = sum(len(m) for m in means)
        number = torch.full(new.shape, -1, device=x.device)
        number[new] = first + torch.arange(int(new.sum()), device=x.device)
        spreadout = number.repeat_interleave(k, 1).repeat_interleave(k, 2)
        part = label[:, : spreadout.shape[1], : spreadout.shape[2]]
        part[spreadout >= 0] = spreadout[spreadout >= 0]
        means.append(mean.permute(0, 2, 3, 1)[new])
    return label, torch.cat(means)


@torch.no_grad()
def render_shared(model: LMLTE, features: Tensor, lr: Tensor, size: tuple[int, int], threshold: float) -> Cheap:
    """:meth:`LMLTE.render`, but input pixels that are alike share their modulations (document 001).

    Alike is what the hyper-network gets, clustered by a mean squared error; it runs once for each cluster. At whole
    scales every input pixel's output pixels lie alike around it, so a cluster also shares what is rendered, save at
    the picture's border. Without a gradient. Raises ValueError as ``LMLTE.render`` does, for a network without
    modulations, with ``mod_input=False``, and for threshold < 0.
    """
    _check(model)
    if not model.mod_input:
        raise ValueError("sharing needs mod_input=True: without it pixels differ beside their modulations")
    shape = check_pair(features, lr)
    size = sampling.check_size(size, MOST_PIXELS)
    ratio, axes = _plan(model, shape, size)
    label, means = cluster(model.shared(features, ratio)[0], threshold)
    latent = model.hyper(means)
    if any(n % m for n, m in zip(size, shape, strict=True)) or min(shape) < 3:
        details = model.details(latent[label], axes, ratio)
        return Cheap(model.finish(details, lr, axes), 1.0)
    ys, xs = (sampling.slots(a, n, model.local_ensemble) for a, n in zip(axes, shape, strict=True))
    inner = torch.zeros(shape, dtype=torch.bool, device=lr.device)
    inner[1:-1, 1:-1] = True
    used, place = label[:, inner].unique(return_inverse=True)
    i, j = ys.offsets.shape[1], xs.offsets.shape[1]
    rows, columns = (s.offsets[1].expand(len(used), -1) for s in (ys, xs))
    common = _decode_each(model, latent[used], rows, columns, ratio)
    which = (~inner).nonzero().T.repeat(1, lr.shape[0])
    edge = _decode_each(model, latent[label[:, ~inner].flatten()], ys.offsets[which[0]], xs.offsets[which[1]], ratio)
    everywhere = common.new_empty(*label.shape, i, j, 3)
    everywhere[:, inner] = common[place]
    everywhere[:, ~inner] = edge.unflatten(0, (lr.shape[0], -1))
    picture = model.finish(_combine(everywhere, ys, xs), lr, axes)
    return Cheap(picture, (len(used) + edge.shape[0]) / label.numel())
