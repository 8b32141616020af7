"""Convolutions whose kernel is made of orthogonal blocks and zeros (document 004), and their unconstrained control.

    conv = BlockOrthogonalConv2d(256, 512, 3, num_matrices=2, r=4, padding=1)     # in the place of nn.Conv2d
    report = make_block_orthogonal(resnet, odk_layers=[3, 4], num_matrices=1)     # whole stages of a ResNet

The kernel, seen as a matrix of c_out rows and c_in·k·k columns, holds ``num_matrices`` square matrices of c_out rows
side by side, each with ``r`` orthogonal blocks on its diagonal; everything else is zero. Only the degrees of freedom of
the blocks are parameters: s(s - 1)/2 for a block of s = c_out / r rows, the strict lower triangle of a skew-symmetric
A, from which Cayley's transform (I - A)(I + A)⁻¹ makes a rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACEMENTS = ("left_zeros", "spread", "permuted")
LARGEST_BATCHED = 128  # rows; see _inverse


class BlockError(ValueError):
    """A block structure that a convolution has no room for; the message gives the numbers and what is allowed."""


def cayley(skew: Tensor) -> Tensor:
    """Rotations (I - A)(I + A)⁻¹ of skew-symmetric matrices A "b s s", in A's own precision.

    Every orthogonal matrix without the eigenvalue -1 is reached, so the determinant is always +1. That is no loss where
    each row is scaled by a number of any sign afterwards, as batch norm does: some change of the rows' signs brings any
    orthogonal matrix into this set.
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return 2 * _inverse(one + skew) - one


def _inverse(x: Tensor) -> Tensor:
    # Larger matrices take long enough each, and on a CPU they must go one by one: with two threads, torch 2.15 gives a
    # batch of them to MKL in a way that ends in "incorrect on entry to SLASWP" and no result (seen from 160 rows).
    if x.device.type == "cpu" and x.shape[-1] > LARGEST_BATCHED:
        return torch.stack([torch.linalg.inv(matrix) for matrix in x])
    return torch.linalg.inv(x)


def _check(inputs: int, outputs: int, taps: int, matrices: int, r: int, placement: str) -> None:
    if placement not in PLACEMENTS:
        raise BlockError(f"placement {placement!r} is unknown; choose one of {list(PLACEMENTS)}")
    most = inputs * taps // outputs
    where = f"a kernel of {outputs} x {inputs}·{taps}"
    if most < 1:
        raise BlockError(f"{where} has no room for a matrix of {outputs} x {outputs}; use an ordinary convolution")
    if not 1 <= matrices <= most:
        raise BlockError(f"num_matrices={matrices} must lie between 1 and {most} for {where}")
    if r < 1 or outputs % r:
        raise BlockError(f"r={r} does not divide the {outputs} output channels; it must be a divisor, 1 to {outputs}")


def used_columns(inputs: int, outputs: int, taps: int, matrices: int, placement: str, seed: int = 0) -> Tensor:
    """Where the columns of the matrices lie in the kernel seen as a matrix: int64 "matrices·outputs".

    Column c·taps + t belongs to input channel c and position t in the window. ``left_zeros``: the last columns, as
    document 004 has it, so the first channels are not read. ``spread``: every channel equally often, each time at the
    next position. ``permuted``: anywhere, drawn by ``seed``.
    """
    total, used = inputs * taps, matrices * outputs
    if placement == "left_zeros":
        return torch.arange(total - used, total)
    if placement == "spread":
        number = torch.arange(used)
        return number * inputs // used * taps + number % taps
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:used]


class MaskedConv2d(nn.Module):
    """Convolution with the zeros of a block-orthogonal one and free numbers elsewhere: the control of document 004.

    "b c_in h w" → "b c_out h' w'". ``stride``, ``padding``, ``dilation`` and ``bias`` as in ``nn.Conv2d``.

    Args:
        num_matrices: matrices side by side, 1 to c_in·k·k // c_out.
        r: blocks on the diagonal of each matrix, a divisor of c_out.
        placement: ``left_zeros``, ``spread`` or ``permuted`` (by ``seed``), see :func:`used_columns`.
        unit_rows: divide the kernel by √num_matrices, so that its rows have length 1 instead of √num_matrices.

    Only the input channels that the kernel reads take part in the convolution. With ``left_zeros`` they are the last
    num_matrices·c_out / k² ones (57 of 512 for one matrix of 512 rows and k = 3), which makes it that much cheaper.

    Raises BlockError, quoting the numbers and the allowed range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        num_matrices: int = 1,
        r: int = 1,
        placement: str = "left_zeros",
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        unit_rows: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        h, w = kernel_size if isinstance(kernel_size, Sequence) else (kernel_size, kernel_size)
        _check(in_channels, out_channels, h * w, num_matrices, r, placement)
        if groups != 1:
            raise BlockError(f"groups={groups} is not possible beside blocks; use groups=1 and r for smaller blocks")
        self.in_channels, self.out_channels, self.kernel_size, self.groups = in_channels, out_channels, (h, w), 1
        self.num_matrices, self.r, self.placement, self.unit_rows = num_matrices, r, placement, unit_rows
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.block = out_channels // r
        columns = used_columns(in_channels, out_channels, h * w, num_matrices, placement, seed)
        self.read = slice(int(columns.min()) // (h * w), int(columns.max()) // (h * w) + 1)
        # Row block b of the kernel holds block b of every matrix.
        index = (columns - self.read.start * h * w).view(num_matrices, r, self.block).transpose(0, 1)
        self.register_buffer("index", index.reshape(r, 1, -1), persistent=False)
        self.free = nn.Parameter(self._start())
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._cached: tuple[object, Tensor] | None = None

    def _start(self) -> Tensor:
        # Rows as long as those of an orthogonal matrix.
        return torch.randn(self.num_matrices * self.r, self.block, self.block) * self.block**-0.5

    def blocks(self) -> Tensor:
        """The blocks "num_matrices·r s s", matrix by matrix, each from the top left to the bottom right."""
        return self._full(self.free)

    @staticmethod
    def _full(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def _assemble(self) -> Tensor:
        """The kernel "c_out c k k" of the channels that are read; in fp32 (or double) also under autocast."""
        m, r, s = self.num_matrices, self.r, self.block
        with torch.autocast(self.free.device.type, enabled=False):
            blocks = self.blocks() * (m**-0.5 if self.unit_rows else 1)
            values = blocks.view(m, r, s, s).permute(1, 2, 0, 3).reshape(r, s, m * s)
            h, w = self.kernel_size
            channels = self.read.stop - self.read.start
            rows = values.new_zeros(r, s, channels * h * w).scatter(2, self.index.expand(-1, s, -1), values)
            return rows.view(self.out_channels, channels, h, w).to(self.free.dtype)

    def kernel(self) -> Tensor:
        """:meth:`_assemble`'s result; made once in eval mode, where no gradient is wanted and no parameter changes."""
        wanted = torch.is_grad_enabled() and self.free.requires_grad
        if self.training or wanted or self.free.is_inference():  # an inference tensor does not count its changes
            return self._assemble()
        state = (self.free.data_ptr(), self.free._version, self.free.dtype)
        if self._cached is None or self._cached[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._cached = (state, self._assemble())
        return self._cached[1]

    def train(self, mode: bool = True) -> MaskedConv2d:
        """As ever; forgets the kernel that was kept."""
        self._cached = None
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        """The whole kernel "c_out c_in k k", with the zeros of the channels that are not read."""
        return F.pad(self.kernel(), (0, 0, 0, 0, self.read.start, self.in_channels - self.read.stop))

    @property
    def stored(self) -> int:
        """Numbers of the kernel that are not zero by construction."""
        return self.num_matrices * self.out_channels * self.block

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, self.read], self.kernel(), self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"num_matrices={self.num_matrices}, r={self.r}, placement={self.placement}"
        )


class BlockOrthogonalConv2d(MaskedConv2d):
    """:class:`MaskedConv2d` whose blocks stay orthogonal: rows of the kernel are orthogonal, W·Wᵀ = num_matrices·I
    (I with ``unit_rows``), also after any training. Its arguments; source: document 004.

    Drop-in for ``nn.Conv2d`` with groups = 1. ``free``, "num_matrices·r s(s-1)/2", are the strict lower triangles of
    the skew-symmetric matrices of :func:`cayley`, N(0, 2/s) at the start: then the spectrum of A is a half circle of
    radius √8, the expected trace of a block is 0, as of a random orthogonal matrix, and I + A has condition 3.
    """

    def _start(self) -> Tensor:
        s = self.block
        self.register_buffer("triangle", torch.tril_indices(s, s, -1), persistent=False)
        return torch.randn(self.num_matrices * self.r, s * (s - 1) // 2) * (2 / s) ** 0.5

    def blocks(self) -> Tensor:
        """The orthogonal blocks "num_matrices·r s s", matrix by matrix, each from the top left to the bottom right."""
        free, s = self._full(self.free), self.block
        row, column = self.triangle
        lower = free.new_zeros(len(free), s * s).index_copy(1, row * s + column, free).view(-1, s, s)
        return cayley(lower - lower.mT)


@torch.no_grad()
def orthogonality_error(conv: MaskedConv2d) -> float:
    """Largest entry of |Q·Qᵀ - I| over the blocks, summed in double precision."""
    q = conv.blocks().double()
    return float((q @ q.mT - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max())


@dataclass(frozen=True)
class Replacement:
    """What became of one convolution: its name, and why it was left as it was (None: it was replaced)."""

    name: str
    skipped: str | None = None


KINDS = {"orthogonal": BlockOrthogonalConv2d, "masked": MaskedConv2d}


def make_block_orthogonal(
    model: nn.Module,
    odk_layers: Sequence[int] = (3, 4),
    num_matrices: int = 1,
    r: int = 1,
    placement: str = "left_zeros",
    unit_rows: bool = False,
    seed: int = 0,
    kind: str = "orthogonal",
) -> list[Replacement]:
    """Replace, in place, the convolutions of the stages ``model.layer1`` … by :class:`BlockOrthogonalConv2d`.

    A convolution without room for ``num_matrices``, such as the 1×1 shortcut of a ResNet that widens, stays and is
    reported with the reason. ``kind="masked"`` makes the unconstrained control instead. With ``permuted``, ``seed`` + i
    serves convolution i. Raises BlockError for an unknown stage, for r that does not divide the channels, for grouped
    convolutions or padding with anything but zeros, and where nothing could be replaced.
    """
    if kind not in KINDS:
        raise BlockError(f"kind {kind!r} is unknown; choose one of {sorted(KINDS)}")
    report = []
    for name, conv in stage_convolutions(model, odk_layers):
        if conv.padding_mode != "zeros":
            raise BlockError(f"{name}: padding_mode={conv.padding_mode!r} is not possible here; only 'zeros' is")
        options = {"unit_rows": unit_rows, "seed": seed + len(report), "bias": conv.bias is not None}
        options |= {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "groups")}
        most = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1] // conv.out_channels
        if most < num_matrices:
            room = f"room for {most}" if most else "no room for any"
            shape = f"{conv.out_channels} x {conv.in_channels}·{conv.kernel_size[0]}·{conv.kernel_size[1]}"
            report.append(Replacement(name, f"{room} of {num_matrices} matrices in a kernel of {shape}"))
            continue
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, num_matrices, r, placement)
        model.set_submodule(name, KINDS[kind](*sizes, **options))
        report.append(Replacement(name))
    if odk_layers and all(entry.skipped for entry in report):
        why = "; ".join(f"{entry.name}: {entry.skipped}" for entry in report)
        raise BlockError(f"num_matrices={num_matrices} fits no convolution of odk_layers={list(odk_layers)} ({why})")
    return report


def stage_convolutions(model: nn.Module, stages: Sequence[int]) -> list[tuple[str, nn.Conv2d]]:
    """(name, convolution) of all ``nn.Conv2d`` below ``model.layerN`` for N in ``stages``; BlockError for unknown N."""
    there = [n for n in range(1, 10) if hasattr(model, f"layer{n}")]
    if unknown := [n for n in stages if n not in there]:
        raise BlockError(f"odk_layers={list(stages)}: the network has no stage {unknown[0]}, only {there}")
    inside = tuple(f"layer{n}." for n in stages)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name.startswith(inside)]


@dataclass(frozen=True)
class Counts:
    """Sizes of a network: ``free`` numbers that are trained (degrees of freedom; what its file holds), ``stored``
    numbers that are not zero by construction once the kernels are made, ``dense`` numbers with the zeros."""

    free: int
    stored: int
    dense: int


def parameter_counts(model: nn.Module) -> Counts:
    """The three sizes of a network; they are equal where it has none of our convolutions."""
    free = stored = dense = sum(p.numel() for p in model.parameters())
    for conv in (m for m in model.modules() if isinstance(m, MaskedConv2d)):
        h, w = conv.kernel_size
        stored += conv.stored - conv.free.numel()
        dense += conv.out_channels * conv.in_channels * h * w - conv.free.numel()
    return Counts(free, stored, dense)
