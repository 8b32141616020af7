"""Training pairs for super-resolution: random, scale-aligned patches as a pure function of seed and step.

Photos up to a memory limit are held as uint8 and every batch is one gather; larger collections are read lazily,
by DataLoader workers, from folders of tiles. Both give the same batches interface, so training cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..degradation import Degradation
from ..degrade import crop_to_multiple, downscale, random_jpeg
from ..images import ImageError, find_images, read_picture, to_tensor
from .photos import (
    DataError,
    Roots,
    as_list,
    check_headers,
    check_pair,
    header_sizes,
    match_lr,
    read_pairs,
    read_photos,
    resolve_root,
)
from .store import SHEET

MEMORY_LIMIT_GB = 4.0
# Crops to be damaged are larger by so many LR pixels, and cut at random afterwards: blur then has something to mix in
# from beyond the border, and JPEG's blocks of 8x8 pixels begin anywhere.
MARGIN = 8


class _Buffer:
    """Pictures of any size in one flat uint8 array (pixels, 3), so that a batch of crops is a single gather."""

    def __init__(self, pictures: Sequence[Tensor]):
        sizes = torch.tensor([p.shape[-2:] for p in pictures])
        self.widths = sizes[:, 1]
        area = sizes.prod(1)
        self.starts = torch.cumsum(area, 0) - area
        self.pixels = torch.cat([p.permute(1, 2, 0).reshape(-1, 3) for p in pictures])

    def crop(self, which: Tensor, top: Tensor, left: Tensor, size: int, flips: Tensor) -> Tensor:
        """Crops "b 3 size size"; ``flips`` (b, 3) says: mirror rows, mirror columns, transpose."""
        width = self.widths[which]
        row, column = width.clone(), torch.ones_like(width)
        corner = self.starts[which] + top * width + left
        corner = corner + flips[:, 0] * (size - 1) * row + flips[:, 1] * (size - 1) * column
        row, column = torch.where(flips[:, 0] > 0, -row, row), torch.where(flips[:, 1] > 0, -column, column)
        row, column = torch.where(flips[:, 2] > 0, column, row), torch.where(flips[:, 2] > 0, row, column)
        steps = torch.arange(size)
        index = corner[:, None, None] + row[:, None, None] * steps[:, None] + column[:, None, None] * steps
        # Advanced indexing leaves RGB innermost, which is channels_last once permuted.
        return self.pixels[index].permute(0, 3, 1, 2)


class Pairs(Dataset):
    """``pairs[step]`` → (lr "b 3 p p", hr "b 3 p·scale p·scale") uint8, a pure function of seed and step.

    ``patch`` is p in LR pixels, ``batch`` is b; ``augment`` flips and transposes, ``jpeg`` damages the LR side. With a
    ``degradation`` LR is made by it from each batch's HR crops, anew every time.
    """

    def __init__(
        self,
        scale: int,
        patch: int = 48,
        batch: int = 16,
        seed: int = 0,
        downscaler: str = "matlab",
        jpeg: bool = False,
        augment: bool = True,
        length: int = 2**31,
        degradation: Degradation | None = None,
    ):
        self.scale, self.patch, self.batch, self.seed = scale, patch, batch, seed
        self.downscaler, self.jpeg, self.augment, self.length = downscaler, jpeg, augment, length
        self.degradation = degradation
        self.crop = _crop(patch, degradation)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.seed, step)
        lr, hr = self.sample(generator)
        if self.degradation is not None:
            lr, hr = self._damage(hr, generator)
        if self.jpeg:
            lr = random_jpeg(lr.float() / 255, generator).mul(255).round().byte()
        return lr, hr

    def _damage(self, hr: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        s, p = self.scale, self.patch
        lr = self.degradation(hr.float() / 255, s, g).mul(255).round().byte()
        y, x = torch.randint(MARGIN, (2,), generator=g).tolist()
        return lr[..., y : y + p, x : x + p], hr[..., y * s : (y + p) * s, x * s : (x + p) * s]

    def sample(self, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
        """One undamaged batch drawn with ``g``, of ``crop`` LR pixels a side; no LR where a degradation makes it."""
        raise NotImplementedError


def _crop(patch: int, degradation: Degradation | None) -> int:
    """Side in LR pixels of the crops drawn for a patch."""
    return patch if degradation is None else patch + MARGIN


class PhotoPairs(Pairs):
    """Photos in memory; ``settings`` are those of :class:`Pairs`.

    Each photo is shrunk whole, once, by ``downscaler``, unless its small picture is given in ``small``; crops are then
    taken at the same place of both, so LR and HR are aligned to the scale. Positions are uniform over all photos'
    pixels.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        scale: int,
        *,
        small: Sequence[Tensor] | None = None,
        progress: bool = False,
        **settings: object,
    ):
        super().__init__(scale, **settings)
        crop, patch = self.crop, self.patch
        fits = [min(p.shape[-2:]) >= crop * scale for p in photos]
        big = [crop_to_multiple(p, scale) for p, fit in zip(photos, fits, strict=True) if fit]
        if not big:
            more = "" if crop == patch else f" and {MARGIN} more for the degradation"
            raise DataError(
                f"none of {len(photos)} photos has {crop * scale} pixels on both sides, which patch={patch}{more} at "
                f"scale {scale} needs; take larger photos, or in training a smaller data.patch"
            )
        if small is not None:
            small = [p for p, fit in zip(small, fits, strict=True) if fit]
        elif self.degradation is None:
            small = [
                downscale(p.float() / 255, scale, self.downscaler).mul(255).round().byte()
                for p in tqdm(big, desc=f"shrinking x{scale}", unit="photo", disable=not progress, leave=False)
            ]
        self.skipped_small = len(photos) - len(big)
        self.room = torch.tensor([[side // scale - crop + 1 for side in p.shape[-2:]] for p in big])
        self.weights = self.room.prod(1).double()
        self.hr, self.lr = _Buffer(big), _Buffer(small) if small is not None else None

    def sample(self, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
        """See :class:`Pairs`."""
        which = torch.multinomial(self.weights, self.batch, replacement=True, generator=g)
        position = (torch.rand(self.batch, 2, generator=g) * self.room[which]).long()
        flips = torch.randint(2 if self.augment else 1, (self.batch, 3), generator=g)
        top, left = position.unbind(1)
        lr = None if self.lr is None else self.lr.crop(which, top, left, self.crop, flips)
        hr = self.hr.crop(which, top * self.scale, left * self.scale, self.crop * self.scale, flips)
        return lr, hr


class TilePairs(Pairs):
    """The same batches from tile files too many for memory: each batch decodes only the tiles it needs.

    ``lr_paths`` maps a tile to its low-resolution file, where there are such files.
    """

    def __init__(
        self, paths: Sequence[Path], scale: int, *, lr_paths: Mapping[Path, Path] | None = None, **settings: object
    ):
        super().__init__(scale, **settings)
        self.paths, self.lr_paths = list(paths), lr_paths

    def sample(self, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
        """See :class:`Pairs`."""
        lr, hr = zip(*(self._one(g) for _ in range(self.batch)), strict=True)
        return (None if self.degradation is not None else torch.stack(lr)), torch.stack(hr)

    def _one(self, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
        need = self.crop * self.scale
        for _ in range(20):  # a damaged or too small tile costs one more draw, not the run
            path = self.paths[int(torch.randint(len(self.paths), (1,), generator=g))]
            try:
                hr = crop_to_multiple(to_tensor(read_picture(path).rgb), self.scale)
                lr = self._small(path, hr) if min(hr.shape[-2:]) >= need else None
            except ImageError:
                continue
            if min(hr.shape[-2:]) >= need:
                break
        else:
            raise DataError(f"20 tiles in a row are unreadable or below {need} pixels; last: {path}")
        room = torch.tensor([side // self.scale - self.crop + 1 for side in hr.shape[-2:]])
        top, left = (torch.rand(2, generator=g) * room).long().tolist()
        flips = torch.randint(2 if self.augment else 1, (3,), generator=g).tolist()
        dims = [d for d, on in zip((1, 2), flips[:2], strict=True) if on]

        def cut(x: Tensor, s: int) -> Tensor:
            x = x[:, top * s : (top + self.crop) * s, left * s : (left + self.crop) * s].flip(dims)
            return (x.transpose(1, 2) if flips[2] else x).mul(255).round().byte()

        return (None if lr is None else cut(lr, 1)), cut(hr, self.scale)

    def _small(self, path: Path, hr: Tensor) -> Tensor | None:
        """The whole tile's LR picture, "3 h w" in [0, 1]."""
        if self.degradation is not None:
            return None
        if self.lr_paths is None:
            return downscale(hr, self.scale, self.downscaler)
        lr = to_tensor(read_picture(self.lr_paths[path]).rgb)
        check_pair(path, hr.shape[-2:], self.lr_paths[path], lr.shape[-2:], self.scale)
        return lr


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers that depend on seed and step only, so that a resumed run repeats its batches exactly."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _open_lazily(
    sizes: dict[Path, tuple[int, int]], scale: int, lr_paths: dict[Path, Path] | None, options: dict
) -> TilePairs:
    need = _crop(options.get("patch", 48), options.get("degradation")) * scale
    paths = [path for path, size in sizes.items() if min(size) >= need]
    if not paths:
        raise DataError(f"none of {len(sizes)} tiles has {need} pixels on both sides; choose a smaller data.patch")
    if lr_paths is not None:  # now, not in the middle of the run
        check_headers({path: lr_paths[path] for path in paths}, scale)
    return TilePairs(paths, scale, lr_paths=lr_paths, **options)


def _read_photos(
    paths: list[Path], scale: int, lr_paths: dict[Path, Path] | None, progress: bool
) -> tuple[list[Tensor], list[Tensor] | None, list[str]]:
    """(originals, their LR pictures or None, what could not be read)."""
    if lr_paths is None:
        photos, skipped = read_photos(paths, progress)
        return photos, None, skipped
    photos, small, skipped = read_pairs({path: lr_paths[path] for path in paths}, scale, progress)
    return photos, small, skipped


def open_pairs(
    roots: Roots,
    scale: int,
    *,
    lr_roots: Roots | None = None,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    memory_limit_gb: float = MEMORY_LIMIT_GB,
    progress: bool = True,
    **options: object,
) -> tuple[Pairs, dict[str, object]]:
    """Pairs from folders, names of ``NAMED`` or files, in memory if they fit ``memory_limit_gb``, else lazily.

    ``lr_roots`` name the folders (or files) of the small pictures, one for each of ``roots``; without them LR is made.
    ``limit`` takes the first so many photos of the sorted (or shuffled) list. ``options`` go to the data set.
    Returns it with a report: photos used, what was skipped, gigabytes, lazy. Raises DataError without any photo, and
    where originals and small pictures do not belong together by name or size.
    """
    roots = as_list(roots)
    folders = [resolve_root(r) for r in roots]
    paths = [p for p in find_images(folders, shuffle_seed=shuffle_seed) if p.name != SHEET][:limit]
    if not paths:
        raise DataError(f"no pictures below {[str(r) for r in roots]}")
    lr_paths = None if lr_roots is None else match_lr(roots, lr_roots, scale)
    sizes = header_sizes(paths)
    gigabytes = sum(w * h * 3 for w, h in sizes.values()) / 1e9
    report: dict[str, object] = {"gigabytes": round(gigabytes, 3), "lazy": gigabytes > memory_limit_gb}
    if report["lazy"]:
        pairs = _open_lazily(sizes, scale, lr_paths, options)
        return pairs, {"photos": len(pairs.paths), "skipped": len(paths) - len(pairs.paths), **report}
    photos, small, skipped = _read_photos(paths, scale, lr_paths, progress)
    if not photos:
        roots_text = [str(r) for r in roots]
        raise DataError(f"none of {len(paths)} pictures below {roots_text} is readable; first: {skipped[0]}")
    pairs = PhotoPairs(photos, scale, small=small, progress=progress, **options)
    if pairs.skipped_small:
        skipped.append(f"{pairs.skipped_small} photos smaller than {pairs.crop * scale} pixels")
    if skipped and progress:
        tqdm.write(f"left out of the training data: {'; '.join(skipped)}")
    return pairs, {"photos": len(photos) - pairs.skipped_small, "skipped": skipped, **report}


class _Steps(torch.utils.data.Sampler):
    def __init__(self, start: int, stop: int):
        self.range = range(start, stop)

    def __iter__(self):
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


def loader(pairs: Pairs, start: int, stop: int, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Batches for steps ``start`` … ``stop - 1`` in order; any number of workers gives the same batches."""
    return DataLoader(
        pairs,
        batch_size=None,
        sampler=_Steps(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
    )
