"""Networks by name: one file per family, plain ``nn.Module`` classes with typed keyword arguments.

An upscaler takes "b 3 h w" in [0, 1] and returns the enlarged picture unclamped; it has ``scale`` (int) and
``halo`` (radius of its receptive field in input pixels, or None where it is global). One that is not the same at
every pixel has ``grid``: shifting its input by so many pixels shifts the output alike, and tiles begin there.

A network for any scale also has ``at(scale)``, the same network with another ``scale``, which may then be a fraction
or (y, x); its own ``scale`` is what it enlarges by where none is asked for. See :mod:`nbhelpers.models.continuous`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from .discriminators import DilatedDiscriminator
from .efficient_srnet import EfficientSRNet, LeanSRNet
from .espcn import ESPCN, StagedESPCN
from .external import rrdbnet
from .lmf import LIIF, LMLTE, LTE
from .plain import PlainSR
from .rlfn import M23_RLFN
from .rrdb import DilatedRRDBNet

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "DilatedRRDBNet": DilatedRRDBNet,
    "ESPCN": ESPCN,
    "EfficientSRNet": EfficientSRNet,
    "LIIF": LIIF,
    "LMLTE": LMLTE,
    "LTE": LTE,
    "LeanSRNet": LeanSRNet,
    "M23_RLFN": M23_RLFN,
    "PlainSR": PlainSR,
    "RRDBNet": rrdbnet,
    "StagedESPCN": StagedESPCN,
}
DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {"DilatedDiscriminator": DilatedDiscriminator}


def build(arch: str, registry: Mapping[str, Callable[..., nn.Module]] = REGISTRY, /, **kwargs: object) -> nn.Module:
    """Make an untrained upscaler (or a network of another registry, as DISCRIMINATORS).

    Raises ValueError for an unknown name or argument, listing what exists.
    """
    if arch not in registry:
        raise ValueError(f"architecture {arch!r} is unknown; choose one of {sorted(registry)}")
    allowed = list(inspect.signature(registry[arch]).parameters)
    if unknown := sorted(set(kwargs) - set(allowed)):
        raise ValueError(f"{arch} has no argument {unknown}; it takes {allowed}")
    return registry[arch](**kwargs)


def count_parameters(model: nn.Module) -> int:
    """Weights and biases of a network; frozen ones count, fixed kernels (buffers) do not."""
    return sum(p.numel() for p in model.parameters())
