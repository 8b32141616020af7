"""Labelled pictures for classifiers, whole in memory as uint8: the bundled MNIST digits or all of MNIST.

train, test = open_pictures("mnist10k", fold=0)
images, labels = train[torch.arange(128)]      # one batch, by indexing
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import runtime
from .download import RemoteFile, fetch_file
from .pairs import DataError

FOLDS = 5
MNIST10K_SHA256 = "c03d6af810269a0b25ef8e8971f521767d52b05849e4fd977d6ca9528003c0b3"


@dataclass(frozen=True)
class LabelledPictures(Dataset):
    """``images`` uint8 "n c h w", ``labels`` int64 "n" from 0 to ``classes`` - 1; indexing takes a tensor of rows."""

    images: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.labels[rows]

    def take(self, rows: Tensor | slice) -> LabelledPictures:
        """The same kind of set with these rows only."""
        return LabelledPictures(*self[rows], self.classes)


class ShuffledBatches(Sampler):
    """Rows of every batch; the order depends on ``seed`` and epoch alone. The last, smaller batch is left out.

    Lightning calls ``set_epoch``. A rest of one picture would stop batch normalisation, hence no small batch.
    """

    def __init__(self, pictures: int, batch: int, seed: int):
        if not 1 <= batch <= pictures:
            raise DataError(f"batch={batch} must lie between 1 and the number of training pictures, {pictures}")
        self.pictures, self.batch, self.seed, self.epoch = pictures, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.pictures, generator=generator)
        return iter(order[: len(self) * self.batch].split(self.batch))

    def __len__(self) -> int:
        return self.pictures // self.batch


def batch_loader(pictures: LabelledPictures, batch: int, seed: int) -> DataLoader:
    """Batches (uint8 "b c h w", int64 "b") in a new order each epoch. Raises DataError for an impossible batch."""
    return DataLoader(pictures, batch_size=None, sampler=ShuffledBatches(len(pictures), batch, seed))


def fold_split(pictures: LabelledPictures, fold: int, folds: int = FOLDS) -> tuple[LabelledPictures, LabelledPictures]:
    """(train, test): every ``folds``-th picture is for testing, beginning with number ``fold`` modulo ``folds``."""
    held_out = torch.arange(len(pictures)) % folds == fold % folds
    return pictures.take(~held_out), pictures.take(held_out)


def mnist10k(fold: int = 0) -> tuple[LabelledPictures, LabelledPictures]:
    """8,000 training and 2,000 test digits of the bundled 10,000; five folds share no test digit.

    They are not MNIST's official test set (probably part of its training set): do not compare with published errors.
    Raises DataError where the file is missing or damaged.
    """
    path = runtime.DATA / "mnist" / "mnist10k.npz"
    if not path.is_file():
        raise DataError(f"{path} is missing; `git checkout -- data/mnist` brings it back")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != MNIST10K_SHA256:
        raise DataError(f"{path} is damaged (SHA-256 {found[:12]}…); `git checkout -- data/mnist` brings it back")
    with np.load(path) as file:
        images, labels = (torch.from_numpy(file[key]) for key in ("x", "y"))
    return fold_split(LabelledPictures(images[:, None], labels.long(), 10), fold)


def mnist(fold: int = 0, base_url: str | None = None) -> tuple[LabelledPictures, LabelledPictures]:
    """The official 60,000 training and 10,000 test digits (``fold`` changes nothing), downloaded once (11 MB).

    Names and MD5 hashes are torchvision's, and so is the folder, ``runs/downloads/mnist``: its ``MNIST(root)`` finds
    the files there. ``base_url`` names another server with the same files. Raises DownloadError without internet.
    """
    from torchvision.datasets import MNIST

    url = (base_url or MNIST.mirrors[0]).rstrip("/") + "/"
    folder = runtime.RUNS / "downloads" / "mnist" / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    files = [fetch_file(RemoteFile(name, f"md5:{md5}"), url, folder, progress=True) for name, md5 in MNIST.resources]
    arrays = [_read_idx(path) for path in files]
    return tuple(LabelledPictures(x[:, None], y.long(), 10) for x, y in (arrays[:2], arrays[2:]))


def _read_idx(path: Path) -> Tensor:
    """MNIST's own format: two zeros, type (8 = uint8), number of axes, their big-endian sizes, then the values."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, offset=4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


DATASETS: dict[str, Callable[..., tuple[LabelledPictures, LabelledPictures]]] = {"mnist10k": mnist10k, "mnist": mnist}


def open_pictures(name: str, fold: int = 0) -> tuple[LabelledPictures, LabelledPictures]:
    """(train, test) of a data set by name; ``fold`` chooses the split where there is no official one.

    Raises DataError for an unknown name, listing what exists.
    """
    if name not in DATASETS:
        raise DataError(f"data set {name!r} is unknown; choose one of {sorted(DATASETS)}")
    return DATASETS[name](fold)
