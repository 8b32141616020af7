"""Upscale pictures of any size (in tiles with a halo), whole folders of them, and measure networks on folders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, metrics, runtime
from .degrade import crop_to_multiple, downscale, upscale_bicubic
from .images import ImageError, find_images, load_image, read_picture, save_image, to_tensor, to_uint8

AUTO_TILE = 384  # input pixels; pictures above 4 such tiles are cut, so memory stays bounded
GLOBAL_OVERLAP = 32  # for networks without a finite receptive field; tiles then differ slightly from the whole
EVALUATED = ("psnr_y", "ssim_y", "psnr_rgb", "lpips")


class Bicubic(nn.Module):
    """The baseline as a network, so that every tool takes it under the name ``bicubic``."""

    halo = 2

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return upscale_bicubic(x, self.scale)


def get_model(model: str | Path | nn.Module, scale: int | None = None) -> nn.Module:
    """A network from a name, a ``.safetensors`` path, ``bicubic`` (needs ``scale``), or itself."""
    if isinstance(model, nn.Module):
        return model
    if str(model) == "bicubic":
        if scale is None:
            raise ValueError("model 'bicubic' fits any scale: say which one (--scale 2, 3 or 4)")
        return Bicubic(scale)
    network = checkpoints.load(model)
    if scale is not None and network.scale != scale:
        raise ValueError(f"network {str(model)!r} enlarges by {network.scale}, not by the {scale} asked for")
    return network


@dataclass(frozen=True)
class _Tile:
    """A core rectangle of the input, and the rectangle with halo that the network must see for it."""

    core: tuple[slice, slice]
    seen: tuple[slice, slice]

    def inner(self, scale: int) -> tuple[slice, slice]:
        return tuple(
            slice((c.start - s.start) * scale, (c.stop - s.start) * scale)
            for c, s in zip(self.core, self.seen, strict=True)
        )


def _tiles(h: int, w: int, tile: int, halo: int) -> Iterator[_Tile]:
    for y in range(0, h, tile):
        for x in range(0, w, tile):
            core = (slice(y, min(y + tile, h)), slice(x, min(x + tile, w)))
            seen = tuple(
                slice(max(0, c.start - halo), min(side, c.stop + halo)) for c, side in zip(core, (h, w), strict=True)
            )
            yield _Tile(core, seen)


def _check_tiling(model: nn.Module, tile: int | None, overlap: int | None) -> int:
    halo = getattr(model, "halo", None)
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile} must be at least 1 input pixel")
    if overlap is not None and overlap < 0:
        raise ValueError(f"overlap {overlap} must not be negative")
    if overlap is not None:
        return overlap
    return GLOBAL_OVERLAP if halo is None else halo


@torch.inference_mode()
def upscale(
    model: nn.Module,
    picture: Tensor | np.ndarray,
    tile: int | None = None,
    overlap: int | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    progress: bool = False,
) -> Tensor | np.ndarray:
    """Enlarge one picture: float tensor "3 h w" in [0, 1] → the same, clamped; or uint8 (h, w, 3) → uint8.

    Args:
        model: network with ``scale`` and ``halo``.
        tile: side of the tiles in input pixels; 0 = whole; None = whole up to about 0.6 megapixels, else 384.
        overlap: pixels seen around each tile; None takes the network's receptive-field radius, with which the
            tiled picture equals the whole one. A smaller value is faster and leaves seams.
        device: where to compute; None = where the network is. The result is on the CPU.
        precision: ``fp32`` (reproducible to the last digit shown), ``auto``, ``bf16``, ``fp16``.

    Raises ValueError for a wrong shape, tile, overlap, device or precision.
    """
    is_array = isinstance(picture, np.ndarray)
    shape = picture.shape[:2] if is_array else picture.shape[-2:]
    if picture.ndim != 3 or (picture.shape[2] if is_array else picture.shape[0]) != 3 or min(shape) < 1:
        raise ValueError(f"expected a uint8 array (h, w, 3) or a tensor (3, h, w), got shape {tuple(picture.shape)}")
    halo = _check_tiling(model, tile or None, overlap)
    h, w = shape
    if tile is None:
        tile = AUTO_TILE if h * w > 4 * AUTO_TILE**2 else 0
    tile = tile or max(h, w)
    where = _device_of(model) if device is None else runtime.pick_device(str(device))
    precision = runtime.pick_precision(where, precision)
    model = model.to(where, memory_format=torch.channels_last).eval()
    s = model.scale
    out = np.empty((h * s, w * s, 3), np.uint8) if is_array else torch.empty(3, h * s, w * s)
    jobs = list(_tiles(h, w, tile, halo))
    for job in tqdm(jobs, desc="upscaling", unit="tile", leave=False, disable=not progress or len(jobs) == 1):
        (ys, xs), (yc, xc) = job.seen, job.core
        x = to_tensor(picture[ys, xs]) if is_array else picture[:, ys, xs].float()
        x = x[None].to(where).contiguous(memory_format=torch.channels_last)
        with runtime.autocast(where, precision):
            sr = model(x)[0]
        sr = sr[(slice(None), *job.inner(s))].float().clamp(0, 1).cpu()
        place = (slice(yc.start * s, yc.stop * s), slice(xc.start * s, xc.stop * s))
        if is_array:
            out[place] = to_uint8(sr)
        else:
            out[(slice(None), *place)] = sr
    return out


def _device_of(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def upscale_file(model: nn.Module, source: str | Path, target: str | Path, **options: object) -> Path:
    """Read, enlarge and write one picture; upright by EXIF, alpha and colour profile kept, written atomically.

    Alpha is enlarged bicubically. ``options`` go to :func:`upscale`. Raises ImageError.
    """
    picture = read_picture(source)
    rgb = upscale(model, picture.rgb, **options)
    alpha = None
    if picture.alpha is not None:
        size = (rgb.shape[1], rgb.shape[0])
        alpha = np.asarray(Image.fromarray(picture.alpha).resize(size, Image.Resampling.BICUBIC))
    return save_image(rgb, target, alpha, picture.icc)


@dataclass
class FolderReport:
    """What a folder run did: ``written`` paths, ``skipped`` messages, seconds."""

    written: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def plan_outputs(inputs: Sequence[str | Path], output: str | Path, suffix: str = ".png") -> dict[Path, Path]:
    """Which file becomes which: {source: target}. Folders keep their inner structure below ``output``.

    A single input file may name its output file. Raises ValueError when two inputs would share one target.
    """
    output = Path(output)
    plan: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"no such file or folder: {given}")
        for source in [given] if given.is_file() else find_images(given):
            if len(inputs) == 1 and given.is_file() and output.suffix:
                target = output
            else:
                inner = Path(given.name) if given.is_file() else source.relative_to(given)
                target = output / inner.with_suffix(source.suffix if suffix == "same" else suffix)
            if target in taken:
                raise ValueError(f"{taken[target]} and {source} would both be written to {target}; run them apart")
            if target.resolve() == source.resolve():
                raise ValueError(f"{source} would overwrite itself; choose another output folder")
            plan[source], taken[target] = target, source
    return plan


def upscale_files(
    model: nn.Module, plan: dict[Path, Path], skip_existing: bool = False, progress: bool = True, **options: object
) -> FolderReport:
    """Run :func:`upscale_file` over a plan; unreadable pictures are reported and skipped, never fatal."""
    report, start = FolderReport(), time.perf_counter()
    for source, target in (bar := tqdm(plan.items(), unit="picture", disable=not progress)):
        bar.set_description(source.name[:30])
        if skip_existing and target.is_file():
            continue
        try:
            report.written.append(upscale_file(model, source, target, progress=progress, **options))
        except ImageError as error:
            report.skipped.append(str(error))
    report.seconds = time.perf_counter() - start
    return report


def _find_lr(lr_dir: Path, hr: Path) -> Path:
    for path in (lr_dir / hr.name, *sorted(lr_dir.glob(f"{hr.stem}.*")), *sorted(lr_dir.glob(f"{hr.stem}x*.*"))):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no low-resolution picture for {hr.name} in {lr_dir}")


def _pair(hr_path: Path, lr_dir: Path | None, scale: int) -> tuple[Tensor, Tensor]:
    hr = crop_to_multiple(load_image(hr_path), scale)
    if lr_dir is None:
        return downscale(hr, scale), hr
    lr = load_image(_find_lr(lr_dir, hr_path))
    want = (hr.shape[-2] // scale, hr.shape[-1] // scale)
    if tuple(lr.shape[-2:]) != want:
        raise ImageError(hr_path, f"its LR picture is {tuple(lr.shape[-2:])}, scale {scale} needs {want}")
    return lr, hr


def evaluate(
    model: str | Path | nn.Module,
    hr: str | Path,
    lr: str | Path | None = None,
    scale: int | None = None,
    *,
    lpips: bool = True,
    progress: bool = False,
    **options: object,
) -> dict:
    """PSNR-Y, SSIM-Y, PSNR-RGB and LPIPS of a network (or ``bicubic``) over a folder of originals.

    ``lr`` holds the matching small pictures (same name or stem); without it they are made by the protocol's
    downscaler. Returns {"model", "scale", "protocol", "images": {name: {metric}}, "mean": {metric}, "skipped"}.
    LPIPS is None where its weights are missing. Raises FileNotFoundError, ValueError, ImageError.
    """
    network = get_model(model, scale)
    s = network.scale
    paths = find_images(hr)
    if not paths:
        raise FileNotFoundError(f"no pictures in {hr}")
    images, skipped = {}, []
    for path in tqdm(paths, desc="evaluating", unit="picture", disable=not progress):
        try:
            small, big = _pair(path, Path(lr) if lr else None, s)
        except ImageError as error:
            skipped.append(str(error))
            continue
        row = metrics.compare(upscale(network, small, **options), big, s, lpips=lpips)
        images[path.name] = {key: row[key] for key in EVALUATED}
    if not images:
        raise ImageError(hr, f"none of {len(paths)} pictures could be read; first: {skipped[0]}")
    name = str(model) if not isinstance(model, nn.Module) else type(model).__name__
    source = "given files" if lr else "MATLAB-style bicubic, made here"
    return {
        "model": name,
        "scale": s,
        "protocol": metrics.protocol(s, source),
        "images": images,
        "mean": metrics.mean(list(images.values())),
        "skipped": skipped,
    }


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """``with timed() as t: …`` puts the elapsed milliseconds into ``t[0]``."""
    box, start = [float("nan")], time.perf_counter()
    yield box
    box[0] = (time.perf_counter() - start) * 1e3
