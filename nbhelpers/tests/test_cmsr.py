"""Cheaper rendering of easy regions: exact where nothing is saved, less work elsewhere, tables, sharing."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import models
from nbhelpers.models import cmsr
from nbhelpers.models.lmf import LMLTE

SMALL = {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}
SIZES = [(88, 104), (41, 60), (44, 52)]  # x8, fractional and different per axis, x4


def network(**options: object) -> LMLTE:
    torch.manual_seed(0)
    return models.build("LMLTE", encoder=SMALL, start="default", **options).eval()


def picture(h: int = 11, w: int = 13, batch: int = 1) -> torch.Tensor:
    """Flat on the left half, noise on the right."""
    torch.manual_seed(1)
    x = torch.rand(batch, 3, h, w)
    x[..., : w // 2] = 0.4
    return x


@torch.no_grad()
def plain(model: LMLTE, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return model(x, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("table", [{}, {2: -1.0}, {2: 0.0, 3: 0.0}])
@pytest.mark.parametrize("options", [{}, {"local_ensemble": False}])
def test_a_table_that_allows_nothing_gives_the_plain_picture(size, table, options):
    model, x = network(**options), picture(batch=2)
    with torch.no_grad():
        found = cmsr.render(model, model.encode(x), x, size, table)
    torch.testing.assert_close(found.picture, plain(model, x, size), atol=1e-6, rtol=0)
    assert found.decoded == 1


@pytest.mark.parametrize("size", SIZES)
def test_easy_pixels_are_rendered_at_their_level_and_the_others_in_full(size):
    model, x = network(), picture(batch=2)
    ratio = (size[0] / 11, size[1] / 13)
    with torch.no_grad():
        features = model.encode(x)
        strong = cmsr.strength(model, model.latent(features, ratio))
        limit = float(strong.median())
        found = cmsr.render(model, features, x, size, {2: limit})
        level = model.details(model.latent(features, ratio), *_at_level(model, x, 2)[::-1])
        low = model.finish(cmsr._enlarge(level, size), x, cmsr._plan(model, (11, 13), size)[1])
    easy = torch.nn.functional.interpolate((strong <= limit)[:, None].float(), size, mode="nearest-exact") > 0
    expected = torch.where(easy, low, plain(model, x, size))
    torch.testing.assert_close(found.picture, expected, atol=1e-5, rtol=0)
    assert found.decoded < 1


def _at_level(model: LMLTE, x: torch.Tensor, level: float) -> tuple:
    return cmsr._plan(model, (11, 13), cmsr._level_size((11, 13), level))


def test_everything_easy_is_one_level_enlarged():
    model, x = network(), picture()
    with torch.no_grad():
        found = cmsr.render(model, model.encode(x), x, (88, 104), {1: 1e9})
    assert found.decoded == pytest.approx(1 / 64)
    assert 0 < (found.picture - plain(model, x, (88, 104))).abs().max() < 0.2


def test_levels_at_or_above_the_scale_are_not_used():
    model, x = network(), picture()
    with torch.no_grad():
        assert cmsr.render(model, model.encode(x), x, (33, 39), {3: 1e9, 4: 1e9}).decoded == 1


def test_the_table_stops_at_the_first_bin_that_loses_too_much():
    """Errors grow with strength: level 1 ten times as fast as level 2. The later dip must not count."""
    strength = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    one, two = 10 * strength, strength.clone()
    two[strength > 0.9] = 0
    errors = torch.stack([strength, one, two])
    table = cmsr.make_table(errors, 0.5, levels=(1, 2))
    assert table[1] == pytest.approx(0.05, abs=0.03) and table[2] == pytest.approx(0.5, abs=0.03)
    assert cmsr.make_table(errors, 0.0, levels=(1, 2)) == {1: 0.0, 2: 0.0}
    assert cmsr.make_table(errors, 100.0, levels=(1, 2))[1] == float(strength.max())


def test_thresholds_never_fall_from_level_to_level():
    errors = torch.stack([torch.linspace(0, 1, 100), torch.zeros(100), torch.ones(100)])
    assert cmsr.make_table(errors, 0.5, levels=(1, 2)) == {1: 1.0, 2: 1.0}


def test_calibration_keeps_the_loss_it_promises():
    model, photos = network(), [picture()[0], picture(9, 16)[0]]
    allowed = []
    for mse in (0.0, 1e-7, 1e-5, 1.0):
        table = cmsr.calibrate(model, photos, 8, mse)
        with torch.no_grad():
            results = [cmsr.render(model, model.encode(p[None]), p[None], (8 * p.shape[1], 8 * p.shape[2]), table)
                       for p in photos]  # fmt: skip
        full = [plain(model, p[None], tuple(r.picture.shape[-2:])) for p, r in zip(photos, results, strict=True)]
        lost = torch.cat([(r.picture - f).square().flatten() for r, f in zip(results, full, strict=True)]).mean()
        assert lost <= 2 * mse + 1e-12
        allowed.append(sum(r.decoded for r in results))
    assert allowed == sorted(allowed, reverse=True) and allowed[0] == len(photos) and allowed[-1] < 0.1


# --- document 001's variant -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"local_ensemble": False}])
def test_sharing_between_equal_pixels_changes_nothing(size, options):
    model, x = network(**options), picture(20, 22, batch=2)[..., :11, :13]
    with torch.no_grad():
        found = cmsr.render_shared(model, model.encode(x), x, size, 0.0)
    torch.testing.assert_close(found.picture, plain(model, x, size), atol=1e-5, rtol=0)


def test_sharing_saves_work_and_loses_little():
    model, x = network(), picture(30, 50)
    with torch.no_grad():
        features = model.encode(x)
        results = [cmsr.render_shared(model, features, x, (120, 200), t) for t in (1e-8, 1e-3, 1e9)]
    shares = [r.decoded for r in results]
    errors = [float((r.picture - plain(model, x, (120, 200))).square().mean()) for r in results]
    assert shares == sorted(shares, reverse=True) and errors == sorted(errors)
    assert shares[0] < 0.9 and shares[2] < 0.45 and errors[0] < 1e-9 < errors[2]


def test_clusters_are_squares_of_alike_pixels():
    x = torch.rand(2, 9, 13, 3)
    x[:, :8, :8] = 0.5
    label, means = cmsr.cluster(x, 0.0)
    assert label.min() == 0 and label.max() == len(means) - 1
    assert (label[0, :8, :8] == label[0, 0, 0]).all() and (label[0] == label[0, 0, 0]).sum() == 64
    torch.testing.assert_close(means[label], x)
    label, means = cmsr.cluster(x, 1e9)
    assert len(means) == 2 * (1 + 2 + 21), "one square of 8, two of 4 beside it, the last row and column alone"


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda m, f, x: cmsr.render(models.build("LTE", encoder=SMALL), f, x, (88, 104), {}), "not LTE"),
        (lambda m, f, x: cmsr.render(network(modulation=False), f, x, (88, 104), {}), "modulation=True"),
        (lambda m, f, x: cmsr.render_shared(network(mod_input=False), f, x, (88, 104), 0), "mod_input=True"),
        (lambda m, f, x: cmsr.render_shared(m, f, x, (88, 104), -1), "threshold -1 must be at least 0"),
        (lambda m, f, x: cmsr.make_table(torch.rand(2, 9), -1, (1,)), "mse -1 must be at least 0"),
        (lambda m, f, x: cmsr.render(m, f, x, (0, 104), {}), "0x104 is an empty picture"),
        (lambda m, f, x: cmsr.render(m, f, x, (10**5, 10**5), {}), "more than the 33,554,432 rendered at once"),
        (lambda m, f, x: cmsr.render_shared(m, f, x, (10**5, 10**5), 0), "more than the 33,554,432"),
        (lambda m, f, x: cmsr.render(m, f, x[..., 1:], (88, 104), {}), "the features are of 11x13 pixels, but lr is"),
        (lambda m, f, x: cmsr.render_shared(m, f, x[..., 1:], (88, 104), 0), "the features are of 11x13 pixels"),
    ],
)
def test_wrong_calls_are_quoted(call, quoted):
    x = picture()
    with pytest.raises(ValueError, match=quoted):
        call(network(), network().encode(x), x)


# --- the study ------------------------------------------------------------------------------------------------


def test_curve_has_a_row_for_each_setting_and_starts_at_plain():
    from nbhelpers.degrade import downscale
    from nbhelpers.studies.cmsr import curve

    hr = torch.rand(3, 72, 88)
    pictures = [(downscale(hr, 8), hr)]
    rows = curve(network(), pictures, [pictures[0][0]], 8, mses=(0.0, 1.0), thresholds=(1e9,), repeats=1)
    assert [(r["method"], r["setting"]) for r in rows] == [
        ("plain", 0.0),
        ("levels", 0.0),
        ("levels", 1.0),
        ("shared", 1e9),
    ]
    assert rows[0]["lost"] == rows[1]["lost"] == 0 and rows[1]["decoded"] == 1 > rows[2]["decoded"]
    assert all(r["ms"] > 0 and r["speedup"] > 0 for r in rows)
    assert rows[2]["table"].startswith("1:")
