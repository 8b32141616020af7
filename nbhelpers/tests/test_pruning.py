"""Pruning: which channels belong together, that the small network computes what is left, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from nbhelpers import checkpoints, deploy, inference, models, pruning, runtime, training
from nbhelpers.__main__ import main
from nbhelpers.experiments import compose, differences

NETWORKS = {
    "ESPCN": ("channels", {"scale": 3, "channels": 8, "batch_norm": True}),
    "StagedESPCN": ("channels", {"scale": 4, "stages": [2, 2], "channels": 8, "upsampler": "nearest"}),
    "M23_RLFN": ("n_feats", {"scale": 2, "n_feats": 16, "n_blocks": 1, "use_m23": False}),
    "DilatedRRDBNet": ("channels", {"scale": 4, "channels": 8, "blocks": 2, "shared": True, "passes": 2}),
    "RRDBNet": ("channels", {"channels": 8, "blocks": 1, "scale": 2}),
    "PlainSR": ("channels", {"scale": 2, "channels": 8, "depth": 4, "residual": True}),
    "EfficientSRNet": ("nf", {"nf": 8, "blocks": 2, "scale": 4}),
    "LeanSRNet": ("channels", {"channels": 8, "blocks": 2, "attention": "local"}),
}


def network(arch: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(arch, **NETWORKS[arch][1] | changes).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("arch", NETWORKS)
def test_channels_that_do_nothing_can_be_cut_away(arch):
    """Where nothing reads some channels, the network made of the others gives the very same pictures."""
    width, arguments = NETWORKS[arch]
    large = network(arch)
    narrow = {width: arguments[width] * 3 // 4}
    channels = pruning.follow(large)
    kept = pruning._kept(channels, large, network(arch, **narrow), torch.rand(len(channels.parents)))
    for (name, dim), numbers in channels.dims.items():
        if dim == 1:
            large.state_dict()[name][:, ~kept[channels.final(numbers)]] = 0
    small = pruning.shrink(large, network(arch, **narrow), channels, kept.float())
    assert models.count_parameters(small) < models.count_parameters(large)
    assert (small.scale, small.halo) == (large.scale, large.halo)
    for size in ((1, 3, 17, 30), (2, 3, 8, 7)):
        x = torch.rand(size)
        torch.testing.assert_close(small(x), large(x), atol=1e-5, rtol=1e-5)


def test_what_belongs_to_one_channel():
    """In a residual network all layers that write to the stream, in order of the channels; a shuffle counts by four."""
    model = network("EfficientSRNet", blocks=1)
    channels = pruning.follow(model)

    def numbers(name: str, dim: int = 0) -> list[int]:
        return channels.final(channels.dims[name, dim]).tolist()

    stream = numbers("head.weight")
    assert len(set(stream)) == 8
    for name in ("trunk.weight", "trunk.bias", "body.0.pointwise.weight", "body.0.depthwise.weight"):
        assert numbers(name) == stream
    assert numbers("upsampling.0.weight", 1) == stream
    assert numbers("body.0.attention.mix.weight") == stream and numbers("body.0.attention.mix.weight", 1) == stream
    shuffled = numbers("upsampling.2.weight", 1)
    assert numbers("upsampling.0.weight") == [n for n in shuffled for _ in range(4)]
    assert not set(shuffled) & set(stream)


def test_importance_finds_what_the_picture_needs():
    """A channel with large weights that nobody reads fools the magnitude, not the loss."""
    model = network("ESPCN", batch_norm=False)
    model.features[0].weight[5] *= 30
    model.features[2].weight[:, 5] = 0
    channels = pruning.follow(model)
    at = channels.final(channels.dims["features.0.weight", 0])[5]
    first = channels.final(channels.dims["features.0.weight", 0])
    assert pruning.magnitude(model, channels)[first].argmax() == 5
    lr, hr = torch.randint(256, (2, 3, 9, 9), dtype=torch.uint8), torch.randint(256, (2, 3, 27, 27), dtype=torch.uint8)
    scores = pruning.taylor(model, channels, lambda sr, hr: ((sr - hr).square().mean(), {}), [(lr, hr)])
    # Its own weights have no gradient; what is left are the weights that read it, which are 0.
    assert scores[at] == 0 and (scores[first] > 0).sum() == 7


class _Mixing(nn.Module):
    scale = 1

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(torch.softmax(self.a(x), 1))


def test_networks_that_cannot_be_followed():
    with pytest.raises(pruning.PruningError, match=r"cannot follow the channels .* through aten\._softmax"):
        pruning.follow(_Mixing())
    with pytest.raises(pruning.PruningError, match=r"through aten\.mean"):
        pruning.follow(network("EfficientSRNet", attention="eca"))
    branched = network("LeanSRNet", branches=True)
    channels = pruning.follow(branched)
    with pytest.raises(pruning.PruningError, match="LeanSRNet is not LeanSRNet with fewer channels: size mismatch"):
        pruning.shrink(
            branched, network("LeanSRNet", branches=True, channels=6), channels, torch.ones(len(channels.parents))
        )
    wide, narrow = network("ESPCN"), network("ESPCN", channels=6)
    channels = pruning.follow(narrow)
    with pytest.raises(pruning.PruningError, match="8 of 6 channels cannot be kept"):
        pruning.shrink(narrow, wide, channels, torch.ones(len(channels.parents)))


@pytest.fixture
def photos(small_photos):
    """A folder with small photos, and a trained network "net"."""
    options = ["data.roots=[bundled]", "data.patch=8", "data.batch=2", "trainer.progress=false", "trainer.threads=1"]
    options += ["model.scale=2", "model.channels=12", "trainer.max_steps=4", "trainer.val_every=4", "init_from=null"]
    from nbhelpers.training import train

    train(compose("espcn_x4", [*options, "name=net", "optimizer.ema_decay=0"]))
    return small_photos


def test_the_command(photos, capsys):
    """Pruned, trained on, saved with a card, and used like any other network; the same command again finds it done."""
    command = ["prune", "net", "-o", "slim", "--multiple", "4", "--steps", "6", "--set", "data.batch=1"]
    assert main(command) == 0
    assert "slim: channels 8, in net 12" in capsys.readouterr().out
    new, old = checkpoints.card("slim"), checkpoints.card("net")
    assert new["arguments"] == old["arguments"] | {"channels": 8} and new["parameters"] < 0.6 * old["parameters"]
    config = new["config"]
    assert config["init_from"] == "net" and config["prune"] == {"importance": "taylor"}
    assert config["optimizer"]["lr"] == pytest.approx(old["config"]["optimizer"]["lr"] * pruning.RATE)
    assert config["trainer"]["max_steps"] == 8 and config["data"]["batch"] == 1, "whole validations"
    before = (runtime.CHECKPOINTS / "slim.safetensors").read_bytes()
    assert main(command) == 0
    assert (runtime.CHECKPOINTS / "slim.safetensors").read_bytes() == before
    assert main(["evaluate", "--model", "slim", "--hr", str(photos / "photos" / "val"), "--no-lpips"]) == 0
    assert deploy.export("slim", photos / "slim.onnx")["sha256"] == new["sha256"]


def test_training_on_begins_in_training_mode(photos):
    """BatchNorm must count again, and the fast gradient of depthwise kernels is for training alone."""
    changes = {"name": "slim", "init_from": "net", "prune": {"importance": "magnitude"}}
    info = checkpoints.card("net")
    cfg = pruning.tuning(info, changes | {"model": info["arguments"] | {"channels": 8}}, 4, [])
    assert all(module.training for module in training._network(cfg).modules())


@pytest.mark.parametrize("name", [n for n in checkpoints.available() if "prune" in checkpoints.card(n)["config"]])
def test_committed_networks_can_be_pruned_again_by_their_command(name, monkeypatch):
    card, trained = checkpoints.card(name), []
    monkeypatch.setattr(training, "train", lambda cfg, command: trained.append((cfg, command)))
    assert main(card["command"].split()[3:]) == 0
    [(cfg, command)] = trained
    assert differences(card["config"], OmegaConf.to_container(cfg, resolve=True)) == []
    assert command == card["command"]


def test_without_training(photos, capsys):
    """The file alone: less than what it came from, and its picture is that of the channels kept."""
    assert main(["prune", "net", "-o", "cut", "--ratio", "0.5", "--multiple", "1", "--steps", "0"]) == 0
    assert "cut: channels 6, in net 12" in capsys.readouterr().out
    sizes = [(runtime.CHECKPOINTS / f"{name}.safetensors").stat().st_size for name in ("net", "cut")]
    assert sizes[1] < 0.5 * sizes[0]
    picture = torch.rand(3, 20, 21)
    model = inference.get_model("cut", 2)
    assert inference.upscale(model, picture).shape == (3, 40, 42) and checkpoints.card("cut")["init_from"] == "net"
    assert main(["prune", "net", "-o", "cut", "--steps", "0"]) == 2
    assert "data/checkpoints/cut exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.2"], "ratio 1.2 must lie between 0 and 1"),
        (["--ratio", "0.9"], "ratio 0.9 leaves no channel of 12 in multiples of 8"),
        (["--ratio", "0.01", "--multiple", "4"], "ratio 0.01 removes no channel of 12"),
        (["--steps", "-1"], "steps -1 must be at least 0"),
        (["-o", "a/new"], "the new name 'a/new' must not be a path"),
        (["--set", "data.bach=3"], "--set data.bach=3: .*bach"),
        (["--set", "data.roots=[nowhere]"], "no folder .*nowhere"),
    ],
)
def test_what_the_command_refuses(photos, capsys, options, message):
    assert main(["prune", "net", "-o", "new", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^error: .*{message}", lines[-1])
    assert "new" not in checkpoints.available()


def test_what_is_no_network_of_ours(photos, capsys):
    model = network("ESPCN")
    checkpoints.save("bare", model, "ESPCN", NETWORKS["ESPCN"][1], {"scale": 3}, [])
    assert main(["prune", "bare", "-o", "new", "--multiple", "1"]) == 2
    assert "the card of 'bare' does not say how it was trained; use --steps 0" in capsys.readouterr().err
    assert main(["prune", "net.onnx", "-o", "new"]) == 2
    assert "net.onnx is an exported file; prune the network it was made from" in capsys.readouterr().err
    card = runtime.CHECKPOINTS / "bare.json"
    card.write_text(card.read_text().replace('"ESPCN"', '"ESPCM"'))
    assert main(["prune", "bare", "-o", "new"]) == 2
    assert "the card of bare cannot be built: architecture 'ESPCM' is unknown" in capsys.readouterr().err
    assert main(["prune", "nothing", "-o", "new"]) == 2
    assert "no network 'nothing'" in capsys.readouterr().err


def test_a_class_without_width(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "Fixed", lambda scale=2: _Mixing())
    with pytest.raises(pruning.PruningError, match=r"Fixed has no width among its arguments \['scale'\]"):
        pruning.narrower({"arch": "Fixed", "arguments": {}}, 0.3)
