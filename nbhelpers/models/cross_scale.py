"""Cross-scale attention (document 001; in published work CiaoSR's, Cao et al. 2023): each pixel looks at all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossScaleAttention(nn.Module):
    """x + Σ over s of softmax(``softmax_scale`` · q·k_s / √c) v_s; features "b c h w" → the same.

    The formula of document 001: q from every pixel, k_s and v_s from the features shrunk by s (mean of s x s pixels),
    so a small structure can be filled in from a larger copy of it anywhere in the picture. Every map has c channels,
    because the kernel that PyTorch has for this then never holds the pixels x pixels weights: memory is linear in the
    picture's pixels. Time is not: it grows with their square.

    Args:
        channels: c.
        multi_scale: the whole numbers s ≥ 1 to shrink by.
        softmax_scale: above 1, attention is on fewer places.

    Raises ValueError for no scale, a scale below 1 and a softmax_scale that is not above 0.
    """

    def __init__(self, channels: int, multi_scale: Sequence[int] = (2,), softmax_scale: float = 1.0):
        super().__init__()
        if not multi_scale or any(int(s) != s or s < 1 for s in multi_scale):
            raise ValueError(f"multi_scale {list(multi_scale)} must be whole numbers of at least 1, and not none")
        if not softmax_scale > 0:
            raise ValueError(f"softmax_scale {softmax_scale} must be above 0")
        self.multi_scale = tuple(int(s) for s in multi_scale)
        self.scale = softmax_scale / channels**0.5
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def shrunk(self, x: Tensor) -> list[Tensor]:
        """``x`` at each scale: means of s x s pixels."""
        options = {"ceil_mode": True, "count_include_pad": False}
        return [x if s == 1 else F.avg_pool2d(x, s, **options) for s in self.multi_scale]

    def forward(self, x: Tensor) -> Tensor:
        query = _tokens(self.query(x))
        found = 0
        for small in self.shrunk(x):
            key, value = _tokens(self.key(small)), _tokens(self.value(small))
            found = found + F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return x + found[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]).to(x.dtype)

    @torch.no_grad()
    def weights(self, x: Tensor, row: int, column: int) -> list[Tensor]:
        """Where one pixel of the features "1 c h w" looks: for each scale a map "h/s w/s" that sums to 1."""
        query = self.query(x[:, :, row : row + 1, column : column + 1])
        maps = []
        for small in self.shrunk(x):
            logits = (query * self.key(small)).sum(1)[0] * self.scale
            maps.append(logits.flatten().softmax(0).view_as(logits))
        return maps


def _tokens(x: Tensor) -> Tensor:
    """One attention head: "b c h w" → "b 1 h·w c", channels together, as the fused kernels want them."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
