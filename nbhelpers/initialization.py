"""First weights of a network by name: document 000's M23 construction and its rivals, behind one interface.

initialise(network, "m23")           # layers of one shape get the same weights, as the document has it
initialise(network, "he", seed=3)    # each layer its own
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .m23 import as_matrix, check_weight, extend, m23_init_tensor, m23_spectrum, m23_values, unitary_factor

__all__ = ["INITIALISERS", "initialise", "m23_init_tensor", "m23_spectrum", "m23_values"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Rule = Callable[[Tensor, int | None], object]


def _drawn(draw: Callable[..., Tensor], **options: object) -> Rule:
    """A rule from a function of ``torch.nn.init``; drawn on the CPU, so that every device gets the same numbers."""

    def rule(weight: Tensor, seed: int) -> None:
        weight.copy_(draw(torch.empty(weight.shape), generator=_generator(seed), **options))

    return rule


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_spectrum(weight: Tensor, seed: int) -> None:
    """M23's construction, from 40 complex Gaussian numbers in the place of the algebra's."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(40) + 1j * rng.standard_normal(40)
    fan_out, fan_in = as_matrix(weight)
    device = weight.device if weight.is_cuda else "cpu"
    weight.copy_(unitary_factor(extend(values, fan_in), fan_out, fan_in, device).real.reshape(weight.shape))


def haar_real(weight: Tensor, seed: int) -> None:
    """Real part of a random (semi-)unitary matrix, uniform by Haar measure."""
    short, long = sorted(as_matrix(weight))
    q, r = torch.linalg.qr(torch.randn(long, short, dtype=torch.complex128, generator=_generator(seed)))
    q = (q * r.diagonal().sgn()).real  # the phases make the QR unique, and so the measure uniform (Mezzadri 2007)
    weight.copy_((q if as_matrix(weight)[0] == long else q.T).reshape(weight.shape))


def row_norm_gaussian(weight: Tensor, seed: int) -> None:
    """Gaussian rows, each as long as M23's row in its place: M23's scale without its directions."""
    shape = as_matrix(weight)
    rows = torch.randn(shape, dtype=torch.float64, generator=_generator(seed))
    weight.copy_((rows * (_m23_row_norms(shape) / rows.norm(dim=1))[:, None]).reshape(weight.shape))


@functools.lru_cache(maxsize=32)
def _m23_row_norms(shape: tuple[int, int]) -> Tensor:
    return m23_init_tensor(torch.empty(shape, dtype=torch.float64)).norm(dim=1)


def delta_orthogonal(weight: Tensor, seed: int) -> None:
    """Orthogonal centre tap, all other taps zero: the convolution is an isometry (Xiao et al. 2018).

    For a linear layer the same as ``orthogonal``.
    """
    weight.zero_()
    centre = weight[(..., *(n // 2 for n in weight.shape[2:]))]
    centre.copy_(nn.init.orthogonal_(torch.empty(centre.shape), generator=_generator(seed)))


def _m23(options: dict[str, str]) -> Rule:
    return lambda weight, seed: m23_init_tensor(weight, "orthogonal", seed, **options)


# Options of `m23_spectrum`: the document as we read it; N = 40; the published program's polynomials.
M23_FAMILY = {"m23": {}, "m23_forty": {"reading": "forty"}, "m23_code": {"polynomials": "code"}}
_he = _drawn(nn.init.kaiming_normal_, nonlinearity="relu")
INITIALISERS: dict[str, Rule] = {
    "default": _drawn(nn.init.kaiming_uniform_, a=math.sqrt(5)),  # PyTorch's own, with its random biases
    "xavier": _drawn(nn.init.xavier_uniform_),
    "he": _he,
    "orthogonal": _drawn(nn.init.orthogonal_),
    "delta_orthogonal": delta_orthogonal,
    "fixup": _he,  # and what `_fixup` does to residual branches
    "haar_real": haar_real,
    "row_norm_gaussian": row_norm_gaussian,
    "random_spectrum": random_spectrum,
    **{name: _m23(options) for name, options in M23_FAMILY.items()},
}


@torch.no_grad()
def initialise(
    module: nn.Module, name: str = "m23", seed: int | None = 0, shared: bool | None = None, gain: float = 1.0
) -> nn.Module:
    """Set the weights of all linear and convolutional layers in place, and their biases to zero; returns ``module``.

    Args:
        name: one of ``INITIALISERS``. ``default`` draws the biases, too, as PyTorch does. ``fixup`` needs residual
            blocks with their branch in an attribute ``branch`` (Zhang et al. 2019, without its scalar parameters): the
            last layer of each branch is zero, the m layers of L branches are He's times L^(-1/(2m-2)).
        seed: decides the weights together with ``shared``; None draws it from torch's global generator.
        shared: True gives layers of one shape the same weights; for the M23 family they are the document's
            deterministic ones, whatever the seed. False gives each layer weights of its own, M23's by another order of
            the spectrum. None: what the source means, True for the M23 family and False for all others.
        gain: number above 0 that all weights are multiplied by. M23's real part keeps half of the signal's energy; √2
            gives it back, and 2 does the same before a ReLU.

    A weight that several layers use is set once. Other layers (normalisations, embeddings) keep their values.
    Raises ValueError for an unknown name, a gain not above 0, a network without such layers, and ``fixup`` without
    branches.
    """
    if name not in INITIALISERS:
        raise ValueError(f"initialiser {name!r} is unknown; choose one of {list(INITIALISERS)}")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain={gain} must be a number above 0")
    layers = _layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to initialise")
    family = name in M23_FAMILY
    shared = family if shared is None else shared
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    made: dict[object, Tensor] = {}
    for i, layer in enumerate(layers):
        weight = layer.weight
        check_weight(weight)
        own = seed if shared else int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        key = weight.shape if shared else id(weight)
        if key in made:
            weight.copy_(made[key])
        else:
            INITIALISERS[name](weight, None if shared and family else own)
            made[key] = weight.mul_(gain)
        _set_bias(layer, own if name == "default" else None)
    if name == "fixup":
        _fixup(module)
    return module


def _layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, LAYERS)]


def _set_bias(layer: nn.Module, seed: int | None) -> None:
    if layer.bias is None:
        return
    layer.bias.zero_()
    if seed is not None:
        bound = 1 / math.sqrt(as_matrix(layer.weight)[1])
        noise = torch.rand(layer.bias.shape, generator=_generator(seed + 1))
        layer.bias.copy_(noise.mul_(2 * bound).sub_(bound))


def _fixup(module: nn.Module) -> None:
    branches = [_layers(m.branch) for m in module.modules() if isinstance(getattr(m, "branch", None), nn.Module)]
    if not branches:
        raise ValueError(
            f"fixup is for residual networks, and {type(module).__name__} has no block with an attribute `branch`; "
            "choose another initialiser"
        )
    for layers in branches:
        for layer in layers[:-1]:
            layer.weight.mul_(len(branches) ** (-1 / (2 * len(layers) - 2)))
        nn.init.zeros_(layers[-1].weight)
