"""Networks for any scale as two files: PyTorch's pictures at any scale and in tiles, what they say, what is refused."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import benchmark, checkpoints, deploy, deploy_scales, inference, models, quantization
from nbhelpers.__main__ import main
from nbhelpers.images import load_image, save_image

ENCODERS = {
    "EDSR-b": {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1},
    "RLFN": {"preset": "RLFN", "n_feats": 8, "n_blocks": 1},
    "SwinIR": {"preset": "SwinIR", "embed_dim": 8, "depths": [2], "num_heads": 2, "window_size": 4},
}


def save(name: str, arch: str, encoder: str, **options: object) -> str:
    torch.manual_seed(0)
    start = {"start": "default"} if arch == "LMLTE" else {}
    arguments = {"encoder": ENCODERS[encoder], **start, **options}
    checkpoints.save(name, models.build(arch, **arguments), arch, arguments, {"scale": 4}, [])
    return name


@pytest.mark.parametrize("suffix", deploy.FORMATS)
@pytest.mark.parametrize(
    ("arch", "encoder", "options"),
    [("LMLTE", "RLFN", {"skip": "bicubic"}), ("LMLTE", "SwinIR", {}), ("LIIF", "EDSR-b", {"local_ensemble": False})],
)
def test_two_files_are_a_network_for_any_scale(runs, arch, encoder, options, suffix):
    name = save("any", arch, encoder, **options)
    info = deploy.export(name, runs / "out" / f"any{suffix}")
    assert info["difference"] <= deploy.TOLERANCE and info["name"] == "any"
    assert sorted(p.name for p in (runs / "out").iterdir()) == info["files"], "nothing temporary is left"
    model = checkpoints.load(name)
    exported = checkpoints.load(runs / "out" / info["files"][1])  # either of the two
    assert (exported.scale, exported.halo, exported.grid) == (4, model.halo, model.grid)
    x = torch.rand(3, 33, 26)
    for scale in (1.3, 4, (2, 3.5)):
        want = inference.upscale(model, x, scale=scale)
        torch.testing.assert_close(inference.upscale(exported, x, scale=scale), want, atol=1e-5, rtol=0)
    tiles = inference.upscale(exported, x, scale=2.7, tile=8)
    torch.testing.assert_close(tiles, inference.upscale(model, x, scale=2.7), atol=1e-5, rtol=0)
    with torch.no_grad():
        pair = torch.rand(2, 3, 5, 6)
        torch.testing.assert_close(exported.at(2)(pair), model.at(2)(pair), atol=1e-5, rtol=0)


def test_the_command(runs, capsys):
    save("any", "LTE", "EDSR-b")
    assert main(["export", "any", "-o", str(runs / "net.onnx")]) == 0
    assert "any for any scale written to net_encoder.onnx and net_renderer.onnx" in capsys.readouterr().out
    save_image(torch.rand(3, 20, 30), runs / "photo.png")
    command = ["upscale", str(runs / "photo.png"), "-o", str(runs / "big.png"), "--scale", "2.7"]
    assert main([*command, "--model", str(runs / "net_encoder.onnx")]) == 0
    assert load_image(runs / "big.png").shape == (3, 54, 81)


def test_the_benchmark_times_them_and_int8_is_refused(runs, capsys):
    save("any", "LMLTE", "EDSR-b")
    rows = benchmark.compare(["any"], size=16, repeats=1, memory=False)
    assert [r["form"] for r in rows][-1] == benchmark.ONNX and all(r["ms"] > 0 and r["scale"] == 4 for r in rows)
    assert "any has no ONNX Runtime int8 row" in capsys.readouterr().err
    with pytest.raises(quantization.QuantizationError, match="'any' is for any scale; only networks for one scale"):
        quantization.quantize("any", runs / "int8.onnx", score=False)


def test_files_that_do_not_belong_together_are_refused(runs, monkeypatch):
    for i, encoder in enumerate(("EDSR-b", "RLFN")):
        deploy.export(save(f"n{i}", "LMLTE", encoder), runs / f"n{i}.pt2")
    with pytest.raises(ValueError, match=r"n0_encoder\.pt2' is an exported file already"):
        deploy.export(runs / "n0_encoder.pt2", runs / "again.pt2")
    (runs / "n0_renderer.pt2").replace(runs / "n1_renderer.pt2")
    with pytest.raises(checkpoints.CheckpointError, match=r"n1_encoder\.pt2 and .* are not of one network"):
        checkpoints.load(runs / "n1_encoder.pt2")
    with pytest.raises(checkpoints.CheckpointError, match=r"no file .*n0_renderer\.pt2"):
        checkpoints.load(runs / "n0_encoder.pt2")
    monkeypatch.setattr(deploy_scales, "TOLERANCE", -1.0)
    with pytest.raises(deploy.ExportError, match="the files of 'n0' differ from PyTorch by"):
        deploy.export("n0", runs / "again.pt2")
    assert not list(runs.glob("again*"))
