"""What first weights do before any training: signal and gradient by depth, singular values (claims M2-M4).

Part of ``python -m nbhelpers study m23_init``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..initialization import M23_FAMILY, initialise
from ..m23 import as_matrix, m23_spectrum, nearest_unitary, phase_matrix
from ..models.plain import ACTIVATIONS
from . import Row, Study

# name: (initialiser, the same weights for layers of one shape, gain)
STARTS: dict[str, tuple[str, bool, float]] = {
    "M23": ("m23", True, 1.0),  # the document's
    "M23, independent": ("m23", False, 1.0),
    "M23 of 40": ("m23_forty", True, 1.0),
    "M23 of 40, independent": ("m23_forty", False, 1.0),
    "M23 of the program": ("m23_code", True, 1.0),
    "random spectrum": ("random_spectrum", True, 1.0),
    "random spectrum, independent": ("random_spectrum", False, 1.0),
    "Re(Haar)": ("haar_real", False, 1.0),
    "0.707 orthogonal": ("orthogonal", False, 0.7071),
    "Gaussian with M23's row norms": ("row_norm_gaussian", False, 1.0),
    "orthogonal": ("orthogonal", False, 1.0),
    "orthogonal, shared": ("orthogonal", True, 1.0),
    "delta-orthogonal": ("delta_orthogonal", False, 1.0),
    "Xavier": ("xavier", False, 1.0),
    "He": ("he", False, 1.0),
    "He, shared": ("he", True, 1.0),
    "PyTorch default": ("default", False, 1.0),
}
DEPTHS = (8, 24, 100, 1000)
SHAPES = ("52x3x3x3", "52x52x3x3", "13x13x3x3", "13x52x1x1", "48x52x3x3", "80x80x3x3", "256x256x1x1")
TORUS = 16  # side of the picture whose convolution's singular values are taken
SMALL = 1e-12  # relative size of the perturbation


@dataclass
class Settings:
    """One run: an initialiser with its options, for the stack of layers or (``shape``) for a single one."""

    seed: int = 0
    init: str = "m23"
    shared: bool = True
    gain: float = 1.0
    channels: int = 48
    side: int = 6
    depths: list[int] = field(default_factory=lambda: list(DEPTHS))
    shape: str = ""


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """``Settings`` with ``key=value`` overrides, types checked by OmegaConf."""
    return OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(list(overrides)))


def options(start: tuple[str, bool, float], prefix: str = "") -> list[str]:
    """A value of ``STARTS`` as overrides of the keys init, shared and gain."""
    return [f"{prefix}{key}={value}" for key, value in zip(("init", "shared", "gain"), start, strict=True)]


# --- Signal and gradient ----------------------------------------------------------------------------------


def weights(cfg: DictConfig) -> list[Tensor]:
    """Weights (float64) of as many 3x3 convolutions as the deepest network has."""
    c = cfg.channels
    layers = nn.Sequential(*(nn.Conv2d(c, c, 3, bias=False) for _ in range(max(cfg.depths))))
    initialise(layers, cfg.init, cfg.seed, cfg.shared, cfg.gain)
    return [layer.weight.detach().double() for layer in layers]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight)  # on a torus: no border takes anything away


def norms_by_depth(
    kernels: Sequence[Tensor], x: Tensor, activation: str, residual: bool, depths: Sequence[int], seed: int = 0
) -> dict[int, tuple[float, float]]:
    """log10 of what the first ``depth`` layers do to the norm of a signal, and back to that of a gradient.

    ``x`` is "1 c h w" float64; residual networks add x after every second layer. The gradient is that of a random
    direction at the output. A signal that has vanished altogether counts as -300.
    """
    act, out, log_scale = ACTIVATIONS[activation](), {}, 0.0
    start = h = (x / x.norm()).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    for depth, kernel in enumerate(kernels[: max(depths)], start=1):
        if not residual:
            h = act(_convolve(h, kernel))
        elif depth % 2:
            inner = act(_convolve(h, kernel))
        else:
            h = h + _convolve(inner, kernel)
        if activation != "tanh" and not (residual and depth % 2):
            # These networks scale with their input, so it can be kept at norm 1 where numbers would over- or underflow.
            size = h.detach().norm().clamp_min(1e-300)
            h, log_scale = h / size, log_scale + math.log10(size)
        if depth in depths:
            away = torch.randn(h.shape, dtype=h.dtype, generator=generator)
            (back,) = torch.autograd.grad(h, start, away / away.norm(), retain_graph=depth < max(depths))
            out[depth] = _log10(h.detach(), log_scale), _log10(back, log_scale)
    return out


def _log10(x: Tensor, log_scale: float) -> float:
    return max(-300.0, math.log10(x.norm().clamp_min(1e-300)) + log_scale)


def signal(cfg: DictConfig) -> Row:
    """One row: signal and gradient of the plain and the residual network, three activations, all depths."""
    started, kernels, row = time.perf_counter(), weights(cfg), {}
    generator = torch.Generator().manual_seed(cfg.seed)
    x = torch.randn(1, cfg.channels, cfg.side, cfg.side, dtype=torch.float64, generator=generator)
    for residual in (False, True):
        for activation in ACTIVATIONS:
            found = norms_by_depth(kernels, x, activation, residual, cfg.depths, cfg.seed)
            for depth, values in found.items():
                name = f"{'residual' if residual else 'plain'}_{activation}_{depth}"
                row |= {f"{name}_{k}": round(v, 3) for k, v in zip(("signal", "gradient"), values, strict=True)}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


# --- Single layers ----------------------------------------------------------------------------------------


def operator_values(weight: Tensor, side: int = TORUS) -> Tensor:
    """Singular values of a convolution (out, in, k, k) of stride 1 on pictures of side x side, without borders.

    The Fourier transform splits it into one small matrix for each frequency (Sedghi, Gupta, Long 2019); those of the
    other half plane are conjugates and left out.
    """
    side = 1 if weight.shape[-1] == 1 else side
    return torch.linalg.svdvals(torch.fft.rfft2(weight.double(), s=(side, side)).permute(2, 3, 0, 1))


def layer(cfg: DictConfig) -> Row:
    """One row: singular values of the kernel as a matrix and of the convolution; for M23 what its SVD had to do.

    ``rank`` is that of the complex matrix before orthogonalisation, ``moved`` the largest change of a weight when that
    matrix is changed by 1e-12 of its size: rounding decides a weight where it is large.
    """
    out, inputs, k, _ = (int(n) for n in cfg.shape.split("x"))
    conv = nn.Conv2d(inputs, out, k, bias=False)
    initialise(conv, cfg.init, cfg.seed, cfg.shared, cfg.gain)
    kernel = conv.weight.detach().double().flatten(1)
    row: Row = {"distinct_rows": len(torch.unique(kernel.round(decimals=5), dim=0))}
    for name, values in (("kernel", torch.linalg.svdvals(kernel)), ("operator", operator_values(conv.weight.detach()))):
        high, low = float(values.max()), float(values.min())
        # Below single precision's noise the layer loses a direction altogether.
        condition = round(high / low, 2) if low > 1e-6 * high else math.inf
        row |= {f"{name}_max": round(high, 4), f"{name}_min": round(low, 4), f"{name}_condition": condition}
        row[f"{name}_rms"] = round(float(values.square().mean().sqrt()), 4)
    return row | _before_svd(cfg, *as_matrix(conv.weight))


def _before_svd(cfg: DictConfig, rows: int, columns: int) -> Row:
    if cfg.init not in M23_FAMILY:
        return {"rank": "", "moved": ""}
    chosen = M23_FAMILY[cfg.init]
    count = 40 if chosen.get("reading") == "forty" else columns
    matrix = phase_matrix(m23_spectrum(count, None if cfg.shared else cfg.seed, **chosen), rows, columns)
    noise = torch.randn(matrix.shape, dtype=matrix.dtype, generator=torch.Generator().manual_seed(cfg.seed))
    changed = nearest_unitary(matrix + SMALL * noise * matrix.norm() / noise.norm()).real
    moved = float((changed - nearest_unitary(matrix).real).abs().max())
    return {"rank": int(torch.linalg.matrix_rank(matrix, rtol=1e-10)), "moved": float(f"{moved:.1e}")}


def _measure(row: Row, cfg: DictConfig) -> dict[str, list[Row]]:
    return {"": [row]}


_study = functools.partial(Study, experiment=None, measure=_measure, compose=compose)
SIGNAL = _study(
    "m23_signal",
    variants={name: options(start) for name, start in STARTS.items()},
    seeds=range(5), train=signal, quick=["depths=[8,24]"],
)  # fmt: skip
LAYERS = _study(
    "m23_layers",
    variants={f"{name}: {shape}": [*options(s), f"shape={shape}"] for name, s in STARTS.items() for shape in SHAPES},
    seeds=range(3), train=layer, quick=(),
)  # fmt: skip
