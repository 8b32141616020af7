"""EfficientSRNet of document 003: depthwise-separable residual blocks with channel attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers import BicubicUpsample, BilinearUpsample, DepthwiseConv2d

SCALES = (2, 4)
CELL = 8  # pixels of one side of a cell over which local attention takes its means


class ECALite(nn.Module):
    """Channel attention as document 003 draws it: x · sigmoid(1x1 convolution of the mean of x); "b c h w" → the same.

    Despite its name this is squeeze-and-excitation (Hu et al. 2018) without a bottleneck: c² weights. The mean is over
    the whole input, so a tile gets other factors than the picture it was cut from.
    """

    halo: int | None = None  # radius of what it sees in pixels; None is the whole input

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Sigmoid()

    def mask(self, x: Tensor) -> Tensor:
        """Factors "b c 1 1" in (0, 1)."""
        return self.gate(self.mix(x.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x)


class ECA(ECALite):
    """Efficient channel attention (Wang et al. 2020): the means of neighbouring channels are mixed by one small kernel.

    Its length is the paper's, the odd number next to log2(c) / 2 + 1/2: 3 weights at 32 channels. "Neighbouring"
    means by number, as in the paper, and the kernel is the same for all channels.
    """

    def __init__(self, channels: int):
        nn.Module.__init__(self)
        length = int(abs(math.log2(channels) / 2 + 0.5))
        length += 1 - length % 2
        self.mix = nn.Conv1d(1, 1, length, padding=length // 2, bias=False)
        self.gate = nn.Sigmoid()

    def mask(self, x: Tensor) -> Tensor:
        """Factors "b c 1 1" in (0, 1)."""
        means = x.mean((2, 3))[:, None]
        return self.gate(self.mix(means)[:, 0, :, None, None])


class LocalECA(ECALite):
    """ECA-Lite with local statistics (ours): means of cells of 8x8 pixels, one factor each, interpolated bilinearly.

    A pixel sees at most 11 pixels far, so tiles that begin at a cell's border equal the whole picture. A cell cut by
    the picture's border is averaged over what is there.
    """

    halo = CELL + CELL // 2 - 1  # from a pixel beside the cell's middle to the far side of the next cell

    def __init__(self, channels: int):
        super().__init__(channels)
        self.enlarge = BilinearUpsample(CELL, channels)

    def mask(self, x: Tensor) -> Tensor:
        """Factors in (0, 1) for each value of ``x``."""
        cells = F.avg_pool2d(x, CELL, ceil_mode=True, count_include_pad=False)
        return self.enlarge(self.gate(self.mix(cells)))[..., : x.shape[-2], : x.shape[-1]]


ATTENTION: dict[str, type[ECALite] | None] = {"eca_lite": ECALite, "eca": ECA, "local": LocalECA, "none": None}


class Branches(nn.Module):
    """Parametrisation of a convolution's weight as a sum of kernels of its own side, of 3 and of 1 (RepVGG's idea).

    Summing the kernels gives what summing the branches' outputs would, at the cost of one convolution, and merging is
    forgetting how the weight was made: ``torch.nn.utils.parametrize.remove_parametrizations``.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        *channels, side, _ = weight.shape
        self.smaller = nn.ParameterList(nn.Parameter(torch.zeros(*channels, n, n)) for n in (1, 3) if n < side)

    def forward(self, weight: Tensor) -> Tensor:
        side = weight.shape[-1]
        return weight + sum(F.pad(kernel, ((side - kernel.shape[-1]) // 2,) * 4) for kernel in self.smaller)


def merge(model: nn.Module) -> nn.Module:
    """Make plain weights of all :class:`Branches` of a model, in place; the model computes what it did before."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model


class ERBlock(nn.Module):
    """x + attention(1x1 convolution(ReLU(depthwise convolution of x))); "b c h w" → the same (document 003).

    ``kernel`` is the depthwise convolution's side, 3 in the document. ``halo`` is the radius of what the block sees,
    None for the whole input. Raises ValueError for an attention not in ``ATTENTION`` and for an even kernel.
    """

    def __init__(self, channels: int, attention: str = "eca_lite", kernel: int = 3):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention {attention!r} is unknown; choose one of {list(ATTENTION)}")
        self.depthwise = DepthwiseConv2d(channels, kernel)
        self.act = nn.ReLU()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        kind = ATTENTION[attention]
        self.attention = nn.Identity() if kind is None else kind(channels)
        reach = 0 if kind is None else kind.halo
        self.halo = None if reach is None else reach + kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.pointwise(self.act(self.depthwise(x))))


def _check_size(width: int, blocks: int, scale: int, scales: tuple[int, ...]) -> None:
    if scale not in scales:
        raise ValueError(f"scale {scale} is unknown; choose one of {list(scales)}")
    if width < 1 or blocks < 1:
        raise ValueError(f"width {width} and blocks {blocks} must be at least 1")


def _reach(body: nn.Sequential, rest: float) -> int | None:
    """``halo`` of a network: its blocks' and ``rest`` pixels; None if a block sees everything."""
    blocks = [block.halo for block in body]
    return None if None in blocks else math.ceil(sum(blocks) + rest)


class EfficientSRNet(nn.Module):
    """Document 003's network: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    Head, ``blocks`` ERBlock, trunk convolution and the head's features again, then one pixel shuffle of 2 for each
    doubling, with a convolution from nf to 4·nf before it, and a last convolution in high resolution. 104,451
    parameters at nf 32, 8 blocks, x4.

    Args:
        nf, blocks: width and number of blocks, at least 1 each.
        scale: 2 or 4.
        attention: ``eca_lite`` (as drawn), ``eca`` (the published one), ``local`` (cells of 8x8 pixels) or ``none``.
        skip: add the bicubic enlargement (ours; the document has none).

    ``halo`` is None with ``eca_lite`` and ``eca``, whose means are over the whole picture. ``grid`` is 8 with
    ``local``. Raises ValueError for what these cannot be.
    """

    def __init__(self, nf: int = 32, blocks: int = 8, scale: int = 4, attention: str = "eca_lite", skip: bool = False):
        super().__init__()
        _check_size(nf, blocks, scale, SCALES)
        doublings = SCALES.index(scale) + 1
        self.scale = scale
        self.head = nn.Conv2d(3, nf, 3, padding=1)
        self.body = nn.Sequential(*(ERBlock(nf, attention) for _ in range(blocks)))
        self.trunk = nn.Conv2d(nf, nf, 3, padding=1)
        steps = ((nn.Conv2d(nf, 4 * nf, 3, padding=1), nn.PixelShuffle(2)) for _ in range(doublings))
        self.upsampling = nn.Sequential(*(layer for step in steps for layer in step))
        self.tail = nn.Conv2d(nf, 3, 3, padding=1)
        self.skip = BicubicUpsample(scale) if skip else None
        # Head and trunk see a pixel each; a convolution at twice (four times) the size half (a quarter) of one.
        self.halo = _reach(self.body, 2 + sum(0.5**i for i in range(doublings + 1)))
        self.grid = CELL if attention == "local" else 1

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        features = features + self.trunk(self.body(features))
        out = self.tail(self.upsampling(features)).float()
        return out if self.skip is None else out + self.skip(x)


class LeanSRNet(nn.Module):
    """Document 003's idea with its cost mended (ours): "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    EfficientSRNet spends nearly all its arithmetic between its blocks and the picture. Here blocks are wider and see
    farther, and what follows is depthwise-separable too: one 3x3 depthwise and one 1x1 convolution straight to the
    sub-pixels, one pixel shuffle, bicubic added.

    Args:
        channels, blocks: width and number of ERBlocks, at least 1 each.
        kernel: side of the blocks' depthwise convolutions, odd.
        scale: whole-number enlargement, 1 to 8.
        attention: as for :class:`EfficientSRNet`.
        branches: train each depthwise kernel as a sum of kernels (:class:`Branches`); :func:`merge` ends that.

    Raises ValueError for what these cannot be.
    """

    def __init__(
        self,
        channels: int = 48,
        blocks: int = 16,
        scale: int = 4,
        kernel: int = 5,
        attention: str = "none",
        branches: bool = False,
    ):
        super().__init__()
        _check_size(channels, blocks, scale, tuple(range(1, 9)))
        self.scale = scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(ERBlock(channels, attention, kernel) for _ in range(blocks)))
        self.to_subpixels = nn.Sequential(
            DepthwiseConv2d(channels),
            nn.Conv2d(channels, 3 * scale**2, 1),
        )
        self.skip = BicubicUpsample(scale)
        self.halo = _reach(self.body, 2)
        self.grid = CELL if attention == "local" else 1
        for block in self.body if branches else ():
            parametrize.register_parametrization(block.depthwise, "weight", Branches(block.depthwise.weight))

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        return self.skip(x, self.to_subpixels(features + self.body(features)))
