"""Networks with 8-bit weights, as ONNX files: convolutions with ranges from real photos, or linear layers alone.

ONNX Runtime does the work and costs our trained networks 0.00 to 0.05 dB. torchao's PT2E, the other way, gives programs
that are fast only through torch.compile, and would be a further dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto
from onnxruntime import quantization as ort
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from . import checkpoints, deploy, metrics, runtime
from .datasets.pairs import open_pairs
from .degrade import crop_to_multiple, downscale
from .images import find_images, load_image
from .inference import upscale

PATCH, BATCH = 48, 4  # calibration: LR pixels of a patch's side, patches looked at together
CROP = 96  # LR pixels of the middle of a validation photo that the result is measured on
ALLOWED = 0.3  # dB; a larger loss is worth a warning
LINEAR = ("MatMul", "Gemm")
STATIC = ("Conv", *LINEAR, "LeakyRelu", "Relu")  # activations too: else each would go through fp32


class QuantizationError(RuntimeError):
    """A network in which nothing can be quantised as asked; the message says what it has."""


class _Patches(ort.CalibrationDataReader):
    """What ONNX Runtime reads to learn the values' ranges."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"lr": batch.contiguous().numpy()}


def calibration_patches(folder: str | Path, scale: int, limit: int = 64) -> Iterator[Tensor]:
    """Batches "4 3 48 48" in [0, 1] of ``limit`` patches, drawn from as many photos, made small by the protocol.

    Raises DataError for a folder that is missing or without a readable photo of 48 · scale pixels, ValueError for a
    limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1 calibration patch")
    options = {"patch": PATCH, "batch": min(BATCH, limit), "augment": False, "limit": limit, "shuffle_seed": 0}
    pairs, _ = open_pairs(folder, scale, progress=False, **options)
    for step in range(-(-limit // BATCH)):
        yield pairs[step][0].float() / 255


def quantize(
    model: str | Path,
    path: str | Path,
    calibration: str | Path = "bundled",
    limit: int = 64,
    keep: Sequence[str] = (),
    dynamic: bool = False,
    score: bool = True,
) -> dict[str, object]:
    """Write a network with 8-bit weights as an ONNX file that :class:`nbhelpers.deploy.OnnxUpscaler` runs.

    Static: convolutions and linear layers compute in 8 bits, weights signed with a scale for each output channel,
    values unsigned with ranges seen on patches of the photos in ``calibration`` (a folder or ``bundled``).
    ``dynamic``: the weights of linear layers only, ranges taken anew from each picture, so that ``halo`` becomes None.
    The fixed kernels of interpolations stay in fp32, and so do the layers that ``keep`` names (``*`` allowed).

    ``model`` is a trained network, or an ONNX file of :func:`nbhelpers.deploy.export`. Returns the file's metadata with
    ``bytes`` and ``fp32_bytes`` of the files, ``weights`` and ``fp32_weights`` (bytes in them), and ``psnr_y`` and
    ``fp32_psnr_y`` (dB; means over the middles of the bundled validation photos; left out without ``score``).

    Raises ValueError, CheckpointError and ExportError as export does, DataError for a folder without photos,
    QuantizationError where there is nothing to quantise or no layer of a name in ``keep``.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"cannot write {path}: name the file *.onnx")
    network, patches = checkpoints.load(model), []
    if hasattr(network, "at"):
        raise QuantizationError(f"{str(model)!r} is for any scale; only networks for one scale can be quantised")
    if not dynamic and hasattr(network, "scale"):  # before the export, which takes longer and refuses what has none
        patches = list(calibration_patches(calibration, network.scale, limit))
    with tempfile.TemporaryDirectory() as folder, runtime.atomic_path(path) as part:
        source, ready = Path(folder) / "fp32.onnx", Path(folder) / "ready.onnx"
        info = _fp32(model, source)
        with _quiet():
            quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
            nodes = _chosen(onnx.load(ready), keep, LINEAR if dynamic else STATIC, str(model))
            options = {"nodes_to_quantize": nodes, "per_channel": True, "weight_type": ort.QuantType.QInt8}
            if dynamic:
                ort.quantize_dynamic(ready, part, **options)
            else:
                # Biases stay as they are: ONNX Runtime makes integers of them when it opens the file, which is smaller.
                extra = {"MatMulConstBOnly": True, "QuantizeBias": False}
                static = {"activation_type": ort.QuantType.QUInt8, "extra_options": extra}
                ort.quantize_static(
                    ready, part, _Patches(patches), op_types_to_quantize=list(STATIC), **static, **options
                )
        info |= {"precision": "int8 dynamic" if dynamic else "int8"} | ({"halo": None} if dynamic else {})
        small = _finish(part, info)
        report = {"fp32_bytes": source.stat().st_size, "bytes": part.stat().st_size}
        report |= {"fp32_weights": _weights(onnx.load(source)), "weights": _weights(small)}
        files = {"fp32_psnr_y": source, "psnr_y": part} if score else {}
        report |= {key: _psnr(deploy.OnnxUpscaler(file)) for key, file in files.items()}
    return info | report


def _fp32(model: str | Path, path: Path) -> dict[str, object]:
    """Put the network's fp32 file at ``path``; returns its metadata."""
    if Path(model).suffix != ".onnx":
        info = deploy.export(model, path)
        info.pop("difference")
        return info
    info = checkpoints.load(model).info
    if "precision" in info:
        raise ValueError(f"{model} is quantised already ({info['precision']}); give the file that it was made from")
    path.write_bytes(Path(model).read_bytes())
    return dict(info)


def _chosen(model: ModelProto, keep: Sequence[str], kinds: Sequence[str], name: str) -> list[str]:
    """Names of the operations to quantise: of those kinds, with trained weights where they have any, not kept."""
    constants = {tensor.name for tensor in model.graph.initializer}
    layers = {node.name.rpartition("/")[0] for node in model.graph.node if node.op_type in ("Conv", *LINEAR)}
    if missing := [k for k in keep if not any(fnmatch(layer, k) for layer in layers)]:
        raise QuantizationError(f"{name!r} has no layer {missing[0]!r} to keep; it has {', '.join(sorted(layers))}")

    def wanted(node: NodeProto) -> bool:
        if node.op_type not in kinds or any(fnmatch(node.name.rpartition("/")[0], k) for k in keep):
            return False
        return "Relu" in node.op_type or (node.input[1] in constants and not node.input[1].endswith(".kernel"))

    nodes = [node for node in model.graph.node if wanted(node)]
    if not any(node.op_type in ("Conv", *LINEAR) for node in nodes):
        kind = "linear" if kinds == LINEAR else "convolutional or linear"
        rest = f" but those kept ({', '.join(keep)})" if keep else ""
        hint = "; leave out --dynamic, which is for linear layers alone" if kinds == LINEAR else ""
        raise QuantizationError(f"{name!r} has no {kind} layer with weights{rest}, so nothing would be quantised{hint}")
    return [node.name for node in nodes]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's tools advise on the root logger what has been done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _finish(path: Path, info: dict[str, object]) -> ModelProto:
    """Give the file its metadata, and take out the tools' notes; returns what it holds."""
    model = onnx.load(path)
    del model.metadata_props[:], model.graph.value_info[:]
    onnx.helper.set_model_props(model, {deploy.KEY: json.dumps(info)})
    onnx.save(model, path)
    return model


def _weights(model: ModelProto) -> int:
    """Bytes of all constants of a file."""
    return sum(len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def _psnr(model: deploy.OnnxUpscaler) -> float:
    """Mean PSNR-Y in dB over the middles of the bundled validation photos."""
    rows = []
    for photo in find_images(runtime.PHOTOS / "val"):
        hr = load_image(photo)
        size = [min(side, CROP * model.scale) for side in hr.shape[-2:]]
        top, left = ((side - n) // 2 for side, n in zip(hr.shape[-2:], size, strict=True))
        hr = crop_to_multiple(hr[:, top : top + size[0], left : left + size[1]], model.scale)
        sr = upscale(model, downscale(hr, model.scale))
        rows.append(metrics.compare(sr, hr, model.scale, lpips=False))
    return float(metrics.mean(rows)["psnr_y"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m nbhelpers quantize``."""
    parser.add_argument("model", metavar="MODEL", help="name from `list`, a weight file, or an .onnx file of `export`")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.onnx", help="file to write")
    text = "photos that show what values occur (default: the bundled training photos)"
    parser.add_argument("--calibration", default="bundled", metavar="FOLDER", help=text)
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="photos and patches (default: %(default)s)")
    text = "leave this layer in fp32, by its name in the network; may be given more than once"
    parser.add_argument("--keep", action="append", default=[], metavar="LAYER", help=text)
    text = "linear layers only, without calibration (for transformers)"
    parser.add_argument("--dynamic", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers quantize MODEL -o FILE.onnx``."""
    info = quantize(args.model, args.output, args.calibration, args.limit, args.keep, args.dynamic)
    print(f"{info['name']} x{info['scale']} written to {args.output} ({info['precision']})")
    for what, key in (("file", "bytes"), ("weights", "weights")):
        old, new = info[f"fp32_{key}"], info[key]
        print(f"{what:<8}{old / 1e3:>9.1f} kB in fp32, {new / 1e3:>8.1f} kB now: {new / old:.1%}")
    lost = info["fp32_psnr_y"] - info["psnr_y"]
    print(f"PSNR-Y  {info['fp32_psnr_y']:>9.3f} dB in fp32, {info['psnr_y']:>8.3f} dB now: {-lost:+.3f} dB")
    print(f"(middles of the bundled validation photos, {metrics.protocol(info['scale']).partition(';')[0]})")
    if not lost <= ALLOWED:
        print(f"warning: more than {ALLOWED} dB lost; keep the first or the last layer in fp32 by --keep")
    return 0
