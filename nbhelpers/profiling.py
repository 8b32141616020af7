"""How fast is it here? Training steps and inference, always as a ratio within one run, with the machine named."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from . import checkpoints, models, runtime


def medians_ms(runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 3) -> list[float]:
    """Median time of one call of each in milliseconds, called in turns, after ``warmup`` untimed rounds.

    Waits for the GPU.
    """
    times: list[list[float]] = [[] for _ in runs]
    for i in range(warmup + repeats):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def median_ms(run: Callable[[], object], repeats: int, warmup: int = 3) -> float:
    """:func:`medians_ms` of one thing alone."""
    return medians_ms([run], repeats, warmup)[0]


def flops(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 per multiply-add) of one forward pass on an input of ``shape``."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape, device=device))
    return counter.get_total_flops()


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


@torch.inference_mode()
def inference_times(model: torch.nn.Module, repeats: int = 12, side: int = 128) -> list[dict]:
    """Median time of an upscaler on one (3, side, side) picture per precision, and per output megapixel."""
    device = runtime.pick_device()
    model = model.to(device, memory_format=torch.channels_last)
    x = torch.rand(1, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    megapixels = (side * model.scale) ** 2 / 1e6
    rows = []
    for precision in dict.fromkeys(["fp32", runtime.pick_precision(device)]):
        with runtime.autocast(device, precision):
            ms = median_ms(lambda: model(x), repeats)
        rows.append({"precision": precision, "ms": round(ms, 1), "ms_per_output_megapixel": round(ms / megapixels, 1)})
    return rows


def main(args: argparse.Namespace) -> int:
    """``python -m nbhelpers benchmark``."""
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    model = checkpoints.load(args.model)
    runtime.set_threads()
    result = {"machine": runtime.machine(), "training_step": training_step_times(args.steps)}
    result["adversarial_step"] = adversarial_step_times(args.steps)
    rows = inference_times(model, args.steps)
    result["inference"] = {"model": args.model, "input": "128x128", "rows": rows}
    if args.json:
        print(json.dumps(result))
        return 0
    print(result["machine"])
    titles = {
        "training_step": "ESPCN-128 x4 training step, batch 32 of 32x32 (median)",
        "adversarial_step": "adversarial step, ESPCN-128 x4 and its discriminator, batch 4 of 32x32 (median)",
    }
    for key, title in titles.items():
        print(f"\n{title}")
        for row in result[key]:
            layout = "channels_last" if row["channels_last"] else "plain layout"
            print(f"  {row['precision']:<5}{layout:<15}{row['ms']:>8.1f} ms{row['speedup']:>8.2f}x")
    print()
    for row in result["inference"]["rows"]:
        print(
            f"  {args.model} on 128x128, {row['precision']}: {row['ms']:.1f} ms, "
            f"{row['ms_per_output_megapixel']:.0f} ms per output megapixel"
        )
    return 0
