"""Training pairs at a scale of their own for every step, for networks that enlarge by any scale (document 001)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..degrade import DOWNSCALERS, random_jpeg
from .pairs import Pairs, step_generator


def no_small_pictures(hr: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """Stands for a degradation where :class:`ScalePairs` makes the small pictures, so that nobody else does."""
    raise NotImplementedError("ScalePairs makes the small pictures itself")


class ScalePairs(Dataset):
    """``pairs[step]`` → (lr "b 3 p p", hr "b 3 n n") uint8 with n = round(p · s), a pure function of seed and step.

    s is drawn uniformly from ``low`` … ``high`` for each step. LR is the whole HR patch shrunk by the downscaler, as
    LIIF trains. ``originals`` are pairs at a whole scale of at least ``high``, opened with ``no_small_pictures``:
    their larger patches are cut at random, and give patch, batch, seed, downscaler and jpeg.

    ``grow_steps``: the upper end rises from ``low`` to ``high`` over so many steps (document 001: from small scales
    to large ones); 0: the whole range from the start.
    """

    def __init__(self, originals: Pairs, low: float, high: float, grow_steps: int = 0):
        self.originals, self.low, self.high, self.grow_steps = originals, low, high, grow_steps
        self.paths: Sequence | None = getattr(originals, "paths", None)  # there are some where photos are read lazily

    def __len__(self) -> int:
        return len(self.originals)

    def scale(self, step: int, generator: torch.Generator) -> float:
        """The scale of a step, before the patch is rounded to whole pixels."""
        share = 1.0 if step >= self.grow_steps else (step + 1) / (self.grow_steps + 1)
        return self.low + (self.high - self.low) * share * float(torch.rand((), generator=generator))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        o = self.originals
        g = step_generator(o.seed, step)
        hr = o.sample(g)[1]
        n = max(1, round(o.patch * self.scale(step, g)))
        top, left = torch.randint(hr.shape[-1] - n + 1, (2,), generator=g).tolist()
        hr = hr[..., top : top + n, left : left + n]
        lr = DOWNSCALERS[o.downscaler](hr.float() / 255, (o.patch, o.patch)).clamp(0, 1)
        if o.jpeg:
            lr = random_jpeg(lr, g)
        return lr.mul(255).round().byte(), hr
