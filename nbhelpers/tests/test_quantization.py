"""8-bit files: close to the network, smaller, telling what they are, and what cannot be quantised."""

from __future__ import annotations

import logging

import onnx
import pytest
import torch
from torch import nn

from nbhelpers import checkpoints, deploy, inference, metrics, models, quantization
from nbhelpers.__main__ import main

ARGUMENTS = {
    "ESPCN": {"scale": 2, "channels": 32},
    "M23_RLFN": {"scale": 2, "n_feats": 16, "n_blocks": 1, "use_m23": False},
}


def network(arch: str) -> nn.Module:
    """Untrained, with weights of normal size also where training starts at zero, and details of normal size."""
    torch.manual_seed(0)
    model = models.build(arch, **ARGUMENTS[arch]).eval()
    with torch.no_grad():
        model.to_subpixels.weight *= 0.3
    return model


@pytest.fixture
def photos(small_photos):
    """Those pictures; the networks by name."""
    for arch, arguments in ARGUMENTS.items():
        checkpoints.save(arch, network(arch), arch, arguments, {"scale": arguments["scale"]}, [])
    return small_photos


def types(path) -> dict[str, int]:
    """The data type of each constant by the number of its dimensions of weights: {name: type}."""
    return {t.name: t.data_type for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("arch", ARGUMENTS)
def test_an_int8_file_is_nearly_the_network(photos, arch):
    path, scale = photos / "net.onnx", ARGUMENTS[arch]["scale"]
    level = logging.root.manager.disable
    info = quantization.quantize(arch, path, limit=4)
    assert logging.root.manager.disable == level, "logging speaks again"
    int8, model = inference.get_model(path, scale), checkpoints.load(arch)
    assert (int8.halo, int8.grid, int8.info["precision"]) == (model.halo, getattr(model, "grid", 1), "int8")
    assert int8.info["sha256"] == checkpoints.card(arch)["sha256"]
    generator = torch.Generator().manual_seed(1)
    picture = nn.functional.interpolate(torch.rand(1, 3, 9, 8, generator=generator), scale_factor=8, mode="bicubic")[0]
    want, got = (inference.upscale(m, picture.clamp(0, 1)) for m in (model, int8))
    bicubic = inference.upscale(inference.get_model("bicubic", scale), picture.clamp(0, 1))
    near = metrics.compare(got, want, scale, lpips=False)["psnr_rgb"]
    far = metrics.compare(bicubic, want, scale, lpips=False)["psnr_rgb"]
    assert near > max(40, far + 10), "the details too, not only bicubic"
    assert info["weights"] < 0.4 * info["fp32_weights"] and info["bytes"] == path.stat().st_size
    assert abs(info["psnr_y"] - info["fp32_psnr_y"]) < 0.3
    stored = types(path)
    learnt = [n for n, t in stored.items() if n.endswith(".weight_quantized") and t == onnx.TensorProto.INT8]
    assert len(learnt) == sum(p.ndim == 4 for p in model.parameters())
    assert stored["skip.kernel"] == onnx.TensorProto.FLOAT


def test_a_tile_gets_the_values_of_the_whole_picture(photos):
    path = photos / "net.onnx"
    quantization.quantize("ESPCN", path, limit=2)
    model, picture = inference.get_model(path), torch.rand(3, 200, 130)
    assert torch.equal(inference.upscale(model, picture, tile=0), inference.upscale(model, picture, tile=96))


def test_the_command_and_layers_that_stay(photos, capsys):
    """From the network or from its ONNX file; evaluate and upscale take the result."""
    file, kept = photos / "fp32.onnx", photos / "kept.onnx"
    deploy.export("ESPCN", file)
    options = ["--calibration", str(photos / "photos" / "train"), "--limit", "3"]
    assert main(["quantize", str(file), "-o", str(photos / "all.onnx"), *options]) == 0
    assert main(["quantize", "ESPCN", "-o", str(kept), *options, "--keep", "features.*", "--keep", "to_sub*"]) == 2
    captured = capsys.readouterr()
    assert "ESPCN x2 written to" in captured.out and "PSNR-Y" in captured.out and "kB in fp32" in captured.out
    assert "no convolutional or linear layer with weights but those kept (features.*, to_sub*)" in captured.err
    assert main(["quantize", "ESPCN", "-o", str(kept), *options, "--keep", "to_subpixels"]) == 0
    assert types(kept)["to_subpixels.weight"] == onnx.TensorProto.FLOAT
    assert "to_subpixels.weight_quantized" in types(photos / "all.onnx")
    assert main(["evaluate", "--model", str(kept), "--hr", str(photos / "photos" / "val"), "--no-lpips"]) == 0
    picture = photos / "photos" / "val" / "c.png"
    assert main(["upscale", str(picture), "-o", str(photos / "big.png"), "--model", str(kept)]) == 0
    assert (photos / "big.png").is_file()


class _Linear(nn.Module):
    """Mixes the colours of each pixel."""

    scale, halo = 1, 0

    def __init__(self):
        super().__init__()
        self.mix, self.back = nn.Linear(3, 64), nn.Linear(64, 3)

    def forward(self, x):
        return x + self.back(torch.relu(self.mix(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def test_dynamic_is_for_linear_layers(photos, monkeypatch, capsys):
    assert main(["quantize", "ESPCN", "-o", str(photos / "net.onnx"), "--dynamic"]) == 2
    assert "'ESPCN' has no linear layer with weights, so nothing would be quantised" in capsys.readouterr().err
    torch.manual_seed(0)
    model, path = _Linear().eval(), photos / "linear.onnx"
    (photos / "linear").write_bytes(b"weights")
    monkeypatch.setattr(deploy.checkpoints, "load", lambda name: model)
    monkeypatch.chdir(photos)
    info = quantization.quantize("linear", path, dynamic=True)
    int8 = deploy.OnnxUpscaler(path)
    assert int8.halo is None, "the ranges are the whole picture's"
    assert info["precision"] == "int8 dynamic" and abs(info["psnr_y"] - info["fp32_psnr_y"]) < 0.1
    x = torch.rand(1, 3, 20, 30)
    assert (int8(x) - model(x)).abs().max() < 0.03
    assert {onnx.TensorProto.INT8} <= set(types(path).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ESPCN", "--calibration", "nowhere"], "no folder"),
        (["ESPCN", "--calibration", "empty"], "no pictures below"),
        (["ESPCN", "--calibration", "broken"], "none of 1 pictures below"),
        (["ESPCN", "--limit", "0"], "limit 0 must be at least 1"),
        (
            ["ESPCN", "--keep", "tail"],
            "'ESPCN' has no layer 'tail' to keep; it has features.0, features.2, skip, to_sub",
        ),
        (["cut.onnx"], "cut.onnx is not a readable ONNX file"),
        (["int8.onnx"], "int8.onnx is quantised already"),
        (["nothing"], "no network 'nothing'"),
    ],
)
def test_what_the_command_refuses(photos, monkeypatch, capsys, options, message):
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    (photos / "broken").mkdir()
    (photos / "broken" / "a.png").write_bytes(b"no picture")
    if options[0].endswith(".onnx"):
        quantization.quantize("ESPCN", "int8.onnx", limit=1)
        (photos / "cut.onnx").write_bytes((photos / "int8.onnx").read_bytes()[:-500])
    capsys.readouterr()
    assert main(["quantize", *options, "-o", "new.onnx"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (photos / "new.onnx").exists() and not list(photos.glob(".new*"))


def test_another_suffix(photos):
    with pytest.raises(ValueError, match=r"cannot write .*net\.pt2: name the file \*\.onnx"):
        quantization.quantize("ESPCN", photos / "net.pt2")
