"""Encoders of arbitrary-scale networks (document 001): a small picture to a map of features of the same size.

Each takes "b 3 h w" in [-1, 1] and returns "b out_channels h w". ``halo`` is how far a feature sees, in pixels;
an encoder with ``grid`` gives a shifted picture the same features only where the shift is a multiple of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .rlfn import CELL, RLFB, reach


def _conv(before: int, after: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, padding=kernel // 2)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")


def _outputs(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> list[Tensor]:
    """What each block of a row gives; with ``checkpointing`` their insides are computed again for the gradient."""
    out = []
    for block in blocks:
        again = checkpointing and torch.is_grad_enabled()
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        out.append(x)
    return out


class ResidualBlock(nn.Module):
    """EDSR's block: x + ``res_scale`` · conv(ReLU(conv(x))), 3x3, no normalisation."""

    def __init__(self, n_feats: int, res_scale: float = 1.0):
        super().__init__()
        self.body = nn.Sequential(_conv(n_feats, n_feats), nn.ReLU(inplace=True), _conv(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        branch = self.body(x)
        return x + (branch if self.res_scale == 1 else branch * self.res_scale)


class EDSR(nn.Module):
    """EDSR without its upsampler (Lim et al. 2017); the defaults are EDSR-baseline, 1,220,416 parameters.

    Args:
        n_feats, n_blocks: width and number of residual blocks.
        res_scale: factor of each block's branch; 0.1 is for 256 wide blocks.
        checkpointing: spend a second forward pass of the blocks to keep less for the gradient.
    """

    def __init__(self, n_feats: int = 64, n_blocks: int = 16, res_scale: float = 1.0, checkpointing: bool = False):
        super().__init__()
        _check_sizes(n_feats=n_feats, n_blocks=n_blocks)
        self.out_channels, self.halo, self.checkpointing = n_feats, 2 * n_blocks + 2, checkpointing
        self.head = _conv(3, n_feats)
        self.blocks = nn.ModuleList(ResidualBlock(n_feats, res_scale) for _ in range(n_blocks))
        self.tail = _conv(n_feats, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.tail(_outputs(self.blocks, x, self.checkpointing)[-1])


class DenseBlock(nn.Module):
    """RDN's block: ``layers`` 3x3 convolutions that see all before them, a 1x1 convolution, and the block's input."""

    def __init__(self, channels: int, layers: int, growth: int):
        super().__init__()
        self.layers = nn.ModuleList(_conv(channels + i * growth, growth) for i in range(layers))
        self.fuse = _conv(channels + layers * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, F.relu(layer(seen))], 1)
        return x + self.fuse(seen)


class RDN(nn.Module):
    """Residual dense network without its upsampler (Zhang et al. 2018), 21,973,952 parameters as LIIF uses it.

    Args, with the paper's letters: n_feats (G0), n_blocks (D), n_layers (C) and growth (G) of each block;
    checkpointing as for :class:`EDSR`.
    """

    def __init__(
        self, n_feats: int = 64, n_blocks: int = 16, n_layers: int = 8, growth: int = 64, checkpointing: bool = False
    ):
        super().__init__()
        _check_sizes(n_feats=n_feats, n_blocks=n_blocks, n_layers=n_layers, growth=growth)
        self.out_channels, self.halo, self.checkpointing = n_feats, n_blocks * n_layers + 3, checkpointing
        self.head, self.second = _conv(3, n_feats), _conv(n_feats, n_feats)
        self.blocks = nn.ModuleList(DenseBlock(n_feats, n_layers, growth) for _ in range(n_blocks))
        self.fuse = nn.Sequential(_conv(n_blocks * n_feats, n_feats, 1), _conv(n_feats, n_feats))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.fuse(torch.cat(_outputs(self.blocks, self.second(x), self.checkpointing), 1))


class SwinStage(nn.Module):
    """SwinIR's residual block: attention in windows, every second time shifted by half of one; a 3x3 convolution.

    "b c h w" → the same; h and w are multiples of the window. The attention blocks are torchvision's.
    """

    def __init__(self, channels: int, depth: int, heads: int, window: int, mlp_ratio: float):
        from torchvision.models.swin_transformer import SwinTransformerBlock  # slow to import, wanted only here

        super().__init__()
        self.blocks = nn.Sequential(
            *(
                SwinTransformerBlock(channels, heads, [window] * 2, [i % 2 * (window // 2)] * 2, mlp_ratio)
                for i in range(depth)
            )
        )
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class SwinIR(nn.Module):
    """SwinIR without its upsampler (Liang et al. 2021): attention in windows. The defaults are SwinIR-light, 903,660
    parameters.

    Any picture size: it is continued to whole windows by its border pixels, and the features are cut back.

    Args:
        embed_dim: width, a multiple of num_heads. depths: attention blocks of each stage.
        num_heads, window_size, mlp_ratio: of every block.
        patch_size: pixels of one token; only 1, as in SwinIR and document 001.
        checkpointing: as for :class:`EDSR`.

    Raises ValueError for a patch_size other than 1 and a width that the heads do not divide.
    """

    def __init__(
        self,
        embed_dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: int = 6,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        patch_size: int = 1,
        checkpointing: bool = False,
    ):
        super().__init__()
        if patch_size != 1:
            raise ValueError(f"patch_size {patch_size} must be 1: every pixel is a token")
        _check_sizes(embed_dim=embed_dim, num_heads=num_heads, window_size=window_size, stages=len(depths))
        _check_sizes(**{f"depths[{i}]": depth for i, depth in enumerate(depths)})
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.out_channels, self.grid, self.checkpointing = embed_dim, window_size, checkpointing
        self.halo = swin_reach(depths, window_size)
        self.head = _conv(3, embed_dim)
        self.norm_first = nn.LayerNorm(embed_dim)
        self.stages = nn.ModuleList(SwinStage(embed_dim, depth, num_heads, window_size, mlp_ratio) for depth in depths)
        self.norm_last = nn.LayerNorm(embed_dim)
        self.tail = _conv(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = self.head(F.pad(x, (0, -w % self.grid, 0, -h % self.grid), mode="replicate"))
        deep = _outputs(self.stages, _norm(self.norm_first, x), self.checkpointing)[-1]
        return (x + self.tail(_norm(self.norm_last, deep)))[..., :h, :w]


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def swin_reach(depths: Sequence[int], window: int) -> int:
    """How far a feature of :class:`SwinIR` sees, in pixels, at the worst place of its window."""
    worst = 0
    for place in range(window):
        low = high = place
        for depth in reversed(depths):
            low, high = low - 1, high + 1  # the stage's convolution, and after the last one the network's own
            for i in reversed(range(depth)):
                shift = i % 2 * (window // 2)
                low = (low - shift) // window * window + shift
                high = (high - shift) // window * window + shift + window - 1
        worst = max(worst, place - low, high - place)
    return worst + 2


class RLFN(nn.Module):
    """M23-RLFN (:class:`nbhelpers.models.rlfn.M23_RLFN`) without its last layer, 673,036 parameters.

    Its layers have the same names, so a trained network for one scale can start it: ``init_from``.

    Args: n_feats, n_blocks as there; checkpointing as for :class:`EDSR`.
    """

    grid = CELL

    def __init__(self, n_feats: int = 52, n_blocks: int = 8, checkpointing: bool = False):
        super().__init__()
        _check_sizes(n_feats=n_feats, n_blocks=n_blocks)
        self.out_channels, self.halo, self.checkpointing = n_feats, reach(n_blocks) + 2, checkpointing
        self.head, self.body_conv = _conv(3, n_feats), _conv(n_feats, n_feats)
        self.body = nn.Sequential(*(RLFB(n_feats) for _ in range(n_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head((x + 1) / 2)  # it knows pictures in [0, 1]
        return x + self.body_conv(_outputs(self.body, x, self.checkpointing)[-1])


# name: class and arguments. SwinIR, EDSR-b and RDN are document 001's names; it gives SwinIR's sizes.
PRESETS: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "EDSR-b": (EDSR, {}),
    "RDN": (RDN, {}),
    "SwinIR": (
        SwinIR,
        {"embed_dim": 96, "depths": (6, 6, 6, 6), "num_heads": 6, "window_size": 8, "patch_size": 1},
    ),
    "SwinIR-light": (SwinIR, {}),
    "RLFN": (RLFN, {}),
}


def build_encoder(encoder: str | Mapping[str, object]) -> nn.Module:
    """An untrained encoder from the name of a preset, or from a mapping with ``preset`` and other sizes than its own.

    ``build_encoder({"preset": "EDSR-b", "n_feats": 48, "checkpointing": True})``. Raises ValueError for an unknown
    preset or size, listing what exists.
    """
    sizes = {"preset": encoder} if isinstance(encoder, str) else dict(encoder)
    name = sizes.pop("preset", None)
    if name not in PRESETS:
        raise ValueError(f"encoder {name!r} is unknown; choose one of {list(PRESETS)}, or a mapping with such a preset")
    kind, preset = PRESETS[name]
    allowed = list(inspect.signature(kind).parameters)
    if unknown := sorted(set(sizes) - set(allowed)):
        raise ValueError(f"encoder {name!r} has no size {unknown}; it takes {allowed}")
    return kind(**(preset | sizes))
