"""Pictures in and out: whatever the file holds becomes 8-bit RGB (plus alpha), or a float tensor in [0, 1]."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .runtime import atomic_path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
NO_ALPHA = {".jpg", ".jpeg", ".bmp", ".ppm", ".pgm"}  # Pillow writes the last three without a word, alpha lost
EXIF_MODEL = 0x0110
# PNG's level 4 takes less than half the time of the usual 6 for files 2 % larger.
QUALITY = {".jpg": {"quality": 95, "subsampling": 0}, ".png": {"compress_level": 4}}
QUALITY[".jpeg"] = QUALITY[".jpg"]


class ImageError(ValueError):
    """A picture that cannot be read or written; ``path`` says which, the message says why."""

    def __init__(self, path: object, why: str):
        self.path = path
        super().__init__(f"{path}: {why}")


@dataclass(frozen=True)
class Picture:
    """Decoded picture: ``rgb`` uint8 (h, w, 3), ``alpha`` uint8 (h, w) or None, upright (EXIF applied).

    ``icc`` is the embedded colour profile of an RGB file, or None.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    path: object = None
    icc: bytes | None = None


def _to_8bit(image: Image.Image) -> Image.Image:
    """Bring 16-bit and float modes to 8 bits; Pillow's own ``convert`` would clip them."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            top = 1.0 if values.max(initial=0) <= 1 else 255.0
        else:
            top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
        return Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF block is damaged, the pixels are not
        return image


def _decode(source: object, name: object) -> Picture:
    with Image.open(source) as opened:
        icc = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA", "P", "PA") else None
        opened.load()
        image = _to_8bit(_upright(opened))
        has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        if has_alpha:
            rgba = np.asarray(image.convert("RGBA"))
            return Picture(rgba[..., :3].copy(), rgba[..., 3].copy(), name, icc)
        return Picture(np.array(image.convert("RGB")), None, name, icc)


def read_picture(source: str | Path | IO[bytes]) -> Picture:
    """Decode any common picture (RGB, RGBA, grey, palette, CMYK, 16-bit; first frame of an animation).

    Raises ImageError when the file is missing, empty, damaged, or not a picture.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "upload")
    try:
        if isinstance(source, (str, Path)):
            _check_file(Path(source))
        return _decode(source, name)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(name, "is not a picture that Pillow can open") from None
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"is too large to open safely ({error})") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        if isinstance(error, OSError) and error.errno:
            raise ImageError(name, f"cannot be read ({error.strerror})") from error
        raise ImageError(name, f"is damaged or cut short ({error or type(error).__name__})") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ImageError(path, "is a folder, not a picture" if path.is_dir() else "no such file")
    if path.stat().st_size == 0:
        raise ImageError(path, "the file is empty (0 bytes)")


def flattened(picture: Picture) -> np.ndarray:
    """The colours of a picture, uint8 (h, w, 3), with white under what is transparent.

    Where nearly all that is visible is white itself, as in a logo for dark pages, dark grey takes its place.
    """
    if picture.alpha is None:
        return picture.rgb
    visible = picture.rgb[picture.alpha > 127]
    ground = 48 if visible.size and visible.mean() > 225 else 255
    share = picture.alpha[..., None].astype(np.float32) / 255
    return np.round(picture.rgb * share + ground * (1 - share)).astype(np.uint8)


def to_tensor(rgb: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) → float32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))).float().div_(255)


def to_uint8(x: Tensor) -> np.ndarray:
    """float (3, h, w), nominally in [0, 1] → uint8 (h, w, 3), clamped and rounded."""
    return x.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def load_image(source: str | Path | IO[bytes]) -> Tensor:
    """Float32 tensor (3, h, w) in [0, 1]; raises ImageError like :func:`read_picture`."""
    return to_tensor(read_picture(source).rgb)


def save_image(
    x: Tensor | np.ndarray, path: str | Path, alpha: np.ndarray | None = None, icc: bytes | None = None
) -> Path:
    """Write a tensor (3, h, w) in [0, 1] or uint8 (h, w, 3); the format follows the suffix, the write is atomic.

    Raises ImageError for an unknown suffix, for alpha in a format without it (JPEG, BMP, PPM), for a picture too
    large for its format, and when the disk is full or not writable.
    """
    path = Path(path)
    rgb = to_uint8(x) if isinstance(x, Tensor) else x
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(path, f"cannot write suffix {path.suffix!r}; use one of {sorted(SUFFIXES)}")
    if alpha is not None and path.suffix.lower() in NO_ALPHA:
        raise ImageError(path, f"{path.suffix} cannot hold transparency; write a .png or .webp")
    image = Image.fromarray(rgb)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    options = dict(QUALITY.get(path.suffix.lower(), {}))
    if icc and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"):
        options["icc_profile"] = icc
    try:
        # Compressing a large picture takes long, and has no name yet that a killed process could leave behind.
        with atomic_path(path) as part, tempfile.TemporaryFile(dir=path.parent) as whole:
            image.save(whole, Image.registered_extensions()[path.suffix.lower()], **options)
            whole.seek(0)
            with part.open("wb") as file:
                shutil.copyfileobj(whole, file)
    except (OSError, ValueError) as error:  # ValueError: larger than the format allows, as WebP above 16383 pixels
        raise ImageError(path, f"could not be written ({getattr(error, 'strerror', None) or error})") from error
    return path


def find_images(
    roots: str | Path | Iterable[str | Path], recursive: bool = True, shuffle_seed: int | None = None
) -> list[Path]:
    """Pictures below one or several folders, sorted, each once; a root that is a file is taken whatever its suffix.

    ``shuffle_seed`` shuffles the sorted list reproducibly. Raises FileNotFoundError for a missing root.
    """
    roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
    found: dict[Path, Path] = {}  # by resolved root, so that overlapping or differently written roots count once
    for root in map(Path, roots):
        if not root.exists():
            raise FileNotFoundError(f"no such file or folder: {root}")
        whole = root.resolve()
        if root.is_file():
            found.setdefault(whole, root)
            continue
        for f in root.glob("**/*" if recursive else "*"):
            # Names beginning with a dot are half-written files of atomic_path or the file manager's.
            if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != ".":
                found.setdefault(whole / f.relative_to(root), f)
    result = sorted(found.values())
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(result)
    return result


def find_lr(folder: Path, hr: Path, scale: int) -> Path:
    """The small picture of ``hr`` in ``folder``: the same name, the same stem, or DIV2K's ``0001x4``.

    Raises FileNotFoundError where there is none.
    """
    suffixes = [s for suffix in sorted(SUFFIXES) for s in (suffix, suffix.upper())]
    # Asking for each name, not listing the folder, which may hold as many files as are looked for.
    for name in (hr.name, *(f"{hr.stem}{mark}{s}" for mark in ("", f"x{scale}") for s in suffixes)):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no low-resolution picture for {hr.name} in {folder}")


def camera_model(path: str | Path) -> str | None:
    """Camera model from the EXIF block; None without one, or where the block is damaged. Raises ImageError."""
    try:
        with Image.open(path) as image:
            try:
                model = image.getexif().get(EXIF_MODEL)
            except Exception:  # a damaged block raises many kinds, and the picture itself may be sound
                return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(path, f"cannot be opened ({error})") from error
    return str(model).strip("\x00 ") if model else None
