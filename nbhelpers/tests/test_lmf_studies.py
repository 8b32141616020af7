"""Studies of notebook 08: variants compose and train, costs are counted, exponents fitted, tables complete."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import checkpoints, models, runtime, studies
from nbhelpers.degrade import downscale, resize_bicubic, upscale_bicubic
from nbhelpers.experiments import check, compose
from nbhelpers.images import load_image, save_image
from nbhelpers.models.cross_scale import CrossScaleAttention
from nbhelpers.studies import lmf, lmf_cost, lmf_scales

FEW = ["data.limit=2", "data.val_limit=0", "data.patch=10", "data.batch=2", "scales.samples=100"]
FEW += ["trainer.max_steps=2", "trainer.val_every=2", "trainer.threads=1"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """One small validation photo."""
    torch.manual_seed(0)
    small = torch.rand(1, 3, 12, 13)
    save_image(
        torch.nn.functional.interpolate(small, size=(96, 104), mode="bicubic")[0].clamp(0, 1), tmp_path / "a.png"
    )
    for module in (lmf, lmf_scales):
        monkeypatch.setattr(module, "resolve_root", lambda root: tmp_path)
    yield tmp_path
    lmf_scales.pictures.cache_clear()


# --- the ablation -----------------------------------------------------------------------------------------------


def test_every_variant_is_a_valid_configuration_of_a_network_of_its_own():
    seen = set()
    for variant, seed, cfg, settings in studies.jobs(lmf.STUDY):
        check(cfg)
        seen.add(settings)
        assert cfg.trainer.threads == 1, "several runs at once share the cores"
        if seed == 0:
            model = models.build(cfg.arch, **cfg.model)
            assert model.at(2.7).scale == 2.7, variant
    assert len(seen) == 3 * len(lmf.VARIANTS)


def test_encoders_compared_are_about_equally_large():
    sizes = {}
    for name in (lmf.REFERENCE, "encoder RDN", "encoder SwinIR"):
        cfg = compose("lmlte_study", lmf.VARIANTS[name])
        sizes[name] = models.count_parameters(models.build(cfg.arch, **cfg.model).encoder)
    assert max(sizes.values()) < 1.25 * min(sizes.values()), sizes


def test_a_run_is_scored_at_every_scale(photos):
    from nbhelpers.training import fit

    cfg = compose("lmlte_study", [*FEW, "model.encoder={preset:EDSR-b,n_feats:4,n_blocks:1}"])
    (row,) = lmf.measure(fit(cfg, keep=False), cfg)[""]
    means = [row[f"psnr_y_x{s}"] for s in (2, 3, 4)]
    assert row["psnr_y"] == pytest.approx(sum(means) / 3, abs=1e-3) and len(set(means)) == 3
    assert min(row["psnr_y_x2.7"], row["psnr_y_x6"]) > 5 and row["parameters"] > row["encoder_parameters"] > 0


def test_pictures_are_whole_or_their_middle(photos):
    photo = load_image(photos / "a.png")
    ((lr, hr),) = lmf_scales.pictures(photos, 3, 48)
    assert torch.equal(hr, photo[:, 24:72, 28:76]) and torch.equal(lr, downscale(hr, 3))
    ((_, whole),) = lmf_scales.pictures(photos, 2.7)
    assert torch.equal(whole, photo[:, :94, :103])


# --- costs ------------------------------------------------------------------------------------------------------


def test_decoders_cost_what_their_papers_say():
    rows = lmf_cost.decoders(side=6, scales=(2, 8), repeats=1)
    macs = {(r["decoder"], r["scale"]): r["macs"] for r in rows if r["precision"] == "fp32"}
    claimed = {
        ("LIIF", 2): 1383,
        ("LTE", 2): 863,
        ("LMLTE", 2): 75,
        ("LIIF", 8): 1383,
        ("LTE", 8): 794,
        ("LMLTE", 8): 13,
    }
    assert {key: round(value / 1000) for key, value in macs.items()} == claimed
    assert all(r["ms"] > 0 for r in rows) and {r["precision"] for r in rows} == set(lmf_cost.precisions())


def test_every_encoder_is_counted(monkeypatch):
    tiny = {"EDSR-b": ({"n_feats": 4, "n_blocks": 1}), "SwinIR": ({"embed_dim": 8, "depths": [1], "num_heads": 2})}
    monkeypatch.setattr(lmf_cost, "PRESETS", tiny)
    build = lmf_cost.build_encoder
    monkeypatch.setattr(lmf_cost, "build_encoder", lambda name: build({"preset": name, **tiny[name]}))
    rows = lmf_cost.encoders(side=8, repeats=1)
    assert [r["encoder"] for r in rows] == [*tiny] * len(lmf_cost.precisions())
    edsr = rows[0]
    assert edsr["macs"] == 9 * (3 * 4 + 3 * 4 * 4) and edsr["parameters"] == edsr["macs"] + 4 * 4


def test_attention_as_written_is_the_fused_one():
    layer, x = CrossScaleAttention(6, multi_scale=[2, 3]), torch.randn(1, 6, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(lmf_cost._AllWeights(layer)(x), layer(x), atol=1e-5, rtol=1e-4)


def test_memory_of_all_weights_grows_with_the_square_and_that_of_the_rest_does_not():
    works = {name: work for name, work in lmf_cost.growing().items() if "SwinIR" not in name and "EDSR" not in name}
    inputs = [torch.rand(1, 64, side, side) for side in (16, 32, 48)]
    rows = []
    for part, work in works.items():
        for x in inputs:
            rows.append(
                {"part": part, "pixels": x[0, 0].numel(), "peak_mb": lmf_cost.counting.peak_activations(work, x)}
            )
    found = lmf_cost.exponents(rows, "peak_mb")
    assert found["attention, all weights at once"][0] > 1.4
    assert found["attention, fused"][0] == pytest.approx(1, abs=0.1)


def test_exponents_are_those_of_a_power_law():
    rows = [{"part": "p", "pixels": n, "ms": 3 * n**1.5} for n in (10, 100, 1000)]
    slope, half = lmf_cost.exponents(rows)["p"]
    assert slope == pytest.approx(1.5) and half == pytest.approx(0, abs=1e-6)


# --- quality against scale --------------------------------------------------------------------------------------


def test_networks_for_one_scale_are_helped_by_bicubic(photos):
    torch.manual_seed(0)
    fixed, free = models.build("ESPCN", scale=2, channels=8).eval(), models.build("LMLTE", encoder={
        "preset": "EDSR-b", "n_feats": 4, "n_blocks": 1}).eval()  # fmt: skip
    lr = torch.rand(3, 20, 22)
    assert torch.equal(lmf_scales.enlarge(None, lr, (40, 44)), upscale_bicubic(lr, 2).clamp(0, 1))
    with torch.no_grad():
        twice = fixed(lr[None])[0].clamp(0, 1)
    torch.testing.assert_close(lmf_scales.enlarge(fixed, lr, (40, 44)), twice)
    torch.testing.assert_close(lmf_scales.enlarge(fixed, lr, (60, 66)), resize_bicubic(twice, (60, 66)).clamp(0, 1))
    assert lmf_scales.enlarge(free, lr, (54, 59)).shape == (3, 54, 59)
    found = lmf_scales.scores(None, photos, 2.7)
    assert set(found) == {"psnr_y", "ssim_y"} and found["psnr_y"] > 10


def test_the_table_of_scales_has_a_row_for_each_network(photos, runs, monkeypatch):
    sizes = {"scale": 4, "channels": 8}
    checkpoints.save("espcn_x4", models.build("ESPCN", **sizes), "ESPCN", sizes, {"scale": 4}, [])
    monkeypatch.setattr(runtime, "shared", lambda: None)
    monkeypatch.setattr(lmf_scales, "SCALES", (2.7, 4))
    rows = studies.read(lmf_scales.run(quick=True))
    assert [(r["set"], r["scale"], r["model"]) for r in rows] == [("val", 4, "bicubic"), ("val", 4, "espcn_x4")]
