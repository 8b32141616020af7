"""Initialisers by name: each against its definition; shared and independent layers, seeds, gains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nbhelpers.initialization import INITIALISERS, M23_FAMILY, initialise
from nbhelpers.m23 import m23_init_tensor, m23_values
from nbhelpers.models.plain import PlainBlock
from nbhelpers.studies.m23_signal import operator_values


def matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().double().flatten(1)


def network(layers: int = 3, channels: int = 44, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, bias=bias) for _ in range(layers)))


def residual() -> nn.Sequential:
    return nn.Sequential(*(PlainBlock(lambda: nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)))


@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_sets_every_weight_and_repeats_by_seed(name):
    one, again, other = (residual() for _ in range(3))
    for net, seed in ((one, 3), (again, 3), (other, 4)):
        for p in net.parameters():
            nn.init.constant_(p, math.nan)
        assert initialise(net, name, seed, shared=False) is net
    state, same, differs = (net.state_dict() for net in (one, again, other))
    for key, value in state.items():
        assert value.isfinite().all() and torch.equal(value, same[key])
    assert any(not torch.equal(state[key], differs[key]) for key in state)


@pytest.mark.parametrize("name", [n for n in INITIALISERS if n != "fixup"])
def test_shared_layers_are_equal_and_independent_ones_are_not(name):
    a, b, _ = (layer.weight for layer in initialise(network(), name, 1, shared=True))
    assert torch.equal(a, b)
    c, d, _ = (layer.weight for layer in initialise(network(), name, 1, shared=False))
    assert not torch.allclose(c, d, atol=1e-3)


@pytest.mark.parametrize("name", M23_FAMILY)
def test_shared_m23_is_the_deterministic_form_whatever_the_seed(name):
    a, b = (initialise(network(1), name, seed)[0].weight for seed in (0, 9))  # None: shared, as the document has it
    assert torch.equal(a, b)
    expected = m23_init_tensor(torch.empty(a.shape), **M23_FAMILY[name])
    torch.testing.assert_close(a.detach(), expected, atol=1e-6, rtol=0)


def test_rivals_are_what_they_are_called():
    made = {n: initialise(network(1), n, 0, shared=False)[0] for n in INITIALISERS if n != "fixup"}
    weight = {n: matrix(layer.weight) for n, layer in made.items()}
    fan_in = 44 * 9
    assert float(weight["he"].std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
    assert float(weight["xavier"].abs().max()) == pytest.approx(math.sqrt(6 / (2 * fan_in)), rel=0.01)
    assert float(weight["default"].abs().max()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
    eye = torch.eye(44, dtype=torch.float64)
    torch.testing.assert_close(weight["orthogonal"] @ weight["orthogonal"].T, eye, atol=1e-5, rtol=0)
    values = operator_values(made["delta_orthogonal"].weight.detach(), 8)
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)
    norms = matrix(m23_init_tensor(torch.empty(44, fan_in))).norm(dim=1)
    torch.testing.assert_close(weight["row_norm_gaussian"].norm(dim=1), norms, atol=1e-5, rtol=0)
    for name in ("haar_real", "random_spectrum", "m23"):  # half of the energy of a semi-unitary matrix
        assert float(weight[name].square().sum()) / 44 == pytest.approx(0.5, abs=0.03), name
    assert float(torch.linalg.svdvals(weight["haar_real"]).max()) < 1


def test_haar_real_of_tall_layers():
    layer = nn.Linear(10, 400)
    initialise(layer, "haar_real", 0)
    assert layer.weight.shape == (400, 10) and float(matrix(layer.weight).square().sum()) / 10 == pytest.approx(
        0.5, abs=0.06
    )


def test_random_spectrum_is_m23s_construction_with_other_values(monkeypatch):
    """Given M23's own values it gives M23's weights."""

    class Drawn:
        def __init__(self):
            self.parts = iter([m23_values().real, m23_values().imag])

        def standard_normal(self, n):
            return next(self.parts)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Drawn())
    a = initialise(network(1), "random_spectrum", 0)[0].weight
    torch.testing.assert_close(a.detach(), m23_init_tensor(torch.empty(a.shape)), atol=1e-6, rtol=0)


def test_default_is_pytorchs_with_its_biases_and_others_start_biases_at_zero():
    default, he = (initialise(network(1), name, 0)[0] for name in ("default", "he"))
    bound = 1 / math.sqrt(44 * 9)
    assert 0.8 * bound < float(default.bias.detach().abs().max()) <= bound
    assert not he.bias.any()


def test_fixup_starts_residual_blocks_as_identity_and_shrinks_the_rest():
    net = initialise(residual(), "fixup", 0)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(net(x), x)
    plain = initialise(residual(), "he", 0)
    first = net[2].branch[0].weight
    torch.testing.assert_close(first, plain[2].branch[0].weight * 4**-0.5)  # 4 branches of 2 layers
    with pytest.raises(ValueError, match="Sequential has no block with an attribute `branch`"):
        initialise(network(), "fixup")


def test_gain_multiplies_all_weights():
    a, b = (initialise(network(2), "he", 0, gain=gain, shared=True) for gain in (1.0, 1.5))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one.weight * 1.5, other.weight)


@pytest.mark.parametrize("shared", [True, False])
def test_a_weight_of_several_layers_is_set_once(shared, monkeypatch):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    net[1].weight = net[0].weight
    calls, rule = [], INITIALISERS["he"]
    monkeypatch.setitem(INITIALISERS, "he", lambda weight, seed: calls.append(weight) or rule(weight, seed))
    initialise(net, "he", 0, shared, gain=2.0)
    assert [tuple(w.shape) for w in calls] == [(6, 6), (3, 6)]
    assert net[1].weight is net[0].weight and not net[1].bias.any()
    alone = initialise(nn.Linear(6, 6), "he", 0, shared, gain=2.0)
    torch.testing.assert_close(net[0].weight, alone.weight)  # the gain, too, only once


def test_without_a_seed_torchs_generator_decides():
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(initialise(nn.Linear(5, 4), "he", seed=None).weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("net", "options", "quoted"),
    [
        (nn.Linear(2, 2), {"name": "m24"}, "'m24' is unknown; choose one of"),
        (nn.ReLU(), {}, "ReLU has no linear or convolutional layer"),
        (nn.Linear(2, 2), {"gain": 0}, "gain=0 must be a number above 0"),
        (nn.Linear(2, 2, dtype=torch.complex64), {}, "not torch.complex64"),
    ],
)
def test_what_cannot_be_initialised_is_refused(net, options, quoted):
    with pytest.raises(ValueError, match=quoted):
        initialise(net, **options)
