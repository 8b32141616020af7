"""What do the parts of LMLTE buy at equal steps? The comparisons of notebook 08 (document 001; claims L1, L3, L4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from .. import metrics, models, runtime
from ..datasets.photos import resolve_root
from ..inference import upscale
from . import Row, Study, run_study
from .lmf_scales import pictures

REFERENCE = "LMLTE"
SCALES = (2, 3, 4, 2.7, 6)  # the first three are those of training's validation; their mean is the score
SIDE = 192  # of the middle of each validation photo, in pixels of the original


NO_EDSR = ["~model.encoder.n_feats", "~model.encoder.n_blocks"]
RDN = {"n_feats": 32, "n_blocks": 2, "n_layers": 4, "growth": 16}
SWINIR = {"embed_dim": 30, "depths": "[3,3]"}


def _encoder(preset: str, sizes: dict[str, object]) -> list[str]:
    return [f"model.encoder.preset={preset}", *NO_EDSR, *(f"+model.encoder.{k}={v}" for k, v in sizes.items())]


VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    "with cross-scale attention": ["+model.non_local_attn=true"],
    "no modulation": ["+model.modulation=false"],
    "no positional encoding": ["+model.positional_encoding=false"],
    "no local ensemble": ["+model.local_ensemble=false"],
    "no cell decoding": ["+model.cell_decode=false"],
    "all waves into the renderer": ["+model.mod_input=false"],
    "decoder LTE": ["arch=LTE"],
    "decoder LIIF": ["arch=LIIF"],
    "points anywhere": ["scales.region=points"],
    "small scales first": ["scales.grow=0.5"],
    "L1 + 0.1 perceptual": ["+loss.vgg={weight:0.1,criterion:l1}", "scales.region=square"],
    "encoder RDN": _encoder("RDN", RDN),
    "encoder SwinIR": _encoder("SwinIR-light", SWINIR),
}


def scores(model: torch.nn.Module, scales: Sequence[float] = SCALES) -> dict[str, float]:
    """Mean PSNR-Y in dB over the middles of the bundled validation photos: ``psnr_y_x2`` …, for every scale, and
    ``psnr_y``, the mean over the first three."""
    folder, found = resolve_root("bundled_val"), {}
    for scale in scales:
        pairs = pictures(folder, scale, SIDE)
        values = [metrics.psnr_y(upscale(model, lr, scale=scale), hr, scale) for lr, hr in pairs]
        found[f"psnr_y_x{scale:g}"] = sum(values) / len(values)
    return {"psnr_y": sum(list(found.values())[:3]) / 3} | found


def measure(result, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores on the middles of the validation photos, parameters (of the encoder too), and seconds of training."""
    model = result.model
    row: Row = {"parameters": models.count_parameters(model)}
    row |= {"encoder_parameters": models.count_parameters(model.encoder), "steps": cfg.trainer.max_steps}
    row |= {key: round(value, 4) for key, value in scores(model).items()}
    return {"": [row | {"seconds": round(result.seconds, 1)}]}


STUDY = Study("lmf_study", "lmlte_study", VARIANTS, measure)


def run(fresh: bool = False, quick: bool = False) -> Path:
    """``python -m nbhelpers study lmf``: 14 variants x 3 seeds, one on each core; one needs the weights of VGG16."""
    threads = runtime.set_threads()
    return run_study(STUDY, fresh, quick, processes=1 if quick else threads)
