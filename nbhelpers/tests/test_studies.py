"""Studies: resumable tables, stale rows dropped, paired intervals; the committed tables are complete."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from nbhelpers import models, runtime, studies
from nbhelpers.experiments import check
from nbhelpers.inference import evaluate
from nbhelpers.studies import (
    Study,
    block_orthogonal,
    deployment,
    erblock,
    espcn,
    gan,
    m23_init,
    pooling,
    read,
    rrdb,
    run_study,
    summary,
    vgg,
    write,
)

SMALL = ["data.limit=2", "data.val_limit=1", "data.patch=12", "data.batch=2"]
SMALL += ["trainer.max_steps=2", "trainer.val_every=2"]


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "RESULTS", tmp_path)
    calls = []

    def measure(result, cfg):
        calls.append(cfg.model.channels)
        return {"": [{"loss": result.history[-1]["train_loss"]}]}

    variants = {"thin": [*SMALL, "model.channels=4"], "wide": [*SMALL, "model.channels=8"]}
    made = Study("toy", "espcn_study", variants, measure, seeds=(0, 1))
    return made, calls


def test_every_variant_and_seed_runs_once_and_a_second_call_runs_nothing(study):
    made, calls = study
    rows = read(run_study(made))
    assert [(r["variant"], r["seed"]) for r in rows] == [("thin", 0), ("wide", 0), ("thin", 1), ("wide", 1)]
    run_study(made)
    assert len(calls) == 4
    assert rows == read(made.path())


def test_an_interrupted_study_goes_on_with_what_is_missing(study):
    made, calls = study
    run_study(made)
    kept = read(made.path())
    write(made.path(), kept[:3])
    run_study(made)
    assert calls[4:] == [8]
    assert read(made.path()) == kept


def test_rows_made_with_other_settings_are_run_again(study):
    made, calls = study
    run_study(made)
    made.variants["thin"].append("optimizer.lr=1e-4")
    run_study(made)
    assert calls[4:] == [4, 4]
    assert len(read(made.path())) == 4


def test_summary_agrees_with_the_closed_form():
    values = {"a": (1, 2, 3), "b": (3, 4, 8)}
    rows = [{"variant": v, "seed": s, "x": x} for v, xs in values.items() for s, x in enumerate(xs)]
    result = summary(rows, "x", reference="a")
    # Student's t for 2 degrees of freedom at 97.5 % is 4.302653; gains are 2, 2, 5.
    assert result["a"]["mean"] == 2 and result["a"]["half"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert result["b"]["gain"] == 3 and result["b"]["gain_half"] == pytest.approx(4.302653, rel=1e-5)
    with pytest.raises(ValueError, match="no variant 'c'"):
        summary(rows, "x", reference="c")


def test_unknown_study_lists_the_known():
    with pytest.raises(ValueError, match=r"'m24' is unknown.*espcn"):
        studies.run("m24")


COMMITTED = [espcn.STUDY, vgg.STUDY, gan.STUDY, pooling.STUDY, rrdb.STUDY, block_orthogonal.STUDY]
for module in (m23_init, erblock, deployment):
    COMMITTED += module.STUDIES.values()


@pytest.mark.parametrize("made", COMMITTED, ids=lambda s: s.name)
def test_committed_study_is_complete_and_current(made):
    """Every row was made by today's configuration: nothing would run if the study were started now."""
    rows = read(made.path())
    wanted = [(variant, seed, settings) for variant, seed, _, settings in studies.jobs(made)]
    assert sorted((r["variant"], r["seed"], r["settings"]) for r in rows) == sorted(wanted)
    for table in made.tables[1:]:
        assert {(r["variant"], r["seed"]) for r in read(made.path(table))} == {w[:2] for w in wanted}


@pytest.mark.parametrize("made", [vgg.STUDY, gan.STUDY, rrdb.STUDY], ids=lambda s: s.name)
def test_every_variant_can_be_built(made):
    for variant, seed, cfg, _ in studies.jobs(made):
        if seed == 0:
            check(cfg)
            network = models.build(cfg.arch, **OmegaConf.to_container(cfg.model))
            assert network.scale == cfg.model.scale, variant


def test_one_step_of_four_and_two_of_two_have_equal_parameters():
    """Claim K9 is about the order of the layers, so their number of weights must be the same."""
    sizes = {}
    for variant, seed, cfg, _ in studies.jobs(rrdb.STUDY):
        if seed == 0 and cfg.arch == "StagedESPCN":
            sizes[variant] = models.count_parameters(models.build(cfg.arch, **OmegaConf.to_container(cfg.model)))
    assert len(sizes) == 6 and len(set(sizes.values())) == 1, sizes


def test_score_is_the_evaluation_of_the_validation_photos():
    model = models.build("ESPCN", scale=4, channels=4).eval()
    expected = evaluate(model, runtime.PHOTOS / "val", lpips=False)["mean"]
    got = studies.score(model, lpips=False)
    assert got["psnr_y"] == pytest.approx(expected["psnr_y"], abs=1e-4) and got["lpips"] is None
    assert studies.score(model, rrdb.damaged, lpips=False) != got


def test_luminance_errors_sort_by_the_originals_brightness():
    import torch

    hr = torch.full((3, 4, 4), 0.05)
    hr[:, 2:] = 0.95
    sr = hr.clone()
    sr[:, :2] += 10 / 255
    sums = espcn.luminance_errors(sr, hr)
    count, signed, squared = sums[0].tolist()
    assert count == 8 and signed / count == pytest.approx(10, abs=0.6) and squared / count == pytest.approx(100, abs=12)
    assert sums[9].tolist() == [8, 0, 0] and sums[1:9].sum() == 0
