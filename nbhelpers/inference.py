"""Upscale pictures of any size (in tiles with a halo), whole folders of them, and measure networks on folders."""

from __future__ import annotations

import contextlib
import glob
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
from .degrade import crop_to_multiple, downscale
from .images import SUFFIXES, ImageError, find_images, load_image, read_picture, save_image, to_tensor, to_uint8
from .layers import BicubicUpsample

AUTO_TILE = 384  # input pixels; pictures above 4 such tiles are cut, so memory stays bounded
# A tile is widened to so many pixels where the picture has them: PyTorch convolves inputs of up to 20480 values by
# another routine, whose last digits differ, and a tile must get the digits of the whole picture.
LEAST_AREA = 96**2
GLOBAL_OVERLAP = 32  # for networks without a finite receptive field; tiles then differ slightly from the whole
EVALUATED = ("psnr_y", "ssim_y", "psnr_rgb", "lpips")


class Bicubic(nn.Module):
    """The baseline as a network, so that every tool takes it under the name ``bicubic``."""

    halo = 2

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        self.resize = BicubicUpsample(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x)


def get_model(model: str | Path | nn.Module, scale: int | None = None) -> nn.Module:
    """A network from a name, a ``.safetensors`` path, ``bicubic`` (needs ``scale``), or itself."""
    if isinstance(model, nn.Module):
        return model
    if str(model) == "bicubic":
        if scale is None:
            raise ValueError("model 'bicubic' fits any scale: say which one (--scale 2, 3 or 4)")
        if scale < 1:
            raise ValueError(f"scale {scale} must be a whole number of at least 1")
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


def _tiles(h: int, w: int, tile: int, halo: int, least: int = 0, grid: int = 1) -> Iterator[_Tile]:
    """Tiles that cover h x w; each sees ``halo`` pixels around its core and at least ``least`` pixels altogether.

    What a tile sees begins at a multiple of ``grid``.
    """
    for y in range(0, h, tile):
        for x in range(0, w, tile):
            core = (slice(y, min(y + tile, h)), slice(x, min(x + tile, w)))
            ys, xs = (
                slice(max(0, c.start - halo), min(side, c.stop + halo)) for c, side in zip(core, (h, w), strict=True)
            )
            ys = _lengthen(ys, h, -(-least // (xs.stop - xs.start)))
            xs = _lengthen(xs, w, -(-least // (ys.stop - ys.start)))
            yield _Tile(core, tuple(slice(s.start // grid * grid, s.stop) for s in (ys, xs)))


def _lengthen(seen: slice, side: int, need: int) -> slice:
    stop = min(side, max(seen.stop, seen.start + need))
    return slice(max(0, min(seen.start, stop - need)), stop)


def _check_tiling(model: nn.Module, tile: int | None, overlap: int | None) -> int:
    halo = getattr(model, "halo", None)
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile} must be at least 1 input pixel")
    if overlap is not None and overlap < 0:
        raise ValueError(f"overlap {overlap} must not be negative")
    if overlap is not None:
        return overlap
    return GLOBAL_OVERLAP if halo is None else halo


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back: a network may be looked at in the middle of its training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()  # not inference_mode: weights brought into another layout there could never be trained again
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
            tiled picture equals the whole one (on a CPU to the last bit). A smaller value leaves seams.
        device: where to compute; None = where the network is. The result is on the CPU.
        precision: ``fp32`` (reproducible to the last digit shown), ``auto``, ``bf16``, ``fp16``.

    Raises ValueError for a wrong shape, tile, overlap, device or precision.
    """
    is_array = isinstance(picture, np.ndarray)
    shape = picture.shape[:2] if is_array else picture.shape[-2:]
    right_type = picture.dtype == np.uint8 if is_array else picture.is_floating_point()
    if picture.ndim != 3 or picture.shape[2 if is_array else 0] != 3 or min(shape) < 1 or not right_type:
        got = f"{picture.dtype} of shape {tuple(picture.shape)}"
        raise ValueError(f"expected a uint8 array (h, w, 3) or a float tensor (3, h, w) in [0, 1], got {got}")
    halo = _check_tiling(model, tile or None, overlap)
    least = LEAST_AREA if overlap is None or overlap >= (getattr(model, "halo", None) or 0) else 0
    h, w = shape
    if tile is None:
        tile = AUTO_TILE if h * w > 4 * AUTO_TILE**2 else 0
    tile = tile or max(h, w)
    where = _device_of(model) if device is None else runtime.pick_device(str(device))
    precision = runtime.pick_precision(where, precision)
    model, s = model.to(where, memory_format=torch.channels_last), model.scale
    out = np.empty((h * s, w * s, 3), np.uint8) if is_array else torch.empty(3, h * s, w * s)
    jobs = list(_tiles(h, w, tile, halo, least, getattr(model, "grid", 1)))
    for job in tqdm(jobs, desc="upscaling", unit="tile", leave=False, disable=not progress or len(jobs) == 1):
        (ys, xs), (yc, xc) = job.seen, job.core
        x = to_tensor(picture[ys, xs]) if is_array else picture[:, ys, xs].float()
        x = x[None].to(where).contiguous(memory_format=torch.channels_last)
        with _evaluating(model), runtime.autocast(where, precision):
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
    """What a folder run did: ``written`` paths, ``skipped`` messages, number ``existing`` before, seconds."""

    written: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    existing: int = 0
    seconds: float = 0.0


def plan_outputs(inputs: Sequence[str | Path], output: str | Path, suffix: str = ".png") -> dict[Path, Path]:
    """Which file becomes which: {source: target}. Folders keep their inner structure below ``output``.

    A single input file may name its output file. What already lies in ``output`` is not an input, so that a run into
    a subfolder can be repeated. Raises FileNotFoundError for a missing input, ValueError when two inputs would share
    one target or an input would be overwritten.
    """
    output = Path(output)
    if len(inputs) > 1 and output.suffix.lower() in SUFFIXES and not output.is_dir():
        raise ValueError(f"{output} names one picture, but there are {len(inputs)} inputs; give a folder")
    plan: dict[Path, Path] = {}
    for given in map(Path, inputs):
        one_file = len(inputs) == 1 and given.is_file() and output.suffix and not output.is_dir()
        if one_file and output.suffix.lower() not in SUFFIXES:
            raise ImageError(output, f"cannot write suffix {output.suffix!r}; use one of {sorted(SUFFIXES)}")
        inside = given.is_dir() and given.resolve() in output.resolve().parents
        for source in find_images(given):
            if inside and output.resolve() in source.resolve().parents:
                continue
            inner = Path(given.name) if given.is_file() else source.relative_to(given)
            target = output / inner.with_suffix(source.suffix if suffix == "same" else suffix)
            plan[source] = output if one_file else target
    _check_plan(plan)
    return plan


def _check_plan(plan: dict[Path, Path]) -> None:
    sources, taken = {source.resolve() for source in plan}, {}
    for source, target in plan.items():
        if target in taken:
            raise ValueError(f"{taken[target]} and {source} would both be written to {target}; run them apart")
        if target.resolve() in sources:
            raise ValueError(f"the input {target} would be overwritten; choose another output folder")
        taken[target] = source


def upscale_files(
    model: nn.Module, plan: dict[Path, Path], skip_existing: bool = False, progress: bool = True, **options: object
) -> FolderReport:
    """Run :func:`upscale_file` over a plan; unreadable pictures are reported and skipped, never fatal."""
    report, start = FolderReport(), time.perf_counter()
    for source, target in (bar := tqdm(plan.items(), unit="picture", disable=not progress)):
        bar.set_description(source.name[:30])
        if skip_existing and target.is_file():
            report.existing += 1
            continue
        try:
            report.written.append(upscale_file(model, source, target, progress=progress, **options))
        except ImageError as error:
            report.skipped.append(str(error))
    report.seconds = time.perf_counter() - start
    return report


def _find_lr(folder: Path, hr: Path, scale: int) -> Path:
    """The small picture of ``hr``: the same name, the same stem, or DIV2K's ``0001x4``."""
    stem = glob.escape(hr.stem)
    for path in (folder / hr.name, *sorted(folder.glob(f"{stem}.*")), *sorted(folder.glob(f"{stem}x{scale}.*"))):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            return path
    raise FileNotFoundError(f"no low-resolution picture for {hr.name} in {folder}")


def _pair(hr_path: Path, lr_dir: Path | None, scale: int) -> tuple[Tensor, Tensor]:
    hr = load_image(hr_path)
    if min(hr.shape[-2:]) < 3 * scale:
        raise ImageError(hr_path, f"{hr.shape[-2]}x{hr.shape[-1]} pixels leave nothing inside the border at x{scale}")
    hr = crop_to_multiple(hr, scale)
    if lr_dir is None:
        return downscale(hr, scale), hr
    lr = load_image(_find_lr(lr_dir, hr_path, scale))
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
    downscaler. Returns {"model", "scale", "protocol", "images": {name: {metric}}, "mean": {metric}, "skipped"};
    names are relative to ``hr``. Unreadable pictures are skipped and reported.
    LPIPS is None where its weights are missing. Raises FileNotFoundError, ValueError, ImageError.
    """
    network = get_model(model, scale)
    s, root = network.scale, Path(hr)
    paths = find_images(root)
    if not paths:
        raise FileNotFoundError(f"no pictures in {hr}")
    if lr is not None and not Path(lr).is_dir():
        raise FileNotFoundError(f"no such folder: {lr}")
    images, skipped = {}, []
    for path in tqdm(paths, desc="evaluating", unit="picture", disable=not progress):
        inner = path.relative_to(root) if root.is_dir() else Path(path.name)
        try:
            small, big = _pair(path, (Path(lr) / inner).parent if lr is not None else None, s)
        except ImageError as error:
            skipped.append(str(error))
            continue
        row = metrics.compare(upscale(network, small, **options), big, s, lpips=lpips)
        images[inner.as_posix()] = {key: row[key] for key in EVALUATED}
    if not images:
        raise ImageError(hr, f"none of {len(paths)} pictures could be read; first: {skipped[0]}")
    name = str(model) if not isinstance(model, nn.Module) else type(model).__name__
    source = "given files" if lr is not None else "MATLAB-style bicubic, made here"
    return {
        "model": name,
        "scale": s,
        "protocol": metrics.protocol(s, source),
        "images": images,
        "mean": metrics.mean(list(images.values())),
        "skipped": skipped,
    }
