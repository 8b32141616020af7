"""Networks for other runtimes: ONNX files that take any picture size, checked against PyTorch before they are kept."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoints, runtime

TOLERANCE = 1e-4  # largest difference of two values, where 1 is white
CHECKED = ((1, 17, 29), (2, 64, 48))  # batch, height and width of the pictures compared; the export itself sees others
KEY = "nbhelpers"  # of the entry in the file's metadata


class ExportError(RuntimeError):
    """A network that cannot become an ONNX file, or whose file does not compute what the network does."""


class OnnxUpscaler(nn.Module):
    """A file written by :func:`export_onnx` as one of our upscalers: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale".

    ONNX Runtime computes on the CPU in fp32, whatever precision is asked for, with as many threads as torch has when
    the file is opened. ``info`` is the file's metadata. Raises ValueError for a file that ONNX Runtime cannot read or
    that :func:`export_onnx` did not write, FileNotFoundError for none.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        import onnxruntime

        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no class of their own
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{Path(path).name} is not a readable ONNX file ({reason})") from error
        found = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if found is None:
            raise ValueError(f"{Path(path).name} does not say its scale; it was not made by `nbhelpers export`")
        self.info: dict[str, object] = json.loads(found)
        self.scale, self.halo, self.grid = (self.info[key] for key in ("scale", "halo", "grid"))

    def forward(self, x: Tensor) -> Tensor:
        (out,) = self.session.run(None, {"lr": x.detach().float().cpu().contiguous().numpy()})
        return torch.from_numpy(out).to(x.device)


def export_onnx(model: str | Path, path: str | Path) -> dict[str, object]:
    """Write a trained network as ONNX: "lr" "b 3 h w" in [0, 1] → "sr" "b 3 h·scale w·scale" unclamped, any b, h, w.

    ``model`` is a name or a weight file as :func:`nbhelpers.checkpoints.load` takes it. The file holds its weights,
    and as metadata (a JSON object under "nbhelpers") name, scale, halo, grid and the SHA-256 of the weight file. It
    appears under ``path`` only if ONNX Runtime gives PyTorch's values to 1e-4 at two sizes; the largest ``difference``
    is returned beside the metadata.

    Raises ValueError for another suffix than .onnx or a network that is no upscaler, CheckpointError for a network
    that cannot be loaded, ExportError where PyTorch cannot export it or the values differ.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"cannot write {path}: name the file *.onnx")
    network = checkpoints.load(model)
    if not hasattr(network, "scale"):
        raise ValueError(f"{str(model)!r} is a {type(network).__name__}, not an upscaler; choose one from `list`")
    source = Path(model) if Path(model).is_file() else runtime.CHECKPOINTS / f"{model}.safetensors"
    info = {"name": source.stem, "scale": network.scale, "halo": network.halo}
    info |= {"grid": getattr(network, "grid", 1), "sha256": checkpoints.sha256(source)}
    program = _to_onnx(network, str(model))
    program.model.metadata_props[KEY] = json.dumps(info)
    with runtime.atomic_path(path) as part:
        program.save(part, external_data=False)
        return info | {"difference": _check(network, OnnxUpscaler(part), str(model))}


def _to_onnx(network: nn.Module, name: str) -> torch.onnx.ONNXProgram:
    shape = {0: "batch", 2: "height", 3: "width"}
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                network,
                (torch.rand(2, 3, 25, 34),),
                dynamo=True,
                dynamic_shapes=(shape,),
                input_names=["lr"],
                output_names=["sr"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]  # its own text says only which step failed
        raise ExportError(f"PyTorch cannot export {name!r} to ONNX: {reason}") from error


@torch.no_grad()
def _check(network: nn.Module, exported: nn.Module, name: str) -> float:
    """Largest difference of two networks over random pictures; ExportError above ``TOLERANCE``."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, h, w in CHECKED:
        x = torch.rand(batch, 3, h, w, generator=generator)
        difference = float((network(x) - exported(x)).abs().max())
        if not difference <= TOLERANCE:  # also NaN
            raise ExportError(
                f"the ONNX file of {name!r} differs from PyTorch by {difference:.2g} at {h}x{w} pixels, more than "
                f"{TOLERANCE:g}; it was not kept"
            )
        worst = max(worst, difference)
    return worst


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers export MODEL -o FILE.onnx``."""
    info = export_onnx(args.model, args.output)
    sizes = " and ".join(f"{h}x{w}" for _, h, w in CHECKED)
    print(f"{info['name']} x{info['scale']} written to {args.output}")
    print(f"checked at {sizes} pixels: at most {info['difference']:.1e} from PyTorch (1 is white)")
    return 0
