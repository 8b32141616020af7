"""ESPCN: three convolutions in low resolution, then one pixel shuffle (Shi et al. 2016; document 002)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import BicubicUpsample

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
}


class ESPCN(nn.Module):
    """Efficient sub-pixel network: "b 3 h w" in [0, 1] → "b 3 h·scale w·scale", unclamped.

    Args:
        scale: whole-number enlargement.
        channels: width of the two hidden layers; 64 in the paper, 128 in document 002.
        activation: ``tanh`` (paper), ``relu`` or ``leaky_relu`` (slope 0.1, document 002).
        skip: add the bicubic enlargement, so that the network learns only what bicubic misses (ours).
        output_activation: ``tanh`` maps the output to (0, 1), which document 002 tried first; None otherwise.

    Source: https://arxiv.org/abs/1609.05158; 212,656 parameters at 128 channels and scale 4.
    """

    halo = 4  # radius of the receptive field in input pixels: 2 + 1 + 1

    def __init__(
        self,
        scale: int = 4,
        channels: int = 128,
        activation: str = "leaky_relu",
        skip: bool = True,
        output_activation: str | None = None,
    ):
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale {scale} must be a whole number of at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; choose one of {list(ACTIVATIONS)}")
        if output_activation not in (None, "tanh"):
            raise ValueError(f"output_activation {output_activation!r} is unknown; choose None or 'tanh'")
        if skip and output_activation:
            raise ValueError("skip=True adds bicubic to an unbounded output; use output_activation=None with it")
        act = ACTIVATIONS[activation]
        self.scale = scale
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=5, padding="same"),
            act(),
            nn.Conv2d(channels, channels, kernel_size=3, padding="same"),
            act(),
        )
        self.to_subpixels = nn.Conv2d(channels, 3 * scale**2, kernel_size=3, padding="same")
        self.shuffle = nn.PixelShuffle(scale)
        self.skip = BicubicUpsample(scale) if skip else None
        self.squash = nn.Tanh() if output_activation == "tanh" else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.to_subpixels(self.features(x))).float()
        if self.squash is not None:
            out = (self.squash(out) + 1) / 2
        return out if self.skip is None else out + self.skip(x)
