"""ONNX files: the values of PyTorch at any size, what they say about themselves, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nbhelpers import checkpoints, deploy, inference, models
from nbhelpers.__main__ import main
from nbhelpers.images import load_image, save_image

ARGUMENTS = {
    "ESPCN": {"scale": 3, "channels": 8},
    "M23_RLFN": {"scale": 4, "n_feats": 8, "n_blocks": 2, "use_m23": False},
    "DilatedRRDBNet": {"scale": 2, "channels": 8, "blocks": 1, "skip": True},
}


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(arch, **ARGUMENTS[arch]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture
def saved(runs):
    """Networks of three families by name, in an otherwise empty checkpoint folder."""
    for arch, arguments in ARGUMENTS.items():
        checkpoints.save(arch, network(arch), arch, arguments, {"scale": arguments["scale"]}, [])
    return runs


@pytest.mark.parametrize("arch", ARGUMENTS)
def test_an_exported_network_is_one_of_ours(saved, arch):
    path = saved / "out" / f"{arch}.onnx"
    info = deploy.export_onnx(arch, path)
    assert 0 <= info["difference"] <= deploy.TOLERANCE
    model, exported = checkpoints.load(arch), inference.get_model(path, ARGUMENTS[arch]["scale"])
    assert (exported.scale, exported.halo) == (model.scale, model.halo)
    assert exported.info["sha256"] == checkpoints.card(arch)["sha256"] and exported.info["name"] == arch
    for size in ((1, 1, 1), (1, 2, 9), (3, 7, 6), (1, 70, 53)):  # none of them seen by the export
        x = torch.rand(size[0], 3, *size[1:])
        torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=0)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "weights are inside, nothing temporary is left"


def test_the_command_and_upscaling_with_its_file(saved, capsys):
    path, photo = saved / "net.onnx", saved / "photo.png"
    save_image(torch.rand(3, 101, 67), photo)
    assert main(["export", "M23_RLFN", "-o", str(path)]) == 0
    assert "M23_RLFN x4 written to" in capsys.readouterr().out
    results = []
    for name, model, tile in (("a", "M23_RLFN", "0"), ("b", str(path), "0"), ("c", str(path), "40")):
        out = saved / f"{name}.png"
        assert main(["upscale", str(photo), "-o", str(out), "--model", model, "--tile", tile]) == 0
        results.append(load_image(out))
    assert results[0].shape == (3, 404, 268)
    assert all((r - results[0]).abs().max() <= 1.01 / 255 for r in results[1:]), "one grey level, from rounding"


class _Wrong(nn.Module):
    scale, halo = 2, 0

    def forward(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) * (1 if torch.compiler.is_exporting() else 1.01)


class _Fixed(nn.Module):
    """Takes one size only."""

    scale, halo = 1, 0

    def __init__(self):
        super().__init__()
        self.register_buffer("shading", torch.ones(1, 1, 25, 34))

    def forward(self, x):
        return x * self.shading


@pytest.mark.parametrize(
    ("model", "quoted"),
    [(_Wrong(), r"'net' differs from PyTorch by 0.01 at 17x29 pixels"), (_Fixed(), "cannot export 'net' to ONNX: .+")],
)
def test_a_file_that_is_not_right_is_not_kept(saved, monkeypatch, model, quoted):
    """And the file that was there stays."""
    monkeypatch.setattr(deploy.checkpoints, "load", lambda name: model)
    path = saved / "net.onnx"
    path.write_bytes(b"the file of yesterday")
    (saved / "net").write_bytes(b"weights")
    monkeypatch.chdir(saved)
    with pytest.raises(deploy.ExportError, match=quoted):
        deploy.export_onnx("net", path)
    assert path.read_bytes() == b"the file of yesterday"
    assert not list(saved.glob(".net*"))


def test_what_is_no_file_of_ours(saved, monkeypatch):
    import onnx

    with pytest.raises(ValueError, match=r"cannot write .*net.pt: name the file \*\.onnx"):
        deploy.export_onnx("ESPCN", saved / "net.pt")
    with pytest.raises(checkpoints.CheckpointError, match="no network 'nothing'"):
        deploy.export_onnx("nothing", saved / "net.onnx")
    with pytest.raises(checkpoints.CheckpointError, match=r"no file .*missing\.onnx"):
        checkpoints.load(saved / "missing.onnx")
    (saved / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(checkpoints.CheckpointError, match=r"bad\.onnx is not a readable ONNX file"):
        checkpoints.load(saved / "bad.onnx")
    deploy.export_onnx("ESPCN", saved / "net.onnx")
    model = onnx.load(saved / "net.onnx")
    assert {p.key: json.loads(p.value)["scale"] for p in model.metadata_props}[deploy.KEY] == 3
    del model.metadata_props[:]
    onnx.save(model, saved / "stripped.onnx")
    with pytest.raises(checkpoints.CheckpointError, match=r"stripped\.onnx does not say its scale"):
        checkpoints.load(saved / "stripped.onnx")


def test_a_discriminator_is_no_upscaler(runs):
    arguments = {"channels": 4}
    judge = models.build("DilatedDiscriminator", models.DISCRIMINATORS, **arguments)
    checkpoints.save("judge", judge, "DilatedDiscriminator", arguments, {"kind": "discriminator"}, [])
    with pytest.raises(ValueError, match="'judge' is a DilatedDiscriminator, not an upscaler"):
        deploy.export_onnx("judge", runs / "judge.onnx")
