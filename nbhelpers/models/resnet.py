"""Classifiers of document 004: torchvision's ResNets for small pictures, with block-orthogonal kernels or controls.

    plain = resnet("Resnet-18", kind="plain")                         # 11,173,962 parameters
    small = resnet("Resnet-18", odk_layers=[3, 4], num_matrices=1)    # 1,505,866 degrees of freedom
    thin = resnet("Resnet-18", kind="plain", width=23)                # as many numbers, in fewer channels

Not part of ``models.REGISTRY``, which holds upscalers, and not imported by ``models``: torchvision takes its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ..block_orthogonal import Replacement, make_block_orthogonal, parameter_counts, stage_convolutions

BASELINES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
STEMS = ("cifar", "imagenet")
KINDS = ("orthogonal", "masked", "grouped", "plain")


class SmallPictureResNet(ResNet):
    """torchvision's ResNet with a stem for small pictures and any width: "b 3 h w" in [0, 1] → logits "b classes".

    The ``cifar`` stem is a 3×3 convolution of stride 1 without max-pooling (document 004), the ``imagenet`` stem
    torchvision's 7×7 of stride 2 with max-pooling. Stages have width, 2·width, 4·width, 8·width channels; names of
    weights are torchvision's. ``report`` says what became of the convolutions of the stages that were to change.
    """

    def __init__(self, block: type[nn.Module], layers: Sequence[int], classes: int, stem: str, width: int):
        self.width = width  # _make_layer, which torchvision's __init__ calls, needs it
        super().__init__(block, list(layers), classes)
        if stem == "cifar":
            self.conv1, self.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
        elif width != 64:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(8 * width * block.expansion, classes)
        self.report: list[Replacement] = []

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:  # the first stage; torchvision begins with 64 channels
            self.inplanes = self.width
        return super()._make_layer(block, planes // 64 * self.width, blocks, stride, dilate)


def resnet(
    baseline_name: str = "Resnet-18",
    classes: int = 10,
    stem: str = "cifar",
    width: int = 64,
    kind: str = "orthogonal",
    odk_layers: Sequence[int] = (3, 4),
    num_matrices: int = 1,
    r: int = 1,
    placement: str = "left_zeros",
    unit_rows: bool = False,
    placement_seed: int = 0,
) -> SmallPictureResNet:
    """A ResNet by document 004's names; arguments after ``kind`` describe the stages ``odk_layers`` (1 to 4).

    Args:
        baseline_name: Resnet-18, -34, -50, -101 or -152, written in any of the usual ways.
        kind: ``orthogonal``: block-orthogonal kernels; ``masked``: the same zeros, other numbers free; ``grouped``:
            grouped convolutions with as nearly as possible the number of degrees of freedom of the orthogonal kernels;
            ``plain``: nothing is changed.
        width: channels of the first stage (64).

    Raises ValueError, quoting the value and the choices; BlockError like :func:`make_block_orthogonal`.
    """
    for key, value, known in (("stem", stem, STEMS), ("kind", kind, KINDS)):
        if value not in known:
            raise ValueError(f"{key} {value!r} is unknown; choose one of {list(known)}")
    name = "".join(c for c in str(baseline_name).lower() if c.isalnum())
    if name not in BASELINES:
        raise ValueError(f"baseline_name {baseline_name!r} is unknown; choose one of {list(BASELINES)}")
    if width < 1 or classes < 2:
        raise ValueError(f"width={width} must be at least 1 and classes={classes} at least 2")
    model = SmallPictureResNet(*BASELINES[name], classes, stem, width)
    if kind != "plain":
        blocks = {"num_matrices": num_matrices, "r": r, "placement": placement}
        kernels = "masked" if kind == "masked" else "orthogonal"
        change = _group if kind == "grouped" else make_block_orthogonal
        model.report = change(model, odk_layers, **blocks, unit_rows=unit_rows, seed=placement_seed, kind=kernels)
    return model


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"ResNet": resnet}


def _group(model: SmallPictureResNet, odk_layers: Sequence[int], **options: object) -> list[Replacement]:
    """Grouped convolutions in the place of what would become orthogonal, with the nearest number of parameters."""
    convolutions = dict(stage_convolutions(model, odk_layers))
    report = make_block_orthogonal(model, odk_layers, **options)
    for entry in (e for e in report if not e.skipped):
        conv, free = convolutions[entry.name], model.get_submodule(entry.name).free.numel()
        common = math.gcd(conv.in_channels, conv.out_channels)
        divisors = [g for g in range(1, common + 1) if common % g == 0]
        # The ratio is what counts: half as many is as far off as twice as many.
        groups = min(divisors, key=lambda g: abs(math.log(conv.weight.numel() / g / max(free, 1))))
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        grouped = nn.Conv2d(*sizes, groups=groups, bias=conv.bias is not None)
        nn.init.kaiming_normal_(grouped.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(entry.name, grouped)
    return report


def thin_width(free: int, baseline_name: str = "Resnet-18", classes: int = 10, stem: str = "cifar") -> int:
    """Channels of the first stage at which a plain ResNet has nearest to ``free`` parameters.

    Raises ValueError where even one channel is too many by half.
    """

    def size(width: int) -> int:
        with torch.device("meta"):  # counted, not made
            return parameter_counts(resnet(baseline_name, classes, stem, width, "plain")).free

    low, high = 1, 2
    while size(high) < free:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= free else (low, middle)
    width = min(low, high, key=lambda w: abs(size(w) - free))
    if size(width) > 1.5 * free:
        raise ValueError(f"a plain {baseline_name} has at least {size(1):,} parameters; {free:,} are too few")
    return width
