"""Upscale pictures of any size (in tiles with a halo), whole folders of them, and measure networks on folders."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, metrics, runtime
from .counting import peak_activations
from .degrade import crop_to_multiple, downscale
from .images import (
    SUFFIXES,
    ImageError,
    find_images,
    find_lr,
    load_image,
    read_picture,
    save_image,
    to_tensor,
    to_uint8,
)
from .models.continuous import MOST_PIXELS, AnyBicubic, Bicubic
from .models.sampling import check_size, span

AUTO_TILE = 384  # input pixels; pictures above 4 such tiles are cut, smaller ones where memory asks for it
PROBE = 32  # side of the picture that shows how much memory a network takes; up to 16 such pictures are never cut
# A tile is widened to so many pixels where the picture has them: PyTorch convolves inputs of up to 20480 values by
# another routine, whose last digits differ, and a tile must get the digits of the whole picture.
LEAST_AREA = 96**2
GLOBAL_OVERLAP = 32  # for networks without a finite receptive field; tiles then differ slightly from the whole
EVALUATED = ("psnr_y", "ssim_y", "psnr_rgb", "lpips")


def get_model(model: str | Path | nn.Module, scale: float | None = None) -> nn.Module:
    """A network from a name, a ``.safetensors`` path, ``bicubic`` (needs ``scale``), or itself.

    A network for any scale is brought to ``scale``. Raises ValueError where a network enlarges by another one, or does
    not enlarge.
    """
    if not isinstance(model, nn.Module) and str(model) == "bicubic":
        if scale is None:
            raise ValueError("model 'bicubic' fits any scale: say which one (--scale 2, 3 or 4)")
        if scale < 1:
            raise ValueError(f"scale {scale} must be at least 1")
        return Bicubic(int(scale)) if scale == int(scale) else AnyBicubic(scale)
    network = model if isinstance(model, nn.Module) else checkpoints.load(model)
    if network is not model and not hasattr(network, "scale"):
        raise ValueError(f"network {str(model)!r} is no upscaler; upscalers: {checkpoints.available()}")
    if scale is None or network.scale == scale:
        return network
    if not hasattr(network, "at"):
        name = type(model).__name__ if network is model else str(model)
        raise ValueError(f"network {name!r} enlarges by {network.scale}, not by the {scale} asked for")
    return network.at(scale)


def _fitted(model: nn.Module, shape: tuple[int, int], scale: object, size: tuple[int, int] | None) -> nn.Module:
    """A network brought to a scale, or to an output size for inputs of ``shape``; see :func:`upscale`."""
    if size is None:
        return get_model(model, scale)
    if scale is not None:
        raise ValueError(f"give scale={scale} or size={tuple(size)}, not both")
    size = check_size(size, 2**62)
    if hasattr(model, "at"):
        return model.at((size[0] / shape[0], size[1] / shape[1]))
    if size != (own := output_size(model, *shape)):
        raise ValueError(f"{type(model).__name__} makes {own[0]}x{own[1]} pixels of these, not {size[0]}x{size[1]}")
    return model


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


def _check_tiling(tile: int | None, overlap: int | None) -> None:
    if tile is not None and tile < 0:
        raise ValueError(f"tile {tile} must be at least 1 input pixel, or 0 for the whole picture")
    if overlap is not None and overlap < 0:
        raise ValueError(f"overlap {overlap} must not be negative")


def _most_pixels(model: nn.Module, where: torch.device, precision: str) -> float:
    """Input pixels for which a network's weights and features fit into memory."""
    x = torch.zeros(1, 3, PROBE, PROBE, device=where).contiguous(memory_format=torch.channels_last)
    with _evaluating(model), runtime.autocast(where, precision, keep_weights=False):
        per_pixel = max(1.0, peak_activations(model, x) / PROBE**2)
    weights = 2 * sum(p.nbytes for p in model.parameters())  # they are copied to another layout or precision
    return max(1.0, (runtime.memory_for(where) - weights) / per_pixel)


def _fit(most: float, halo: int, overlap: int | None) -> tuple[int, int]:
    """Side of tiles and overlap (``halo`` if None is asked for) such that a tile sees at most so many pixels."""
    side = int(most**0.5)
    least = max(1, side // 4)  # smaller tiles would throw away most of what is computed
    if overlap is None and side - 2 * halo < least:
        overlap = side // 8
        warnings.warn(
            f"the network sees {halo} pixels far, but only {side}x{side} fit into memory: tiles overlap by {overlap} "
            "pixels, and may differ a little from the whole picture (set tile and overlap to choose yourself)",
            stacklevel=5,
        )
    overlap = halo if overlap is None else overlap
    return min(max(least, side - 2 * overlap), max(AUTO_TILE, 2 * overlap)), overlap


def _plan(
    model: nn.Module, h: int, w: int, tile: int | None, overlap: int | None, where: torch.device, precision: str
) -> list[_Tile]:
    """Tiles for a picture of h x w; see :func:`upscale`."""
    halo = getattr(model, "halo", None)
    halo = GLOBAL_OVERLAP if halo is None else halo
    if tile is None and (h * w > 16 * PROBE**2 or math.prod(output_size(model, h, w)) > MOST_PIXELS):
        most = _most_pixels(model, where, precision)
        if h * w > min(most, 4 * AUTO_TILE**2):
            tile, overlap = _fit(most, halo, overlap)
    overlap = halo if overlap is None else overlap
    least = LEAST_AREA if overlap >= halo else 0
    return list(_tiles(h, w, tile or max(h, w), overlap, least, getattr(model, "grid", 1)))


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
    progress: bool | Callable[[int, int], None] = False,
    *,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor | np.ndarray:
    """Enlarge one picture: float tensor "3 h w" in [0, 1] → the same, clamped; or uint8 (h, w, 3) → uint8.

    Args:
        model: network with ``scale`` and ``halo``.
        tile: side of the tiles in input pixels; 0 = whole; None = whole up to about 0.6 megapixels, else 384, and
            less where the network's features would not fit into ``runtime.memory_for(device)``.
        overlap: pixels seen around each tile; None takes the network's receptive-field radius, with which the
            tiled picture equals the whole one (on a CPU to the last bit). A smaller value leaves seams; None itself
            comes to one, with a warning, where ``tile`` is None and a tile with that radius does not fit.
        device: where to compute; None = where the network is. The result is on the CPU.
        precision: ``fp32`` (reproducible to the last digit shown), ``auto``, ``bf16``, ``fp16``.
        progress: show a bar; or a function that is called with (tiles done, tiles) before each, and may raise to stop.
        scale, size: for networks for any scale: how much to enlarge, 2.7 or (2, 3.5) for height and width, or to which
            height and width; None = the network's own scale.

    Raises ValueError for a wrong shape, tile, overlap, device or precision, and a scale or size that cannot be.
    """
    is_array = isinstance(picture, np.ndarray)
    shape = picture.shape[:2] if is_array else picture.shape[-2:]
    right_type = picture.dtype == np.uint8 if is_array else picture.is_floating_point()
    if picture.ndim != 3 or picture.shape[2 if is_array else 0] != 3 or min(shape) < 1 or not right_type:
        got = f"{picture.dtype} of shape {tuple(picture.shape)}"
        raise ValueError(f"expected a uint8 array (h, w, 3) or a float tensor (3, h, w) in [0, 1], got {got}")
    _check_tiling(tile, overlap)
    where = _device_of(model) if device is None else runtime.pick_device(str(device))
    precision, (h, w) = runtime.pick_precision(where, precision), shape
    model = _fitted(model, shape, scale, size).to(where, memory_format=torch.channels_last)
    jobs = _plan(model, h, w, tile, overlap, where, precision)
    size = output_size(model, h, w)
    out = np.empty((*size, 3), np.uint8) if is_array else torch.empty(3, *size)
    bar = tqdm(jobs, desc="upscaling", unit="tile", leave=False, disable=progress is not True or len(jobs) == 1)
    for done, job in enumerate(bar):
        if callable(progress):
            progress(done, len(jobs))
        place = tuple(span(c.start, c.stop, n, m) for c, n, m in zip(job.core, shape, size, strict=True))
        if any(p.start == p.stop for p in place):  # made smaller, a tile may have no pixel of its own
            continue
        x = to_tensor(picture[job.seen]) if is_array else picture[(slice(None), *job.seen)].float()
        x = x[None].to(where).contiguous(memory_format=torch.channels_last)
        with _evaluating(model), runtime.autocast(where, precision):
            if hasattr(model, "region"):
                sr = model.region(x, job.seen, (h, w), place)[0]
            else:
                sr = model(x)[0][(slice(None), *job.inner(model.scale))]
        sr = sr.float().clamp(0, 1).cpu()
        out[place if is_array else (slice(None), *place)] = to_uint8(sr) if is_array else sr
    return out


def output_size(model: nn.Module, h: int, w: int) -> tuple[int, int]:
    """Height and width of what a network makes of h x w pixels; ValueError where a scale below 1 leaves none."""
    return model.output_size(h, w) if hasattr(model, "output_size") else (h * model.scale, w * model.scale)


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


def _pair(hr_path: Path, lr_dir: Path | None, scale: float) -> tuple[Tensor, Tensor, bool]:
    """LR, HR, and whether HR had to be cut."""
    whole = hr = load_image(hr_path)
    if min(hr.shape[-2:]) < 3 * scale:
        raise ImageError(hr_path, f"{hr.shape[-2]}x{hr.shape[-1]} pixels leave nothing inside the border at x{scale}")
    hr = crop_to_multiple(hr, scale)
    if lr_dir is None:
        return downscale(hr, scale), hr, hr.shape != whole.shape
    lr = load_image(find_lr(lr_dir, hr_path, scale))
    want = (round(hr.shape[-2] / scale), round(hr.shape[-1] / scale))
    if tuple(lr.shape[-2:]) != want:
        h, w = lr.shape[-2:]
        raise ImageError(hr_path, f"its LR picture has {w} x {h} pixels, scale {scale} needs {want[1]} x {want[0]}")
    return lr, hr, hr.shape != whole.shape


def evaluate(
    model: str | Path | nn.Module,
    hr: str | Path,
    lr: str | Path | None = None,
    scale: float | None = None,
    *,
    lpips: bool = True,
    progress: bool = False,
    **options: object,
) -> dict:
    """PSNR-Y, SSIM-Y, PSNR-RGB and LPIPS of a network (or ``bicubic``) over a folder of originals.

    ``lr`` holds the matching small pictures (same name or stem); without it they are made by the protocol's
    downscaler. Returns {"model", "scale", "protocol", "images": {name: {metric}}, "mean": {metric}, "skipped"};
    names are relative to ``hr``. Unreadable pictures are skipped and reported; "notes" tells of originals cut to sizes
    that the scale divides and of missing LPIPS weights (its values are None). Raises FileNotFoundError, ValueError,
    ImageError.
    """
    network = get_model(model, scale)
    s, root = network.scale, Path(hr)
    paths = find_images(root)
    if not paths:
        raise FileNotFoundError(f"no pictures in {hr}")
    if lr is not None and not Path(lr).is_dir():
        raise FileNotFoundError(f"no such folder: {lr}")
    images, skipped, cropped = {}, [], []
    for path in tqdm(paths, desc="evaluating", unit="picture", disable=not progress):
        inner = path.relative_to(root) if root.is_dir() else Path(path.name)
        try:
            small, big, cut = _pair(path, (Path(lr) / inner).parent if lr is not None else None, s)
        except ImageError as error:
            skipped.append(str(error))
            continue
        row = metrics.compare(upscale(network, small, **options), big, s, lpips=lpips)
        images[inner.as_posix()] = {key: row[key] for key in EVALUATED}
        cropped += [inner.as_posix()] if cut else []
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
        "notes": _notes(cropped, s, lpips),
    }


def _notes(cropped: list[str], scale: float, lpips: bool) -> list[str]:
    cut = f"cut to a size that x{scale:g} divides: {', '.join(cropped)}"
    missing = lpips and not metrics.lpips_available()
    return [cut] * bool(cropped) + [f"LPIPS {metrics.LPIPS_MISSING}"] * missing
