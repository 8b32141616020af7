"""First weights of LMLTE: no details, a linear map behind them, gradients that reach what must learn first."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import models
from nbhelpers.degrade import upscale_bicubic
from nbhelpers.models.lmf import OPEN, ModulatedMLP

SMALL = {"encoder": {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}, "skip": "bicubic"}


def network(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("LMLTE", **SMALL, **options)


@pytest.mark.parametrize("options", [{}, {"mod_input": False}, {"modulation": False}, {"positional_encoding": False}])
def test_it_begins_as_the_skip(options):
    x = torch.rand(1, 3, 9, 11)
    inner = (..., slice(8, -8), slice(8, -8))  # the two treat borders alike only inside
    with torch.no_grad():
        picture = network(**options).at(4)(x)
    torch.testing.assert_close(picture[inner], upscale_bicubic(x, 4)[inner], atol=1e-5, rtol=0)


def test_the_renderer_begins_linear():
    mlp = ModulatedMLP(16)
    mlp.start_linear()
    a, b = (0.5 * OPEN * torch.nn.functional.normalize(torch.randn(5, 7, 16), dim=-1) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(mlp(a + b, None), mlp(a, None) + mlp(b, None), atol=1e-5, rtol=0)
        assert mlp(a, None).abs().max() > 0.01
        none = torch.zeros(5, 2 * 8 * 16)
        assert torch.equal(mlp(a, none), mlp(a, None))
    # Rotations keep lengths: seen from the output, no direction of the input is damped by the eight layers.
    matrix = torch.autograd.functional.jacobian(lambda x: mlp(x.view(1, 1, 16), None).flatten(), torch.zeros(16))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), atol=1e-5, rtol=0)


def test_a_pixels_waves_are_asked_for_at_once():
    """The gradient of a colour with respect to the amplitudes, which by PyTorch's first weights nearly vanishes."""
    sizes = []
    for start in ("linear", "default"):
        model = network(start=start)
        latent = torch.zeros(4, model.modulations + 32)
        latent[:, -16:] = torch.rand(4, 16)
        latent.requires_grad_()
        model.decode(latent, torch.rand(4, 3, 2) - 0.5, (3.0, 3.0)).sum().backward()
        sizes.append(float(latent.grad[:, model.modulations : model.modulations + 16].norm()))
    assert sizes[0] > 100 * sizes[1]


def test_modulations_are_divided_by_the_depth():
    mlp, x = ModulatedMLP(16, depth=4), torch.rand(3, 5, 16)
    modulation = torch.randn(3, 2, 4, 16)
    y = x
    for i, layer in enumerate(mlp.layers):
        y = torch.relu(layer(y) * (1 + modulation[:, 0, i, None] / 4) + modulation[:, 1, i, None] / 4)
    torch.testing.assert_close(mlp(x, modulation.flatten(1)), mlp.last(y))


def test_an_unknown_start_is_quoted():
    with pytest.raises(ValueError, match=r"start 'he' is unknown; choose one of \['linear', 'default'\]"):
        network(start="he")
