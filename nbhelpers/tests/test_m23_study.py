"""The initialisation study: deep plain networks, norms against direct computation, resumable tables, best rates."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from nbhelpers import models, runtime, studies
from nbhelpers.experiments import TrainingError, check
from nbhelpers.layers import BicubicUpsample
from nbhelpers.models.plain import PlainMLP, PlainSR, plain_body
from nbhelpers.studies import jobs, m23_init, m23_signal, read, run_study, summary

TINY = ["model.channels=4", "model.depth=4", "trainer.max_steps=20", "trainer.val_every=20"]


# --- Networks ---------------------------------------------------------------------------------------------


def layers(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("residual", [True, False])
def test_plain_networks_have_the_documents_depth_and_upscalers_start_as_bicubic(residual):
    net = PlainSR(scale=3, channels=6, depth=24, residual=residual, init="he")
    x = torch.rand(2, 3, 5, 7)
    assert len(layers(net)) == 24
    torch.testing.assert_close(net(x), BicubicUpsample(3)(x))
    digits = PlainMLP(width=8, depth=24, residual=residual)
    assert len(layers(digits)) == 24 and digits(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_halo_of_the_upscaler_covers_what_it_sees():
    net = PlainSR(scale=2, channels=4, depth=5, activation="linear", init="he")
    nn.init.normal_(net.tail.weight)
    x = torch.rand(1, 3, 1, 25, requires_grad=True)
    net(x)[..., 24:26].sum().backward()  # the two pixels that the middle one became
    seen = x.grad[0, :, 0].abs().sum(0).nonzero().flatten()
    assert int(seen.min()) >= 12 - net.halo and int(seen.max()) <= 12 + net.halo and len(seen) > 3


def test_blocks_add_their_input():
    body = plain_body(lambda: nn.Linear(3, 3), 2, "tanh", residual=True)
    x = torch.rand(4, 3)
    first, last = layers(body)
    torch.testing.assert_close(body(x), x + last(torch.tanh(first(x))))


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"activation": "gelu"}, "'gelu' is unknown; choose one of"),
        ({"depth": 2}, "0 layers between the ends: at least 1"),
        ({"depth": 5, "residual": True}, "3 layers between the ends.*even number"),
        ({"scale": 0}, "scale 0 must be"),
        ({"init": "m24"}, "'m24' is unknown"),
    ],
)
def test_impossible_plain_networks_are_refused(options, quoted):
    with pytest.raises(ValueError, match=quoted):
        PlainSR(**options)


# --- Before training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "tanh", "relu"])
@pytest.mark.parametrize("residual", [True, False])
def test_norms_are_those_of_the_network_itself(activation, residual):
    """Against the whole Jacobian of a network built of ordinary layers; the rescaling on the way must cancel."""
    cfg = m23_signal.compose(["init=he", "shared=false", "channels=3", "side=4", "depths=[2,6]"])
    kernels = m23_signal.weights(cfg)
    convolution = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    net = plain_body(lambda: nn.Conv2d(**_arguments(convolution)), 6, activation, residual)
    for layer, kernel in zip(layers(net), kernels, strict=True):
        layer.weight.data = kernel
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    found = m23_signal.norms_by_depth(kernels, x, activation, residual, [2, 6], seed=1)
    part = net if residual else [nn.Sequential(*net[i : i + 2]) for i in range(0, 12, 2)]
    generator = torch.Generator().manual_seed(1)
    for depth in (2, 6):
        upto = nn.Sequential(*part[: depth // 2 if residual else depth])
        start = x / x.norm()
        direction = torch.randn(x.shape, dtype=x.dtype, generator=generator).flatten()
        jacobian = torch.autograd.functional.jacobian(upto, start).reshape(48, 48)
        signal, gradient = found[depth]
        assert signal == pytest.approx(math.log10(upto(start).detach().norm()), abs=1e-9)
        assert gradient == pytest.approx(
            math.log10((direction @ jacobian).detach().norm() / direction.norm()), abs=1e-9
        )


def _arguments(conv: nn.Conv2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "padding", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": False, "dtype": torch.float64}


def test_signal_row_tells_what_theory_says():
    """Delta-orthogonal is an isometry at any depth; M23's real part loses half the energy per layer, ReLU once more."""
    small = ["channels=48", "side=3", "depths=[8,40]"]
    delta, m23 = (
        m23_signal.signal(m23_signal.compose([*m23_signal.options(m23_signal.STARTS[name]), *small]))
        for name in ("delta-orthogonal", "M23, independent")
    )
    assert delta["plain_linear_40_signal"] == pytest.approx(0, abs=1e-3)
    assert delta["plain_linear_40_gradient"] == pytest.approx(0, abs=1e-3)
    assert m23["plain_linear_40_signal"] == pytest.approx(40 * math.log10(0.5) / 2, abs=0.6)
    assert m23["plain_relu_40_signal"] < 0.8 * 2 * m23["plain_linear_40_signal"]


def test_vanished_and_enormous_signals_stay_numbers():
    kernels = [torch.full((2, 2, 3, 3), 1e-30, dtype=torch.float64)] * 30
    x = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    for activation in ("linear", "tanh"):
        assert m23_signal.norms_by_depth(kernels, x, activation, False, [30])[30] == (-300, -300)
    growing = [k * 1e60 for k in kernels]
    signal, gradient = m23_signal.norms_by_depth(growing, x, "linear", False, [30])[30]
    assert signal == pytest.approx(30 * (30 + math.log10(18)), abs=1e-6) and 800 < gradient <= signal


@pytest.mark.parametrize("size", [1, 3])
def test_operator_values_are_those_of_the_whole_convolution(size):
    """Against the dense matrix that maps a 4x4 picture to its convolution on the torus."""
    weight = torch.randn(3, 2, size, size, dtype=torch.float64)
    basis = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4)
    border = size // 2
    dense = F.conv2d(F.pad(basis, (border,) * 4, mode="circular"), weight).flatten(1).T
    expected = torch.linalg.svdvals(dense)
    found = m23_signal.operator_values(weight, 4)
    distinct = [v for v in expected if float((found.flatten() - v).abs().min()) > 1e-9]
    assert not distinct and float(found.max()) == pytest.approx(float(expected.max()))
    assert float(found.min()) == pytest.approx(float(expected.min()), abs=1e-9)


def test_layer_row_shows_what_orthogonalisation_had_to_do():
    """With N = 40 twelve of 52 directions are up to rounding; with N = fan_in all are decided."""
    rows = {
        name: m23_signal.layer(m23_signal.compose([*m23_signal.options(m23_signal.STARTS[name]), "shape=52x52x3x3"]))
        for name in ("M23", "M23 of 40", "He", "delta-orthogonal")
    }
    assert rows["M23"]["rank"] == 52 and rows["M23"]["moved"] < 1e-9
    assert rows["M23 of 40"]["rank"] == 40 and rows["M23 of 40"]["moved"] > 0.01
    assert rows["He"]["rank"] == "" and 1.7 < rows["He"]["kernel_condition"] < 2.2
    assert 2.2 < rows["M23"]["kernel_condition"] < 2.5 and rows["M23"]["kernel_rms"] == pytest.approx(0.702, abs=0.002)
    assert rows["delta-orthogonal"]["operator_condition"] == 1
    head = m23_signal.layer(m23_signal.compose(["shape=52x3x3x3"]))
    assert head["distinct_rows"] == head["rank"] == 27  # 25 of 52 output channels are copies


# --- The tables -------------------------------------------------------------------------------------------


def test_every_run_can_be_built_and_names_are_paired():
    runs = {study.name: jobs(replace(study, seeds=(0,))) for study in m23_init.STUDIES.values()}
    for _, _, cfg, _ in runs["m23_init_study"] + runs["m23_ablation"]:
        check(cfg)
    some = {(cfg.model.init, cfg.model.residual): cfg for _, _, cfg, _ in runs["m23_init_study"]}
    for cfg in some.values():
        tiny = OmegaConf.to_container(cfg.model) | {"channels": 4, "depth": 4}
        assert models.build(cfg.arch, **tiny).scale == 2
    for name, kept in m23_init.QUICK_VARIANTS.items():
        assert set(kept) <= {variant for variant, *_ in runs[name]}
    nets = {variant.rpartition(", lr ")[0] for variant, *_ in runs["m23_init_study"] + runs["m23_accuracy"]}
    for start, control in m23_init.PAIRS.items():
        assert any({f"{net}: {start}", f"{net}: {control}"} <= nets for net in ("plain tanh", "plain ReLU"))


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "RESULTS", tmp_path)
    return tmp_path


def test_upscaler_study_measures_each_run_once(results):
    kept = ["plain tanh: M23, lr 1e-3", "plain tanh: delta-orthogonal, lr 1e-3", "residual ReLU: Fixup, lr 1e-3"]
    study = replace(m23_init.STUDY, variants={k: [*m23_init.VARIANTS[k], *TINY] for k in kept}, seeds=(0, 1))
    rows = read(run_study(study))
    assert [(r["variant"], r["seed"]) for r in rows] == [(k, s) for s in (0, 1) for k in kept]
    for r in rows:
        assert 0.5 < r["loss_1"] < 1.5 and r["final_loss"] == r["loss_10"] and r["lr"] == 1e-3
        assert r["steps_to_target"] == 20 or r["reached"]
        assert r["gradient_mean"] > 0 and r["gradient_std"] > 0 and abs(r["psnr_gain"]) < 3
    assert rows == read(run_study(study))
    best = summary(m23_init.best_rates(rows, "final_loss"), "final_loss", reference="plain tanh: M23")
    assert best["plain tanh: delta-orthogonal"]["n"] == 2


def test_losses_are_parts_of_bicubics(results):
    """A network that never leaves bicubic has 1 everywhere and reaches nothing; the target is met where it is met."""
    cfg = m23_init.compose([*TINY, "optimizer.lr=1e-12"])
    run = m23_init.train(cfg)
    (row,) = m23_init.measure(run, cfg)[""]
    assert all(row[f"loss_{i}"] == pytest.approx(1, abs=1e-4) for i in range(1, 11))
    assert row["reached"] == 0 and row["steps_to_target"] == 20 and row["psnr_gain"] == pytest.approx(0, abs=1e-2)
    cfg = m23_init.compose([*TINY, "trainer.max_steps=40", "trainer.val_every=40"])
    expected, _ = m23_init._bicubic(OmegaConf.to_yaml(cfg.data, resolve=True), 2, 0, 40)
    run.watch.losses = [float(v) * (1 if i < 16 else 0.86) for i, v in enumerate(expected)]
    (row,) = m23_init.measure(run, cfg)[""]
    assert (row["reached"], row["steps_to_target"]) == (1, 21)  # after step 20 the mean is 0.972, after 21 0.965
    assert row["loss_4"] == 1 and row["loss_5"] == 0.86


def test_a_run_that_diverges_is_a_row(results, monkeypatch):
    cfg = m23_init.compose([*TINY, "optimizer.lr=1e30", "trainer.gradient_clip_val=null"])
    run = m23_init.train(cfg)
    assert run.result is None
    (row,) = m23_init.measure(run, cfg)[""]
    assert row["final_loss"] == math.inf and row["psnr_gain"] == -math.inf and row["reached"] == 0

    def diverge(*args: object, **options: object):
        raise TrainingError("the loss became nan")

    monkeypatch.setattr(m23_init, "fit_classifier", diverge)
    cfg = m23_init.compose_classifier(["limit=200"])
    (row,) = m23_init.measure_classifier(m23_init.train_classifier(cfg), cfg)[""]
    assert (row["test_accuracy"], row["train_loss"], row["accuracy_4"]) == (0.1, math.inf, 0.1)


def test_other_tables_can_be_made(results, monkeypatch):
    """One run of each of the four, small, through the same machinery as the full study."""
    monkeypatch.setattr(m23_init, "score", functools.partial(studies.score, lpips=False))
    tiny = ["model.n_feats=4", "model.n_blocks=1", "data.batch=2", "trainer.max_steps=2", "trainer.val_every=2"]
    name = "no frequency loss, cosine"
    small = [
        (m23_init.SIGNAL, {"He": ["init=he", "shared=false", "channels=4", "side=3", "depths=[2,4]"]}),
        (m23_init.LAYERS, {"M23: 13x13x3x3": ["init=m23", "shape=13x13x3x3"]}),
        (m23_init.ACCURACY, {"x, lr 1e-3": ["limit=1000", "depth=4", "training.epochs=1", "init=he", "shared=false"]}),
        (m23_init.ABLATION, {name: [*m23_init.ABLATION_VARIANTS[name], *tiny]}),
    ]
    for study, variants in small:
        rows = read(run_study(replace(study, variants=variants, seeds=(0,))))
        assert [r["variant"] for r in rows] == list(variants), study.name
    assert rows[0]["steps"] == 2 and rows[0]["psnr_y"] > 10 and min(rows[0]["charbonnier"], rows[0]["frequency"]) > 0


def test_full_and_quick_form_make_five_tables_and_leave_the_threads_alone(monkeypatch):
    seen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(m23_init, "run_study", lambda study, fresh, quick: seen.append(study) or study.path())
    assert m23_init.run(processes=1) == runtime.RESULTS / "m23_*.csv"
    assert seen == list(m23_init.STUDIES.values())
    seen.clear()
    m23_init.run(quick=True)
    assert [s.name for s in seen] == list(m23_init.STUDIES) and all(len(s.variants) < 5 for s in seen)
    assert torch.get_num_threads() == threads


def test_tables_side_by_side(monkeypatch, tmp_path):
    """In processes of their own, which get nothing from this one but the names."""
    monkeypatch.setenv("NB_RUNS", str(tmp_path))
    m23_init.run(quick=True, tables=("m23_signal", "m23_layers"), processes=2)
    rows = {name: read(tmp_path / "quick_results" / f"{name}.csv") for name in ("m23_signal", "m23_layers")}
    assert [r["variant"] for r in rows["m23_signal"]] == list(m23_init.QUICK_VARIANTS["m23_signal"])
    assert [r["rank"] for r in rows["m23_layers"]] == [52, "", "", 40]


def test_best_rates_take_the_better_mean_of_each_start():
    values = {"a, lr 1": (3, 5), "a, lr 2": (1, 6), "b, x, lr 1": (1, 1), "b, x, lr 2": (math.inf, 0)}
    rows = [{"variant": v, "seed": s, "k": x} for v, xs in values.items() for s, x in enumerate(xs)]
    best = m23_init.best_rates(rows, "k")
    assert [(r["variant"], r["k"]) for r in best] == [("a", 1), ("a", 6), ("b, x", 1), ("b, x", 1)]
    assert [r["k"] for r in m23_init.best_rates(rows[:4], "k", largest=True)] == [3, 5]
    assert summary(best, "k", reference="a")["b, x"]["gain"] == -2.5
