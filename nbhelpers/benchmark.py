"""``python -m nbhelpers benchmark``: networks side by side in one run, with the machine named; tables or one JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from . import checkpoints, models, runtime
from .counting import flops
from .images import find_images, read_picture
from .inference import get_model
from .profiling import (
    adversarial_step_times,
    latencies_ms,
    machine_peaks,
    module_rows,
    peak_of_call,
    training_step_times,
)

# Untrained: speed does not depend on the values. The first is the reference of all ratios.
NETWORKS: dict[str, tuple[str, dict]] = {
    "RRDBNet-23": ("RRDBNet", {}),
    "DilatedRRDBNet-small": ("DilatedRRDBNet", {"channels": 48, "blocks": 1, "skip": True}),
    "M23_RLFN": ("M23_RLFN", {"use_m23": False}),
    "ESPCN-128": ("ESPCN", {}),
    "EfficientSRNet": ("EfficientSRNet", {}),
    "LeanSRNet": ("LeanSRNet", {}),
}
ONNX, INT8 = "ONNX Runtime fp32", "ONNX Runtime int8"
LARGE = 100  # megapixels
WIDTHS = (9, 17, 11, 9, 9, 10)  # of the printed columns


def sources(names: Sequence[str], folder: Path) -> dict[str, Path | str]:
    """What to load for each name: a file made in ``folder`` for one of ``NETWORKS``, else the trained network's own.

    Raises CheckpointError for a name that is neither there nor a trained network, ValueError for none or a repeated
    one.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"models {list(names)} must be one or more different names")
    found: dict[str, Path | str] = {}
    for name in names:
        if name not in NETWORKS:
            try:
                checkpoints.load(name)
            except checkpoints.CheckpointError as error:
                raise checkpoints.CheckpointError(f"{error}; untrained ones are {', '.join(NETWORKS)}") from None
            path = runtime.CHECKPOINTS / f"{name}.safetensors"
            found[name] = path if path.is_file() else name
            continue
        arch, arguments = NETWORKS[name]
        runtime.seed_everything(0)
        model = models.build(arch, **arguments)
        found[name] = checkpoints.save(name, model, arch, arguments, {"scale": model.scale}, [], folder)
    return found


def forms(device: torch.device) -> list[str]:
    """The ways in which PyTorch computes a network that are timed on a device."""
    fast = runtime.pick_precision(device)
    return ["fp32", "fp32 channels_last", *[f"{fast} channels_last"] * (fast != "fp32")]


def runner(
    source: str | Path, form: str, device: torch.device, scale: float | None = None
) -> Callable[[int], Callable[[], torch.Tensor]]:
    """``runner(…)(size)()`` enlarges one random picture of size x size in that form of the network.

    ``source`` and ``scale`` as for :func:`nbhelpers.inference.get_model`.
    """
    last = "channels_last" in form
    layout = torch.channels_last if last else torch.contiguous_format
    model = get_model(source, scale).to(device, memory_format=layout)
    precision = form.split()[0] if form.split()[0] in runtime.PRECISIONS else "fp32"

    def with_size(size: int) -> Callable[[], torch.Tensor]:
        x = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=layout)

        def run() -> torch.Tensor:
            with torch.no_grad(), runtime.autocast(device, precision):
                return model(x)

        return run

    return with_size


def _peak(source: str | Path, form: str, size: int, device: str, threads: int, scale: float | None = None) -> int:
    runtime.set_threads(threads)
    at = runner(source, form, torch.device(device), scale)
    at(16)()  # loads the code and makes the threads, which are no memory of the network
    return peak_of_call(at(size), torch.device(device))


def peak_bytes(
    jobs: Sequence[tuple[str | Path, str]], size: int, device: torch.device, threads: int, scale: float | None = None
) -> list[int]:
    """:func:`nbhelpers.profiling.peak_of_call` for each (source, form); on a CPU each in a fresh process."""
    if device.type != "cpu":
        return [_peak(source, form, size, str(device), threads, scale) for source, form in jobs]
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":  # torch is imported once, by a process without threads
        context.set_forkserver_preload(["nbhelpers.benchmark"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        fixed = (size, str(device), threads, scale)
        found = (pool.submit(_peak, source, form, *fixed).result() for source, form in jobs)
        return list(tqdm(found, desc="memory", total=len(jobs), unit="network", leave=False))


def _exported(name: str, source: str | Path, folder: Path) -> dict[tuple[str, str], Path]:
    """ONNX files of a network, {(name, form): file}; none, and a line on stderr, for a form that cannot be made.

    Ranges for int8 come from four patches only: speed does not depend on them.
    """
    from . import deploy, quantization

    found: dict[tuple[str, str], Path] = {}
    stem = len(list(folder.iterdir()))  # names of networks need not be names of files
    try:
        info = deploy.export(source, folder / f"{stem}.onnx")
        found[name, ONNX] = folder / info.get("files", [f"{stem}.onnx"])[0]
        quantization.quantize(found[name, ONNX], folder / f"{stem}_int8.onnx", limit=4, score=False)
        found[name, INT8] = folder / f"{stem}_int8.onnx"
    except (deploy.ExportError, quantization.QuantizationError) as error:
        tqdm.write(f"{name} has no {INT8 if found else 'ONNX Runtime'} row: {error}", file=sys.stderr)
    return found


def compare(
    names: Sequence[str],
    size: int = 64,
    repeats: int = 7,
    device: torch.device | None = None,
    memory: bool = True,
    onnx: bool = True,
) -> list[dict]:
    """Networks in all their forms, timed in turns on one picture of size x size pixels; one row for each.

    The forms are those of :func:`forms`, and on a CPU those of ONNX Runtime (unless ``onnx`` is False).

    Rows {"model", "form", "scale", "parameters", "flops", "macs", "ms" (median), "ms_low", "ms_high" (quartiles),
    "ms_per_output_megapixel", "gflops" (achieved, per second), "peak_mb", "speedup"}. "peak_mb" (10^6 bytes; None
    without ``memory``) is what one forward pass takes beside weights and input. "speedup" is how many times less time
    per output megapixel a form takes than the same form of the first network; None where that has none. bf16 is
    autocast's, which converts the weights in each pass, as ``upscale`` does. Raises as :func:`sources`.
    """
    device, threads = device or runtime.pick_device(), torch.get_num_threads()
    jobs: dict[tuple[str, str], str | Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        given = sources(names, Path(folder))
        for name, source in tqdm(given.items(), desc="preparing", unit="network", leave=False):
            jobs |= {(name, form): source for form in forms(device)}
            jobs |= _exported(name, source, Path(folder)) if onnx and device.type == "cpu" else {}
        runs = [runner(source, form, device)(size) for (_, form), source in jobs.items()]
        times = latencies_ms(runs, repeats, 2, "timing in turns")
        plans = [(source, form) for (_, form), source in jobs.items()]
        peaks = peak_bytes(plans, size, device, threads) if memory else [None] * len(jobs)
        counted = {name: _counts(checkpoints.load(source, device), size) for name, source in given.items()}
    rows = []
    for (name, form), ms, peak in zip(jobs, times, peaks, strict=True):
        row = {"model": name, "form": form, **counted[name], "ms": ms.median, "ms_low": ms.low, "ms_high": ms.high}
        row["ms_per_output_megapixel"] = ms.median / (size * row["scale"]) ** 2 * 1e6
        row["gflops"] = row["flops"] / ms.median / 1e6
        rows.append(row | {"peak_mb": None if peak is None else peak / 1e6})
    first = {row["form"]: row["ms_per_output_megapixel"] for row in rows if row["model"] == names[0]}
    for row in rows:
        reference = first.get(row["form"])
        row["speedup"] = None if reference is None else reference / row["ms_per_output_megapixel"]
    return rows


def _counts(model: nn.Module, size: int) -> dict:
    used = flops(model, (1, 3, size, size))
    return {"scale": model.scale, "parameters": models.count_parameters(model), "flops": used, "macs": used // 2}


def part_rows(names: Sequence[str], size: int, repeats: int, device: torch.device) -> dict[str, list[dict]]:
    """:func:`nbhelpers.profiling.module_rows` of networks, {name: rows}, in this device's fast precision."""
    precision, found = runtime.pick_precision(device), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in tqdm(sources(names, Path(folder)).items(), desc="parts", unit="network", leave=False):
            found[name] = module_rows(checkpoints.load(source, device), size, precision, repeats, device)
    return found


UPSCALE = """
import sys
from nbhelpers.__main__ import main
from nbhelpers.profiling import resident_bytes
code = main(sys.argv[1:])
print(resident_bytes(peak=True))
sys.exit(code)
"""


def large_picture(name: str, megapixels: float = LARGE, precision: str = "auto", threads: int | None = None) -> dict:
    """Enlarge a picture to so many megapixels by the ``upscale`` command, on the CPU, in a process of its own.

    {"model", "input", "output", "precision", "threads", "seconds", "peak_mb"}: wall-clock time of the whole command
    and the most main memory its process held, Python and the libraries included (10^6 bytes). The picture is a bundled
    photo repeated; the output is a PNG. ``name`` as for :func:`sources`. Raises RuntimeError if the command fails.
    """
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source = sources([name], folder)[name]
        scale = checkpoints.load(source).scale
        side = max(1, round((megapixels * 1e6) ** 0.5 / scale))
        photo = read_picture(find_images(runtime.PHOTOS)[0]).rgb
        repeats = [-(-side // n) for n in photo.shape[:2]]
        Image.fromarray(np.tile(photo, (*repeats, 1))[:side, :side]).save(folder / "in.bmp")
        command = ["upscale", str(folder / "in.bmp"), "-o", str(folder / "out.png"), "--model", str(source)]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", UPSCALE, *command, "--precision", precision],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"enlarging {side}x{side} pixels with {name!r} ended with code {done.returncode}")
    return {
        "model": name,
        "input": f"{side}x{side}",
        "output": f"{side * scale}x{side * scale}",
        "precision": precision,
        "threads": threads,
        "seconds": round(seconds, 1),
        "peak_mb": int(done.stdout.split()[-1]) / 1e6,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the ``benchmark`` command."""
    names = f"untrained {', '.join(NETWORKS)}; or trained ones from `list`, or weight files"
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), metavar="NAME", help=f"{names} (default: all)")
    parser.add_argument("--size", type=int, default=64, help="side of the input picture (default: %(default)s pixels)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out (faster)")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime out (faster)")
    parser.add_argument("--training", action="store_true", help="also time training steps")
    text = f"only this: enlarge a picture to {LARGE} megapixels by `upscale`, with NAME; seconds and peak memory"
    parser.add_argument("--large", nargs="?", const="espcn_x4", metavar="NAME", help=f"{text} (default: %(const)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _check(args: argparse.Namespace) -> None:
    for name, least in (("size", 16), ("repeats", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")


def measure(args: argparse.Namespace) -> dict:
    """What the command line asks for, as one dictionary of plain values."""
    _check(args)
    device, threads = runtime.pick_device(args.device), runtime.set_threads(args.threads)
    result = {"machine": runtime.machine(), "device": str(device), "threads": threads}
    if args.large:
        return result | {"large": large_picture(args.large, threads=threads)}
    result |= {"size": f"{args.size}x{args.size}", "repeats": args.repeats}
    result["rows"] = compare(
        args.models, args.size, args.repeats, device, memory=not args.no_memory, onnx=not args.no_onnx
    )
    result["parts"] = part_rows(args.models, args.size, min(5, args.repeats), device)
    result["peaks"] = machine_peaks(device)
    if args.training:
        result["training_step"] = training_step_times(args.repeats)
        result["adversarial_step"] = adversarial_step_times(args.repeats)
    return result


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers benchmark``."""
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['machine']}; device {result['device']}, {result['threads']} threads")
    if large := result.get("large"):
        print(
            f"{large['model']} {large['input']} to {large['output']} ({large['precision']}): {large['seconds']:.0f} s, "
            f"at most {large['peak_mb']:.0f} MB of memory in the process"
        )
        return 0
    _print_rows(result)
    _print_parts(result["parts"])
    peaks = dict(result["peaks"])
    bandwidth = peaks.pop("bandwidth")
    best = ", ".join(f"{value:.0f} GFLOP/s in {key}" for key, value in peaks.items())
    print(f"\nthis machine at best: {best}; {bandwidth:.1f} GB/s of memory")
    _print_steps(result)
    return 0


def _print_rows(result: dict) -> None:
    print(f"\ninput {result['size']}, median of {result['repeats']} in turns (quartiles)")
    print("speedup: per output pixel, over the same form of the first network")
    titles = ("ms", "quartiles", "ms/Mpixel", "GFLOP/s", "peak MB", "speedup")
    last = None
    for row in result["rows"]:
        if row["model"] != last:
            last = row["model"]
            name = f"{last} x{row['scale']}: {row['parameters']:,} parameters, {row['macs'] / 1e9:.3g} GMAC"
            print(f"\n{name:<48}" + "".join(f"{title:>{n}}" for title, n in zip(titles, WIDTHS, strict=True)))
        peak = "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        faster = "–" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        cells = [f"{row['ms']:.1f}", f"{row['ms_low']:.1f}–{row['ms_high']:.1f}"]
        cells += [f"{row['ms_per_output_megapixel']:.0f}", f"{row['gflops']:.0f}", peak, faster]
        print(f"  {row['form']:<46}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, WIDTHS, strict=True)))


def _print_parts(parts: dict[str, list[dict]]) -> None:
    for name, rows in parts.items():
        print(f"\n{name:<24}{'parameters':>12}{'MMAC':>12}{'share':>8}{'ms':>9}{'share':>8}{'FLOP/byte':>11}")
        for row in rows:
            print(
                f"  {row['part']:<22}{row['parameters']:>12,}{row['macs'] / 1e6:>12.1f}{row['flops_share']:>8.1%}"
                f"{row['ms']:>9.2f}{row['ms_share']:>8.1%}{row['intensity']:>11.1f}"
            )


def _print_steps(result: dict) -> None:
    titles = {
        "training_step": "ESPCN-128 x4 training step, batch 32 of 32x32 (median)",
        "adversarial_step": "adversarial step, ESPCN-128 x4 and its discriminator, batch 4 of 32x32 (median)",
    }
    for key in [key for key in titles if key in result]:
        print(f"\n{titles[key]}")
        for row in result[key]:
            layout = "channels_last" if row["channels_last"] else "plain layout"
            print(f"  {row['precision']:<5}{layout:<15}{row['ms']:>8.1f} ms{row['speedup']:>8.2f}x")
