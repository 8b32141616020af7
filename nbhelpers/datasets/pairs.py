"""Training pairs for super-resolution: random, scale-aligned patches as a pure function of seed and step.

Photos up to a memory limit are held as uint8 and every batch is one gather; larger collections are read lazily,
by DataLoader workers, from folders of tiles. Both give the same batches interface, so training cannot tell.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import runtime
from ..degrade import crop_to_multiple, downscale, random_jpeg
from ..images import ImageError, find_images, read_picture, to_tensor
from .store import SHEET

MEMORY_LIMIT_GB = 4.0
NAMED = ("bundled", "bundled_val", "train_large", "div2k_train", "div2k_valid", "flowers102")


class DataError(ValueError):
    """Training data that are missing, empty, or too small; the message says what to do."""


def resolve_root(root: str | Path) -> Path:
    """A folder of photos from a name of ``NAMED`` or a path, relative to the current folder or the project's root.

    Raises DataError when the folder does not exist (downloaded collections: see ``nbhelpers download``).
    """
    if root == "bundled":
        return runtime.PHOTOS / "train"
    if root == "bundled_val":
        return runtime.PHOTOS / "val"
    if root == "train_large":
        pack = runtime.shared()
        if pack is None:
            raise DataError("the photo pack 'train_large' is not on this machine; use data.roots=[bundled]")
        return pack / "data" / "train_large" / "photos"
    if root in NAMED:
        from .download import fetch

        return fetch(str(root))
    here = Path(root).expanduser().absolute()
    for path in (here, runtime.ROOT / root):
        if path.exists():
            return path
    raise DataError(f"no folder '{here}'; give an existing folder or one of {list(NAMED)}")


def split(paths: Sequence[Path], valid_fraction: float, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """(train, validation) paths, disjoint, split by whole files; at least one each when 0 < fraction < 1."""
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is outside 0 <= fraction < 1")
    shuffled = sorted(paths)
    random.Random(seed).shuffle(shuffled)
    n = round(len(shuffled) * valid_fraction)
    n = min(max(n, 1), len(shuffled) - 1) if valid_fraction and len(shuffled) > 1 else 0
    return sorted(shuffled[n:]), sorted(shuffled[:n])


def read_photos(paths: Sequence[Path], progress: bool = True) -> tuple[list[Tensor], list[str]]:
    """Decode photos to uint8 "3 h w"; unreadable ones are left out and reported in the second list."""
    photos, skipped = [], []
    for path in tqdm(paths, desc="reading photos", unit="photo", disable=not progress, leave=False):
        try:
            photos.append(torch.from_numpy(read_picture(path).rgb).permute(2, 0, 1))
        except ImageError as error:
            skipped.append(str(error))
    return photos, skipped


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

    ``patch`` is p in LR pixels, ``batch`` is b; ``augment`` flips and transposes, ``jpeg`` damages the LR side.
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
    ):
        self.scale, self.patch, self.batch, self.seed = scale, patch, batch, seed
        self.downscaler, self.jpeg, self.augment, self.length = downscaler, jpeg, augment, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.seed, step)
        lr, hr = self.sample(generator)
        if self.jpeg:
            lr = random_jpeg(lr.float() / 255, generator).mul(255).round().byte()
        return lr, hr

    def sample(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """One undamaged batch drawn with ``g``."""
        raise NotImplementedError


class PhotoPairs(Pairs):
    """Photos in memory; ``settings`` are those of :class:`Pairs`.

    Each photo is shrunk whole, once, by ``downscaler``; crops are then taken at the same place of both, so LR and
    HR are aligned to the scale. Positions are uniform over all photos' pixels.
    """

    def __init__(self, photos: Sequence[Tensor], scale: int, *, progress: bool = False, **settings: object):
        super().__init__(scale, **settings)
        patch = self.patch
        big = [crop_to_multiple(p, scale) for p in photos if min(p.shape[-2:]) >= patch * scale]
        if not big:
            raise DataError(
                f"none of {len(photos)} photos has {patch * scale} pixels on both sides, which patch={patch} at scale "
                f"{scale} needs; choose a smaller data.patch or larger photos"
            )
        small = [
            downscale(p.float() / 255, scale, self.downscaler).mul(255).round().byte()
            for p in tqdm(big, desc=f"shrinking x{scale}", unit="photo", disable=not progress, leave=False)
        ]
        self.skipped_small = len(photos) - len(big)
        self.room = torch.tensor([(p.shape[-2] - patch + 1, p.shape[-1] - patch + 1) for p in small])
        self.weights = self.room.prod(1).double()
        self.hr, self.lr = _Buffer(big), _Buffer(small)

    def sample(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Pairs`."""
        which = torch.multinomial(self.weights, self.batch, replacement=True, generator=g)
        position = (torch.rand(self.batch, 2, generator=g) * self.room[which]).long()
        flips = torch.randint(2 if self.augment else 1, (self.batch, 3), generator=g)
        top, left = position.unbind(1)
        lr = self.lr.crop(which, top, left, self.patch, flips)
        hr = self.hr.crop(which, top * self.scale, left * self.scale, self.patch * self.scale, flips)
        return lr, hr


class TilePairs(Pairs):
    """The same batches from tile files too many for memory: each batch decodes only the tiles it needs."""

    def __init__(self, paths: Sequence[Path], scale: int, **settings: object):
        super().__init__(scale, **settings)
        self.paths = list(paths)

    def sample(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Pairs`."""
        pairs = [self._one(g) for _ in range(self.batch)]
        lr, hr = (torch.stack(side) for side in zip(*pairs, strict=True))
        return lr, hr

    def _one(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        need = self.patch * self.scale
        for _ in range(20):  # a damaged or too small tile costs one more draw, not the run
            path = self.paths[int(torch.randint(len(self.paths), (1,), generator=g))]
            try:
                hr = crop_to_multiple(to_tensor(read_picture(path).rgb), self.scale)
            except ImageError:
                continue
            if min(hr.shape[-2:]) >= need:
                break
        else:
            raise DataError(f"20 tiles in a row are unreadable or below {need} pixels; last: {path}")
        lr = downscale(hr, self.scale, self.downscaler)
        room = torch.tensor([lr.shape[-2] - self.patch + 1, lr.shape[-1] - self.patch + 1])
        top, left = (torch.rand(2, generator=g) * room).long().tolist()
        s, p = self.scale, self.patch
        lr, hr = lr[:, top : top + p, left : left + p], hr[:, top * s : (top + p) * s, left * s : (left + p) * s]
        flips = torch.randint(2 if self.augment else 1, (3,), generator=g).tolist()
        dims = [d for d, on in zip((1, 2), flips[:2], strict=True) if on]
        lr, hr = (x.flip(dims).transpose(1, 2) if flips[2] else x.flip(dims) for x in (lr, hr))
        return lr.mul(255).round().byte(), hr.mul(255).round().byte()


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers that depend on seed and step only, so that a resumed run repeats its batches exactly."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _sizes(paths: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """(width, height) of each picture, from the file headers alone; unreadable ones are left out."""
    sizes = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[path] = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # it is reported where it is read
    return sizes


def _open_lazily(sizes: dict[Path, tuple[int, int]], scale: int, options: dict) -> TilePairs:
    need = options.get("patch", 48) * scale
    paths = [path for path, size in sizes.items() if min(size) >= need]
    if not paths:
        raise DataError(f"none of {len(sizes)} tiles has {need} pixels on both sides; choose a smaller data.patch")
    return TilePairs(paths, scale, **options)


def open_pairs(
    roots: str | Path | Sequence[str | Path],
    scale: int,
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    memory_limit_gb: float = MEMORY_LIMIT_GB,
    progress: bool = True,
    **options: object,
) -> tuple[Pairs, dict[str, object]]:
    """Pairs from folders, names of ``NAMED`` or files, in memory if they fit ``memory_limit_gb``, else lazily.

    ``limit`` takes the first so many photos of the sorted (or shuffled) list. ``options`` go to the data set.
    Returns it with a report: photos used, what was skipped, gigabytes, lazy. Raises DataError without any photo.
    """
    roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
    folders = [resolve_root(r) for r in roots]
    paths = [p for p in find_images(folders, shuffle_seed=shuffle_seed) if p.name != SHEET][:limit]
    if not paths:
        raise DataError(f"no pictures below {[str(r) for r in roots]}")
    sizes = _sizes(paths)
    gigabytes = sum(w * h * 3 for w, h in sizes.values()) / 1e9
    report: dict[str, object] = {"gigabytes": round(gigabytes, 3), "lazy": gigabytes > memory_limit_gb}
    if report["lazy"]:
        pairs = _open_lazily(sizes, scale, options)
        return pairs, {"photos": len(pairs.paths), "skipped": len(paths) - len(pairs.paths), **report}
    photos, skipped = read_photos(paths, progress)
    if not photos:
        roots_text = [str(r) for r in roots]
        raise DataError(f"none of {len(paths)} pictures below {roots_text} is readable; first: {skipped[0]}")
    pairs = PhotoPairs(photos, scale, progress=progress, **options)
    if pairs.skipped_small:
        skipped.append(f"{pairs.skipped_small} photos smaller than {pairs.patch * scale} pixels")
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
