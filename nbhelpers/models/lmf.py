"""One network for every scale (document 001): LMLTE, which renders latent modulated functions, and its rivals.

LIIF (Chen et al. 2021), LTE (Lee and Jin 2022) and LMLTE (He and Jin 2024) encode a picture once and then say the
colour at any coordinate from the features of the pixels around it, and where the coordinate lies between them.
LIIF and LTE ask a wide network for every output pixel; LMLTE asks a wide one for every input pixel, which answers
with modulations of a tiny one, and the tiny one renders the output pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .continuous import ContinuousSR
from .cross_scale import CrossScaleAttention

STARTS = ("linear", "default")
OPEN = 0.1  # where the render network's activations begin: as far as details usually go, and a ReLU is linear there
FREQUENCY = 0.75  # first frequencies of the render network's waves, at most, in half periods in half a pixel


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


def texture(latent: Tensor, offsets: Tensor, phase: Tensor | None, periodic: bool = True) -> Tensor:
    """Local texture (LTE) "n q c" at ``offsets`` "n q 2", in input pixels, from pixels whose ``latent`` "n 2c" holds c
    amplitudes, c/2 frequencies along y and c/2 along x: amplitude · (cos π(f·offset + phase), then as many sines).

    In fp32, where a wave's angle is exact enough. Not ``periodic``: the angles take the place of both waves.
    """
    c, unit = latent.shape[-1] // 2, math.pi if periodic else 1.0
    amplitude, along_y, along_x = latent.float()[:, None].split([c, c // 2, c // 2], -1)
    along_y, along_x = (torch.cat([along, along], -1) for along in (along_y, along_x))
    start = amplitude.new_zeros(c) if phase is None else torch.cat([phase, phase]) * unit
    if periodic:  # a cosine is a sine a quarter ahead; one sine in place takes half the time of both
        start = start + start.new_tensor([math.pi / 2, 0.0]).repeat_interleave(c // 2)
    rows, columns = (2 * unit * offsets).split(1, -1)  # the papers' unit is half a pixel
    angle = torch.addcmul(start, along_y, rows).addcmul_(along_x, columns)
    return (angle.sin_() if periodic else angle).mul_(amplitude)


class LIIF(ContinuousSR):
    """Local implicit image function (Chen et al. 2021): 1,383,424 multiply-adds for every output pixel, at any scale.

    The features of 3x3 pixels, the offset and the cell go through ``layers`` hidden layers of ``width``. Published
    without a skip. Other arguments as for :class:`nbhelpers.models.continuous.ContinuousSR`.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, object] = "EDSR-b",
        scale: float = 4,
        width: int = 256,
        layers: int = 4,
        skip: str | None = None,
        local_ensemble: bool = True,
        cell_decode: bool = True,
        max_scale: float = 4,
    ):
        super().__init__(encoder, scale, skip, local_ensemble, cell_decode, max_scale)
        self.mlp = mlp([9 * self.encoder.out_channels + 2 + 2 * cell_decode, *[width] * layers, 3])

    def latent(self, features: Tensor, ratio: tuple[float, float]) -> Tensor:
        return F.unfold(features, 3, padding=1).unflatten(2, features.shape[-2:]).permute(0, 2, 3, 1)

    def decode(self, latent: Tensor, offsets: Tensor, ratio: tuple[float, float]) -> Tensor:
        parts = [latent[:, None].expand(-1, offsets.shape[1], -1), 2 * offsets]
        if self.cell_decode:
            parts.append(self.cell(ratio, offsets).expand_as(offsets))
        return self.mlp(torch.cat(parts, -1))


class LTE(ContinuousSR):
    """Local texture estimator (Lee and Jin 2022): 789,504 multiply-adds for every output pixel and 294,912 for every
    input pixel.

    Amplitudes and frequencies of ``hidden`` waves at each input pixel, their values at the offset, ``layers`` hidden
    layers of ``hidden`` channels. Other arguments as for :class:`nbhelpers.models.continuous.ContinuousSR`.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, object] = "EDSR-b",
        scale: float = 4,
        hidden: int = 256,
        layers: int = 3,
        skip: str | None = "bilinear",
        local_ensemble: bool = True,
        cell_decode: bool = True,
        max_scale: float = 4,
    ):
        super().__init__(encoder, scale, skip, local_ensemble, cell_decode, max_scale)
        self.estimate = nn.Conv2d(self.encoder.out_channels, 2 * hidden, 3, padding=1)
        self.phase = nn.Linear(2, hidden // 2, bias=False) if cell_decode else None
        self.mlp = mlp([hidden, *[hidden] * layers, 3])

    def latent(self, features: Tensor, ratio: tuple[float, float]) -> Tensor:
        return self.estimate(features).permute(0, 2, 3, 1)

    def decode(self, latent: Tensor, offsets: Tensor, ratio: tuple[float, float]) -> Tensor:
        phase = None if self.phase is None else self.phase(self.cell(ratio, offsets)).float()
        return self.mlp(texture(latent, offsets, phase))


class ModulatedMLP(nn.Module):
    """The render network: ``depth`` linear layers of ``width``, each followed by x·(1 + scale) + shift and ReLU.

    "n q before" and modulations "n 2·depth·width" (all scales, then all shifts; None: none) → "n q 3". In fp32, on a
    CPU the faster arithmetic for layers as narrow as these. Ours: modulations are divided by ``depth``. Adam moves all
    weights by steps of one size, the effects of the layers add up, and undivided they overshoot.
    """

    def __init__(self, before: int, width: int = 16, depth: int = 8):
        super().__init__()
        self.width, self.depth = width, depth
        self.layers = nn.ModuleList(nn.Linear(before if i == 0 else width, width) for i in range(depth))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if modulation is not None:
                # unbind, not an index for each layer: its gradient is one copy, not as many as there are layers.
                divided = modulation.float() / self.depth
                scale, shift = divided.view(-1, 2, self.depth, 1, self.width).unbind(1)
                scales, shifts = (1 + scale).unbind(1), shift.unbind(1)
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if modulation is not None:
                    x = torch.addcmul(shifts[i], x, scales[i], out=None if torch.is_grad_enabled() else x)
                x = x.relu_()
            return self.last(x)

    @torch.no_grad()
    def start_linear(self) -> None:
        """First weights with which it is a linear map, through which signals and gradients pass undamped.

        Rotations around a point at which every ReLU is open: x → ReLU(W(x - c) + c), c = ``OPEN``.
        """
        for i, layer in enumerate(self.layers):
            nn.init.orthogonal_(layer.weight)
            layer.bias.fill_(OPEN)
            if i:
                layer.bias.sub_(OPEN * layer.weight.sum(1))
        nn.init.orthogonal_(self.last.weight)
        self.last.bias.copy_(-OPEN * self.last.weight.sum(1))


class LMLTE(ContinuousSR):
    """Latent modulated local texture estimator (He and Jin 2024, document 001): 8,384 multiply-adds for every output
    pixel and 267,264 for every input pixel; 1,490,883 parameters with EDSR-baseline and the defaults.

    Amplitudes and frequencies of ``hidden`` waves are estimated at each input pixel and read off at the pixel's own
    place and cell; a hyper-network with one layer of ``hyper_width`` turns them into scale and shift of every layer of
    the render network, and into few amplitudes and frequencies that the render network reads at the offset.

    Args, beside those of :class:`nbhelpers.models.continuous.ContinuousSR`:
        hidden, hyper_width, render_width, render_depth: sizes; those of the publication.
        mod_input: the render network gets few waves, made by the hyper-network; else all ``hidden`` ones.
        modulation: modulate the render network; else (an ablation) only its input tells pixels apart.
        positional_encoding: waves; else (an ablation) their angles, which are linear in the offset.
        non_local_attn, multi_scale, softmax_scale: see :class:`nbhelpers.models.cross_scale.CrossScaleAttention`;
            document 001 has it on, the published LMLTE has none. With it every pixel sees the whole picture.
        start: first weights: "linear", ours: details are zero, and a linear mix of waves can be learnt at once (see
            :meth:`ModulatedMLP.start_linear`), or "default", PyTorch's, by which learning begins slowly: eight layers
            of them hardly pass a signal.

    Raises ValueError without both mod_input and modulation, for sizes that cannot be, and for an unknown start.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, object] = "EDSR-b",
        scale: float = 4,
        hidden: int = 128,
        hyper_width: int = 288,
        render_width: int = 16,
        render_depth: int = 8,
        skip: str | None = "bilinear",
        local_ensemble: bool = True,
        local_size: int = 2,
        cell_decode: bool = True,
        mod_input: bool = True,
        modulation: bool = True,
        positional_encoding: bool = True,
        non_local_attn: bool = False,
        multi_scale: Sequence[int] = (2,),
        softmax_scale: float = 1.0,
        max_scale: float = 4,
        start: str = "linear",
    ):
        super().__init__(encoder, scale, skip, local_ensemble, cell_decode, max_scale, local_size)
        for name, value in {"hidden": hidden, "render_width": render_width}.items():
            if value < 2 or value % 2:
                raise ValueError(f"{name} {value} must be an even number of at least 2: half its waves run along y")
        if render_depth < 1 or hyper_width < 1:
            raise ValueError(f"render_depth {render_depth} and hyper_width {hyper_width} must be at least 1")
        if not (mod_input or modulation):
            raise ValueError("mod_input=False and modulation=False leave the hyper-network without a task; set one")
        if start not in STARTS:
            raise ValueError(f"start {start!r} is unknown; choose one of {list(STARTS)}")
        self.hidden, self.mod_input, self.positional_encoding = hidden, mod_input, positional_encoding
        self.modulations = 2 * render_depth * render_width * modulation
        self.attention = None
        if non_local_attn:
            self.attention = CrossScaleAttention(self.encoder.out_channels, multi_scale, softmax_scale)
            self.halo = None
        self.estimate = nn.Conv2d(self.encoder.out_channels, 2 * hidden, 3, padding=1)
        self.hyper = mlp([hidden, hyper_width, self.modulations + 2 * render_width * mod_input])
        waves_in = render_width if mod_input else hidden
        self.render_mlp = ModulatedMLP(waves_in, render_width, render_depth)
        self.phase, self.render_phase = (
            nn.Linear(2, n // 2, bias=False) if needed else None
            for n, needed in ((hidden, cell_decode), (render_width, cell_decode and mod_input))
        )
        if start == "linear":
            self._start_linear(render_width)

    @torch.no_grad()
    def _start_linear(self, waves: int) -> None:
        self.render_mlp.start_linear()
        asks = self.hyper[-1]  # for modulations, amplitudes and frequencies, in this order
        nn.init.zeros_(asks.weight)
        nn.init.zeros_(asks.bias)
        if self.mod_input:
            nn.init.uniform_(asks.bias[-waves:], -FREQUENCY, FREQUENCY)
        else:  # the amplitudes come from elsewhere and are not zero
            nn.init.zeros_(self.render_mlp.last.weight)
            nn.init.zeros_(self.render_mlp.last.bias)

    def encode(self, x: Tensor) -> Tensor:
        features = super().encode(x)
        return features if self.attention is None else self.attention(features)

    def shared(self, features: Tensor, ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """(what the hyper-network gets "b h w hidden", all waves "b h w 2·hidden") of every input pixel."""
        estimated = self.estimate(features).permute(0, 2, 3, 1)
        phase = None if self.phase is None else self.phase(self.cell(ratio, features)).float()
        # "At the pixel's own place" is half a pixel off, as published: all waves count with offset 1 of half a pixel.
        place = features.new_full((1, 1, 2), 0.5, dtype=torch.float32)
        shared = texture(estimated.flatten(0, 2), place, phase, self.positional_encoding)
        return shared.view(*estimated.shape[:3], self.hidden), estimated

    def latent(self, features: Tensor, ratio: tuple[float, float]) -> Tensor:
        """Modulations of every input pixel (scales, then shifts), then its waves for the render network."""
        shared, estimated = self.shared(features, ratio)
        latent = self.hyper(shared)
        return latent if self.mod_input else torch.cat([latent, estimated.to(latent.dtype)], -1)

    def decode(self, latent: Tensor, offsets: Tensor, ratio: tuple[float, float]) -> Tensor:
        linear = self.render_phase if self.mod_input else self.phase
        phase = None if linear is None else linear(self.cell(ratio, offsets)).float()
        modulation, own = latent.split([self.modulations, latent.shape[1] - self.modulations], 1)
        x = texture(own, offsets, phase, self.positional_encoding)
        return self.render_mlp(x, modulation if self.modulations else None)
