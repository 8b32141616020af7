"""Training losses by name; each takes (sr, hr) "b c h w" and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import rgb_to_y


def charbonnier(sr: Tensor, hr: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Smooth L1: mean of sqrt(d² + ε²) (Lai et al. 2017)."""
    return torch.sqrt((sr - hr).square() + epsilon**2).mean()


def mse_luma(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error of luma (BT.601), the quantity PSNR-Y measures."""
    return rgb_to_y(sr - hr, full_range=True).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "mse_luma": mse_luma,
    "charbonnier": charbonnier,
}


class WeightedLoss(nn.Module):
    """Weighted sum of named terms: ``WeightedLoss({"l1": 1.0})``; the call returns (total, {name: term})."""

    def __init__(self, weights: Mapping[str, float]):
        super().__init__()
        if unknown := sorted(set(weights) - set(LOSSES)):
            raise ValueError(f"loss {unknown} is unknown; choose from {sorted(LOSSES)}")
        if not weights:
            raise ValueError(f"no loss given; choose from {sorted(LOSSES)}")
        self.weights = dict(weights)

    def forward(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {name: LOSSES[name](sr, hr) for name in self.weights}
        return sum(self.weights[name] * term for name, term in terms.items()), terms
