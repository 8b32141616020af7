"""Training at any scale: batches by seed and step, sampled pixels, schedules of scales, resume, what is written."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import checkpoints, runtime, training
from nbhelpers.datasets.pairs import PhotoPairs, TilePairs, loader
from nbhelpers.datasets.scales import ScalePairs, no_small_pictures
from nbhelpers.degrade import resize_bicubic
from nbhelpers.experiments import TrainingError
from nbhelpers.images import save_image
from nbhelpers.models import sampling
from nbhelpers.scales import ScaleModule
from nbhelpers.tests.test_training import BreaksAtStep3, weights

TINY = [
    "data.roots=[bundled]", "data.limit=2", "data.val_limit=1", "data.patch=10", "data.batch=2", "scales.samples=30",
    "model.encoder.n_feats=4", "model.encoder.n_blocks=1", "+model.hidden=8", "+model.hyper_width=8",
    "+model.render_depth=2", "trainer.max_steps=6", "trainer.val_every=2", "trainer.progress=false",
    "trainer.threads=1", "trainer.precision=fp32",
]  # fmt: skip


def tiny(name: str, *overrides: str):
    return training.compose("lmlte_edsr_small", [*TINY, f"name={name}", *overrides])


def photos(count: int = 3, side: int = 120) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, side, side + 8 * i), generator=generator).byte() for i in range(count)]


def scale_pairs(low: float = 1.0, high: float = 4.0, **options: object) -> ScalePairs:
    grow = options.pop("grow_steps", 0)
    settings = {"patch": 10, "batch": 2, "degradation": no_small_pictures, **options}
    return ScalePairs(PhotoPairs(photos(), 4, **settings), low, high, grow)


# --- batches --------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step():
    one, two, other = scale_pairs(seed=1), scale_pairs(seed=1), scale_pairs(seed=2)
    batches = list(loader(one, 3, 6))
    for step, batch in zip(range(3, 6), batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, two[step], strict=True))
        assert not torch.equal(batch[0], other[step][0])


def test_the_small_patch_is_the_large_one_shrunk():
    pairs = scale_pairs()
    for step in range(8):
        lr, hr = pairs[step]
        assert lr.shape == (2, 3, 10, 10) and lr.dtype == hr.dtype == torch.uint8
        expected = resize_bicubic(hr.float() / 255, (10, 10)).clamp(0, 1).mul(255).round()
        assert torch.equal(lr.float(), expected)


def test_the_large_patch_is_cut_from_a_photo():
    pairs = scale_pairs(augment=False)
    hr = pairs[0][1][0]
    n = hr.shape[-1]
    assert any((p.unfold(1, n, 1).unfold(2, n, 1).movedim(0, 2) == hr).flatten(2).all(-1).any() for p in photos())


def test_scales_cover_the_range_evenly():
    sides = torch.tensor([scale_pairs(low=1.5, high=3.5)[step][1].shape[-1] / 10 for step in range(300)])
    assert sides.min() >= 1.5 and sides.max() <= 3.5
    assert sides.mean() == pytest.approx(2.5, abs=0.15) and sides.quantile(0.25) == pytest.approx(2.0, abs=0.15)


def test_scales_grow_from_the_lower_end():
    pairs = scale_pairs(grow_steps=100)
    generator = [torch.Generator().manual_seed(i) for i in range(200)]
    scales = [pairs.scale(step, generator[step]) for step in range(200)]
    assert all(s <= 1 + 3 * (step + 1) / 101 for step, s in enumerate(scales[:100]))
    assert max(scales[:20]) < 1.7 < 3 < max(scales[100:])


def test_tiles_read_from_disk_give_such_pairs_too(tmp_path):
    for i, photo in enumerate(photos()):
        save_image(photo.float() / 255, tmp_path / f"{i}.png")
    tiles = TilePairs(sorted(tmp_path.iterdir()), 4, patch=10, batch=2, degradation=no_small_pictures)
    pairs = ScalePairs(tiles, 1.0, 4.0)
    lr, hr = pairs[0]
    assert len(pairs.paths) == 3 and lr.shape == (2, 3, 10, 10) and hr.shape[-1] == hr.shape[-2]
    assert torch.equal(hr, pairs[0][1])


# --- what is trained on ---------------------------------------------------------------------------------------


def module_for(*overrides: str) -> ScaleModule:
    cfg = tiny("module", *overrides)
    return training._module(cfg)


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ([], (2, 3, 30, 1)),
        (["scales.samples=0"], (2, 3, 23, 23)),
        (["scales.samples=5000"], (2, 3, 23, 23)),
        (["scales.region=square", "scales.samples=50"], (2, 3, 7, 7)),
        (["scales.region=lattice", "scales.samples=100"], (2, 3, 11, 11)),
        (["scales.region=lattice", "scales.samples=400"], (2, 3, 22, 22)),
    ],
)
def test_sampled_pixels_stand_beside_their_originals(overrides, shape):
    """A picture whose colour tells each pixel's place: what is rendered and its target are of the same places."""
    module = module_for(*overrides)
    place = sampling.make_coord((23, 23)).T.reshape(2, 23, 23)
    hr = torch.cat([place, place[:1]]).expand(2, -1, -1, -1)
    seen = []
    module.model.render = lambda f, lr, size, coords=None, rows=slice(None), columns=slice(None): (
        seen.append(hr[..., rows, :][..., columns] if coords is None else torch.cat([coords, coords[..., :1]], -1).mT)
        or seen[0]
    )
    sr, target = module.predict(torch.rand(2, 3, 10, 10), hr)
    assert target.shape == sr.shape == shape
    torch.testing.assert_close(sr, target)


def test_pixels_are_drawn_anew_and_repeatably():
    module, lr = module_for(), torch.rand(1, 3, 10, 10)
    hr = torch.rand(1, 3, 31, 31)
    targets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        targets.append(module.predict(lr, hr)[1])
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])


def test_a_feature_loss_gets_squares():
    loss = ["~loss", "+loss={l1: 1.0, frequency: 0.1, tv: 0.1}", "scales.region=square", "scales.samples=64"]
    module = module_for(*loss)
    _, total = module.objective(torch.rand(2, 3, 10, 10), torch.rand(2, 3, 25, 25))
    total.backward()
    assert module.columns == ["train_loss", "l1", "frequency", "tv"]


# --- runs -----------------------------------------------------------------------------------------------------

DIFFICULT = ["scales.grow=0.5", "trainer.accumulate_grad_batches=2", "optimizer.schedule=stages"]


@pytest.mark.parametrize("extra", [[], DIFFICULT], ids=["plain", "difficult"])
def test_a_broken_run_resumes_to_the_same_weights(runs, extra):
    whole = training.fit(tiny("whole", *extra))
    cfg = tiny("broken", *extra)
    pairs, *rest = training.open_data(cfg, progress=False)
    with pytest.raises(OSError, match="cable"):
        training.fit(cfg, (BreaksAtStep3(pairs), *rest))
    if extra:  # two batches a step: it broke in the second step, before the first checkpoint
        assert not (runtime.RUNS / "train" / "broken" / "last.ckpt").exists()
    resumed = training.fit(cfg, (pairs, *rest))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    first, second = ([{k: v for k, v in r.items() if k != "seconds"} for r in x.history] for x in (whole, resumed))
    assert first == second and [r["step"] for r in first] == [2, 4, 6]


def test_what_is_written_and_used(runs):
    training.train(tiny("any", "trainer.sample_every=6"), "the command")
    card, rows = checkpoints.card("any"), checkpoints.history("any")
    assert card["scale"] == 4 and card["scales"] == [1.0, 4.0]
    names = [f"val_psnr_y_x{s}" for s in (2, 3, 4)]
    kept = max(rows, key=lambda r: r["val_psnr_y"])
    assert card["metrics"]["val_psnr_y"] == round(kept["val_psnr_y"], 3)
    for row in rows:
        assert row["val_psnr_y"] == pytest.approx(sum(row[n] for n in names) / 3)
        assert row["val_psnr_y_x2"] > row["val_psnr_y_x3"] > row["val_psnr_y_x4"]
    assert (runtime.RUNS / "train" / "any" / "samples" / "step_000006.png").is_file()
    model = checkpoints.load("any")
    assert model.scale == 4 and model.at(2.5)(torch.rand(1, 3, 6, 8)).shape == (1, 3, 15, 20)


def test_a_run_learns(runs):
    """From a flat start the details are learnt within a few dozen steps."""
    steps = [
        "trainer.max_steps=60",
        "trainer.val_every=20",
        "optimizer.warmup_steps=0",
        "data.val_limit=0",
        "optimizer.lr=0.01",
    ]
    result = training.fit(tiny("learn", *steps, "model.skip=null", "data.batch=4"), keep=False)
    losses = [row["train_loss"] for row in result.history]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.9 * losses[0]


@pytest.mark.parametrize("experiment", ["lte_edsr_small", "liif_edsr_small"])
def test_rivals_train_by_the_same_settings(experiment):
    rival, ours = (training.compose(name) for name in (experiment, "lmlte_edsr_small"))
    for section in ("loss", "optimizer", "scales"):
        assert rival[section] == ours[section]
    assert {**rival.data, "val_limit": None} == {**ours.data, "val_limit": None}
    small = [o for o in TINY if "model.h" not in o and "render" not in o]
    result = training.fit(training.compose(experiment, [*small, "data.val_limit=0", "trainer.max_steps=2"]), keep=False)
    assert result.history[0]["train_loss"] > 0


def test_the_published_setting():
    cfg = training.compose("lmlte_edsr")
    assert (cfg.data.patch, cfg.data.batch, cfg.scales.samples, list(cfg.scales.range)) == (48, 16, 2304, [1, 4])
    assert dict(cfg.loss) == {"l1": 1.0} and cfg.optimizer.lr == 1e-4 and cfg.model.skip == "bilinear"


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("scales.range=[4,1]", r"scales.range=\[4, 1\] must be two scales above 0, the smaller first"),
        ("scales.range=[0,4]", r"scales.range=\[0, 4\]"),
        ("scales.range=3", "scales.range=3 must be two scales"),
        ("scales.samples=-1", "scales.samples=-1 must be a whole number of at least 0"),
        ("scales.grow=1.5", "scales.grow=1.5 must be a share of the run"),
        ("scales.region=line", r"scales.region=line is unknown; choose one of \['points', 'lattice', 'square'\]"),
        ("scales.validate=[2,3]", r"scales.validate=\[2, 3\] must be a list of scales with model.scale=4 among them"),
        ("scales.validate=[]", r"scales.validate=\[\]"),
        ("model.scale=2.5", "model.scale=2.5"),
        ("+adversarial=default", "adversarial does not go with the section scales"),
        ("+degradation=light", "degradation does not go with the section scales"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(runs, override, quoted):
    with pytest.raises(TrainingError, match=quoted):
        training.fit(tiny("refused", override), data=())


def test_too_small_photos_are_named(runs, tmp_path):
    save_image(torch.rand(3, 50, 50), tmp_path / "a.png")
    with pytest.raises(training.DataError, match=r"take larger photos, or in training a smaller data\.patch"):
        training.fit(tiny("small", f"data.roots=[{tmp_path}]"))
