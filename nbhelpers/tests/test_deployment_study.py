"""The study of pruning and 8-bit weights: what each variant trains, and that its rows are measured."""

from __future__ import annotations

import pytest

from nbhelpers import checkpoints, studies
from nbhelpers.experiments import check, compose
from nbhelpers.studies import deployment, run_study
from nbhelpers.training import train


@pytest.fixture
def source(small_photos):
    """A network in the place of the one that the study prunes; one block, hardly trained."""
    studies.validation.cache_clear()
    options = ["data.roots=[bundled]", "data.patch=8", "data.batch=2", "trainer.threads=1", "model.blocks=1"]
    options += [f"name={deployment.SOURCE}", "trainer.max_steps=4", "trainer.val_every=2", "optimizer.ema_decay=0"]
    train(compose("lean_study", options))
    yield small_photos
    studies.validation.cache_clear()


def test_rows_of_pruning(source):
    chosen = (
        deployment.REFERENCE,
        "24 channels, pruned",
        "24 channels, from scratch",
        "32 channels, pruned by magnitude",
    )
    variants = {name: deployment.PRUNING_VARIANTS[name] for name in chosen}
    made = studies.Study(**vars(deployment.PRUNING_STUDY) | {"variants": variants})
    whole, pruned, scratch, magnitude = studies.read(run_study(made, quick=True))
    assert [row["width"] for row in (whole, pruned, scratch, magnitude)] == [48, 24, 24, 32]
    assert pruned["parameters"] == scratch["parameters"] < magnitude["parameters"] < whole["parameters"]
    assert pruned["bytes"] < 0.7 * whole["bytes"] and pruned["mmacs"] < 0.7 * whole["mmacs"]
    assert pruned["untrained_psnr_y"] > 0 and whole["untrained_psnr_y"] == scratch["untrained_psnr_y"] == ""
    assert pruned["psnr_y"] != scratch["psnr_y"]
    assert all(row["time_share"] > 0 and row["steps"] == 4 for row in (whole, pruned, scratch, magnitude))


def test_configurations_of_pruning(source):
    """Those that go on from the trained network do so at half its rate, the others begin anew at the whole one."""
    rate = checkpoints.card(deployment.SOURCE)["config"]["optimizer"]["lr"]
    found = {variant: cfg for variant, seed, cfg, _ in studies.jobs(deployment.PRUNING_STUDY) if seed == 1}
    for variant, cfg in found.items():
        check(cfg)
        fresh = "scratch" in variant
        assert cfg.optimizer.lr == pytest.approx(rate if fresh else rate / 2), variant
        assert (cfg.init_from is None) == fresh and ("prune" in cfg) == ("pruned" in variant), variant
        assert cfg.trainer.max_steps == deployment.STEPS and cfg.seed == 1


def test_rows_of_int8(source):
    names = (deployment.SOURCE, f"{deployment.SOURCE}, first kept")
    variants = {name: deployment.INT8_VARIANTS[name] for name in names}
    made = studies.Study(**vars(deployment.INT8_STUDY) | {"variants": variants})
    everything, kept = studies.read(run_study(made, quick=True))
    assert everything["weights"] < kept["weights"] < everything["fp32_weights"]
    assert everything["fp32_psnr_y"] == kept["fp32_psnr_y"] and everything["psnr_y"] != kept["psnr_y"]
    assert everything["time_share"] > 0 and everything["bf16_time_share"] > 0 and everything["patches"] == 4


def test_another_source_makes_other_rows(source):
    """A network trained anew under the same name: the hashes of all its rows change."""
    mades = (deployment.PRUNING_STUDY, studies.Study(**vars(deployment.INT8_STUDY) | {"variants": {"all": []}}))
    before = [job[3] for made in mades for job in studies.jobs(made)]
    card = checkpoints.card(deployment.SOURCE)
    model = checkpoints.load(deployment.SOURCE)
    model.head.weight.data.add_(0.01)
    checkpoints.save(deployment.SOURCE, model, card["arch"], card["arguments"], {"config": card["config"]}, [])
    after = [job[3] for made in mades for job in studies.jobs(made)]
    assert not set(before) & set(after)
