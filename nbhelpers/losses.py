"""Training losses by name; each takes (sr, hr) "b c h w" and returns a scalar."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from .degrade import linear_to_srgb, srgb_to_linear
from .metrics import LPIPS_SIDE, lpips_network, rgb_to_y

SHIFTS = 8  # a shift crop moves a picture by 0–7 pixels on each axis


def charbonnier(sr: Tensor, hr: Tensor, *, epsilon: float = 1e-3) -> Tensor:
    """Smooth L1: mean of sqrt(d² + ε²) (Lai et al. 2017)."""
    return torch.sqrt((sr - hr).square() + epsilon**2).mean()


def mse_luma(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error of luma (BT.601), the quantity PSNR-Y measures."""
    return rgb_to_y(sr - hr, full_range=True).square().mean()


def psnr_luma(sr: Tensor, hr: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Tens of dB by which the PSNR of luma falls short of 50 dB, mean over the pictures: log10(1 + MSE / ε).

    PSNR as a loss (Chen et al. 2021, HINet, on RGB): a smooth picture counts as much as a detailed one. ``epsilon``
    keeps a nearly perfect one from outweighing the rest.
    """
    error = rgb_to_y(sr - hr, full_range=True).square().mean(dim=(-3, -2, -1))
    return torch.log10(1 + error / epsilon).mean()


def total_variation(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of ``sr``, down plus across; ``hr`` is not looked at."""
    return sr.diff(dim=-2).abs().mean() + sr.diff(dim=-1).abs().mean()


def frequency(sr: Tensor, hr: Tensor, *, phase: float = 1.0) -> Tensor:
    """Distance of the spectra: mean | |A| - |B| | + ``phase`` · mean min(|A|, |B|) · (1 - cos(phase of A - of B)).

    A and B are the orthonormal 2-D Fourier transforms of ``sr`` and ``hr`` per channel, in fp32 (the half plane that
    a real picture needs), so both parts are in units of the pictures' values. Document 000 gives the first part and
    "+ phase". Ours: phases are compared as unit phasors, for which -π and π are the same, and a frequency counts by
    the smaller of its two amplitudes, held constant: one that is empty in either picture has no phase to speak of,
    shrinking it earns nothing, and the gradient stays bounded, also at amplitude 0.
    """
    a, b = (torch.fft.rfft2(x.float(), norm="ortho") for x in (sr, hr))
    size_a, size_b = a.abs(), b.abs()
    amplitude = (size_a - size_b).abs().mean()
    if not phase:
        return amplitude
    unit_a, unit_b = (x / size.clamp_min(1e-8) for x, size in ((a, size_a), (b, size_b)))
    cosine = unit_a.real * unit_b.real + unit_a.imag * unit_b.imag
    return amplitude + phase * (torch.minimum(size_a, size_b).detach() * (1 - cosine)).mean()


# --- Perceptual losses ------------------------------------------------------------------------------------


def random_shift_crop(*pictures: Tensor) -> tuple[Tensor, ...]:
    """Crop all pictures "… h w" to h-7 × w-7 at one random offset of 0–7 pixels down and across.

    Document 002 shifts the pairs its discriminator sees so, because a network that shrinks by 8 sees every alignment
    with its own grid this way. Drawn from torch's global generator: ``torch.manual_seed`` makes it repeatable.
    """
    y, x = torch.randint(SHIFTS, (2,)).tolist()
    h, w = (n - (SHIFTS - 1) for n in pictures[0].shape[-2:])
    return tuple(p[..., y : y + h, x : x + w] for p in pictures)


def half_size(x: Tensor) -> Tensor:
    """Pictures "… h w" in [0, 1] → "… h//2 w//2": mean of 2×2 pixels in linear light, back in sRGB values.

    Values outside [0, 1] are clamped, as on a screen, and pass no gradient (the full size does); the gradient is
    finite everywhere.
    """
    return linear_to_srgb(F.avg_pool2d(srgb_to_linear(x), 2))


# name: weights of VGG16's convolutions in order, and the weight of the whole term where the source names one.
# The weights are cut to the depth in use; the five of Real-ESRGAN serve no deeper layer than conv3_1.
LAYER_WEIGHTS: dict[str, tuple[tuple[float, ...], float | None]] = {
    "uniform": ((1.0,) * 13, None),
    "srgan": ((1.0,) * 13, 1e-3),
    "author": ((1.0,) * 13, 1e-4),
    "halving": (tuple(0.5**i for i in range(13)), None),
    "real_esrgan": ((0.1, 0.1, 1.0, 1.0, 1.0), None),
}
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}


class PerceptualLoss(nn.Module):
    """Distance of two pictures in the features of a frozen VGG16, summed over its convolutions; a scalar.

    (sr, hr) "b 3 h w" in [0, 1]. At each size the loss is Σ layer weight · criterion(features of sr, of hr), with
    features from before the activation and differences in fp32 also under autocast; hr gets no gradient.

    As in document 002: VGG16 before activation, the sum over every convolution, mse, full and half size together,
    the presets ``author`` (weight 0.0001) and ``srgan`` (the 0.001 it reads in the SRGAN paper) with all layers alike,
    ``halving`` (1 ½ ¼ …, which it suggests because deeper layers give larger errors) and ``real_esrgan``
    (0.1 0.1 1 1 1 on the first five convolutions, as it reads that paper; its published code takes the last
    convolution of each of VGG19's five blocks). Ours: the l1 criterion (Real-ESRGAN's), halving in linear light (the
    text does not say how it halves), and the shift crop here (the text has it for the discriminator).
    Ours too: features are expressed in IMAGENET1K_V1's units (``VGG16Features.unit``), so that the text's weights
    mean about the same with either weight file; the other's features are 58 times as large.

    Args:
        depth, weights: see :class:`nbhelpers.features.VGG16Features`.
        layer_weights: a name in ``LAYER_WEIGHTS``, or one number ≥ 0 for each convolution up to ``depth``.
        criterion: "mse" or "l1".
        full_size, half_size: weight of the loss at this size; True is 1, False (0) leaves the size out.
        shift_crop: crop both pictures at one random offset of 0–7 pixels first.

    Raises ValueError for unknown or misfitting options and for pictures of different or too small size;
    FeatureWeightsError or DownloadError where the weights are not to be had.
    """

    def __init__(
        self,
        *,
        depth: str = "conv2_2",
        weights: str = "IMAGENET1K_FEATURES",
        layer_weights: str | Sequence[float] = "uniform",
        criterion: str = "mse",
        full_size: float = True,
        half_size: float = False,
        shift_crop: bool = False,
    ):
        super().__init__()
        from .features import VGG16Features, layers_to  # torchvision is imported only where features are wanted

        if criterion not in CRITERIA:
            raise ValueError(f"vgg: criterion {criterion!r} is unknown; choose one of {list(CRITERIA)}")
        self.sizes = {"full": _number("vgg: full_size", full_size), "half": _number("vgg: half_size", half_size)}
        self.sizes = {size: weight for size, weight in self.sizes.items() if weight}
        if not self.sizes:
            raise ValueError(f"vgg: full_size={full_size} and half_size={half_size} leave no size; set one above 0")
        self.layers = layers_to(depth)
        self.layer_weights, self.weight = _layer_weights(layer_weights, self.layers)
        self.depth, self.criterion, self.shift_crop = depth, criterion, bool(shift_crop)
        self.network = VGG16Features(depth, weights)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        parts = self.parts(sr, hr)
        return sum(
            self.sizes[size] * weight * value
            for size, values in parts.items()
            for weight, value in zip(self.layer_weights, values, strict=True)
        )

    def parts(self, sr: Tensor, hr: Tensor) -> dict[str, list[Tensor]]:
        """The unweighted distance of every convolution in ``layers``, at each size in use: {"full": […], "half": […]}.

        One draw of the shift crop serves both sizes. Values in IMAGENET1K_V1's units (squared for mse).
        """
        self._check(sr, hr)
        if self.shift_crop:
            sr, hr = random_shift_crop(sr, hr)
        shrink = {"full": lambda x: x, "half": half_size}
        return {size: self._distances(shrink[size](sr), shrink[size](hr)) for size in self.sizes}

    def _distances(self, sr: Tensor, hr: Tensor) -> list[Tensor]:
        # Two passes: one over cat([sr, hr]) takes 1.6 times as long, as it sends a gradient back through hr's half too.
        with torch.no_grad():
            wanted = self.network(hr)
        given = self.network(sr)
        unit = self.network.unit ** (2 if self.criterion == "mse" else 1)
        with torch.autocast(sr.device.type, enabled=False):
            return [CRITERIA[self.criterion](given[n].float(), wanted[n].float()) * unit for n in self.layers]

    def _check(self, sr: Tensor, hr: Tensor) -> None:
        if sr.shape != hr.shape or sr.dim() != 4 or sr.shape[1] != 3:
            raise ValueError(f"vgg: need two batches 'b 3 h w' alike, got {tuple(sr.shape)} and {tuple(hr.shape)}")
        needed = self.network.min_size * (2 if "half" in self.sizes else 1) + (SHIFTS - 1) * self.shift_crop
        if min(sr.shape[-2:]) < needed:
            raise ValueError(
                f"vgg: pictures of {sr.shape[-2]}x{sr.shape[-1]} pixels are too small for depth {self.depth} "
                f"(sizes: {', '.join(self.sizes)}; shift_crop: {self.shift_crop}); it needs {needed}x{needed}: use "
                "larger patches or a smaller depth"
            )


class LPIPSLoss(nn.Module):
    """LPIPS-Squeeze (Zhang et al. 2018) of (sr, hr) "b 3 h w" in [0, 1], mean over the batch; 0 = same.

    The frozen network behind :func:`nbhelpers.metrics.lpips_squeeze`, here with a gradient for ``sr`` and on values
    as they are, neither clamped nor rounded. Always in fp32.

    Raises FileNotFoundError where the weights are not on this machine, ValueError for pictures below 32x32 pixels.
    """

    def __init__(self):
        super().__init__()
        self.network = lpips_network()
        for module in self.network.modules():  # buffers outside the state dict, as PerceptualLoss has them
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach(), persistent=False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        if min(sr.shape[-2:]) < LPIPS_SIDE:
            raise ValueError(
                f"lpips: pictures of {sr.shape[-2]}x{sr.shape[-1]} pixels are too small; it needs at least "
                f"{LPIPS_SIDE}x{LPIPS_SIDE}: use larger patches"
            )
        with torch.autocast(sr.device.type, enabled=False):
            return self.network(sr.float(), hr.float(), normalize=True).mean()


def _number(what: str, value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a number of at least 0, not {value!r}")
    return float(value)


def _layer_weights(wanted: str | Sequence[float], layers: Sequence[str]) -> tuple[list[float], float | None]:
    """Weights of the layers, and the preset's weight of the whole term or None."""
    if isinstance(wanted, str):
        if wanted not in LAYER_WEIGHTS:
            raise ValueError(f"vgg: layer_weights {wanted!r} is unknown; choose from {list(LAYER_WEIGHTS)} or a list")
        preset, weight = LAYER_WEIGHTS[wanted]
        numbers = list(preset[: len(layers)])
    else:
        numbers, weight = [_number("vgg: a layer weight", value) for value in wanted], None
    if len(numbers) != len(layers):
        raise ValueError(
            f"vgg: layer_weights {wanted!r} has {len(numbers)} numbers, but depth {layers[-1]} has {len(layers)} "
            f"convolutions ({layers[0]} to {layers[-1]}); give one number for each"
        )
    return numbers, weight


# --- Weighted sum -----------------------------------------------------------------------------------------

# A term's options in a configuration are its keyword-only arguments. A class is built once with them.
LOSSES: dict[str, Callable[..., object]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "mse_luma": mse_luma,
    "psnr_luma": psnr_luma,
    "charbonnier": charbonnier,
    "frequency": frequency,
    "lpips": LPIPSLoss,
    "tv": total_variation,
    "vgg": PerceptualLoss,
}


class WeightedLoss(nn.Module):
    """Weighted sum of named terms: ``WeightedLoss({"l1": 1.0})``; the call returns (total, {name: term}).

    A term is a weight, or a mapping with ``weight`` and the term's own options:
    ``{"l1": 1.0, "vgg": {"weight": 1e-4, "half_size": True}}``. The weight may be left out where the options bring
    one (``{"vgg": {"layer_weights": "author"}}``). Raises ValueError for an unknown term or option, and for a
    weight that is missing or not a finite number ≥ 0.
    """

    def __init__(self, weights: Mapping[str, float | Mapping[str, object]]):
        super().__init__()
        if OmegaConf.is_config(weights):
            weights = OmegaConf.to_container(weights, resolve=True)
        if unknown := sorted(set(weights) - set(LOSSES)):
            raise ValueError(f"loss {unknown} is unknown; choose from {sorted(LOSSES)}")
        if not weights:
            raise ValueError(f"no loss given; choose from {sorted(LOSSES)}")
        self.weights: dict[str, float] = {}
        self.terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name, value in weights.items():
            self.weights[name], self.terms[name] = _term(name, value)
        # Registered, so that frozen networks move with `.to(device)`; they hold nothing that a state dict keeps.
        self.networks = nn.ModuleList(t for t in self.terms.values() if isinstance(t, nn.Module))

    def forward(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {name: term(sr, hr) for name, term in self.terms.items()}
        return sum(self.weights[name] * term for name, term in terms.items()), terms


def _term(name: str, value: float | Mapping[str, object]) -> tuple[float, Callable[[Tensor, Tensor], Tensor]]:
    """(weight, term) of one entry of a ``loss:`` section."""
    function = LOSSES[name]
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = options.pop("weight", None)
    allowed = [k for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"loss {name!r} has no option {unknown}; it has {['weight', *allowed]}")
    term = function(**options) if inspect.isclass(function) else partial(function, **options)
    if weight is None:
        weight = getattr(term, "weight", None)
    if weight is None:
        raise ValueError(f"loss {name!r} has no weight; give {name}: NUMBER or {name}: {{weight: NUMBER, …}}")
    return _number(f"loss {name!r}: weight", weight), term


# --- Adversarial losses -----------------------------------------------------------------------------------
# Logits of a discriminator, any shape, the same for the generated picture (fake) and its original (real); they may
# be as large as ±1e4. All are computed in fp32 and averaged over every logit.

ADVERSARIAL_LOSSES = ("classic", "relativistic", "bounded", "bounded_smooth")


def _check_adversarial(kind: str, pred_fake: Tensor, pred_real: Tensor) -> tuple[Tensor, Tensor]:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"adversarial loss {kind!r} is unknown; choose one of {list(ADVERSARIAL_LOSSES)}")
    if pred_fake.shape != pred_real.shape:
        raise ValueError(f"logits of two shapes: {tuple(pred_fake.shape)} fake, {tuple(pred_real.shape)} real")
    return pred_fake.float(), pred_real.float()


def generator_loss(kind: str, pred_fake: Tensor, pred_real: Tensor) -> Tensor:
    """What the generator minimises, given the discriminator's logits; a scalar of at least 0.

    With f and r for a place's logits of the generated picture and of the original (document 002):

    ``classic``: -log σ(f), the generated picture alone should look real (binary cross entropy with target 1).
    ``relativistic``: -log σ(f - r), it should look more real than the original (Jolicoeur-Martineau 2018).
    ``bounded``: the same where r >= f, and 0 where the generated picture already looks more real: no reward for
    inventing patterns. The document writes it as a difference of 9000 put into the cross entropy; that is this very
    function, but it multiplies by 0, which turns an infinite logit into NaN.
    ``bounded_smooth`` (ours): 2 log cosh((r - f) / 2) where r > f, else 0. At r = f ``bounded`` falls from ln 2 to 0
    and, which is what training feels, its gradient from 1/2 to 0; taking ln 2 off would mend the first only. Here
    the gradient, tanh((r - f) / 2), begins at 0 and approaches the same 1.

    Raises ValueError for an unknown kind or logits of different shapes.
    """
    fake, real = _check_adversarial(kind, pred_fake, pred_real)
    if kind == "classic":
        return F.softplus(-fake).mean()
    gap = real - fake
    if kind == "bounded":
        return torch.where(fake > real, 0.0, F.softplus(gap)).mean()
    if kind == "bounded_smooth":
        gap = gap.clamp_min(0)
        return (gap + 2 * F.softplus(-gap) - 2 * math.log(2)).mean()
    return F.softplus(gap).mean()


def discriminator_loss(kind: str, pred_fake: Tensor, pred_real: Tensor) -> Tensor:
    """What the discriminator minimises: ln 2 while it cannot tell the two apart, 0 when it always can.

    ``classic``: binary cross entropy with targets 0 (fake) and 1 (real), mean of both. All others: -log σ(r - f),
    the original should look more real than the generated picture; the bound concerns the generator only.
    Raises ValueError like :func:`generator_loss`.
    """
    fake, real = _check_adversarial(kind, pred_fake, pred_real)
    if kind == "classic":
        return (F.softplus(fake).mean() + F.softplus(-real).mean()) / 2
    return F.softplus(fake - real).mean()
