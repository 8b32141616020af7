"""What do fewer channels and 8-bit weights cost, and what do they save? The curves of notebook 06 (claim L6)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from .. import checkpoints, deploy, models, profiling, pruning, quantization, runtime
from . import Row, Study, run_study, score

SOURCE = "lean_srnet_x4"
STEPS = 400  # of training after pruning, and of a network of the same width from scratch
WIDTHS = (40, 32, 24, 16)
SIDE = 128  # of the input that is timed
REPEATS = 5
REFERENCE = "trained on"  # the whole network, for as many steps

PRUNING_VARIANTS: dict[str, list[str]] = {
    REFERENCE: ["start=whole", "importance=none"],
    **{f"{w} channels, pruned": [f"width={w}", "start=pruned", "importance=taylor"] for w in WIDTHS},
    **{f"{w} channels, from scratch": [f"width={w}", "start=scratch", "importance=none"] for w in WIDTHS},
    "32 channels, pruned by magnitude": ["width=32", "start=pruned", "importance=magnitude"],
}


def compose_pruning(overrides: Sequence[str]) -> DictConfig:
    """The training of one variant: the source's own configuration, shorter, on the bundled photos.

    ``width`` channels; ``start`` is ``whole`` (the trained network), ``pruned`` (narrowed by ``importance``), both at
    half the rate as ``prune`` does, or ``scratch`` (at the source's rate). ``steps`` and ``seed``.
    """
    asked = OmegaConf.merge({"steps": STEPS, "seed": 0}, OmegaConf.from_dotlist(list(overrides)))
    info = checkpoints.card(SOURCE)
    changes: dict[str, object] = {"name": "pruning_study", "seed": asked.seed, "init_from": SOURCE}
    if asked.start != "whole":
        changes["model"] = info["arguments"] | {"channels": asked.width}
    if asked.start == "pruned":
        changes["prune"] = {"importance": asked.importance}
    brief = ["optimizer.ema_decay=0"]  # an average over 1,000 steps would still be where it began
    cfg = pruning.tuning(info, changes, asked.steps, ["data.roots=[bundled]", "trainer.progress=false", *brief])
    cfg.trainer.val_every = cfg.trainer.max_steps = asked.steps
    if asked.start == "scratch":
        cfg.init_from, cfg.optimizer.lr = None, info["config"]["optimizer"]["lr"]
    OmegaConf.set_struct(cfg, False)
    cfg.source = {"sha256": info["sha256"]}  # so that rows of another source are made again
    return cfg


def _pace(networks: Sequence[torch.nn.Module]) -> list[float]:
    """Time of each network on the CPU, fastest precision, in parts of the first one's; in turns."""
    device = torch.device("cpu")
    x = torch.rand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    precision = runtime.pick_precision(device)
    ready = [net.to(memory_format=torch.channels_last).eval() for net in networks]

    @torch.inference_mode()
    def run(net: torch.nn.Module) -> None:
        with runtime.autocast(device, precision):
            net(x)

    times = profiling.medians_ms([functools.partial(run, net) for net in ready], REPEATS)
    return [round(t / times[0], 4) for t in times]


def measure_pruning(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on the validation photos after training and, for a pruned network, before it; size, and time."""
    model = result.model
    row: Row = {
        "width": cfg.model.channels,
        "steps": cfg.trainer.max_steps,
        "parameters": models.count_parameters(model),
        "bytes": len(save({k: v.contiguous() for k, v in model.state_dict().items()})),
        "mmacs": round(profiling.flops(model, (1, 3, 64, 64)) / 2e6, 1),
        "time_share": _pace([checkpoints.load(SOURCE), model])[1],
        "untrained_psnr_y": "",
    }
    if OmegaConf.select(cfg, "prune"):
        row["untrained_psnr_y"] = score(pruning.pruned(cfg), lpips=False)["psnr_y"]
    return {"": [row | score(model) | {"seconds": round(result.seconds, 1)}]}


PRUNING_STUDY = Study(
    "pruning_study",
    None,
    PRUNING_VARIANTS,
    measure_pruning,
    compose=compose_pruning,
    quick=("steps=4",),
)

QUANTISED = (SOURCE, "efficient_srnet_x4", "espcn_x4", "m23_rlfn_x4", "rrdb_x2_small")
KEPT = {"first": ["head"], "last": ["to_subpixels*"], "first and last": ["head", "to_subpixels*"]}
INT8_VARIANTS: dict[str, list[str]] = {
    **{name: [f"model={name}"] for name in QUANTISED},
    **{f"{SOURCE}, {kind} kept": [f"keep=[{','.join(map(repr, keep))}]"] for kind, keep in KEPT.items()},
    f"{SOURCE}, depthwise kept": ["keep=['*depthwise*']"],
    **{f"{SOURCE}, {n} patches": [f"limit={n}"] for n in (4, 16)},
}


def compose_int8(overrides: Sequence[str]) -> DictConfig:
    """What to quantise: ``model``, layers to ``keep`` in fp32, and the ``limit`` of calibration patches."""
    chosen = OmegaConf.from_dotlist([o for o in overrides if not o.startswith("keep=")])
    keep = [OmegaConf.create(f"{{keep: {o.removeprefix('keep=')}}}") for o in overrides if o.startswith("keep=")]
    cfg = OmegaConf.merge({"model": SOURCE, "keep": [], "limit": 64, "seed": 0}, chosen, *keep)
    cfg.sha256 = checkpoints.card(cfg.model)["sha256"]
    return cfg


def quantise(cfg: DictConfig) -> Row:
    """One row: bytes of the files, PSNR-Y of both, and the time of the int8 file in parts of fp32 and bf16."""
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        deploy.export(cfg.model, plain)
        info = quantization.quantize(plain, small, limit=cfg.limit, keep=list(cfg.keep))
        networks = [deploy.OnnxUpscaler(plain), deploy.OnnxUpscaler(small), checkpoints.load(cfg.model)]
        shares = _pace(networks)
    kept = {key: info[key] for key in ("bytes", "fp32_bytes", "weights", "fp32_weights")}
    scores = {key: round(info[key], 4) for key in ("psnr_y", "fp32_psnr_y")}
    return {"scale": info["scale"], **kept, **scores, "time_share": shares[1], "bf16_time_share": shares[2]}


def measure_int8(row: Row, cfg: DictConfig) -> dict[str, list[Row]]:
    """The row as it is."""
    return {"": [{"model": cfg.model, "patches": cfg.limit} | row]}


INT8_STUDY = Study(
    "int8_study",
    None,
    INT8_VARIANTS,
    measure_int8,
    seeds=(0,),
    compose=compose_int8,
    train=quantise,
    quick=("limit=4",),
)
STUDIES = {study.name: study for study in (PRUNING_STUDY, INT8_STUDY)}


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study deployment``: narrower networks x 3 seeds, then networks in 8 bits."""
    runtime.set_threads()
    for study in STUDIES.values():
        run_study(study, fresh, quick)
    return (runtime.RUNS / "quick_results" if quick else runtime.RESULTS) / "{pruning,int8}_study.csv"
