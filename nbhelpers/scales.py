"""Training of networks for any scale (document 001): sampled output pixels, validation at several scales."""

from __future__ import annotations

import math

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from .models import sampling
from .pixel import PixelModule


def validated(cfg: DictConfig) -> list[float]:
    """Scales of a run's validation."""
    scales = OmegaConf.select(cfg, "scales")
    return [cfg.model.scale] if scales is None else list(scales.validate)


class ScaleModule(PixelModule):
    """Trains a network with ``encode``, ``render`` and ``at`` on batches (lr, hr) each of which has a scale of its own.

    Only ``scales.samples`` output pixels of each picture are rendered, drawn anew every step. ``validation`` holds
    the same photos at every scale of :func:`validated`, one scale after the other.
    """

    def predict(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        """(sr, target) at the sampled pixels: "b 3 q 1" for points, else "b 3 rows columns"."""
        features, s = self.model.encode(lr), self.cfg.scales
        size, b, shape = hr.shape[-2:], hr.shape[0], lr.shape[-2:]
        if not s.samples or s.samples >= size.numel():
            return self.model.render(features, lr, size), hr
        if s.region == "lattice":
            each = max(1, round((s.samples / shape.numel()) ** 0.5))
            rows, columns = (sampling.lattice(n, m, each).to(hr.device) for n, m in zip(shape, size, strict=True))
            return self.model.render(features, lr, size, rows=rows, columns=columns), hr[:, :, rows][..., columns]
        if s.region == "square":
            n = math.isqrt(s.samples)
            top, left = (int(torch.randint(side - n + 1, ())) for side in size)
            rows, columns = slice(top, top + n), slice(left, left + n)
            return self.model.render(features, lr, size, rows=rows, columns=columns), hr[..., rows, columns]
        place = torch.randint(size.numel(), (b, s.samples)).to(hr.device)
        coords = torch.stack([place // size[1], place % size[1]], -1)
        coords = (2 * coords + 1) / torch.tensor(size, device=hr.device) - 1
        target = hr.flatten(2).gather(2, place[:, None].expand(-1, 3, -1))
        return self.model.render(features, lr, size, coords)[..., None], target[..., None]

    def validate(self) -> dict[str, float]:
        """As for one scale at each of :func:`validated` (``val_psnr_y_x2`` …), and the means over the scales."""
        scales, found, scores = validated(self.cfg), {}, []
        count = len(self.validation) // len(scales)
        for i, scale in enumerate(scales):
            scores.append(self.scores(self.final.at(scale), self.validation[i * count : (i + 1) * count]))
            found[f"val_psnr_y_x{scale:g}"] = scores[-1]["val_psnr_y"]
        return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]} | found
