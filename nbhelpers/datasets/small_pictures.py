"""Small colour pictures with labels, whole in memory: CIFAR-10/100, .npz files, class folders, bundled patches.

pictures = open_collection("bundled")                         # train, test, class names, description
train, valid = hold_out(pictures.train, subset_fraction=0.1, valid_size=0.1, seed=0)
batch = augment(train[rows][0], seed=0, step=7)               # shifted and mirrored, the same for the same step
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import runtime
from ..images import SUFFIXES, ImageError, find_images, read_picture
from .classification import DataError, LabelledPictures
from .download import RemoteFile, fetch_file

SIDE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATCH_PHOTOS = (
    "anemones", "autumn_foliage", "bamboo_trunk", "dyed_brushes", "forest_path", "lanterns_crowd", "pagoda", "raccoon",
    "stream_cascade", "swallowtail_wing",
)  # fmt: skip
REGION = 64  # pixels; a region of a photo is for training or for testing as a whole
KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
NAMED = ("bundled", "cifar10", "cifar100", "cifar10_jpeg")


@dataclass(frozen=True)
class Collection:
    """Training and test pictures, the names of the classes, and one sentence to stand beside every number."""

    train: LabelledPictures
    test: LabelledPictures
    names: tuple[str, ...]
    description: str


def open_collection(dataset: str = "bundled", data_dir: str | Path = "data", num_workers: int = 4) -> Collection:
    """A collection by name or path.

    Args:
        dataset: ``bundled``: patches of ten bundled photos, :func:`photo_patches`; ``cifar10``, ``cifar100``:
            downloaded; ``cifar10_jpeg``: CIFAR-10's pixels after JPEG, from the optional pack ../shared; else a .npz
            in Keras layout (:func:`read_npz`), or a folder with ``train/CLASS/…`` and ``test/CLASS/…``.
        data_dir: folder of downloads; a relative one lies below ``runs/downloads``, never in the repository's data.
        num_workers: threads that decode pictures of a folder.

    Raises DataError for data that are missing, damaged or not as they should be, DownloadError without internet.
    """
    if dataset == "bundled":
        return photo_patches()
    folder = runtime.RUNS / "downloads" / Path(data_dir).expanduser()
    if dataset in ("cifar10", "cifar100"):
        return cifar(dataset, folder)
    if dataset == "cifar10_jpeg":
        return read_npz(_cifar10_jpeg(folder), CIFAR10_CLASSES, "CIFAR-10 (JPEG): the pixels went through JPEG")
    path = Path(dataset).expanduser()
    if path.suffix == ".npz":
        return read_npz(path)
    if path.is_dir():
        return _folders(path, num_workers)
    raise DataError(f"data set {dataset!r} is neither a file nor a folder, nor one of {list(NAMED)}")


# --- bundled ----------------------------------------------------------------------------------------------


def photo_patches() -> Collection:
    """Which photo does this patch come from? 32×32 patches of ten bundled photos; 1,120 to train on, 320 to test.

    The photos are cut into regions of 64×64 pixels, about every fifth for testing, and the regions into four patches,
    so that training and test patches share no pixel. Raises DataError where a photo is missing.
    """
    parts: dict[bool, list[tuple[Tensor, int]]] = {False: [], True: []}
    for label, name in enumerate(PATCH_PHOTOS):
        try:
            photo = torch.from_numpy(read_picture(runtime.PHOTOS / "train" / f"{name}.png").rgb)
        except ImageError as error:
            raise DataError(f"{error}; `git checkout -- data/photos` brings it back") from None
        for y in range(0, photo.shape[0] - SIDE + 1, SIDE):
            for x in range(0, photo.shape[1] - SIDE + 1, SIDE):
                for_test = (y // REGION + 2 * (x // REGION)) % 5 == 0
                parts[for_test].append((photo[y : y + SIDE, x : x + SIDE], label))
    sets = [
        _labelled(torch.stack([p for p, _ in part]), [c for _, c in part], len(PATCH_PHOTOS)) for part in parts.values()
    ]
    return Collection(*sets, PATCH_PHOTOS, "32×32 patches of ten bundled photos, each photo a class")


def _labelled(pixels: Tensor | np.ndarray, labels: Sequence[int] | np.ndarray, classes: int) -> LabelledPictures:
    """From pixels "n h w c", which stay so in memory: batches then are channels-last."""
    return LabelledPictures(torch.as_tensor(pixels).permute(0, 3, 1, 2), torch.as_tensor(labels).long(), classes)


# --- CIFAR ------------------------------------------------------------------------------------------------


def cifar(name: str, folder: Path, base_url: str | None = None) -> Collection:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test pictures, downloaded once into ``folder`` (170 MB).

    Names, hashes and layout are torchvision's, whose ``CIFAR10(root)`` finds the files. Every call checks the hashes;
    unpacked files that were damaged are unpacked again. ``base_url`` names another server with the same archive.
    Raises DownloadError without internet, saying what to put where.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [kind(folder, train=train) for train in (True, False)]
    except RuntimeError:  # torchvision's word for files that are not there or not whole
        folder.mkdir(parents=True, exist_ok=True)
        url = (base_url or kind.url.rpartition("/")[0]).rstrip("/") + "/"
        fetch_file(RemoteFile(kind.filename, f"md5:{kind.tgz_md5}"), url, folder, progress=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints one line per file
            parts = [kind(folder, train=train, download=True) for train in (True, False)]
    names = tuple(parts[0].classes)
    sets = [_labelled(part.data, part.targets, len(names)) for part in parts]
    return Collection(*sets, names, name.upper().replace("CIFAR", "CIFAR-"))


def _cifar10_jpeg(folder: Path) -> Path:
    """CIFAR-10's pixels after JPEG as a .npz in Keras layout, decoded once from the optional pack."""
    path = folder / "cifar10_jpeg.npz"
    if path.is_file():
        return path
    pack = runtime.shared()
    packed = pack and pack / "data" / "cifar10" / "cifar10_jpeg.npz"
    if not packed or not packed.is_file():
        raise DataError("data set 'cifar10_jpeg' needs the optional pack ../shared, which is not here; use cifar10")
    arrays = {}
    with np.load(packed) as file:
        for part in ("train", "test"):
            data, at = file[f"jpeg_{part}"].tobytes(), file[f"offset_{part}"]
            spans = tqdm(itertools.pairwise(at), f"decoding {part}", len(at) - 1, leave=False)
            arrays[f"x_{part}"] = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in spans])
            arrays[f"y_{part}"] = file[f"y_{part}"]
    with runtime.atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
    return path


# --- files of one's own -----------------------------------------------------------------------------------


def read_npz(path: Path, names: Sequence[str] | None = None, description: str | None = None) -> Collection:
    """A .npz in Keras layout: ``x_train``, ``x_test`` uint8 "n h w 3", ``y_train``, ``y_test`` whole numbers "n" or
    "n 1" from 0; ``classes``, their names, may be there. Raises DataError, saying which array is wrong and how.
    """
    try:
        with np.load(path) as file:  # pickles are refused
            arrays = {key: file[key] for key in (*KERAS_KEYS, "classes") if key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz file ({error})") from None
    if missing := [key for key in KERAS_KEYS if key not in arrays]:
        raise DataError(f"{path} lacks {', '.join(missing)}; Keras layout has {', '.join(KERAS_KEYS)}")
    labels = {part: arrays[f"y_{part}"].reshape(-1) for part in ("train", "test")}
    for part, y in labels.items():
        _check_arrays(path, part, arrays[f"x_{part}"], y)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise DataError(f"{path}: x_train {arrays['x_train'].shape} and x_test {arrays['x_test'].shape} differ in size")
    names = names or [str(n) for n in arrays.get("classes", ())]
    count = 1 + max(int(y.max()) for y in labels.values())
    if names and len(names) < count:
        raise DataError(f"{path} names {len(names)} classes but has labels up to {count - 1}")
    names = tuple(names or map(str, range(count)))
    sets = [_labelled(arrays[f"x_{part}"], y, len(names)) for part, y in labels.items()]
    return Collection(*sets, names, description or path.name)


def _check_arrays(path: Path, part: str, x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise DataError(f"{path}: x_{part} is {x.dtype} {x.shape}; it must be uint8 of shape (n, h, w, 3)")
    if not np.issubdtype(y.dtype, np.integer) or len(y) != len(x) or not len(y) or y.min() < 0:
        raise DataError(f"{path}: y_{part} must hold {len(x)} whole numbers from 0, one for each picture; it is {y}")


def fit_picture(rgb: np.ndarray, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """uint8 "h w 3" → uint8 "3 height width" of ``size``: the largest such part in the middle, antialiased bicubic."""
    (h, w), (height, width) = rgb.shape[:2], size
    scale = min(h / height, w / width)
    h_kept, w_kept = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = (h - h_kept) // 2, (w - w_kept) // 2
    part = torch.from_numpy(rgb[y : y + h_kept, x : x + w_kept].copy()).permute(2, 0, 1)[None]
    if part.shape[-2:] == size:
        return part[0]
    small = F.interpolate(part.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return small[0].clamp(0, 255).round().byte()


def read_pictures(
    paths: Sequence[Path], size: tuple[int, int] = (SIDE, SIDE), workers: int = 4
) -> tuple[Tensor, list[Path], list[str]]:
    """(uint8 "n 3 height width", their paths, what could not be read and why), decoded by so many threads."""

    def read(path: Path) -> Tensor | str:
        try:
            return fit_picture(read_picture(path).rgb, size)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(pool.map(read, paths))
    good = [(path, x) for path, x in zip(paths, found, strict=True) if isinstance(x, Tensor)]
    pixels = torch.stack([x for _, x in good]) if good else torch.empty(0, 3, *size, dtype=torch.uint8)
    return pixels, [path for path, _ in good], [x for x in found if isinstance(x, str)]


def read_class_folders(
    folder: Path, names: Sequence[str] | None = None, workers: int = 4, size: tuple[int, int] = (SIDE, SIDE)
) -> tuple[LabelledPictures, tuple[str, ...]]:
    """Pictures ``folder/CLASS/…`` at ``size``; classes in the order of ``names`` (default: sorted by name).

    Pictures that cannot be read are named and left out. Raises DataError for no class, or one not in ``names``.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise DataError(f"{folder} has no folders of classes, CLASS/picture{min(SUFFIXES)}")
    names = tuple(names or classes)
    if unknown := [c for c in classes if c not in names]:
        raise DataError(f"{folder} has a class {unknown[0]!r} that is none of {list(names)}")
    paths = [(path, names.index(c)) for c in classes for path in find_images(folder / c)]
    pixels, kept, skipped = read_pictures([path for path, _ in paths], size, workers)
    for message in skipped:
        tqdm.write(f"left out: {message}")
    if not kept:
        raise DataError(f"{folder} has no readable pictures")
    labels = dict(paths)
    return _labelled(pixels.permute(0, 2, 3, 1), [labels[path] for path in kept], len(names)), names


def _folders(path: Path, workers: int) -> Collection:
    if missing := [part for part in ("train", "test") if not (path / part).is_dir()]:
        raise DataError(f"{path} has no folder {missing[0]!r}; it needs train/CLASS/… and test/CLASS/…")
    train, names = read_class_folders(path / "train", workers=workers)
    test, _ = read_class_folders(path / "test", names, workers)
    return Collection(train, test, names, path.name)


# --- what training makes of them --------------------------------------------------------------------------


def hold_out(
    pictures: LabelledPictures, subset_fraction: float = 1.0, valid_size: float = 0.1, seed: int = 0
) -> tuple[LabelledPictures, LabelledPictures]:
    """(training, validation) pictures: a random part of all, ``valid_size`` of that part held out (document 004).

    With the defaults 45,000 and 5,000 of CIFAR's 50,000. The subset of a smaller fraction lies within that of a larger
    one. Raises DataError for fractions that are impossible or leave no picture to train on.
    """
    if not 0 < subset_fraction <= 1:
        raise DataError(f"subset_fraction={subset_fraction} must lie above 0 and at most at 1")
    if not 0 <= valid_size < 1:
        raise DataError(f"valid_size={valid_size} must lie between 0 and below 1")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    subset = order[: round(subset_fraction * len(pictures))]
    held_out = round(valid_size * len(subset))
    if held_out >= len(subset):
        raise DataError(
            f"subset_fraction={subset_fraction} and valid_size={valid_size} leave none of {len(pictures)} pictures "
            "to train on"
        )
    return pictures.take(subset[held_out:]), pictures.take(subset[:held_out])


def augment(images: Tensor, seed: int, step: int, padding: int = 4) -> Tensor:
    """Each of "b c h w" shifted by up to ``padding`` pixels (zeros come in) and mirrored in half of the cases.

    A pure function of pictures, seed and step, the same on every device; the batch is made at once, where it lies.
    """
    b, _, h, w = images.shape
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    shift = torch.randint(2 * padding + 1, (2, b, 1), generator=generator)
    mirrored = torch.rand(b, 1, generator=generator) < 0.5
    rows = shift[0] + torch.arange(h)
    columns = shift[1] + torch.where(mirrored, torch.arange(w).flip(0), torch.arange(w))
    whole = F.pad(images, (padding,) * 4)
    number = torch.arange(b, device=images.device)[:, None, None]
    picked = whole[number, :, rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)]
    return picked.permute(0, 3, 1, 2)  # indexing puts channels last
