"""Networks that judge how real a picture looks, place by place (document 002)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import DilatedConv2d

NORMS = ("batch", "none")
DOWNSAMPLES = ("maxpool", "strided")


class DilatedDiscriminator(nn.Module):
    """How real does each block of 8x8 pixels look? "b 3 h w" in [0, 1] → logits "b 1 h/8 w/8" (rounded down).

    Document 002's DiscriminatorDilationNetwork: convolutions and pooling three times, convolutions with dilation 2
    and 4 for a wide view, a head of 1x1 convolutions; LeakyReLU 0.1. 2,504,001 parameters at 32 channels with batch
    norm. It shrinks by 8 only, so that every place of the picture is told what is wrong with it.

    Args:
        channels: width of the first stage; the following ones are 2, 4 and 8 times as wide.
        norm: ``batch`` (document 002) or ``none``; the convolutions have a bias only without it.
        dropout: probability before each 1x1 convolution of the head (the document tried dropout; the place is ours).
        downsample: ``maxpool`` (document 002), or ``strided``: the stage's last convolution takes every second pixel
            instead, which leaves the number of parameters as it is.
        depth: convolutions per stage; 2 in document 002, more for a smarter discriminator.

    Raises ValueError for an unknown or impossible argument, and in ``forward`` for a picture below 8x8 pixels.
    """

    cell = 8  # pixels on a side per logit

    def __init__(
        self,
        channels: int = 32,
        norm: str = "batch",
        dropout: float = 0.0,
        downsample: str = "maxpool",
        depth: int = 2,
    ):
        super().__init__()
        for name, value, allowed in (("norm", norm, NORMS), ("downsample", downsample, DOWNSAMPLES)):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {list(allowed)}")
        for name, value in (("channels", channels), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} {value} must be a whole number of at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is outside 0 <= dropout < 1")
        c, strided = channels, downsample == "strided"
        stages: list[nn.Module] = []
        for i in range(3):
            width = c * 2**i
            for j in range(depth):
                first, last = i == j == 0, j == depth - 1
                before = (3 if i == 0 else width // 2) if j == 0 else width
                stages.append(_block(before, width, norm, 5 if first else 3, stride=2 if strided and last else 1))
            if not strided:
                stages.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*stages)
        self.context = nn.Sequential(
            _block(4 * c, 8 * c, norm),
            _block(8 * c, 8 * c, norm, dilation=2),
            _block(8 * c, 8 * c, norm, dilation=4),
            _block(8 * c, 8 * c, norm),
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            _block(8 * c, 16 * c, norm, 1),
            nn.Dropout(dropout),
            _block(16 * c, c, norm, 1),
            nn.Dropout(dropout),
            nn.Conv2d(c, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, w = (n // self.cell * self.cell for n in x.shape[-2:])
        if not (h and w):
            raise ValueError(f"picture of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than {self.cell}x{self.cell}")
        return self.head(self.context(self.stages(x[..., :h, :w])))


def _block(before: int, after: int, norm: str, kernel: int = 3, dilation: int = 1, stride: int = 1) -> nn.Sequential:
    conv = DilatedConv2d(before, after, kernel, dilation, stride=stride, bias=norm == "none")
    layers = [conv, nn.BatchNorm2d(after)] if norm == "batch" else [conv]
    return nn.Sequential(*layers, nn.LeakyReLU(0.1))
