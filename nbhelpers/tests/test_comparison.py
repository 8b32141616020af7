"""Comparisons: damage in its order and always the same, networks for other scales, photos too large for a page."""

import numpy as np
import pytest
import torch

from nbhelpers import comparison, degrade, inference, models
from nbhelpers.comparison import AS_IS, RESTORE, Damage, compare_upscaling
from nbhelpers.images import to_uint8
from nbhelpers.jobs import Worker
from nbhelpers.tests.conftest import tiny_network


@pytest.fixture
def picture():
    small = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (72, 84), mode="bicubic")[0].clamp(0, 1).mul(255).round().div(255)


def test_damage_is_blur_then_noise_then_jpeg(picture):
    blurred = degrade.gaussian_blur(picture, 1.3)
    noisy = degrade.add_noise(blurred, 10, torch.Generator().manual_seed(0))
    expected = degrade.jpeg(noisy, 40)
    assert (Damage(40, 1.3, 10)(picture) - expected).abs().max() < 0.05  # another convolution: JPEG rounds it apart
    torch.testing.assert_close(Damage(blur=1.3)(picture), blurred, atol=0.6 / 255, rtol=0)
    torch.testing.assert_close(
        Damage(noise=10)(picture),
        degrade.add_noise(picture, 10, torch.Generator().manual_seed(0)),
        atol=0.6 / 255,
        rtol=0,
    )
    torch.testing.assert_close(Damage(40)(picture), degrade.jpeg(picture, 40))


def test_no_damage_changes_nothing_and_says_nothing(picture):
    assert torch.equal(Damage()(picture), picture) and str(Damage()) == ""
    assert str(Damage(30, 1.5, 10)) == "blur 1.5 px, noise 10 of 255, JPEG quality 30"


def test_the_same_seed_gives_the_same_noise(picture):
    assert torch.equal(Damage(noise=9, seed=3)(picture), Damage(noise=9, seed=3)(picture))
    assert not torch.equal(Damage(noise=9, seed=3)(picture), Damage(noise=9, seed=4)(picture))


def test_all_sides_get_the_same_damaged_picture(picture):
    damage = Damage(50, 0.8, 8)
    result = compare_upscaling(picture, tiny_network(2), 2, RESTORE, damage, other=tiny_network(4))
    low = damage(degrade.downscale(picture, 2))
    assert torch.equal(result.low, low) and torch.equal(result.original, picture)
    torch.testing.assert_close(result.bicubic, degrade.upscale_bicubic(low, 2).clamp(0, 1))
    torch.testing.assert_close(result.network, inference.upscale(tiny_network(2), low))


@pytest.mark.parametrize(("own", "asked"), [(4, 2), (2, 4), (2, 3), (3, 3)])
def test_a_network_for_another_scale_is_brought_to_the_one_asked_for(picture, own, asked):
    result = compare_upscaling(picture, tiny_network(asked), asked, AS_IS, other=tiny_network(own))
    size = (72 * asked, 84 * asked)
    enlarged = inference.upscale(tiny_network(own), picture)
    expected = enlarged if own == asked else degrade.resize_bicubic(enlarged, size).clamp(0, 1)
    assert result.other.shape[-2:] == result.network.shape[-2:] == size
    torch.testing.assert_close(result.other, expected)


def test_a_network_for_any_scale_renders_the_one_asked_for(picture):
    torch.manual_seed(0)
    encoder = {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}
    any_scale = models.build("LMLTE", encoder=encoder, skip="bicubic", start="default").eval()
    result = compare_upscaling(picture, tiny_network(3), 3, AS_IS, other=any_scale)
    torch.testing.assert_close(result.other, inference.upscale(any_scale, picture, scale=3))


def test_a_large_photo_is_enlarged_whole_and_shown_smaller(picture, monkeypatch):
    monkeypatch.setattr(comparison, "MOST_SHOWN", 100 * 120)
    model = tiny_network(4)
    result = compare_upscaling(picture, model, 4, AS_IS)
    assert result.whole.dtype == np.uint8 and result.whole.shape == (288, 336, 3)
    assert np.array_equal(result.whole, inference.upscale(model, to_uint8(picture)))
    assert result.reduced > 1 and result.network.shape == result.bicubic.shape
    assert result.network.shape[-2] * result.network.shape[-1] <= 1.02 * 100 * 120
    assert not torch.equal(result.network, result.bicubic)
    assert result.bytes["network"] > result.whole.nbytes


def test_what_a_page_can_show_is_not_reduced(picture):
    result = compare_upscaling(picture, tiny_network(2), 2, AS_IS)
    assert result.reduced == 1 and result.whole is None


def test_progress_is_told_for_each_side(picture, monkeypatch):
    monkeypatch.setattr(inference, "_plan", lambda *a: list(inference._tiles(36, 42, 24, 4)))
    stages = []

    def work(job):
        told = job.step
        job.step = lambda done, total: (stages.append((job.doing, done, total)), told(done, total))
        return compare_upscaling(picture, tiny_network(2), 2, other=tiny_network(2), job=job)

    Worker(lambda job: None).start(work, stages.append)
    for side in ("left side", "right side"):
        assert [(d, t) for name, d, t in stages[:-1] if name == f"enlarging, {side}" and t] == [
            (0, 4), (1, 4), (2, 4), (3, 4)]  # fmt: skip
    assert isinstance(stages[-1], comparison.Comparison)


def test_an_unknown_mode_is_quoted(picture):
    with pytest.raises(ValueError, match="mode 'enlarge' is unknown"):
        compare_upscaling(picture, None, 2, "enlarge")
