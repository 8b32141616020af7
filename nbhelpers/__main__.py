"""Command line: ``python -m nbhelpers COMMAND --help``. Every command imports only what it needs."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

DESCRIPTION = "Super-Resolution Workbook: train, evaluate and use the networks of the notebooks."


def _add_inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tile", type=int, help="tile side in input pixels; 0 = whole picture (default: automatic)")
    parser.add_argument("--overlap", type=int, help="pixels seen around a tile (default: receptive field, seam-free)")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: cpu)", default="cpu")
    text = "arithmetic; auto takes the fast one of this machine (default: fp32, reproducible)"
    parser.add_argument("--precision", default="fp32", choices=["auto", "fp32", "bf16", "fp16"], help=text)


def scale(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.lower().split("x"))
    return height, width


def _inference_options(args: argparse.Namespace) -> dict:
    return {k: getattr(args, k) for k in ("tile", "overlap", "device", "precision")}


def _train(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from . import runtime, training
    from .experiments import compose

    cfg = compose(overrides=args.overrides)
    if args.show:
        print(OmegaConf.to_yaml(cfg, resolve=True), end="")
        return 0
    command = " ".join(["python -m nbhelpers train", *args.overrides])
    result = training.train(cfg, command)
    if not training.is_main_process():
        return 0
    kept = f"{cfg.keep} validation PSNR-Y {result.kept['val_psnr_y']:.2f} dB"
    print(f"{cfg.name}: {kept} after {result.seconds:.0f} s of training")
    beside = "" if result.discriminator is None else f" and {cfg.name}_discriminator"
    print(f"written: {runtime.CHECKPOINTS / cfg.name}.safetensors, .json, .csv{beside}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .inference import evaluate

    options = _inference_options(args) | {"lpips": not args.no_lpips, "progress": not args.json}
    result = evaluate(args.model, args.hr, args.lr, args.scale, **options)
    for message in result["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    if args.json:
        keys = ("model", "scale", "protocol", "images", "mean", "skipped", "notes")
        print(json.dumps({k: _finite(result[k]) for k in keys}, ensure_ascii=False))
    else:
        _print_evaluation(result, not args.no_lpips)
    return 1 if result["skipped"] else 0


def _finite(value: object) -> object:
    """JSON knows neither infinity nor NaN: the PSNR of two equal pictures becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_evaluation(result: dict, lpips: bool) -> None:
    from .metrics import NAMES

    keys = [k for k in result["mean"] if lpips or k != "lpips"]
    width = max(len(n) for n in [*result["images"], "mean"])
    print(f"{result['model']}".ljust(width) + "".join(f"{NAMES[k]:>16}" for k in keys))
    for name, row in [*result["images"].items(), ("mean", result["mean"])]:
        cells = ["–" if row[k] is None else f"{row[k]:.2f}" if "psnr" in k else f"{row[k]:.4f}" for k in keys]
        print(name.ljust(width) + "".join(f"{c:>16}" for c in cells))
    print(result["protocol"], *result["notes"], sep="\n")


def _upscale(args: argparse.Namespace) -> int:
    from .inference import AnyBicubic, get_model, plan_outputs, upscale_files

    plan = plan_outputs(args.inputs, args.output, args.format)
    if not plan:
        raise FileNotFoundError(f"no pictures in {', '.join(map(str, args.inputs))}")
    options, any_scale = _inference_options(args), args.size is not None and args.model == "bicubic"
    model = AnyBicubic(1) if any_scale else get_model(args.model, args.scale)
    report = upscale_files(model, plan, args.skip_existing, **options, size=args.size)
    there = f", {report.existing} were there already" if report.existing else ""
    print(f"{len(report.written)} of {len(plan)} pictures written to {args.output} in {report.seconds:.1f} s{there}")
    if report.skipped:
        print(f"{len(report.skipped)} skipped:", *report.skipped, sep="\n  ", file=sys.stderr)
    return 1 if report.skipped else 0


def _list(args: argparse.Namespace) -> int:
    from . import checkpoints

    cards = [checkpoints.card(name, args.folder) for name in checkpoints.available(args.folder)]
    if args.json:
        print(json.dumps(cards, ensure_ascii=False))
        return 0
    print(f"{'name':<28}{'architecture':<16}{'scale':>6}{'parameters':>12}{'val PSNR-Y':>12}")
    for c in cards:
        score = c.get("metrics", {}).get("val_psnr_y")
        text = "–" if score is None else f"{score:.2f}"
        scale = "–".join(f"{s:g}" for s in c["scales"]) if "scales" in c else c.get("scale", "–")
        print(f"{c['name']:<28}{c['arch']:<16}{scale:>6}{c['parameters']:>12,}{text:>12}")
    return 0


def _study(args: argparse.Namespace) -> int:
    from .studies import run

    return run(args.name, fresh=args.fresh, quick=args.quick)


def _download(args: argparse.Namespace) -> int:
    if args.name == "lpips":
        from .metrics import download_lpips

        print(download_lpips(args.target))
    elif args.name == "vgg16":
        from .features import download_vgg16

        print(download_vgg16(target=args.target))
    else:
        from .datasets.download import fetch

        print(fetch(args.name, args.target))
    return 0


def _damage(args: argparse.Namespace) -> int:
    from . import degradation

    return degradation.run(args)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _run_module(name: str, args: argparse.Namespace) -> int:
    return _module(name).run(args)


# Commands whose module declares their options and runs them; it is imported for that command only.
MODULES = {
    "benchmark": ("benchmark", "networks side by side: parameters, FLOPs, speed and memory, by part"),
    "classify": ("classify_cli", "picture classifiers: train, sweep, evaluate, infer, tracked runs"),
    "export": ("deploy", "write a network as ONNX or torch.export program, checked against PyTorch"),
    "quantize": ("quantization", "write a network as ONNX file with 8-bit weights"),
    "prune": ("pruning", "make a narrower network of a trained one, and train it on"),
    "readme": ("readme", "make README.md's tables and picture again from committed results"),
    "tiles": ("datasets.tiles", "cut folders of photos into lossless training tiles"),
}
SCALE = "needed for bicubic, free (2.7) for networks for any scale, otherwise checked against the network"
MODEL = (
    "name from `list`, a file (.safetensors, .onnx, .pth of ESRGAN, SwinIR …; .pt2 if you trust its maker), or bicubic"
)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; given the command to run, options that need torch are declared for that one only."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("list", help="trained networks in data/checkpoints")
    p.add_argument("--folder", type=Path, help="another folder with networks")
    p.add_argument("--json", action="store_true", help="print the cards as one JSON list")
    p.set_defaults(run=_list)

    p = commands.add_parser("upscale", help="enlarge pictures and folders of pictures")
    p.add_argument("inputs", nargs="+", metavar="IN", help="files or folders (folders recursively)")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="folder, or a file for a single input file")
    p.add_argument("--model", default="espcn_x4", help=MODEL)
    how_large = p.add_mutually_exclusive_group()
    how_large.add_argument("--scale", type=scale, help=SCALE)
    text = "pixels of each result, for networks for any scale and bicubic; the shape may change"
    how_large.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help=text)
    p.add_argument("--format", default=".png", choices=[".png", ".jpg", ".webp", "same"], help="default: %(default)s")
    p.add_argument("--skip-existing", action="store_true", help="continue an interrupted folder run")
    _add_inference(p)
    p.set_defaults(run=_upscale)

    p = commands.add_parser("evaluate", help="PSNR-Y, SSIM-Y, PSNR-RGB, LPIPS over a folder of originals")
    p.add_argument("--model", required=True, help=MODEL)
    p.add_argument("--hr", required=True, help="folder of originals")
    p.add_argument("--lr", help="folder of matching small pictures (default: made by MATLAB-style bicubic)")
    p.add_argument("--scale", type=scale, help=SCALE)
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument("--no-lpips", action="store_true", help="leave LPIPS out (faster)")
    _add_inference(p)
    p.set_defaults(run=_evaluate)

    p = commands.add_parser(
        "train",
        help="train a network: experiment=NAME key=value …",
        epilog='example: python -m nbhelpers train experiment=espcn_x4 name=mine "data.roots=[my/photos]"',
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=NAME and any key that --show prints")
    p.add_argument("--show", action="store_true", help="print the whole configuration and stop")
    if command in (None, "train"):
        from .configs import experiments

        p.epilog += f"; experiments: {', '.join(experiments())}"
    p.set_defaults(run=_train)

    p = commands.add_parser("study", help="run a notebook's controlled comparison; results go to data/results")
    p.add_argument(
        "name",
        help="set5 (README's table); the notebooks' espcn, vgg, pooling, gan, rrdb, m23_init, erblock, damaged, "
        "deployment, cmsr, block_orthogonal, block_orthogonal_full, lmf, lmf_cost, lmf_scales, scoreboard",
    )
    p.add_argument("--fresh", action="store_true", help="drop finished runs and start again (default: resume)")
    p.add_argument("--quick", action="store_true", help="a few steps per run, written to runs/, to see that it works")
    p.set_defaults(run=_study)

    p = commands.add_parser("download", help="fetch a data set or weights, hash-checked")
    p.add_argument("name", choices=["div2k_train", "div2k_valid", "flowers102", "lpips", "vgg16"])
    p.add_argument("--target", type=Path, help="folder (default: runs/downloads/NAME; lpips, vgg16: the torch cache)")
    p.set_defaults(run=_download)

    for name, (module, text) in MODULES.items():
        p = commands.add_parser(name, help=text)
        if command in (None, name):
            _module(module).add_arguments(p)
        p.set_defaults(run=functools.partial(_run_module, module))

    p = commands.add_parser(
        "damage", help="small, damaged pictures of photos (blur, resize, noise, JPEG), as test sets"
    )
    p.add_argument("inputs", nargs="+", metavar="IN", help="files or folders (folders recursively)")
    p.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="folder, or a .png file for a single input file"
    )
    p.add_argument("--scale", type=int, default=4, help="how much smaller (default: %(default)s)")
    p.add_argument("--preset", default="real_esrgan", help="real_esrgan, light, or a .yaml file (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="another seed, other damage (default: 0, training's validation)")
    p.set_defaults(run=_damage)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on stderr and exit code 2, Ctrl-C becomes 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv[0] if argv else "").parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}".removesuffix(": "), file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, RuntimeError, OSError) as error:
        if type(error) is RuntimeError:  # a bug or a torch error: the traceback is what helps
            raise
        lines = str(error).strip().splitlines()
        # A DataLoader worker hands over its whole traceback; the last line is what went wrong.
        text = lines[-1] if "Original Traceback" in str(error) else " ".join(lines)
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
