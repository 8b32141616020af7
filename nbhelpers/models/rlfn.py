"""M23-RLFN (document 000): residual local feature blocks with spatial attention, after RLFN (Kong et al. 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..initialization import initialise
from ..layers import BicubicUpsample, BilinearUpsample

SCALES = (2, 3, 4)
CELL = 6  # pixels of one cell of ESA's coarse map: a convolution of stride 2, a pooling of stride 3


class ESA(nn.Module):
    """Enhanced spatial attention: x · mask(x); "b c h w" → the same, for any h and w from 1 pixel on.

    The mask is made in c/4 channels at two sizes: full, and one cell per 6x6 pixels, where a 7x7 max pooling and
    three 3x3 convolutions look far around. Layers as in the code published with document 000 (RLFN itself has one
    convolution on the coarse map). That code stretches the coarse map to the size of x, whatever that is, and needs
    15 pixels; here cells lie at multiples of 6 pixels, so that a tile cut at one gets the mask of the whole picture.

    Raises ValueError for less than 4 channels.
    """

    def __init__(self, n_feats: int):
        super().__init__()
        if n_feats < 4:
            raise ValueError(f"n_feats {n_feats} must be at least 4: the attention works in a quarter of the channels")
        f = n_feats // 4
        self.squeeze = nn.Conv2d(n_feats, f, 1)
        self.local = nn.Conv2d(f, f, 1)
        self.shrink = nn.Conv2d(f, f, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(
            nn.Conv2d(f, f, 3, padding=1), nn.ReLU(),
            nn.Conv2d(f, f, 3, padding=1), nn.ReLU(),
            nn.Conv2d(f, f, 3, padding=1),
        )  # fmt: skip
        self.enlarge = BilinearUpsample(CELL, f)
        self.expand = nn.Conv2d(f, n_feats, 1)
        self.gate = nn.Sigmoid()

    def mask(self, x: Tensor) -> Tensor:
        """Factors in (0, 1) for each value of ``x``."""
        h, w = x.shape[-2:]
        features = self.squeeze(x)
        # Cell k pools shrunken pixels 3k - 2 … 3k + 4; ceil_mode keeps a last, incomplete cell.
        cells = F.max_pool2d(self.shrink(features), 7, stride=3, padding=2, ceil_mode=True)
        wide = self.enlarge(self.coarse(cells))[..., :h, :w]
        return self.gate(self.expand(wide + self.local(features)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x)


class RLFB(nn.Module):
    """Residual local feature block: x + ESA(three 3x3 convolutions with GELU between); "b c h w" → the same.

    As in the code published with document 000. RLFN's own block adds x before a further 1x1 convolution and ESA.
    """

    def __init__(self, n_feats: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(n_feats, n_feats, 3, padding=1), nn.GELU(),
            nn.Conv2d(n_feats, n_feats, 3, padding=1), nn.GELU(),
            nn.Conv2d(n_feats, n_feats, 3, padding=1),
        )  # fmt: skip
        self.esa = ESA(n_feats)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.esa(self.branch(x))


def reach(n_blocks: int) -> int:
    """How far ``n_blocks`` RLFB see in the worst case, in pixels.

    A block moves the edge of what is seen to a cell's border, 34 pixels away at most, each further one by five cells.
    """
    return 34 + 5 * CELL * (n_blocks - 1)


class M23_RLFN(nn.Module):
    """Document 000's network: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped; any h and w from 1 pixel on.

    Bicubic enlargement plus a picture of details: head, ``n_blocks`` RLFB, one convolution, the head's features
    added again, pixel shuffle. 695,548 parameters at 52 x 8 and x4, 1,535,984 at 64 x 12, exactly those of the
    published code (the document says about 900 K and 1.8 M).

    Args:
        n_feats, n_blocks: width, at least 4, and number of blocks.
        scale: 2, 3 or 4.
        use_m23: initialise every layer by the M23 spectrum, as the document does.
        init: without ``use_m23``, a name in ``nbhelpers.initialization.INITIALISERS``; None is PyTorch's default.

    ``halo`` counts what the attention can see in the worst case, 30 pixels a block. ``grid`` is 6: a tile must begin
    at a multiple of it. Raises ValueError for an unknown scale or initialiser, a width below 4, no block, and
    ``init`` beside ``use_m23``.
    """

    grid = CELL

    def __init__(
        self, n_feats: int = 52, n_blocks: int = 8, scale: int = 4, use_m23: bool = True, init: str | None = None
    ):
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale {scale} is unknown; choose one of {list(SCALES)}")
        if n_blocks < 1:
            raise ValueError(f"n_blocks {n_blocks} must be at least 1")
        if use_m23 and init is not None:
            raise ValueError(f"init={init!r} and use_m23=True exclude each other; set use_m23=False for it")
        self.scale = scale
        self.head = nn.Conv2d(3, n_feats, 3, padding=1)
        self.body = nn.Sequential(*(RLFB(n_feats) for _ in range(n_blocks)))
        self.body_conv = nn.Conv2d(n_feats, n_feats, 3, padding=1)
        self.to_subpixels = nn.Conv2d(n_feats, 3 * scale**2, 3, padding=1)
        self.skip = BicubicUpsample(scale)
        self.halo = reach(n_blocks) + 3  # three 3x3 convolutions outside the blocks
        if use_m23 or init is not None:
            initialise(self, init or "m23", seed=None)  # what is random follows torch.manual_seed

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        features = features + self.body_conv(self.body(features))
        return self.skip(x, self.to_subpixels(features))
