"""The discriminator of document 002 and the losses between it and a generator."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nbhelpers import losses, models

LN2 = math.log(2)
INF = math.inf


def discriminator(**arguments) -> torch.nn.Module:
    return models.build("DilatedDiscriminator", models.DISCRIMINATORS, **arguments)


# --- Discriminator ----------------------------------------------------------------------------------------


def test_parameter_count_of_document_002():
    assert models.count_parameters(discriminator()) == 2_504_001
    assert models.count_parameters(discriminator(downsample="strided")) == 2_504_001  # a fair comparison
    assert models.count_parameters(discriminator(depth=3)) > 2_504_001


@pytest.mark.parametrize(
    "arguments", [{}, {"downsample": "strided"}, {"norm": "none"}, {"depth": 1}, {"depth": 3, "dropout": 0.5}]
)
def test_one_logit_for_8x8_pixels(arguments):
    d = discriminator(channels=4, **arguments)
    assert d(torch.rand(2, 3, 47, 64)).shape == (2, 1, 5, 8)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in d.modules()) == (arguments.get("norm") != "none")


def test_the_view_is_wide_but_finite():
    """A logit sees beyond its own block, by the dilated convolutions; and not the whole of a large picture."""
    d = discriminator(channels=4, norm="none").double()
    x = torch.rand(1, 3, 320, 320, dtype=torch.double, requires_grad=True)
    d(x)[0, 0, 20, 20].backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert 60 < rows[-1] - rows[0] < 200


def test_dropout_makes_the_judgement_noisy_in_training_only():
    d, x = discriminator(channels=4, dropout=0.3), torch.rand(2, 3, 32, 32)
    assert not torch.equal(d(x), d(x))
    d.eval()
    assert torch.equal(d(x), d(x))


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [({"norm": "layer"}, "'layer'"), ({"downsample": "area"}, "'area'"), ({"channels": 0}, "channels 0"),
     ({"depth": 0}, "depth 0"), ({"dropout": 1.0}, "dropout 1.0"), ({"width": 3}, "width")],
)  # fmt: skip
def test_wrong_arguments_are_quoted(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        discriminator(**arguments)


def test_a_picture_below_one_block_is_refused():
    with pytest.raises(ValueError, match="7x30"):
        discriminator(channels=4)(torch.rand(1, 3, 7, 30))


# --- Losses -----------------------------------------------------------------------------------------------


def authors_bounded(pred_y, pred_label):
    """Document 002's loss_for_generator, without its weight."""
    y_more_real = pred_y > pred_label
    diff = y_more_real * 9000 + ~y_more_real * (pred_y - pred_label)
    return F.binary_cross_entropy_with_logits(diff, torch.ones_like(diff))


def test_losses_agree_with_the_documents_code():
    fake, real = torch.randn(2, 1, 6, 6) * 5, torch.randn(2, 1, 6, 6) * 5
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like(fake), torch.zeros_like(fake)
    g, d = losses.generator_loss, losses.discriminator_loss
    assert torch.allclose(g("bounded", fake, real), authors_bounded(fake, real))
    assert torch.allclose(g("relativistic", fake, real), bce(fake - real, one))
    assert torch.allclose(g("classic", fake, real), bce(fake, one))
    assert torch.allclose(d("classic", fake, real), (bce(fake, zero) + bce(real, one)) / 2)
    for kind in ("relativistic", "bounded", "bounded_smooth"):
        assert torch.allclose(d(kind, fake, real), bce(fake - real, zero))
    gap = (real - fake).double()
    smooth = torch.where(gap > 0, 2 * torch.log(torch.cosh(gap / 2)), 0.0).mean()
    assert float(g("bounded_smooth", fake, real)) == pytest.approx(float(smooth), abs=1e-6)


def test_equal_logits_cost_ln_2_but_nothing_in_the_smooth_form():
    x = torch.randn(1, 1, 4, 4)
    for kind, value in (("relativistic", LN2), ("bounded", LN2), ("bounded_smooth", 0.0)):
        assert float(losses.generator_loss(kind, x, x)) == pytest.approx(value, abs=1e-6)
    for kind in losses.ADVERSARIAL_LOSSES:
        at_zero = losses.discriminator_loss(kind, torch.zeros(3), torch.zeros(3))
        assert float(at_zero) == pytest.approx(LN2)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_give_no_nan(kind, dtype):
    values = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=dtype)
    fake, real = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    for loss in (losses.generator_loss, losses.discriminator_loss):
        leaf = fake.clone().requires_grad_()
        out = loss(kind, leaf, real)
        out.backward()
        assert out.dtype == torch.float32 and out.isfinite() and leaf.grad.isfinite().all()


def test_infinite_logits_where_the_documents_form_gives_nan():
    fake, real = torch.tensor([INF, 1.0]), torch.tensor([0.0, -INF])  # both look more real than the original
    assert authors_bounded(fake, real).isnan()
    for kind in ("bounded", "bounded_smooth"):
        leaf = fake.clone().requires_grad_()
        loss = losses.generator_loss(kind, leaf, real)
        loss.backward()
        assert float(loss.detach()) == 0 and torch.equal(leaf.grad, torch.zeros(2))
    assert losses.generator_loss("bounded_smooth", real, fake) == INF  # and a NaN would hide that something broke


def gradient(kind: str, gap: float) -> float:
    """d loss / d (real - fake) of one place at that gap."""
    fake = torch.zeros(1, dtype=torch.double, requires_grad=True)
    losses.generator_loss(kind, fake, torch.full((1,), gap, dtype=torch.double)).backward()
    return -float(fake.grad)


def test_no_reward_beyond_the_original():
    assert gradient("relativistic", -1) > 0.2
    for kind in ("bounded", "bounded_smooth"):
        assert gradient(kind, -1) == 0 and gradient(kind, -1e-3) == 0 and gradient(kind, 8) > 0.99
    assert gradient("bounded", 1e-3) == pytest.approx(0.5, abs=1e-3)  # the jump
    assert gradient("bounded_smooth", 1e-3) == pytest.approx(5e-4, rel=1e-2)
    assert gradient("bounded_smooth", 1) == pytest.approx(math.tanh(0.5), rel=1e-4)


def test_unknown_loss_and_unlike_logits_are_refused():
    with pytest.raises(ValueError, match=r"'hinge' is unknown.*bounded_smooth"):
        losses.generator_loss("hinge", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        losses.discriminator_loss("classic", torch.zeros(1), torch.zeros(2))
