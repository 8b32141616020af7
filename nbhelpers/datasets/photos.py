"""Which files a training reads: named folders, train/validation splits, and the small pictures that belong to them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import runtime
from ..images import ImageError, find_images, find_lr, read_picture
from .store import SHEET

NAMED = ("bundled", "bundled_val", "train_large", "div2k_train", "div2k_valid", "flowers102")
Roots = str | Path | Sequence[str | Path]


class DataError(ValueError):
    """Training data that are missing, empty, too small or do not belong together; the message says what to do."""


def as_list(roots: Roots) -> list[str | Path]:
    """One root or several, as a list."""
    return [roots] if isinstance(roots, (str, Path)) else list(roots)


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
            raise DataError(
                "the photo pack 'train_large' is not on this machine; use data.roots=[bundled] "
                '(prune: --set "data.roots=[bundled]")'
            )
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


def _decode(path: Path) -> Tensor:
    return torch.from_numpy(read_picture(path).rgb).permute(2, 0, 1)


def read_photos(paths: Sequence[Path], progress: bool = True) -> tuple[list[Tensor], list[str]]:
    """Decode photos to uint8 "3 h w"; unreadable ones are left out and reported in the second list."""
    photos, skipped = [], []
    for path in tqdm(paths, desc="reading photos", unit="photo", disable=not progress, leave=False):
        try:
            photos.append(_decode(path))
        except ImageError as error:
            skipped.append(str(error))
    return photos, skipped


def read_pairs(
    lr_paths: Mapping[Path, Path], scale: int, progress: bool = True
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """(originals, small pictures, what was left out): the same for originals and their small pictures.

    Raises DataError like :func:`check_pair`.
    """
    photos, small, skipped = [], [], []
    for path, lr_path in tqdm(lr_paths.items(), desc="reading photos", unit="photo", disable=not progress, leave=False):
        try:
            hr, lr = _decode(path), _decode(lr_path)
        except ImageError as error:
            skipped.append(str(error))
            continue
        check_pair(path, hr.shape[-2:], lr_path, lr.shape[-2:], scale)
        photos.append(hr)
        small.append(lr)
    return photos, small, skipped


def match_lr(roots: Roots, lr_roots: Roots, scale: int) -> dict[Path, Path]:
    """{original: its low-resolution file} for folders (or files) that belong together one to one.

    Names are as ``find_lr`` takes them; folders below a root have theirs below its LR root. Raises DataError where an
    original has no counterpart; small pictures without an original are not looked at.
    """
    roots, lr_roots = as_list(roots), as_list(lr_roots)
    if len(roots) != len(lr_roots):
        raise DataError(
            f"{len(roots)} folders of originals but {len(lr_roots)} of low-resolution pictures; data.lr_roots must "
            "name one for each of data.roots, in the same order"
        )
    found, missing = {}, []
    for root, lr_root in zip(map(resolve_root, roots), map(resolve_root, lr_roots), strict=True):
        for path in (p for p in find_images(root) if p.name != SHEET):
            below = lr_root if path == root else (lr_root / path.relative_to(root)).parent
            try:
                found[path] = lr_root if path == root and lr_root.is_file() else find_lr(below, path, scale)
            except FileNotFoundError:
                missing.append(f"{path.name} in {below}")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(missing) + len(found)} originals have no low-resolution picture (the same name, "
            f"another suffix, or NAMEx{scale}); first: {missing[0]}; data.lr_roots must match data.roots"
        )
    return found


def check_pair(path: Path, hr: Sequence[int], lr_path: Path, lr: Sequence[int], scale: int) -> None:
    """Raise DataError, quoting files and sizes (height, width), unless LR is ``scale`` times smaller, exactly."""
    (h, w), (y, x) = hr, lr
    if h % scale or w % scale:
        raise DataError(
            f"{path} has {h}x{w} pixels, which scale {scale} does not divide; crop the original and make its "
            "low-resolution picture from that"
        )
    if (y * scale, x * scale) != (h, w):
        raise DataError(
            f"{path} has {h}x{w} pixels and {lr_path} {y}x{x}; at scale {scale} that must be {h // scale}x{w // scale}"
        )


def header_sizes(paths: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """(width, height) of each picture, from the file headers alone; unreadable ones are left out."""
    sizes = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[path] = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # it is reported where it is read
    return sizes


def check_headers(lr_paths: Mapping[Path, Path], scale: int) -> None:
    """:func:`check_pair` by the file headers, for very many files; what cannot be read is left to who reads it."""
    sizes = header_sizes([*lr_paths, *lr_paths.values()])
    for path, lr_path in lr_paths.items():
        if path in sizes and lr_path in sizes:
            try:
                check_pair(path, sizes[path][::-1], lr_path, sizes[lr_path][::-1], scale)
            except DataError:  # unless EXIF turns one of the two, of which its header's size knows nothing
                read_pairs({path: lr_path}, scale, progress=False)
