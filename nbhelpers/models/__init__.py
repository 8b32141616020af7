"""Networks by name: one file per family, plain ``nn.Module`` classes with typed keyword arguments.

An upscaler takes "b 3 h w" in [0, 1] and returns the enlarged picture unclamped; it has ``scale`` (int) and
``halo`` (radius of its receptive field in input pixels, or None where it is global).
"""

from __future__ import annotations

import inspect

from torch import nn

from .espcn import ESPCN

REGISTRY: dict[str, type[nn.Module]] = {"ESPCN": ESPCN}


def build(arch: str, **kwargs: object) -> nn.Module:
    """Make an untrained network. Raises ValueError for an unknown name or argument, listing what exists."""
    if arch not in REGISTRY:
        raise ValueError(f"architecture {arch!r} is unknown; choose one of {sorted(REGISTRY)}")
    allowed = list(inspect.signature(REGISTRY[arch]).parameters)
    if unknown := sorted(set(kwargs) - set(allowed)):
        raise ValueError(f"{arch} has no argument {unknown}; it takes {allowed}")
    return REGISTRY[arch](**kwargs)


def count_parameters(model: nn.Module) -> int:
    """Weights and biases of a network; frozen ones count, fixed kernels (buffers) do not."""
    return sum(p.numel() for p in model.parameters())
