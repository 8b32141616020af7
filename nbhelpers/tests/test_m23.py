"""The M23 spectrum and the weights made of it, against independent references."""

from __future__ import annotations

import math
import threading

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from nbhelpers import m23
from nbhelpers.m23 import (
    POLYNOMIALS,
    READINGS,
    VARIANTS,
    m23_init_tensor,
    m23_spectrum,
    m23_values,
    nearest_unitary,
    phase_matrix,
    unitary_factor,
)

WIDE, TALL, SQUARE, CONV = (12, 50), (50, 12), (45, 45), (52, 52, 3, 3)


def matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().double().flatten(1)


# --- The 40 values ----------------------------------------------------------------------------------------


def exact_values(polynomials: str) -> list[complex]:
    """With 40 digits, by another algorithm (Durand-Kerner in mpmath)."""
    with mpmath.workdps(40):
        found = gs = mpmath.polyroots([1, 1, 9, -10, 8], maxsteps=500, extraprec=200)
        for g in gs:
            document = polynomials == "document"
            p3 = [1, 0, g, -1] if document else [1, g, 0, -1]
            p4 = [1, g, 0, -(g**2 + 1), 1 / g - g if document else -g]
            for p in ([1, -g, 1], p3, p4):
                found = found + mpmath.polyroots(p, maxsteps=500, extraprec=200)
        return [complex(z) for z in found]


@pytest.mark.parametrize("polynomials", POLYNOMIALS)
def test_values_are_the_roots_to_1e_10(polynomials):
    expected = np.array(exact_values(polynomials))
    distance = np.abs(m23_values(polynomials)[:, None] - expected)
    assert distance.shape == (40, 40)
    assert sorted(distance.argmin(1)) == list(range(40))  # each root once
    assert distance.min(1).max() < 1e-10


def test_known_facts_of_the_values():
    size = np.abs(m23_values())
    assert size.max() == pytest.approx(3.7436, abs=5e-5) and size.min() == pytest.approx(0.2868, abs=5e-5)
    # By Vieta the roots of each polynomial add up to minus its second coefficient: -1 + Σ(g + 0 - g).
    assert m23_values().sum() == pytest.approx(-1, abs=1e-12)
    # The program's cubic has -g in place of 0, so everything cancels.
    assert m23_values("code").sum() == pytest.approx(0, abs=1e-12)


def test_values_and_spectra_cannot_be_spoilt_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        m23_values()[0] = 0
    spectrum = m23_spectrum(30)
    spectrum[:] = 0
    assert np.abs(m23_spectrum(30)).min() > 0


def test_two_threads_solve_the_polynomials_once_and_agree(monkeypatch):
    expected = {n: m23_spectrum(n, seed=n % 3) for n in range(1, 200)}
    m23._forty.cache_clear()
    solved, solve = [], m23._roots
    monkeypatch.setattr(m23, "_roots", lambda p: solved.append(p) or solve(p))
    start, found = threading.Barrier(8), [{} for _ in range(8)]

    def build(mine: dict, order: int) -> None:
        start.wait()
        for n in sorted(expected, reverse=order % 2 == 1):
            mine[n] = m23_spectrum(n, seed=n % 3)

    threads = [threading.Thread(target=build, args=(mine, i)) for i, mine in enumerate(found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(solved) == 1 + 4 * 3
    for mine in found:
        assert mine.keys() == expected.keys()
        for n, spectrum in mine.items():
            np.testing.assert_array_equal(spectrum, expected[n])


# --- The spectrum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("fan_in", [1, 7, 40, 41, 468])
def test_spectrum_has_fan_in_values_with_the_stated_bound(fan_in, reading):
    spectrum = m23_spectrum(fan_in, reading=reading)
    assert spectrum.shape == (fan_in,) and spectrum.dtype == np.complex128
    assert np.abs(spectrum).max() * math.sqrt(fan_in) == pytest.approx(1, abs=1e-12)


def test_the_two_readings():
    """N = 40: the values again and again. N = fan_in: round k of 3 turned by k/3 of a full turn."""
    scale = np.abs(m23_values()).max() * math.sqrt(120)
    forty, turned = (m23_spectrum(120, reading=reading) * scale for reading in ("forty", "fan_in"))
    np.testing.assert_allclose(forty, np.tile(m23_values(), 3), rtol=1e-12)
    np.testing.assert_allclose(turned[80:], m23_values() * np.exp(4j * np.pi / 3), rtol=1e-12)
    assert len(np.unique(turned.round(9))) == 120


@pytest.mark.parametrize("reading", READINGS)
def test_seed_is_an_order_of_the_same_values(reading):
    plain, one, again, two = (m23_spectrum(100, seed, reading=reading) for seed in (None, 1, 1, 2))
    np.testing.assert_array_equal(one, again)
    if reading == "fan_in":
        np.testing.assert_array_equal(np.sort_complex(one), np.sort_complex(plain))
    assert not np.allclose(one, plain) and not np.allclose(one, two)


@pytest.mark.parametrize("fan_in", [0, -3, 2.5, "9", True, None])
def test_impossible_fan_in_is_quoted(fan_in):
    with pytest.raises(ValueError, match=f"fan_in={fan_in!r} must be a whole number of at least 1"):
        m23_spectrum(fan_in)


@pytest.mark.parametrize("option", ["reading", "polynomials"])
def test_unknown_options_list_the_known(option):
    with pytest.raises(ValueError, match=f"{option} 'elkies' is unknown; choose one of"):
        m23_spectrum(9, **{option: "elkies"})
    with pytest.raises(ValueError, match=f"{option} 'elkies' is unknown"):
        m23_init_tensor(torch.empty(3, 3), **{option: "elkies"})


# --- Weights ----------------------------------------------------------------------------------------------


def documents_matrix(rows: int, columns: int, values: np.ndarray) -> np.ndarray:
    """The document's formula, value by value."""
    w = np.zeros((rows, columns), complex)
    for r in range(rows):
        for c in range(columns):
            w[r, c] = values[(r + c) % len(values)] * np.exp(2j * np.pi * c**2 / columns)
    return w


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, (9, 4, 3, 3), (6, 5, 7)], ids=str)
@pytest.mark.parametrize("seed", [None, 5])
def test_orthogonal_and_standard_are_the_documents_formulas(shape, seed):
    rows, columns = shape[0], math.prod(shape[1:])
    w = documents_matrix(rows, columns, m23_spectrum(columns, seed))
    u, _, vh = np.linalg.svd(w, full_matrices=False)
    for variant, expected in (("orthogonal", (u @ vh).real), ("standard", w.real)):
        weight = m23_init_tensor(torch.full(shape, 7.0, dtype=torch.float64), variant, seed)
        np.testing.assert_allclose(weight.numpy().reshape(rows, columns), expected, atol=1e-10)


def test_reading_of_forty_uses_all_forty_values():
    expected = documents_matrix(12, 50, m23_values() / (np.abs(m23_values()).max() * math.sqrt(50)))
    weight = m23_init_tensor(torch.empty(WIDE, dtype=torch.float64), "standard", reading="forty")
    np.testing.assert_allclose(weight.numpy(), expected.real, atol=1e-12)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_unitary_factor_is_unitary_and_knows_no_scale(shape):
    values = m23_spectrum(shape[1])
    w = unitary_factor(values, *shape)
    product = w @ w.mH if shape[0] <= shape[1] else w.mH @ w
    torch.testing.assert_close(product, torch.eye(min(shape), dtype=w.dtype), atol=1e-10, rtol=0)
    torch.testing.assert_close(unitary_factor(values * 1000, *shape), w, atol=1e-10, rtol=0)


def test_square_layers_by_fourier_transform_equal_the_svd():
    values = m23_spectrum(52)
    torch.testing.assert_close(
        unitary_factor(values, 52, 52), nearest_unitary(phase_matrix(values, 52, 52)), atol=1e-9, rtol=0
    )


def test_real_part_keeps_half_of_the_energy():
    """So a layer is no isometry: the finding behind claim M2."""
    singular = torch.linalg.svdvals(matrix(m23_init_tensor(torch.empty(CONV))))
    assert float(singular.square().mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.35 < float(singular.min()) < 0.45 and 0.88 < float(singular.max()) < 0.95


@pytest.mark.parametrize(
    ("shape", "reading", "rank"),
    [((52, 468), "forty", 40), ((52, 468), "fan_in", 52), ((80, 720), "fan_in", 40), ((30, 270), "forty", 30)],
)
def test_rank_before_orthogonalisation(shape, reading, rank):
    """40 values fill 40 directions; also N = fan_in does not help where fan_in is a multiple of 40."""
    count = 40 if reading == "forty" else shape[1]
    w = phase_matrix(m23_spectrum(count, reading=reading), *shape)
    assert int(torch.linalg.matrix_rank(w, rtol=1e-10)) == rank


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (300, 16), (16, 4, 3, 3)], ids=str)
def test_scaled_and_transformer_have_the_stated_size(shape):
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    for variant, rms in (("scaled", math.sqrt(2 / (fan_in + fan_out))), ("transformer", fan_in**-0.5)):
        weight = m23_init_tensor(torch.empty(shape, dtype=torch.float64), variant)
        assert float(weight.square().mean().sqrt()) == pytest.approx(rms, rel=1e-9)
        assert (
            len(torch.unique(matrix(weight).round(decimals=9), dim=0)) == fan_out
        )  # a tall one does not repeat itself


def test_scaled_serves_tied_embeddings():
    """One matrix, both directions: no two tokens alike, and logits of a size at which training can begin."""
    vocabulary, width = 1000, 64
    embedding, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    head.weight = embedding.weight
    m23_init_tensor(embedding.weight, "scaled")
    tokens = torch.arange(vocabulary)
    vectors = embedding(tokens)
    assert len(torch.unique(vectors.round(decimals=6), dim=0)) == vocabulary
    logits = head(nn.functional.layer_norm(vectors, (width,)))
    loss = nn.functional.cross_entropy(logits, tokens.roll(1))
    assert abs(float(loss.detach()) - math.log(vocabulary)) < 0.3
    # The document's formula repeats itself after 64 rows: token 64 would be token 0.
    m23_init_tensor(embedding.weight, "orthogonal")
    torch.testing.assert_close(embedding.weight[64], embedding.weight[0])


def test_transformer_serves_an_attention_block():
    """Query, key and value of a normalised token have variance 1 and differ, though they are one fused matrix."""
    torch.manual_seed(0)
    width, heads = 64, 4
    block = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    for weight in (block.in_proj_weight, block.out_proj.weight):
        m23_init_tensor(weight, "transformer")
    x = nn.functional.layer_norm(torch.randn(8, 50, width), (width,)).requires_grad_()
    query, key, value = (x @ part.T for part in block.in_proj_weight.chunk(3))
    for projected in (query, key, value):
        assert float(projected.var().detach()) == pytest.approx(1, abs=0.25)
    assert min(float((a - b).detach().abs().mean()) for a, b in ((query, key), (key, value), (query, value))) > 0.3
    y, attention = block(x, x, x)
    entropy = -(attention * attention.log()).sum(-1).mean()
    assert 0.7 * math.log(50) < float(entropy.detach()) < math.log(50)  # neither frozen on one token nor uniform
    y.sum().backward()
    assert x.grad.isfinite().all() and float(x.grad.abs().mean()) > 1e-3
    # By the document's formula the three are one and the same.
    m23_init_tensor(block.in_proj_weight, "orthogonal")
    q, k, v = block.in_proj_weight.detach().chunk(3)
    torch.testing.assert_close(q, k)
    torch.testing.assert_close(q, v)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (1,), (5,)], ids=str)
def test_biases_and_norm_scales_stay_as_they_are(shape, variant):
    assert torch.equal(m23_init_tensor(torch.ones(shape), variant), torch.ones(shape))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 1, 1, 1), (2, 3, 1, 5, 2)], ids=str)
def test_any_shape_gives_finite_weights_in_place(shape, variant):
    weight = nn.Parameter(torch.full(shape, math.nan))
    assert m23_init_tensor(weight, variant) is weight
    assert weight.isfinite().all() and float(weight.detach().abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_types_are_the_same_numbers_rounded(dtype):
    exact = m23_init_tensor(torch.empty(WIDE, dtype=torch.float64))
    assert torch.equal(m23_init_tensor(torch.empty(WIDE, dtype=dtype)), exact.to(dtype))


def test_a_view_is_filled():
    weight = torch.zeros(50, 12)
    m23_init_tensor(weight.T)
    torch.testing.assert_close(weight.T, m23_init_tensor(torch.empty(WIDE)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, CONV], ids=str)
def test_cuda_gives_the_cpus_weights(shape, variant):
    on_gpu = m23_init_tensor(torch.empty(shape, device="cuda"), variant)
    torch.testing.assert_close(on_gpu.cpu(), m23_init_tensor(torch.empty(shape), variant), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tensor", "quoted"),
    [
        (torch.empty(0, 5), r"shape \(0, 5\) has no elements"),
        (torch.empty(4, 0, 3, 3), r"shape \(4, 0, 3, 3\) has no elements"),
        (torch.ones(3, 4, dtype=torch.int64), r"not torch.int64 \(shape \(3, 4\)\)"),
        (torch.ones(3, 4, dtype=torch.complex64), "not torch.complex64"),
    ],
)
def test_impossible_tensors_are_refused(tensor, quoted):
    with pytest.raises(ValueError, match=quoted):
        m23_init_tensor(tensor)


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"variant 'unitary' is unknown; choose one of \['orthogonal', 'standard'"):
        m23_init_tensor(torch.empty(3, 4), "unitary")
