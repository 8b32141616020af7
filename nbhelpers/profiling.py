"""How fast is it here? Latency, parts and peaks of this machine, always within one run, with the machine named.

What needs no clock (parameters, FLOPs, bytes) is in :mod:`nbhelpers.counting`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from . import models, runtime
from .counting import REST, count, watching
from .counting import flops as flops  # notebooks import it from here


class Latency(NamedTuple):
    """Milliseconds of one call: the median, and the quartiles below and above it."""

    median: float
    low: float
    high: float


def latencies_ms(
    runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 3, progress: str = ""
) -> list[Latency]:
    """Latency of one call of each in milliseconds, called in turns, after ``warmup`` untimed rounds.

    In turns, so that all see the same load of the machine. Waits for the GPU. ``progress`` names a progress bar.
    Raises ValueError for less than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats} must be at least 1")
    times: list[list[float]] = [[] for _ in runs]
    for i in tqdm(range(warmup + repeats), desc=progress, unit="round", leave=False, disable=not progress):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            runtime.synchronize()
            if i >= warmup:
                found.append((time.perf_counter() - start) * 1e3)
    return [_latency(found) for found in times]


def _latency(found: Sequence[float]) -> Latency:
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Latency(median, low, high)


def medians_ms(runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 3) -> list[float]:
    """The medians of :func:`latencies_ms`."""
    return [found.median for found in latencies_ms(runs, repeats, warmup)]


def median_ms(run: Callable[[], object], repeats: int, warmup: int = 3) -> float:
    """:func:`medians_ms` of one thing alone."""
    return medians_ms([run], repeats, warmup)[0]


def training_step_times(steps: int = 12, batch: int = 32, patch: int = 32, scale: int = 4) -> list[dict]:
    """Median time of one ESPCN-128 training step: plain fp32, channels_last, bf16, and both; rows with ``speedup``."""
    device = runtime.pick_device()
    variants = [("fp32", False), ("fp32", True)]
    if runtime.pick_precision(device) != "fp32":
        variants += [(runtime.pick_precision(device), False), (runtime.pick_precision(device), True)]
    lr, hr = torch.rand(batch, 3, patch, patch), torch.rand(batch, 3, patch * scale, patch * scale)
    rows = []
    for precision, last in tqdm(variants, desc="training step", leave=False):
        layout = torch.channels_last if last else torch.contiguous_format
        model = models.build("ESPCN", scale=scale).to(device, memory_format=layout)
        x, y = (t.to(device).contiguous(memory_format=layout) for t in (lr, hr))
        adam = torch.optim.Adam(model.parameters())

        def step(model=model, x=x, y=y, adam=adam, precision=precision) -> None:
            with runtime.autocast(device, precision):
                out = model(x)
            loss = (out.float() - y).abs().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

        ms = median_ms(step, steps)
        rows.append({"precision": precision, "channels_last": last, "ms": round(ms, 1)})
    for row in rows:
        row["speedup"] = round(rows[0]["ms"] / row["ms"], 2)
    return rows


def adversarial_step_times(steps: int = 12, batch: int = 4, overrides: Sequence[str] = ()) -> list[dict]:
    """Median time of one step of ``espcn_gan_x4``: generator, then discriminator; rows with ``speedup``.

    Plain fp32, then the fast precision of this machine with channels_last, in turns so that both see the same load.
    The module's own objectives with pixel and adversarial loss; the feature loss is left out, since its weights may
    not be here. ``overrides`` change the experiment.
    """
    from .adversarial import AdversarialModule, build_discriminator
    from .experiments import compose

    device = runtime.pick_device()
    cfg = compose("espcn_gan_x4", ["~loss.vgg", f"data.batch={batch}", *overrides])
    runs = {}
    for precision, last in dict.fromkeys([("fp32", False), (runtime.pick_precision(device), True)]):
        runtime.seed_everything(0)
        model = models.build(cfg.arch, **cfg.model)
        module = AdversarialModule(model, build_discriminator(cfg), cfg)
        module.layout = torch.channels_last if last else torch.contiguous_format
        runs[precision, last] = _adversarial_step(module.to(device, memory_format=module.layout), precision)
    times = medians_ms(list(runs.values()), steps)
    rows = [
        {"precision": precision, "channels_last": last, "ms": round(ms, 1), "speedup": round(times[0] / ms, 2)}
        for (precision, last), ms in zip(runs, times, strict=True)
    ]
    return rows


def _adversarial_step(module: torch.nn.Module, precision: str) -> Callable[[], None]:
    cfg, device = module.cfg, module.device
    (g, d), _ = module.configure_optimizers()
    size = cfg.data.patch, cfg.data.patch * cfg.model.scale
    lr, hr = (torch.rand(cfg.data.batch, 3, n, n, device=device).contiguous(memory_format=module.layout) for n in size)

    def step() -> None:
        with runtime.autocast(device, precision):
            sr, loss = module.generator_objective(lr, hr)
        g.zero_grad()
        loss.backward()
        g.step()
        with runtime.autocast(device, precision):
            loss = module.discriminator_objective(sr.detach(), hr)
        d.zero_grad()
        loss.backward()
        d.step()

    return step


def module_rows(
    model: nn.Module, size: int = 64, precision: str = "fp32", repeats: int = 7, device: torch.device | None = None
) -> list[dict]:
    """Where a network's FLOPs sit and where its milliseconds, for one picture of size x size pixels.

    The rows of :func:`nbhelpers.counting.count` with "ms" (median), "ms_share" and "gflops" (achieved, per second);
    bytes and intensity are those of ``precision``. "between" is what the network computes outside its parts. Each
    part is waited for on a GPU, so that the sum there is longer than an undisturbed pass.
    """
    device = device or next(model.parameters()).device
    model = model.to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    rows = count(model, tuple(x.shape))
    rounds: list[dict[str, float]] = []
    with torch.no_grad(), runtime.autocast(device, precision):
        rounds = [_times_of_parts(model, x) for _ in range(2 + repeats)][2:]
    for row in rows:
        if precision != "fp32":  # two bytes per value
            row["bytes"], row["intensity"] = row["bytes"] // 2, row["intensity"] * 2
        row["ms"] = statistics.median(found[row["part"]] for found in rounds)
        row["gflops"] = row["flops"] / row["ms"] / 1e6 if row["ms"] else 0.0
    in_parts = sum(row["ms"] for row in rows[:-1])  # medians need not add up to the median of the total
    for row in rows:
        row["ms_share"] = 1.0 if row["part"] == "total" else row["ms"] / in_parts
    return rows


def _times_of_parts(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """Milliseconds of each part in one pass, of what is between them, and in total."""
    spent: Counter[str] = Counter()
    began = [0.0]

    def enter(_: str) -> None:
        runtime.synchronize()
        began[0] = time.perf_counter()

    def leave(part: str) -> None:
        runtime.synchronize()
        spent[part] += (time.perf_counter() - began[0]) * 1e3

    with watching(model, enter, leave):
        start = time.perf_counter()
        model(x)
        runtime.synchronize()
        total = (time.perf_counter() - start) * 1e3
    return spent + Counter({"total": total, REST: max(0.0, total - spent.total())})


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process in main memory, now or at most so far (Linux; elsewhere only the peak is known)."""
    status = Path("/proc/self/status")
    if status.is_file():
        key = "VmHWM:" if peak else "VmRSS:"
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_of_call(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``run()`` takes beyond what is held before it.

    On CUDA those of torch's allocator. On a CPU the growth of the process's resident memory: tensors, scratch of the
    convolution routines, code loaded for the first time; meaningful in a fresh process only, since memory that an
    earlier call gave back may be used again unseen, and outside Linux an earlier peak hides a lower one. Weights and
    inputs made before are not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: count the peak from here
    before = resident_bytes()
    run()
    return max(0, resident_bytes(peak=True) - before)


def machine_peaks(device: torch.device | None = None, side: int = 2048, megabytes: int = 256) -> dict[str, float]:
    """What this machine reaches at best: GFLOP/s of a matrix product by precision, and GB/s of memory ("bandwidth").

    The product is of two ``side`` x ``side`` matrices; memory is measured by a triad a = b + 2·c of three arrays of
    ``megabytes`` each, counting two reads and one write. Best of several runs, with torch's present threads: the two
    roofs of a roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785).
    """
    device = device or runtime.pick_device()
    found = {}
    for precision in dict.fromkeys(["fp32", runtime.pick_precision(device)]):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        found[precision] = 2 * side**3 / _best_seconds(lambda a=a, b=b: a @ b) / 1e9
    a, b, c = (torch.ones(megabytes * 250_000, device=device) for _ in range(3))
    seconds = _best_seconds(lambda: torch.add(b, c, alpha=2, out=a))
    return found | {"bandwidth": 3 * a.nbytes / seconds / 1e9}


def _best_seconds(run: Callable[[], object], repeats: int = 6) -> float:
    best = float("inf")
    for _ in range(1 + repeats):
        runtime.synchronize()
        start = time.perf_counter()
        run()
        runtime.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def convolution_rows(
    channels: Sequence[int] = (16, 32, 64, 128),
    size: int = 128,
    repeats: int = 12,
    device: torch.device | None = None,
    precisions: Sequence[str] | None = None,
) -> list[dict]:
    """A full 3x3 convolution against its depthwise-separable replacement, c to c channels on size x size pixels.

    Rows {"precision", "channels", "layer", "macs", "bytes", "ms", "macs_share", "bytes_share", "ms_share", "gflops"};
    shares are of the full convolution at the same width and precision (document 003 says "about 1/9" of the
    depthwise one: claim E3). Bytes are input, output and weights of each layer. Weights and pictures are in the
    precision itself, channels_last, without bias; ``precisions`` None takes fp32 and the fast one of this machine.
    """
    device = device or runtime.pick_device()
    precisions = precisions or list(dict.fromkeys(["fp32", runtime.pick_precision(device)]))
    rows = []
    for precision in tqdm(precisions, desc="convolutions", unit="precision", leave=False):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        for c in channels:
            rows += [{"precision": precision, **row} for row in _convolutions(c, size, repeats, device, dtype)]
    return rows


def _convolutions(c: int, size: int, repeats: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
    place = {"device": device, "dtype": dtype, "bias": False}
    full = nn.Conv2d(c, c, 3, padding=1, **place)
    depthwise, pointwise = nn.Conv2d(c, c, 3, padding=1, groups=c, **place), nn.Conv2d(c, c, 1, **place)
    layers = {
        "full 3x3": full,
        "depthwise 3x3": depthwise,
        "pointwise 1x1": pointwise,
        "depthwise + pointwise": nn.Sequential(depthwise, pointwise),
    }
    x = torch.rand(1, c, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    runs = [functools.partial(layer.to(memory_format=torch.channels_last), x) for layer in layers.values()]
    with torch.no_grad():
        times = medians_ms(runs, repeats)
    rows = []
    for (name, layer), ms in zip(layers.items(), times, strict=True):
        weights = [p.numel() for p in layer.parameters()]
        macs, moved = sum(weights) * size**2, (sum(weights) + 2 * len(weights) * x.numel()) * x.element_size()
        row = {"channels": c, "layer": name, "macs": macs, "bytes": moved, "ms": ms}
        whole = rows[0] if rows else row
        row |= {f"{key}_share": row[key] / whole[key] for key in ("macs", "bytes", "ms")}
        rows.append(row | {"gflops": 2 * macs / ms / 1e6})
    return rows
