"""Small classifiers for controlled comparisons (document 002's digit network)."""

from __future__ import annotations

from torch import Tensor, nn

DOWNSAMPLING = ("max_pool", "convolution", "stride")


class DigitNet(nn.Module):
    """Classifier of 28×28 digits: "b 1 28 28" in [0, 1] → logits "b classes". Its size is halved twice.

    Args:
        channels: width of the first stage; the second has twice, the last four times as many.
        downsampling: how a stage of two convolutions ends. ``max_pool``: 2×2 maximum. ``convolution``: one more
            3×3 convolution, stride 2, in the place of the maximum. ``stride``: nothing is added, the stage's second
            convolution has stride 2.
        classes: number of outputs.

    Raises ValueError for an unknown ``downsampling``. Source: document 002, "max pooling vs strided conv", and its two
    notebooks ``mnist_baseline_compare_maxpool_vs_*``, whose parameter counts these are: 13,362 with the maximum at 8
    channels, 16,314 with one more convolution. The notebook for ``stride`` keeps every second pixel *after* batch norm
    and activation, at the cost of computing all; we stride the convolution, as the document says. The function is the
    same, only the batch statistics in training come from the pixels that are kept.
    """

    def __init__(self, channels: int = 8, downsampling: str = "max_pool", classes: int = 10):
        super().__init__()
        if downsampling not in DOWNSAMPLING:
            raise ValueError(f"downsampling {downsampling!r} is unknown; choose one of {list(DOWNSAMPLING)}")
        c = channels
        self.layers = nn.Sequential(
            _stage(1, c, downsampling),  # 28 → 26 → 24 → 12
            _stage(c, 2 * c, downsampling),  # 12 → 10 → 8 → 4
            _conv(2 * c, 4 * c, 3),  # 4 → 2
            _conv(4 * c, 4 * c, 2),  # 2 → 1
            nn.Conv2d(4 * c, classes, 1),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _conv(inputs: int, outputs: int, size: int, **options: object) -> nn.Sequential:
    options = {"bias": False, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, **options), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))


def _stage(inputs: int, outputs: int, downsampling: str) -> nn.Sequential:
    stride = 2 if downsampling == "stride" else 1
    layers = [_conv(inputs, outputs, 3), _conv(outputs, outputs, 3, stride=stride)]
    if downsampling == "max_pool":
        layers.append(nn.MaxPool2d(2))
    elif downsampling == "convolution":
        # Batch norm makes the bias useless; the document's network has it, and the count should be the same.
        layers.append(_conv(outputs, outputs, 3, stride=2, padding=1, bias=True))
    return nn.Sequential(*layers)
