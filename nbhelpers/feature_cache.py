"""Features of pictures encoded lately, kept beside the networks: encode once, render at many scales."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .models.continuous import ContinuousSR


class FeatureCache:
    """A bounded store of features (document 001); the least recently used are dropped first.

    Networks for any scale keep nothing between calls, so this does it for them, outside. ``hits`` and ``misses`` count
    the calls, ``bytes`` is what is held, never above ``max_bytes``: larger features are made anew every time. What a
    network encoded before its weights were changed is not given out. Raises ValueError for max_bytes below 0.
    """

    def __init__(self, max_bytes: int = 2**28):
        if max_bytes < 0:
            raise ValueError(f"max_bytes {max_bytes} must not be negative")
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        # The network is kept beside its features, so that no other weights can get the identity of its own meanwhile.
        self._held: OrderedDict[tuple, tuple[nn.Module, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def features(self, model: ContinuousSR, lr: Tensor) -> Tensor:
        """``model.encode(lr)`` "b c h w" without a gradient, made or found; not to be changed in place."""
        key = _key(model, lr)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
            return self._held[key][1]
        self.misses += 1
        with torch.no_grad():
            found = model.encode(lr)
        if found.nbytes <= self.max_bytes:
            self._held[key] = (model, found)
            self.bytes += found.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._held.popitem(last=False)[1][1].nbytes
        return found

    @torch.no_grad()
    def upscale(
        self,
        model: ContinuousSR,
        picture: Tensor,
        scale: float | tuple[float, float] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """A picture "3 h w" in [0, 1] as :func:`nbhelpers.inference.upscale` enlarges it, whole: "3 h' w'", clamped.

        ``scale`` or ``size`` as there; None: the network's own scale. Raises ValueError as ``model.render`` does.
        """
        if scale is not None and size is not None:
            raise ValueError(f"give scale={scale} or size={tuple(size)}, not both")
        lr = picture[None].to(next(model.parameters()).device)
        model = model if scale is None else model.at(scale)
        size = model.output_size(*lr.shape[-2:]) if size is None else size
        return model.render(self.features(model, lr), lr, size)[0].clamp(0, 1)

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()
        self.bytes = 0


def _key(model: ContinuousSR, lr: Tensor) -> tuple:
    """What features depend on: the weights, which a view by ``model.at`` shares, the picture, and the arithmetic."""
    weights = tuple((id(p), p._version) for p in model.parameters())  # and how often each was written to
    kind = lr.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lr.dtype
    digest = hashlib.blake2b(lr.detach().cpu().contiguous().numpy(), digest_size=16).digest()
    return weights, tuple(lr.shape), str(lr.device), precision, digest
