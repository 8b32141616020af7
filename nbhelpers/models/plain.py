"""Deep networks of equal layers and nothing else, to see what their first weights do (document 000's 24 layers)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..initialization import initialise
from ..layers import BicubicUpsample

ACTIVATIONS = {"linear": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU}


class PlainBlock(nn.Module):
    """x + layer(activation(layer(x)))."""

    def __init__(self, layer: Callable[[], nn.Module], activation: str = "relu"):
        super().__init__()
        self.branch = nn.Sequential(layer(), ACTIVATIONS[activation](), layer())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def plain_body(layer: Callable[[], nn.Module], depth: int, activation: str, residual: bool = False) -> nn.Sequential:
    """``depth`` layers from the factory ``layer``, each with its activation, or in residual blocks of two.

    Raises ValueError for an unknown activation, a depth below 1, and an odd depth of residual blocks.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {list(ACTIVATIONS)}")
    if depth < 1 or (residual and depth % 2):
        raise ValueError(f"{depth} layers between the ends: at least 1 is needed, an even number for residual blocks")
    if residual:
        return nn.Sequential(*(PlainBlock(layer, activation) for _ in range(depth // 2)))
    return nn.Sequential(*(m for _ in range(depth) for m in (layer(), ACTIVATIONS[activation]())))


class PlainSR(nn.Module):
    """Upscaler of ``depth`` 3x3 convolutions: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    A head, ``depth`` - 2 convolutions of :func:`plain_body`, a tail with pixel shuffle; bicubic is added to the result.
    The tail starts at zero, whatever the initialiser, so that each network starts as bicubic and what differs is how
    signal and gradient pass the body.

    Args:
        scale: whole-number enlargement.
        channels: width.
        depth: number of convolutions; document 000 compares initialisations at 24.
        activation: ``linear``, ``tanh`` or ``relu``.
        residual: blocks of two convolutions with a skip instead of a plain stack.
        init, shared, gain: see :func:`nbhelpers.initialization.initialise`; torch's global generator gives the seed.

    Raises ValueError for what these cannot be.
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 48,
        depth: int = 24,
        activation: str = "relu",
        residual: bool = False,
        init: str = "default",
        shared: bool | None = None,
        gain: float = 1.0,
    ):
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale {scale} must be a whole number of at least 1")
        self.scale, self.halo = scale, max(depth, BicubicUpsample.halo)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.body = plain_body(partial(conv, channels, channels), depth - 2, activation, residual)
        self.head = nn.Sequential(conv(3, channels), ACTIVATIONS[activation]())
        self.tail = conv(channels, 3 * scale**2)
        self.skip = BicubicUpsample(scale)
        initialise(self, init, None, shared, gain)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, self.tail(self.body(self.head(x))))


class PlainMLP(nn.Module):
    """Classifier of ``depth`` linear layers: "b …" with ``inputs`` values each → logits "b classes".

    Arguments as for :class:`PlainSR`; ``width`` is that of all hidden layers. The last layer starts like the others.
    """

    def __init__(
        self,
        inputs: int = 784,
        classes: int = 10,
        width: int = 64,
        depth: int = 24,
        activation: str = "relu",
        residual: bool = False,
        init: str = "default",
        shared: bool | None = None,
        gain: float = 1.0,
    ):
        super().__init__()
        body = plain_body(partial(nn.Linear, width, width), depth - 2, activation, residual)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, width), ACTIVATIONS[activation](), body, nn.Linear(width, classes)
        )
        initialise(self, init, None, shared, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
