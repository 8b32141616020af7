"""The block-orthogonal studies: fair controls, every configuration different, complete tables, times in one run."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from nbhelpers import classify, runtime
from nbhelpers.block_orthogonal import parameter_counts
from nbhelpers.models.resnet import resnet, thin_width
from nbhelpers.studies import block_orthogonal as study
from nbhelpers.studies import block_orthogonal_full as full
from nbhelpers.studies import fingerprint, jobs, read


def network(variant: str, made=study) -> torch.nn.Module:
    cfg = made.compose(made.VARIANTS[variant])
    return resnet(cfg.baseline_name, 10, **OmegaConf.to_container(cfg.model))


@pytest.mark.parametrize(
    ("made", "names"), [(study, ("1 matrix", "3 matrices")), (full, ("1 matrix",))], ids=["small", "full"]
)
def test_thin_networks_are_the_nearest_in_size(made, names):
    for name in names:
        thin = made.compose(made.VARIANTS[f"thin as {name}"]).model
        assert (thin.kind, thin.width) == ("plain", thin_width(parameter_counts(network(name, made)).free))


def test_what_the_claims_need_is_compared():
    settings = {name: study.compose(overrides) for name, overrides in study.VARIANTS.items()}
    large = {name: cfg for name, cfg in settings.items() if "%" not in name}
    assert {cfg.model.stem for cfg in large.values()} == {"cifar", "imagenet"}
    assert {cfg.model.placement for cfg in large.values()} == {"left_zeros", "spread", "permuted"}
    assert {cfg.model.kind for cfg in large.values()} == {"plain", "orthogonal", "masked", "grouped"}
    assert len({(cfg.model.num_matrices, cfg.model.r) for cfg in large.values()}) >= 3
    assert {cfg.data_module.subset_fraction for cfg in settings.values()} == {0.1, 0.03, 0.01}
    assert len({fingerprint(cfg) for cfg in settings.values()}) == len(settings)
    assert len({cfg.name for cfg in settings.values()}) == len(settings)  # in MLflow
    for cfg in settings.values():
        classify.check(cfg)
    assert len(jobs(study.STUDY)) == 4 * len(settings)


def test_a_matrix_for_each_block_or_blocks_in_more_matrices_cost_the_same():
    one, four = (parameter_counts(network(name)).free for name in ("1 matrix", "4 matrices of 4 blocks"))
    plain = parameter_counts(network(study.REFERENCE)).free
    assert abs(one / four - 1) < 0.01 and one / plain < 0.3


@pytest.mark.parametrize("made", [study, full], ids=["small", "full"])
def test_quick_form_fills_every_table(runs, made):
    path = made.run(quick=True)
    rows = read(path)
    assert path.parent == runtime.RUNS / "quick_results" and len(rows) >= 3
    for row in rows:
        assert 0 <= row["test_accuracy"] <= 1 and row["free"] <= row["stored"] <= row["dense"]
        assert row["width"] == 4 and row["mmacs"] > 0 and row["ms_per_step"] > 0
    curves, confusion = (read(path.with_name(f"{path.stem}_{table}.csv")) for table in ("curves", "confusion"))
    assert len(curves) == len(rows) and curves[0]["epoch"] == 1
    names = list(confusion[0])[4:]
    assert len(confusion) == 10 * len(rows) and [row["class"] for row in confusion[:10]] == names
    for i, row in enumerate(rows):
        part = confusion[10 * i : 10 * i + 10]
        assert all(sum(line[name] for name in names) == 32 for line in part)
        assert sum(line[line["class"]] for line in part) / 320 == pytest.approx(row["test_accuracy"], abs=1e-4)


def test_times_are_relative_to_the_plain_network_in_the_same_run():
    threads = torch.get_num_threads()
    rows = study.step_times(batch=2, repeats=2, width=8)
    assert rows[0]["what"] == "plain" and rows[0]["relative"] == 1 and rows[1]["precision"] == "fp32"
    assert {"m = 1, left_zeros", "m = 4, spread", "m = 4, r = 4, left_zeros"} <= {row["what"] for row in rows}
    for row in rows:
        assert row["low"] <= row["ms"] <= row["high"]
        assert row["relative"] == pytest.approx(row["ms"] / rows[0]["ms"], rel=0.05, abs=0.01)
    made = study.construction_times(size=24, matrices=2, repeats=1)
    assert [row["what"] for row in made] == ["ours", "torch, cayley", "torch, matrix_exp", "torch, householder"]
    assert all(row["ms"] > 0 for row in made) and torch.get_num_threads() == threads
