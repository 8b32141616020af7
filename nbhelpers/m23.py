"""Weights from a polynomial of the Mathieu group M23 (document 000): 40 values, the matrix made of them, its variants.

How a layer gets its weights: 40 complex values → as many as the layer has inputs → a complex matrix of them, each
column turned by a phase → its unitary factor (the SVD's U·Vᴴ) → the real part.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from torch import Tensor

VARIANTS = ("orthogonal", "standard", "scaled", "transformer")
READINGS = ("fan_in", "forty")
POLYNOMIALS = ("document", "code")
_G = (1, 1, 9, -10, 8)  # g⁴ + g³ + 9g² - 10g + 8
_LOCK = threading.Lock()


def _choose(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is unknown; choose one of {list(allowed)}")


def _roots(coefficients: tuple[complex, ...]) -> np.ndarray:
    """Roots of a polynomial (highest power first), by real and then by imaginary part."""
    z = np.roots(np.asarray(coefficients, complex))
    slope = np.polyder(np.asarray(coefficients, complex))
    for _ in range(4):  # Newton: companion eigenvalues are good to 1e-14 or so, and it doubles the digits
        z = z - np.polyval(coefficients, z) / np.polyval(slope, z)
    return z[np.lexsort((z.imag.round(9), z.real.round(9)))]  # rounded: conjugates have the same real part


@functools.cache
def _forty(polynomials: str) -> np.ndarray:
    values = [elkies := _roots(_G)]
    for g in elkies:
        p2 = (1, -g, 1)
        p3 = (1, 0, g, -1) if polynomials == "document" else (1, g, 0, -1)
        p4 = (1, g, 0, -(g**2 + 1), 1 / g - g if polynomials == "document" else -g)
        values += [_roots(p) for p in (p2, p3, p4)]
    found = np.concatenate(values)
    found.flags.writeable = False
    return found


def m23_values(polynomials: str = "document") -> np.ndarray:
    """The 40 values (complex128, read-only): the four g, then for each g the roots of P2, P3 and P4.

    g⁴+g³+9g²-10g+8, P2 = z²-gz+1, P3 = z³+gz-1, P4 = z⁴+gz³-(g²+1)z+(1/g-g), as document 000 has them; moduli from
    0.2868 to 3.7436. ``polynomials="code"`` takes those of the program published by the same project
    (github.com/m23spectrum/m23-spectrum), which computes two others: P3 = z³+gz²-1, and P4 ends in -g.

    Raises ValueError for unknown ``polynomials``. Any number of threads may call it at once.
    """
    _choose("polynomials", polynomials, POLYNOMIALS)
    with _LOCK:
        return _forty(polynomials)


def m23_spectrum(
    fan_in: int, seed: int | None = None, *, reading: str = "fan_in", polynomials: str = "document"
) -> np.ndarray:
    """``fan_in`` complex128 values with the largest modulus 1/√fan_in (document 000).

    The document does not say how 40 values become ``fan_in``, nor what the seed does. We offer:

    reading: ``fan_in`` takes the 40 round after round, each round turned by another multiple of a full turn divided
        by the number of rounds, so that no value comes twice (N = fan_in; the published program does so, too).
        ``forty`` takes them round after round as they are (N = 40, "40 components" read literally).
    seed: None gives the order of :func:`m23_values`, the same for every layer: the method's deterministic form.
        A number gives a random order of the same values (of the 40 for ``forty``).
    polynomials: see :func:`m23_values`.

    Raises ValueError for ``fan_in`` below 1 and for unknown options.
    """
    if isinstance(fan_in, bool) or not isinstance(fan_in, int | np.integer) or fan_in < 1:
        raise ValueError(f"fan_in={fan_in!r} must be a whole number of at least 1")
    _choose("reading", reading, READINGS)
    values = m23_values(polynomials)
    if reading == "forty":
        values = _shuffled(values, seed)[np.arange(fan_in) % len(values)]
    else:
        values = _shuffled(extend(values, fan_in), seed)
    return values / (np.abs(values).max() * math.sqrt(fan_in))


def extend(values: np.ndarray, length: int) -> np.ndarray:
    """``length`` values from fewer: round after round, round k of n turned by k/n of a full turn."""
    turn, place = np.divmod(np.arange(length), len(values))
    return values[place] * np.exp(2j * np.pi * turn / math.ceil(length / len(values)))


def _shuffled(values: np.ndarray, seed: int | None) -> np.ndarray:
    return values if seed is None else np.random.default_rng(seed).permutation(values)


# --- The matrix -------------------------------------------------------------------------------------------


def phase_matrix(values: np.ndarray | Tensor, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Complex128 (rows, columns): values[(r + c) mod N] · exp(2πi·c²/columns), N = len(values) (document 000)."""
    values = torch.as_tensor(values, device=device)
    r, c = (torch.arange(n, device=device) for n in (rows, columns))
    turn = (c * c % columns).double() * (2 * math.pi / columns)
    return values[(r[:, None] + c) % len(values)].mul_(torch.polar(torch.ones_like(turn), turn))


def unitary_factor(values: np.ndarray, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """U·Vᴴ of the SVD of :func:`phase_matrix`: orthonormal rows (wide) or columns (tall), complex128.

    Not unique where the matrix has less than full rank, as with 40 values and more than 40 rows and columns: what the
    SVD returns for the missing directions is then up to the library and the processor.
    """
    if len(values) == rows == columns:
        # Up to unitary factors the matrix is a circulant one, so its singular values are the moduli of the values'
        # discrete Fourier transform: set them to one. For 4096 x 4096 that is a second instead of minutes.
        angle = torch.fft.fft(torch.as_tensor(values, device=device)).angle()
        return phase_matrix(torch.fft.ifft(torch.polar(torch.ones_like(angle), angle)), rows, columns, device)
    return nearest_unitary(phase_matrix(values, rows, columns, device))


def nearest_unitary(matrix: Tensor) -> Tensor:
    """U·Vᴴ of the SVD of a matrix: of all with orthonormal rows or columns, the nearest to it."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def as_matrix(weight: Tensor) -> tuple[int, int]:
    """(fan_out, fan_in) of a weight: its first side, and the product of the others."""
    return weight.shape[0], math.prod(weight.shape[1:])


def check_weight(weight: Tensor) -> None:
    """Raise ValueError, quoting shape or type, for a weight without elements or without real floating point."""
    if not weight.is_floating_point():
        raise ValueError(f"a weight must be of a real floating type, not {weight.dtype} (shape {tuple(weight.shape)})")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no elements to initialise")


@torch.no_grad()
def m23_init_tensor(
    tensor: Tensor,
    variant: str = "orthogonal",
    seed: int | None = None,
    *,
    reading: str = "fan_in",
    polynomials: str = "document",
) -> Tensor:
    """Set a weight in place and return it: (fan_out, fan_in) of a linear layer or (out, in, …) of a convolution.

    With λ from :func:`m23_spectrum` and W the :func:`phase_matrix` of it, the variants are:

    orthogonal: Re(U·Vᴴ), the document's formula. The real part alone is no isometry: on average it keeps half of the
        signal's energy. Scaling λ changes nothing here.
    standard: Re(W), without orthogonalisation.
    scaled: Re(W), rescaled to the root mean square √(2/(fan_in + fan_out)), which is the same for the transpose: for
        matrices used in both directions (tied embeddings). No SVD, so vocabularies are no problem.
    transformer: Re(U·Vᴴ), rescaled to the root mean square 1/√fan_in, so that each projection of a normalised token
        has variance 1.

    The document names the last three without formulas; they are ours. In its formula row r and row r + N are equal
    (N: see ``reading``), so a tall matrix repeats itself, and fused query, key and value would coincide. ``scaled`` and
    ``transformer`` therefore fill a tall matrix as the transpose of a wide one, and shuffle the spectrum also without
    a seed (as with seed 0): its rounds of 40 repeat themselves, too. ``orthogonal`` and ``standard`` stay with the
    document.

    Any device (computed on the tensor's own if that is CUDA, otherwise on the CPU) and any real floating type. A
    tensor with fewer than two dimensions (a bias, the scale of a normalisation) has no fan_in and stays as it is.
    ``seed``, ``reading``, ``polynomials``: see :func:`m23_spectrum`.

    Raises ValueError for an unknown variant or option, a tensor without elements, a type that is not floating point.
    """
    _choose("variant", variant, VARIANTS)
    _choose("reading", reading, READINGS)
    _choose("polynomials", polynomials, POLYNOMIALS)
    check_weight(tensor)
    if tensor.dim() < 2:
        return tensor
    fan_out, fan_in = as_matrix(tensor)
    ours = variant in ("scaled", "transformer")
    flip = ours and fan_out > fan_in
    seed = 0 if ours and seed is None else seed
    rows, columns = (fan_in, fan_out) if flip else (fan_out, fan_in)
    count = columns if reading == "fan_in" else 40
    values = m23_spectrum(count, seed, reading=reading, polynomials=polynomials) * math.sqrt(count / columns)
    make = unitary_factor if variant in ("orthogonal", "transformer") else phase_matrix
    real = make(values, rows, columns, tensor.device if tensor.is_cuda else "cpu").real
    if variant == "scaled":
        real = with_rms(real, math.sqrt(2 / (fan_in + fan_out)))
    elif variant == "transformer":
        real = with_rms(real, 1 / math.sqrt(fan_in))
    return tensor.copy_((real.T if flip else real).reshape(tensor.shape))


def with_rms(matrix: Tensor, rms: float) -> Tensor:
    """The matrix times the number that gives its entries this root mean square."""
    return matrix * (rms / matrix.square().mean().sqrt())
