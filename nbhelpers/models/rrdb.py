"""Residual-in-residual dense networks with dilated blocks for x2 (document 002, after ESRGAN, Wang et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import BicubicUpsample, DilatedConv2d


class DilatedBlock(nn.Module):
    """x + ``res_scale`` · f(x), f = dilated 3x3 convolutions and one 1x1; "b c h w" → the same.

    Document 002's MyDilatedBlock: dilations 1, 2, 4 let a pixel see 7 pixels far at the cost of three convolutions.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (1, 2, 4),
        res_scale: float = 0.2,
        slope: float = 0.1,
        inplace: bool = False,
    ):
        super().__init__()
        self.res_scale, self.halo = res_scale, sum(dilations)
        layers: list[nn.Module] = []
        for d in dilations:
            layers += [DilatedConv2d(channels, channels, dilation=d), nn.LeakyReLU(slope, inplace)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) * self.res_scale


class DenseBlock(nn.Module):
    """x + ``res_scale`` · f(x), f = ``layers`` 3x3 convolutions, each reading the outputs of all before it.

    The last one returns to ``channels`` and has no activation. ``growth`` is the width of the others: 32 in ESRGAN
    (with 5 layers and slope 0.2), the full width with 3 layers in document 002.
    """

    def __init__(
        self,
        channels: int,
        growth: int | None = None,
        layers: int = 3,
        res_scale: float = 0.2,
        slope: float = 0.1,
        inplace: bool = False,
    ):
        super().__init__()
        growth = growth or channels
        self.res_scale, self.halo = res_scale, layers
        widths = [growth] * (layers - 1) + [channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + i * growth, width, 3, padding=1) for i, width in enumerate(widths)
        )
        self.act = nn.LeakyReLU(slope, inplace)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(self.act(conv(torch.cat(seen, 1))))
        return x + self.convs[-1](torch.cat(seen, 1)) * self.res_scale


class DilatedRRDB(nn.Module):
    """x + ``res_scale`` · f(x), f = dilated and dense blocks in turn, ``pairs`` of them (document 002: three)."""

    def __init__(self, channels: int, pairs: int = 3, dilated: dict | None = None, dense: dict | None = None):
        super().__init__()
        dilated, dense = dilated or {}, dense or {}
        self.res_scale = dense.get("res_scale", 0.2)
        blocks: list[nn.Module] = []
        for _ in range(pairs):
            if dilated.get("dilations", True):  # an empty list leaves them out
                blocks.append(DilatedBlock(channels, **dilated))
            blocks.append(DenseBlock(channels, **dense))
        self.blocks = nn.Sequential(*blocks)
        self.halo = sum(b.halo for b in blocks)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x) * self.res_scale


class DilatedRRDBNet(nn.Module):
    """Document 002's generator: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped; 16,293,763 parameters.

    Args:
        scale: 2, 4, 8 …: the upscaler doubles as often as it takes.
        channels, blocks: width, and number of residual-in-residual blocks (64 and 16 in the document).
        pairs: dilated + dense pairs in one block.
        dilations: of the dilated blocks; empty leaves them out.
        dense_layers, growth: convolutions of a dense block and their width (None: ``channels``).
        res_scale: every residual branch is multiplied by it.
        slope: of LeakyReLU.
        inplace: activations overwrite their input, which saves memory.
        shared: one block, applied ``blocks`` times (the document's "funny idea").
        passes: apply the whole network so many times, G(G(x)) for 2; together they enlarge by ``scale``.
        skip: add the bicubic enlargement and start as it (ours; the document has none).

    Raises ValueError for sizes below one and for a scale that is no power of two.
    """

    def __init__(
        self,
        scale: int = 2,
        channels: int = 64,
        blocks: int = 16,
        pairs: int = 3,
        dilations: Sequence[int] = (1, 2, 4),
        dense_layers: int = 3,
        growth: int | None = None,
        res_scale: float = 0.2,
        slope: float = 0.1,
        inplace: bool = True,
        shared: bool = False,
        passes: int = 1,
        skip: bool = False,
    ):
        super().__init__()
        sizes = {"channels": channels, "blocks": blocks, "pairs": pairs, "dense_layers": dense_layers}
        for name, value in (sizes | {"passes": passes}).items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        doublings = max(0, scale.bit_length() - 1) // passes
        if doublings < 1 or 2 ** (doublings * passes) != scale:
            raise ValueError(f"scale {scale} with passes {passes}: each pass must enlarge by 2, 4, 8 …")
        self.scale, self.passes, self.repeats = scale, passes, blocks if shared else 1
        common = {"res_scale": res_scale, "slope": slope, "inplace": inplace}
        dense = {"growth": growth, "layers": dense_layers, **common}
        self.first = nn.Conv2d(3, channels, 5, padding=2)  # no activation: the residual path starts here
        self.body = nn.Sequential(
            *(DilatedRRDB(channels, pairs, {"dilations": tuple(dilations), **common}, dense)
              for _ in range(1 if shared else blocks))
        )  # fmt: skip
        act = nn.LeakyReLU(slope, inplace)
        doubling = (_doubling(channels, act) for _ in range(doublings))
        self.upscale = nn.Sequential(
            *(layer for step in doubling for layer in step),
            nn.Conv2d(channels, channels, 3, padding=1),
            act,
            nn.Conv2d(channels, 3, 3, padding=1),
        )
        self.skip = BicubicUpsample(2**doublings) if skip else None
        if skip:  # start as bicubic: the first steps need not unlearn random pictures
            nn.init.zeros_(self.upscale[-1].weight), nn.init.zeros_(self.upscale[-1].bias)
        reach = sum(0.5**k for k in range(doublings)) + 2 * 0.5**doublings  # of the upscaler, in input pixels
        one = 2 + sum(b.halo for b in self.body) * self.repeats + math.ceil(reach)
        self.halo = sum(math.ceil(one / 2 ** (doublings * k)) for k in range(passes))

    def once(self, x: Tensor) -> Tensor:
        """One pass of the network."""
        features = self.first(x)
        for _ in range(self.repeats):
            features = self.body(features)
        out = self.upscale(features).float()
        return out if self.skip is None else out + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            x = self.once(x)
        return x


def _doubling(channels: int, act: nn.Module) -> list[nn.Module]:
    wide = [nn.Conv2d(channels, 2 * channels, 3, padding=1), act, nn.Conv2d(2 * channels, 4 * channels, 1)]
    return [*wide, nn.PixelShuffle(2), act]
