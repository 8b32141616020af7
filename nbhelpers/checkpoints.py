"""Trained networks on disk: ``NAME.safetensors`` + card ``NAME.json`` + training history ``NAME.csv``."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from . import models, runtime
from .models.external import SUFFIXES, load_external

EXPORTED = (".onnx", ".pt2")


class CheckpointError(ValueError):
    """A network file that is missing, damaged, or of another architecture; the message says which and why."""


def _folder(folder: Path | None) -> Path:
    return Path(folder) if folder else runtime.CHECKPOINTS


def available(folder: Path | None = None, kind: str | None = "upscaler") -> list[str]:
    """Names of all networks of a kind with weights and a card, sorted.

    Kinds: ``upscaler``, ``discriminator``, ``classifier``; None: any.
    """
    names = sorted(p.stem for p in _folder(folder).glob("*.safetensors") if p.with_suffix(".json").is_file())
    return names if kind is None else [n for n in names if _kind(n, folder) == kind]


def _kind(name: str, folder: Path | None) -> str:
    try:
        return card(name, folder).get("kind", "upscaler")
    except CheckpointError:
        return "upscaler"  # a damaged card stays in the list, so that loading it says what is wrong


def _paths(name: str | Path, folder: Path | None) -> tuple[Path, Path]:
    given = Path(name)
    weights = given if given.suffix.lower() in SUFFIXES else _folder(folder) / f"{name}.safetensors"
    if weights.is_file():
        return weights, weights.with_suffix(".json")
    if given.is_file():
        known = ", ".join((*SUFFIXES, *EXPORTED))
        raise CheckpointError(f"{given.name} is no network file that is known here; their names end in {known}")
    names = available(folder, None)
    near = get_close_matches(given.stem, names)
    if weights == given and not near:
        raise CheckpointError(f"no such file: {name}")
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {names}"
    raise CheckpointError(f"no network {str(name)!r}; {hint}")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    name: str,
    model: nn.Module,
    arch: str,
    arguments: Mapping[str, object],
    card: Mapping[str, object],
    history: Iterable[Mapping[str, object]],
    folder: Path | None = None,
    half: bool = False,
) -> Path:
    """Write weights, history and card atomically, the card last; returns the weights' path.

    ``half`` stores floating-point tensors in half precision, which halves the file; they are read back as fp32.
    The card gets the architecture, its arguments, parameter count and the weights' SHA-256 beside what is given.
    """
    path = _folder(folder) / f"{name}.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    with runtime.atomic_path(path) as part:
        part.write_bytes(to_bytes(state))  # save_file would make the file readable to its owner only
    if rows := list(history):
        runtime.write_csv(path.with_suffix(".csv"), rows)
    full = {
        "name": name,
        "arch": arch,
        "arguments": dict(arguments),
        "parameters": models.count_parameters(model),
        **card,
        "sha256": sha256(path),
    }
    with runtime.atomic_path(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def card(name: str | Path, folder: Path | None = None) -> dict:
    """The card of a network as a dictionary."""
    _, path = _paths(name, folder)
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing beside the weights; it says how to build the network") from None
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{path.name} is not valid JSON ({error})") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{path.name} is not a card: it holds a JSON {type(info).__name__}, not an object")
    return info


def history(name: str, folder: Path | None = None) -> list[dict[str, float]]:
    """Rows of the training history; empty cells become NaN. Raises CheckpointError where there is none."""
    weights, _ = _paths(name, folder)
    path = weights.with_suffix(".csv")
    if not path.is_file():
        raise CheckpointError(f"network {str(name)!r} has no training history: {path.name} is missing")
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: float(v) if v else float("nan") for k, v in row.items()} for row in csv.DictReader(file)]


def load(
    name: str | Path, device: str | torch.device = "cpu", folder: Path | None = None, check: bool = True
) -> nn.Module:
    """Build the network its card describes and fill in the weights; in eval mode, without gradients.

    ``name`` is one of :func:`available`, a path to a ``.safetensors`` file with its card beside it, an ``.onnx`` or
    ``.pt2`` file of ours (:mod:`nbhelpers.deploy`; open only those ``.pt2`` files whose maker you trust), or a weight
    file of a published network (ESRGAN, SwinIR …; see :mod:`nbhelpers.models.external`).
    Raises CheckpointError for a missing or damaged file, a wrong SHA-256 (``check``) or other architecture.
    """
    if Path(name).suffix.lower() in EXPORTED:
        return _load_exported(Path(name))
    weights, card_file = _paths(name, folder)
    if weights.suffix != ".safetensors" or (Path(name).suffix and not card_file.is_file()):
        try:
            return load_external(weights).to(device)
        except ValueError as error:
            hint = "" if card_file.is_file() else f"; our own networks have a card, {card_file.name}, beside them"
            raise CheckpointError(f"{error}{hint}") from error
    info = card(name, folder)
    if check and info.get("sha256") and sha256(weights) != info["sha256"]:
        raise CheckpointError(f"{weights.name} does not match the SHA-256 in its card: damaged or changed")
    try:
        model = models.build(info["arch"], _registry(info.get("kind")), **info["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the card of {weights.stem} cannot be built: {error}") from error
    load_weights(model, weights)
    return model.to(device).eval().requires_grad_(False)


def _registry(kind: str | None) -> Mapping[str, Callable[..., nn.Module]]:
    if kind == "classifier":
        from .models.resnet import CLASSIFIERS  # which takes torchvision's time

        return CLASSIFIERS
    return models.DISCRIMINATORS if kind == "discriminator" else models.REGISTRY


def _load_exported(path: Path) -> nn.Module:
    from . import deploy, deploy_scales  # which import this file

    kind = deploy_scales.ExportedScales if deploy_scales.is_part(path) else deploy.FORMATS[path.suffix.lower()]
    try:
        return kind(path).eval()
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{Path(path).name} is not a readable safetensors file ({error})") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file; raises CheckpointError naming the first tensors that do not fit."""
    state = _read(path)
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, the network needs {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{Path(path).name} holds another architecture than {type(model).__name__}: "
            + "; ".join(problems[:3])
            + more
        )
    model.load_state_dict(state)


def copy_matching(model: nn.Module, name: str | Path, folder: Path | None = None) -> list[str]:
    """Warm start: copy from a trained network every tensor of the same name and shape; returns their names.

    A network with an ``encoder`` also takes the tensors that have their names there. Raises CheckpointError when
    nothing matches, and for a file that cannot be read.
    """
    weights, _ = _paths(name, folder)
    own, donor = model.state_dict(), _read(weights)
    donor = {f"encoder.{k}": v for k, v in donor.items()} | donor
    state = {k: v for k, v in donor.items() if k in own and own[k].shape == v.shape}
    if not state:
        raise CheckpointError(f"no tensor of {weights.stem} has the name and shape of one in {type(model).__name__}")
    model.load_state_dict(own | state)
    return sorted(state)


@functools.lru_cache(maxsize=16)
def cached(name: str, device: str = "cpu") -> nn.Module:
    """Like :func:`load`, but each network is read once; for panels and notebooks. Do not train the result."""
    return load(name, device)
