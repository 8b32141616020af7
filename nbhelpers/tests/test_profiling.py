"""Counts equal those made by hand, the benchmark's rows are complete; no test looks at how long anything takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from nbhelpers import benchmark, checkpoints, counting, models, profiling
from nbhelpers.__main__ import main

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Two small networks instead of the benchmark's."""
    networks = {"plain": ("ESPCN", {"scale": 2, "channels": 8}), "wide": ("ESPCN", {"scale": 4, "channels": 16})}
    monkeypatch.setattr(benchmark, "NETWORKS", networks)
    return list(networks)


# --- counts ---------------------------------------------------------------------------------------------------


def test_counts_of_efficient_srnet_by_hand():
    h, w, nf = 16, 24, 32
    rows = counting.count(models.build("EfficientSRNet"), (1, 3, h, w))
    macs = {row["part"]: row["macs"] for row in rows}
    area = h * w
    blocks = 8 * (9 * nf * area + nf * nf * area + nf * nf)  # depthwise, pointwise, attention of one pixel
    expected = {
        "head": 9 * 3 * nf * area,
        "blocks": blocks,
        "trunk": 9 * nf * nf * area,
        "upsampling": 9 * nf * 4 * nf * (area + 4 * area),
        "last convolution": 9 * nf * 3 * 16 * area,
        "between": 0,
    }
    assert macs == expected | {"total": sum(expected.values())}
    parameters = {row["part"]: row["parameters"] for row in rows}
    assert parameters["blocks"] == 8 * ((9 + 1) * nf + 2 * (nf * nf + nf)) and parameters["total"] == 104_451
    assert sum(list(parameters.values())[:-1]) == 104_451
    for key in ("flops_share", "bytes_share"):
        assert sum(row[key] for row in rows[:-1]) == pytest.approx(1) and rows[-1][key] == 1
    assert all(row["flops"] == 2 * row["macs"] for row in rows)
    share = {row["part"]: row["flops_share"] for row in rows}
    assert share["upsampling"] == pytest.approx(0.843, abs=0.001) and share["blocks"] == pytest.approx(0.048, abs=0.001)


def test_bytes_moved_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2))
    conv, relu, shuffle, total = counting.count(model, (1, 3, 10, 10))
    x, y, weights = 300, 800, 3 * 8 * 9 + 8
    assert conv["bytes"] == 4 * (x + weights + y) and conv["parameters"] == weights
    assert relu["bytes"] == 4 * 2 * y == shuffle["bytes"], "read once, written once"
    assert (relu["flops"], shuffle["flops"]) == (0, 0)
    assert conv["intensity"] == 2 * 9 * 3 * 8 * 100 / conv["bytes"] and total["intensity"] < conv["intensity"]
    flat = counting.count(nn.Sequential(nn.Flatten(), nn.Linear(300, 2)), (1, 3, 10, 10))
    assert [row["part"] for row in flat] == ["1", "total"], "a view moves nothing, and is no row"
    assert flat[0]["bytes"] == 4 * (300 + 2 * 300 + 2 + 2)


def test_peak_activations_by_hand():
    """Input and weights are not counted; what is no longer needed is counted no more."""
    convs = [nn.Conv2d(3, 20, 1), nn.Conv2d(20, 5, 1), nn.Conv2d(5, 1, 1)]
    x = torch.zeros(1, 3, 8, 8)
    assert counting.peak_activations(nn.Sequential(*convs), x) == 4 * (20 + 5) * 64
    assert counting.peak_activations(nn.Sequential(*convs), torch.zeros(1, 3, 16, 8)) == 4 * (20 + 5) * 128
    assert counting.peak_activations(nn.Sequential(convs[0], nn.ReLU()), x) == 4 * 40 * 64
    assert counting.peak_activations(nn.Sequential(convs[0], nn.ReLU(inplace=True)), x) == 4 * 20 * 64


def test_flops_of_a_whole_network_do_not_need_weights_of_its_own():
    assert profiling.flops(nn.Conv2d(2, 3, 3, padding=1), (1, 2, 5, 7)) == 2 * 9 * 2 * 3 * 35


def test_parts_are_named_alike_for_all_networks():
    chain = counting.parts(models.build("RRDBNet", blocks=1, channels=8))
    assert list(chain) == ["head", "blocks", "upsampling"] and chain["blocks"] == ["model.1"]
    assert list(counting.parts(models.build("M23_RLFN"))) == ["head", "blocks", "trunk", "upsampling", "bicubic"]
    assert list(counting.parts(models.build("DilatedRRDBNet", channels=8, blocks=1))) == [
        "head",
        "blocks",
        "upsampling",
    ]
    assert counting.parts(nn.Sequential(nn.ReLU(), nn.Tanh())) == {"0": ["0"], "1": ["1"]}
    for arch in models.REGISTRY:
        model = models.build(arch, **({"blocks": 1} if "RRDB" in arch else {}))
        inside = {
            id(p)
            for names in counting.parts(model).values()
            for n in names
            for p in model.get_submodule(n).parameters()
        }
        assert inside == {id(p) for p in model.parameters()}, arch


# --- clocks ---------------------------------------------------------------------------------------------------


def test_latencies_are_taken_in_turns_after_the_warm_up():
    calls = []
    found = profiling.latencies_ms([lambda: calls.append("a"), lambda: calls.append("b")], repeats=5, warmup=2)
    assert calls == ["a", "b"] * 7 and len(found) == 2
    assert all(0 <= each.low <= each.median <= each.high for each in found)
    assert profiling._latency([4.0, 1.0, 2.0, 3.0, 5.0]) == (3, 2, 4) and profiling._latency([7.0]) == (7, 7, 7)
    with pytest.raises(ValueError, match="repeats 0"):
        profiling.latencies_ms([list], 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_modules_are_complete(precision):
    model = models.build("EfficientSRNet", nf=8, blocks=2)
    rows = profiling.module_rows(model, 16, precision, repeats=2)
    counted = counting.count(model, (1, 3, 16, 16))
    size = 4 if precision == "fp32" else 2
    for row, plain in zip(rows, counted, strict=True):
        assert {key: row[key] for key in ("part", "parameters", "flops", "flops_share")}.items() <= plain.items()
        assert row["bytes"] == plain["bytes"] * size // 4
        assert row["intensity"] == pytest.approx(plain["intensity"] * 4 / size)
        assert row["ms"] >= 0 and row["gflops"] >= 0
    assert sum(row["ms_share"] for row in rows[:-1]) == pytest.approx(1) and rows[-1]["ms_share"] == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_convolution_and_its_separable_replacement_by_hand():
    rows = profiling.convolution_rows((8, 32), size=16, repeats=1, precisions=["fp32", "bf16"])
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        c, area = row["channels"], 256
        full = {"macs": 9 * c * c * area, "weights": 9 * c * c, "layers": 1}
        depthwise = {"macs": 9 * c * area, "weights": 9 * c, "layers": 1}
        pointwise = {"macs": c * c * area, "weights": c * c, "layers": 1}
        both = {key: depthwise[key] + pointwise[key] for key in full}
        names = ("full 3x3", "depthwise 3x3", "pointwise 1x1", "depthwise + pointwise")
        want = dict(zip(names, (full, depthwise, pointwise, both), strict=True))[row["layer"]]
        assert row["macs"] == want["macs"] and row["macs_share"] == want["macs"] / full["macs"]
        size = 4 if row["precision"] == "fp32" else 2
        assert row["bytes"] == size * (want["weights"] + want["layers"] * 2 * c * area)
        assert row["ms"] > 0 and row["gflops"] > 0
    shares = {row["layer"]: row["macs_share"] for row in rows if row["channels"] == 32}
    assert shares["depthwise 3x3"] == 1 / 32 and shares["depthwise + pointwise"] == pytest.approx(1 / 32 + 1 / 9)


def test_peaks_of_this_machine():
    found = profiling.machine_peaks(CPU, side=64, megabytes=1)
    assert found["fp32"] > 0 and found["bandwidth"] > 0
    assert set(found) <= {"fp32", "bf16", "bandwidth"}


GROWTH = """
import torch
from nbhelpers.profiling import peak_of_call, resident_bytes
held = torch.ones(30_000_000)
del held  # an earlier peak, which must not count
kept = []
print(peak_of_call(lambda: kept.append(torch.ones(20_000_000).sum()), torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere earlier peaks cannot be forgotten")
def test_peak_memory_of_a_call():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert 80e6 <= int(done.stdout) < 110e6


# --- the command ----------------------------------------------------------------------------------------------

KEYS = ["model", "form", "scale", "parameters", "flops", "macs", "ms", "ms_low", "ms_high", "ms_per_output_megapixel"]
KEYS += ["gflops", "peak_mb", "speedup"]


def test_reference_networks_are_what_they_are_called():
    reference, arguments = benchmark.NETWORKS["RRDBNet-23"]
    assert models.count_parameters(models.build(reference, **arguments)) == 16_697_987
    assert next(iter(benchmark.NETWORKS)) == "RRDBNet-23", "what ratios refer to"
    assert {arch for arch, _ in benchmark.NETWORKS.values()} <= set(models.REGISTRY)


def test_json_is_one_object_with_all_rows(small, runs, capsys):
    model = models.build("ESPCN", scale=2, channels=4)
    checkpoints.save("trained", model, "ESPCN", {"scale": 2, "channels": 4}, {"scale": 2}, [])
    assert main(["benchmark", "--models", "plain", "trained", "--size", "16", "--repeats", "2", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(result) == ["machine", "device", "threads", "size", "repeats", "rows", "parts", "peaks"]
    assert (result["size"], result["repeats"], result["device"]) == (
        "16x16",
        2,
        "cpu" if not torch.cuda.is_available() else "cuda",
    )
    wanted = [*benchmark.forms(torch.device(result["device"]))]
    wanted += [benchmark.ONNX, benchmark.INT8] * (result["device"] == "cpu")
    assert [(row["model"], row["form"]) for row in result["rows"]] == [
        (m, f) for m in ("plain", "trained") for f in wanted
    ]
    for row in result["rows"]:
        assert list(row) == KEYS and row["ms_low"] <= row["ms"] <= row["ms_high"] and row["peak_mb"] >= 0
        assert row["ms_per_output_megapixel"] == pytest.approx(row["ms"] * 1e6 / (16 * row["scale"]) ** 2)
        assert row["speedup"] == 1 or row["model"] != "plain"
    parameters = {row["model"]: row["parameters"] for row in result["rows"]}
    assert parameters["trained"] == models.count_parameters(model)
    assert list(result["parts"]) == ["plain", "trained"] and result["parts"]["plain"][-1]["part"] == "total"


def test_tables(small, capsys):
    assert main(["benchmark", "--models", "wide", "--size", "16", "--repeats", "1", "--no-memory", "--no-onnx"]) == 0
    out = capsys.readouterr().out
    for text in ("threads", "wide x4", "fp32 channels_last", "upsampling", "GFLOP/s in fp32", "FLOP/byte"):
        assert text in out
    assert "training step" not in out and "ONNX" not in out


def test_training_steps_on_request(small, monkeypatch, capsys):
    row = {"precision": "fp32", "channels_last": False, "ms": 12.5, "speedup": 1.0}
    monkeypatch.setattr(benchmark, "training_step_times", lambda repeats: [row])
    monkeypatch.setattr(benchmark, "adversarial_step_times", lambda repeats: [row | {"ms": 31.5}])
    monkeypatch.setattr(benchmark, "compare", lambda *_, **__: [])
    monkeypatch.setattr(benchmark, "part_rows", lambda *_: {})
    monkeypatch.setattr(benchmark, "machine_peaks", lambda *_: {"fp32": 1.0, "bandwidth": 1.0})
    assert main(["benchmark", "--training"]) == 0
    out = capsys.readouterr().out
    assert (
        out.index("ESPCN-128 x4 training step") < out.index("12.5 ms") < out.index("adversarial") < out.index("31.5 ms")
    )


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["--size", "8"], "--size 8"),
        (["--repeats", "0"], "--repeats 0"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu"], "'tpu'"),
        (["--models", "plain", "plain"], "different names"),
        (["--models", "no_such"], "'no_such'"),
        (["--large", "no_such"], "'no_such'"),
        (["--models", "FILE.onnx"], "FILE.onnx"),
    ],
)
def test_bad_arguments_are_one_line(small, runs, capsys, arguments, quoted):
    assert main(["benchmark", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and quoted in last


def test_an_unknown_network_is_told_what_there_is(small, runs, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match=r"no_such.*untrained ones are plain, wide"):
        benchmark.sources(["no_such"], tmp_path)


def test_large_picture_through_the_command(small, monkeypatch):
    row = benchmark.large_picture("plain", megapixels=0.25, precision="fp32", threads=1)
    assert (row["input"], row["output"], row["threads"]) == ("250x250", "500x500", 1)
    assert math.isfinite(row["seconds"]) and 50 < row["peak_mb"] < 4000, "a Python process with torch"
    monkeypatch.setattr(benchmark, "UPSCALE", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"250x250 pixels with 'plain' ended with code 3"):
        benchmark.large_picture("plain", megapixels=0.25)
