"""Networks for other runtimes: ONNX files and torch.export programs for any picture size, checked against PyTorch."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoints, runtime

TOLERANCE = 1e-4  # largest difference of two values, where 1 is white
CHECKED = ((1, 17, 29), (2, 64, 48))  # batch, height and width of the pictures compared; the export itself sees others
KEY = "nbhelpers"  # of the entry in the file's metadata
RECIPES = """\
TensorRT (NVIDIA GPUs) builds an engine for pictures within a range of sizes, fastest at the middle one:
  trtexec --onnx=FILE.onnx --saveEngine=FILE.engine --minShapes=lr:1x3x16x16 \\
          --optShapes=lr:1x3x256x256 --maxShapes=lr:1x3x1024x1024
It fits this GPU and this version of TensorRT only. In fp16: TensorRT 10 takes the option --fp16; TensorRT 11 goes by
the types in the file, which the package nvidia-modelopt changes first:
  python -m modelopt.onnx.autocast --onnx_path FILE.onnx --output_path FILE_fp16.onnx --keep_io_types
In int8: python -m modelopt.onnx.quantization --onnx_path FILE.onnx --quantize_mode int8 --calibration_data lr.npy.
TensorRT wants zero points of 0; the files of `python -m nbhelpers quantize` have others and are for ONNX Runtime.

Phones: ONNX Runtime's packages for Android and iOS read FILE.onnx and the files of `quantize` as they are. The others
begin with program = torch.export.load("FILE.pt2") or network = nbhelpers.checkpoints.load("NAME"):
  ExecuTorch  to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
  Core ML     coremltools.convert(program.run_decompositions({}))
  LiteRT      litert_torch.convert(network, (torch.rand(1, 3, 256, 256),))
Those that plan memory ahead want the largest height and width: torch.export.export with torch.export.Dim(max=...).
"""


class ExportError(RuntimeError):
    """A network that cannot be exported, or whose file does not compute what the network does."""


class Exported(nn.Module):
    """A file written by :func:`export` as one of our upscalers: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale".

    It computes on the CPU in fp32 (or in what the file says), whatever device and precision are asked for. ``info`` is
    the file's metadata. Raises ValueError for a file that cannot be read or that :func:`export` did not write,
    FileNotFoundError for none.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        found = self._open(path)
        if found is None:
            raise ValueError(f"{path.name} does not say its scale; it was not made by `nbhelpers export`")
        self.info: dict[str, object] = json.loads(found)
        self.scale, self.halo, self.grid = (self.info[key] for key in ("scale", "halo", "grid"))

    def _open(self, path: Path) -> str | None:
        """Get ready to compute; returns the metadata."""
        raise NotImplementedError

    def compute(self, *inputs: Tensor) -> Tensor:
        """What the file makes of its inputs, fp32 on the CPU: pictures "b 3 h w"."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        pictures = x.float().cpu().contiguous()
        parts = pictures.split(1) if self.info.get("batch") == 1 else [pictures]
        return torch.cat([self.compute(part) for part in parts]).to(x.device)


class OnnxUpscaler(Exported):
    """An ONNX file, computed by ONNX Runtime with as many threads as torch has when the file is opened."""

    def _open(self, path: Path) -> str | None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would spin after each call, on cores that torch and other sessions need: two times slower on two.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no class of their own
            raise ValueError(f"{path.name} is not a readable ONNX file ({line(error)})") from error
        return self.session.get_modelmeta().custom_metadata_map.get(KEY)

    def compute(self, *inputs: Tensor) -> Tensor:
        names = [given.name for given in self.session.get_inputs()]
        (out,) = self.session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return torch.from_numpy(out)


class ProgramUpscaler(Exported):
    """A torch.export program (.pt2), computed by PyTorch.

    Only for files whose maker you trust: ``torch.export.load`` unpickles, and can load compiled libraries.
    """

    def _open(self, path: Path) -> str | None:
        try:
            with zipfile.ZipFile(path) as archive:  # first: PyTorch answers a damaged file with pages of log
                damaged = archive.testzip()
                extra = [name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")]
                found = archive.read(extra[0]).decode() if extra and not damaged else None
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path.name} is not a readable torch.export file ({error})") from error
        if damaged:
            raise ValueError(f"{path.name} is damaged ({damaged} does not match its checksum)")
        if found is not None:
            try:
                program = torch.export.load(path)
            except Exception as error:  # KeyError, RuntimeError …: whatever a file of another version runs into
                raise ValueError(
                    f"{path.name} cannot be loaded by torch {torch.__version__} ({line(error)})"
                ) from error
            # Guards refuse pictures of a few pixels, which the program computes rightly. In a tuple it is no
            # submodule: its graph is fixed to the CPU and has no training mode.
            self._program = (program.module(check_guards=False),)
        return found

    def compute(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self._program[0](*inputs)


FORMATS: dict[str, type[Exported]] = {".onnx": OnnxUpscaler, ".pt2": ProgramUpscaler}


def export(model: str | Path, path: str | Path) -> dict[str, object]:
    """Write a trained network as a file for any b, h, w: "lr" "b 3 h w" in [0, 1] → "sr" "b 3 h·scale w·scale".

    ``model`` is a name or a weight file as :func:`nbhelpers.checkpoints.load` takes it. The suffix of ``path`` chooses
    the format: .onnx, or .pt2 for a program of torch.export. The file holds its weights, and as metadata (a JSON
    object under "nbhelpers") name, scale, halo, grid and the SHA-256 of the weight file. It appears under ``path`` only
    if it gives PyTorch's values to 1e-4 at two sizes; the largest ``difference`` is returned beside the metadata.
    Values are not clamped. Where a network cannot be followed with any number of pictures (SwinIR), the file takes one
    at a time, and says so by ``batch`` 1. A network for any scale becomes two files, see
    :func:`nbhelpers.deploy_scales.export`.

    Raises ValueError for another suffix or a network that is no upscaler, CheckpointError for a network that cannot be
    loaded, ExportError where PyTorch cannot export it or the values differ.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: name the file {' or '.join(f'*{suffix}' for suffix in FORMATS)}")
    network, info = _source(model)
    if hasattr(network, "render"):
        from . import deploy_scales  # which imports this file

        return deploy_scales.export(network, path, info, str(model))
    try:
        return _export(network, path, info, str(model))
    except ExportError:
        return _export(network, path, info | {"batch": 1}, str(model))


def _export(network: nn.Module, path: Path, info: dict[str, object], name: str) -> dict[str, object]:
    x, free = _example(info)
    shapes = {dim: ("batch", "", "height", "width")[dim] for dim in free}
    with runtime.atomic_path(path) as part:
        write(network, part, info, name, {"lr": (x, shapes)}, "sr")
        difference = _check(network, FORMATS[path.suffix](part), f"{path.suffix} file of {name!r}")
    return info | {"difference": difference}


def _example(info: dict[str, object]) -> tuple[Tensor, tuple[int, ...]]:
    """Pictures to follow a network with, and which of their dimensions may be anything."""
    return (torch.rand(1, 3, 25, 34), (2, 3)) if "batch" in info else (torch.rand(2, 3, 25, 34), (0, 2, 3))


def _source(model: str | Path) -> tuple[nn.Module, dict[str, object]]:
    """The network and what its files will say about it."""
    network = checkpoints.load(model)
    if Path(model).suffix in FORMATS:
        raise ValueError(f"{str(model)!r} is an exported file already; give the network that it was made from")
    if not hasattr(network, "scale"):
        raise ValueError(f"{str(model)!r} is a {type(network).__name__}, not an upscaler; choose one from `list`")
    source = Path(model) if Path(model).is_file() else runtime.CHECKPOINTS / f"{model}.safetensors"
    info = {"name": source.stem, "scale": network.scale, "halo": network.halo}
    return network, info | {"grid": getattr(network, "grid", 1), "sha256": checkpoints.sha256(source)}


Inputs = Mapping[str, tuple[Tensor, Mapping[int, str]]]  # name: example, and names of dimensions that may be anything


def write(network: nn.Module, path: Path, info: dict[str, object], name: str, inputs: Inputs, output: str) -> None:
    """Write a network in the format of the suffix, with ``info`` as metadata; ``name`` is for errors.

    Raises ExportError where PyTorch cannot export it.
    """
    (_write_onnx if path.suffix == ".onnx" else _write_program)(network, path, info, name, inputs, output)


def _write_onnx(
    network: nn.Module, path: Path, info: dict[str, object], name: str, inputs: Inputs, output: str
) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                tuple(x for x, _ in inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple(dict(free) for _, free in inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]  # its own text says only which step failed
        raise ExportError(f"PyTorch cannot export {name!r} to ONNX: {reason}") from error
    for i, node in enumerate(program.model.graph):  # named by layer; the exporter's notes hold this machine's paths
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = f"{scopes[-2] if len(scopes) > 1 else ''}/{node.op_type}_{i}".lstrip("/")
        for noted in (node, *node.outputs):
            noted.metadata_props.clear()
    program.model.metadata_props[KEY] = json.dumps(info)
    program.save(path, external_data=False)


def _write_program(
    network: nn.Module, path: Path, info: dict[str, object], name: str, inputs: Inputs, output: str
) -> None:
    shapes = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _, free in inputs.values())
    try:
        program = torch.export.export(network, tuple(x for x, _ in inputs.values()), dynamic_shapes=shapes)
    except Exception as error:  # of many classes, from torch, its compiler and the network's own code
        raise ExportError(f"torch.export cannot follow {name!r}: {line(error)}") from error
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("stack_trace", None)  # holds this machine's paths
    with path.open("wb") as file:  # given a name, PyTorch calls the folder inside by it
        torch.export.save(program, file, extra_files={KEY: json.dumps(info)})


def line(error: Exception) -> str:
    """The beginning of an error's text, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@torch.no_grad()
def _check(network: nn.Module, exported: nn.Module, name: str) -> float:
    """Largest difference of two networks over random pictures; ExportError above ``TOLERANCE``."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, h, w in CHECKED:
        x = torch.rand(batch, 3, h, w, generator=generator)
        want = network(x)
        try:
            got = exported(x)
        except Exception as error:  # ONNX Runtime's share no class of their own
            raise ExportError(f"the {name} cannot compute {batch} pictures of {h}x{w} pixels: {line(error)}") from error
        if got.shape != want.shape:
            shapes = f"{tuple(got.shape)} for {tuple(want.shape)} of PyTorch"
            raise ExportError(f"the {name} gives shape {shapes}; it was not kept")
        difference = float((want - got).abs().max())
        if not difference <= TOLERANCE:  # also NaN
            raise ExportError(
                f"the {name} differs from PyTorch by {difference:.2g} at {h}x{w} pixels, more than "
                f"{TOLERANCE:g}; it was not kept"
            )
        worst = max(worst, difference)
    return worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m nbhelpers export``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, RECIPES
    parser.add_argument("model", metavar="MODEL", help="name from `list`, or a weight file (.safetensors, .pth)")
    text = "file to write; .pt2 is a torch.export program. Open only .pt2 files of people you trust: they can run code"
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.onnx|FILE.pt2", help=text)


def run(args: argparse.Namespace) -> int:
    """``python -m nbhelpers export MODEL -o FILE``."""
    info = export(args.model, args.output)
    files = info.get("files")
    what = f"for any scale written to {' and '.join(files)}" if files else f"x{info['scale']} written to {args.output}"
    print(f"{info['name']} {what}")
    sizes = "three sizes and scales" if files else f"{' and '.join(f'{h}x{w}' for _, h, w in CHECKED)} pixels"
    print(f"checked at {sizes}: at most {info['difference']:.1e} from PyTorch (1 is white)")
    return 0
