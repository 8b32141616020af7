"""Exported files: the values of PyTorch at any size, what they say about themselves, and what is refused."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

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


@pytest.mark.parametrize("suffix", deploy.FORMATS)
@pytest.mark.parametrize("arch", ARGUMENTS)
def test_an_exported_network_is_one_of_ours(saved, arch, suffix):
    path = saved / "out" / f"{arch}{suffix}"
    info = deploy.export(arch, path)
    assert 0 <= info["difference"] <= deploy.TOLERANCE
    model, exported = checkpoints.load(arch), inference.get_model(path, ARGUMENTS[arch]["scale"])
    assert (exported.scale, exported.halo) == (model.scale, model.halo)
    assert exported.info["sha256"] == checkpoints.card(arch)["sha256"] and exported.info["name"] == arch
    for size in ((1, 1, 1), (1, 2, 9), (3, 7, 6), (1, 70, 53)):  # none of them seen by the export
        x = torch.rand(size[0], 3, *size[1:])
        torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=0)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "weights are inside, nothing temporary is left"
    content = zipfile.ZipFile(path).read("archive/models/model.json") if suffix == ".pt2" else path.read_bytes()
    assert b".py" not in content, "no folders of this machine"


@pytest.mark.parametrize("suffix", deploy.FORMATS)
def test_the_command_and_upscaling_with_its_file(saved, capsys, suffix):
    path, photo = saved / f"net{suffix}", saved / "photo.png"
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
    x = load_image(photo)
    model = checkpoints.load(path)
    assert torch.equal(inference.upscale(model, x, precision="bf16"), inference.upscale(model, x)), "always fp32"


def test_evaluate_takes_exported_files(saved, capsys):
    """The table of a network and that of its files are the same."""
    save_image(torch.rand(3, 60, 54, generator=torch.Generator().manual_seed(0)), saved / "photos" / "a.png")
    means = []
    for model in ("ESPCN", saved / "net.onnx", saved / "net.pt2"):
        if isinstance(model, Path):
            deploy.export("ESPCN", model)
        assert main(["evaluate", "--model", str(model), "--hr", str(saved / "photos"), "--no-lpips", "--json"]) == 0
        means.append(json.loads(capsys.readouterr().out)["mean"])
    for mean in means[1:]:
        assert mean["psnr_y"] == pytest.approx(means[0]["psnr_y"], abs=2e-3)


def test_help_has_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "--minShapes=lr:1x3x16x16" in text and "--maxShapes=lr:1x3x1024x1024" in text and "ExecuTorch" in text


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


class _OneAtATime(nn.Module):
    """Fixes the number of pictures that it was followed with, as SwinIR does."""

    scale, halo = 1, 0

    def forward(self, x):
        count = 2 if x.shape[0] == 2 else x.shape[0]
        return x + x.reshape(count, -1).mean(1)[:, None, None, None]


@pytest.mark.parametrize("suffix", deploy.FORMATS)
def test_a_network_that_takes_one_picture(saved, monkeypatch, suffix):
    model, path = _OneAtATime(), saved / f"net{suffix}"
    (saved / "net").write_bytes(b"weights")
    monkeypatch.setattr(deploy.checkpoints, "load", lambda name: model)
    monkeypatch.chdir(saved)
    assert deploy.export("net", path)["batch"] == 1
    x = torch.rand(3, 3, 12, 9)
    torch.testing.assert_close(deploy.FORMATS[suffix](path)(x), model(x))


@pytest.mark.parametrize(
    ("suffix", "model", "quoted"),
    [
        (".onnx", _Wrong(), r"the \.onnx file of 'net' differs from PyTorch by 0.01 at 17x29 pixels"),
        (".pt2", _Wrong(), r"the \.pt2 file of 'net' differs from PyTorch by 0.01 at 17x29 pixels"),
        (".onnx", _Fixed(), "cannot export 'net' to ONNX: .+"),
        (".pt2", _Fixed(), "torch.export cannot follow 'net': .+"),
    ],
)
def test_a_file_that_is_not_right_is_not_kept(saved, monkeypatch, suffix, model, quoted):
    """And the file that was there stays."""
    monkeypatch.setattr(deploy.checkpoints, "load", lambda name: model)
    path = saved / f"net{suffix}"
    path.write_bytes(b"the file of yesterday")
    (saved / "net").write_bytes(b"weights")
    monkeypatch.chdir(saved)
    with pytest.raises(deploy.ExportError, match=quoted):
        deploy.export("net", path)
    assert path.read_bytes() == b"the file of yesterday"
    assert not list(saved.glob(".net*"))


def test_what_is_no_file_of_ours(saved, monkeypatch):
    import onnx

    with pytest.raises(ValueError, match=r"cannot write .*net.pt: name the file \*\.onnx or \*\.pt2"):
        deploy.export("ESPCN", saved / "net.pt")
    with pytest.raises(checkpoints.CheckpointError, match="no network 'nothing'"):
        deploy.export("nothing", saved / "net.onnx")
    with pytest.raises(checkpoints.CheckpointError, match=r"no file .*missing\.onnx"):
        checkpoints.load(saved / "missing.onnx")
    (saved / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(checkpoints.CheckpointError, match=r"bad\.onnx is not a readable ONNX file"):
        checkpoints.load(saved / "bad.onnx")
    deploy.export("ESPCN", saved / "net.onnx")
    model = onnx.load(saved / "net.onnx")
    assert {p.key: json.loads(p.value)["scale"] for p in model.metadata_props}[deploy.KEY] == 3
    del model.metadata_props[:]
    onnx.save(model, saved / "stripped.onnx")
    with pytest.raises(checkpoints.CheckpointError, match=r"stripped\.onnx does not say its scale"):
        checkpoints.load(saved / "stripped.onnx")
    with pytest.raises(ValueError, match=r"net\.onnx' is an exported file already"):
        deploy.export(saved / "net.onnx", saved / "net.pt2")


@pytest.mark.parametrize("suffix", deploy.FORMATS)
def test_damaged_files(saved, suffix, caplog):
    """Cut short or changed inside: one clear line, and no pages of log from PyTorch."""
    path = saved / f"net{suffix}"
    deploy.export("ESPCN", path)
    whole = path.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello")):
        bad = saved / f"{name}{suffix}"
        bad.write_bytes(content)
        with pytest.raises(checkpoints.CheckpointError, match=rf"{name}\{suffix} .*") as caught:
            checkpoints.load(bad)
        assert "is not a readable" in str(caught.value) or "does not say its scale" in str(caught.value)
        assert main(["upscale", str(bad), "-o", str(saved / "o"), "--model", str(bad)]) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_damage_inside_a_program(saved):
    """A changed weight, a program without our entry, and an entry without program."""
    path, bad = saved / "net.pt2", saved / "bad.pt2"
    deploy.export("ESPCN", path)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/weights/weight_0")
        files = {name: archive.read(name) for name in archive.namelist()}
    content = bytearray(path.read_bytes())
    content[info.header_offset + 100] ^= 0xFF
    bad.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match=r"bad\.pt2 is (damaged|not a readable)"):
        checkpoints.load(bad)
    for left_out, message in (
        (deploy.KEY, "does not say its scale"),
        ("models/model.json", "cannot be loaded by torch"),
    ):
        with zipfile.ZipFile(bad, "w") as archive:
            for name, data in files.items():
                if not name.endswith(left_out):
                    archive.writestr(name, data)
        with pytest.raises(checkpoints.CheckpointError, match=rf"bad\.pt2 {message}"):
            checkpoints.load(bad)


def test_a_discriminator_is_no_upscaler(runs):
    arguments = {"channels": 4}
    judge = models.build("DilatedDiscriminator", models.DISCRIMINATORS, **arguments)
    checkpoints.save("judge", judge, "DilatedDiscriminator", arguments, {"kind": "discriminator"}, [])
    with pytest.raises(ValueError, match="'judge' is a DilatedDiscriminator, not an upscaler"):
        deploy.export("judge", runs / "judge.onnx")
