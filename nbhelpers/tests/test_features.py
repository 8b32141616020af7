"""VGG16's features: really before activation, as torchvision computes them; weight files and their download."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch

from nbhelpers import features
from nbhelpers.datasets.download import DownloadError
from nbhelpers.features import FeatureWeightsError, VGG16Features

from . import test_download
from .conftest import needs_shared

FEATURES_FILE = "vgg16_features-amdegroot-88682ab5.pth"
CAFFE_MEAN = (0.48235, 0.45882, 0.40784)
weights_server = test_download.server  # a server on this machine
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def random_state(depth: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights like torchvision's, up to ``depth``, that keep the signal's size from layer to layer."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, inputs, outputs in zip(features.layers_to(depth), WIDTHS, WIDTHS[1:], strict=False):
        kernel = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state[f"features.{features.LAYERS[name]}.weight"] = kernel
        state[f"features.{features.LAYERS[name]}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return state


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty TORCH_HOME and no shared pack; the folder torchvision's files belong in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NB_SHARED", str(tmp_path / "no_pack"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def vgg(home):
    """Random weights up to conv3_1 under the real file's name."""
    torch.save(random_state("conv3_1"), home / FEATURES_FILE)
    return home


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    hr = torch.rand(2, 3, 32, 40, generator=generator)
    return (hr + 0.1 * torch.randn(hr.shape, generator=generator)).clamp(0, 1), hr


def by_torchvision(state: dict, x: torch.Tensor, mean, std) -> list[torch.Tensor]:
    """Outputs of torchvision's own convolutions, noted by hooks that copy them before the in-place ReLU."""
    from torchvision.models import vgg

    network, out = vgg.make_layers(vgg.cfgs["D"])[: 2 + max(int(k.split(".")[1]) for k in state)], []
    network.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    for layer in network:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda module, given, result: out.append(result.clone()))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        network((x - mean) / std)
    return out


# --- features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "file", "mean", "std"),
    [
        ("IMAGENET1K_FEATURES", FEATURES_FILE, CAFFE_MEAN, (1 / 255,) * 3),
        ("IMAGENET1K_V1", "vgg16-397923af.pth", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_every_layer_equals_torchvision_before_activation(home, pair, weights, file, mean, std):
    state = random_state("conv5_3")
    torch.save(state, home / file)
    network = VGG16Features("conv5_3", weights)
    got = network(pair[0])
    assert list(got) == list(features.LAYERS) and len(got) == 13
    expected = by_torchvision(state, pair[0], mean, std)
    for (name, value), wanted in zip(got.items(), expected, strict=True):
        assert value.shape == wanted.shape
        assert torch.allclose(value, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name
        assert float((value < 0).float().mean()) > 0.1, f"{name} has lost its negative half"


@needs_shared
def test_the_packs_weights_give_torchvisions_features(pair):
    network = VGG16Features("conv2_2")
    got = network(pair[1])
    state = {k: getattr(network, n) for name in network.layers for k, n in zip(
        (f"features.{features.LAYERS[name]}.weight", f"features.{features.LAYERS[name]}.bias"),
        (f"{name}_weight", f"{name}_bias"), strict=True)}  # fmt: skip
    for value, wanted in zip(got.values(), by_torchvision(state, pair[1], CAFFE_MEAN, (1 / 255,) * 3), strict=True):
        assert torch.allclose(value, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert value.min() < 0 < value.max()
    assert float(got["conv1_2"].abs().max()) > 100, "the original network works on values of 0-255"


def test_unit_makes_the_two_files_comparable(vgg):
    torch.save(random_state("conv1_1"), vgg / "vgg16-397923af.pth")
    assert VGG16Features("conv1_1", "IMAGENET1K_V1").unit == pytest.approx(1)
    assert 1 / VGG16Features("conv1_1").unit == pytest.approx(255 * 0.226, rel=1e-3)


# --- weight files -----------------------------------------------------------------------------------------


def test_missing_layers_are_named(vgg):
    with pytest.raises(FeatureWeightsError) as error:
        VGG16Features("conv3_3")
    text = str(error.value)
    assert "no weights for conv3_2, conv3_3, only for conv1_1, conv1_2, conv2_1, conv2_2, conv3_1" in text
    assert str(vgg / FEATURES_FILE) in text and "528 MB" in text
    assert f"https://download.pytorch.org/models/{FEATURES_FILE}" in text


@needs_shared
def test_the_packs_file_ends_at_conv2_2(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # empty: the pack is looked into as well
    assert features.available_layers() == ("conv1_1", "conv1_2", "conv2_1", "conv2_2")
    assert VGG16Features().layers == features.available_layers()
    with pytest.raises(FeatureWeightsError, match="no weights for conv3_1, only for conv1_1"):
        VGG16Features("conv3_1")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_elsewhere_serves_what_the_first_lacks(vgg, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    (pack / "data").mkdir(parents=True)
    (pack / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(random_state("conv3_3"), pack / "torch" / "hub" / "checkpoints" / FEATURES_FILE)
    monkeypatch.setenv("NB_SHARED", str(pack))
    assert VGG16Features("conv3_3").layers[-1] == "conv3_3"
    assert features.available_layers()[-1] == "conv3_3"


def test_available_layers_without_a_file(home):
    assert features.available_layers() == ()
    assert list(home.iterdir()) == [], "nothing is downloaded for a question"


def test_old_file_format_and_damaged_file(home):
    path = home / FEATURES_FILE
    torch.save(random_state("conv1_2"), path, _use_new_zipfile_serialization=False)
    assert VGG16Features("conv1_2").layers == ("conv1_1", "conv1_2")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FeatureWeightsError, match=r"vgg16_features\S+ cannot be read .*fetch it again"):
        VGG16Features("conv1_2")


def test_a_file_with_code_in_it_is_refused(home):
    torch.save({"features.0.weight": pytest.raises}, home / FEATURES_FILE)
    with pytest.raises(FeatureWeightsError, match="cannot be read"):
        VGG16Features("conv1_1")


@pytest.mark.parametrize(
    ("options", "quoted"),
    [({"depth": "conv6_1"}, "'conv6_1'; choose from conv1_1"), ({"weights": "V3"}, "'V3' are unknown.*IMAGENET1K_V1")],
)
def test_unknown_layer_or_weights(vgg, options, quoted):
    with pytest.raises(ValueError, match=quoted):
        VGG16Features(**options)


# --- download ---------------------------------------------------------------------------------------------


@pytest.fixture
def offered(weights_server, monkeypatch):
    """The server holds a small weight file, under a name with the first digits of its hash."""
    buffer = io.BytesIO()
    torch.save(random_state("conv1_2"), buffer)
    data = buffer.getvalue()
    name = f"vgg16_features-test-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    weights_server.files[name] = data
    real = features._source("IMAGENET1K_FEATURES")

    class Source:
        name, url, transforms = real.name, f"{weights_server.url}/", staticmethod(real.transforms)
        IMAGENET1K_V1 = type(real).IMAGENET1K_V1

    Source.url += name
    monkeypatch.setattr(features, "_source", lambda weights: Source())
    return weights_server, name


def test_download_once_where_there_is_no_file(offered, home, capsys):
    server, name = offered
    assert len(VGG16Features("conv1_2").layers) == 2
    assert [p.name for p in home.iterdir()] == [name] and server.asked == [name]
    assert name in capsys.readouterr().err, "a download is never silent"
    VGG16Features("conv1_2")
    assert features.download_vgg16() == home / name and server.asked == [name]


def test_wrong_hash_is_refused_and_nothing_stays(offered, home):
    server, name = offered
    server.files[name] += b"x"
    with pytest.raises(DownloadError, match="damaged or has changed and was removed: its hash is sha256:") as error:
        VGG16Features("conv1_2")
    assert f"sha256:{name[-12:-4]}…" in str(error.value)
    assert list(home.iterdir()) == []


def test_cut_connection_and_missing_file_leave_nothing(offered, home):
    server, name = offered
    server.broken.add(name)
    with pytest.raises(DownloadError, match=name):
        features.download_vgg16(progress=False)
    server.files.clear()
    with pytest.raises(DownloadError, match="answered 404"):
        features.download_vgg16(progress=False)
    assert list(home.iterdir()) == []


def test_cut_file_is_replaced_only_by_a_whole_one(offered, home):
    server, name = offered
    torch.save(random_state("conv1_1"), home / name)
    before = (home / name).read_bytes()
    with pytest.raises(DownloadError):
        features.download_vgg16(progress=False, base_url=test_download.closed_port())
    assert (home / name).read_bytes() == before
    assert features.download_vgg16(progress=False) == home / name
    assert (home / name).read_bytes() == server.files[name]


def test_no_connection_says_what_to_put_where(home, weights_server):
    base = test_download.closed_port()
    with pytest.raises(DownloadError) as error:
        features.download_vgg16(progress=False, base_url=base)
    text = str(error.value)
    for word in (f"{base}/{FEATURES_FILE}", "528 MB", f"put it in {home}", "sha256:88682ab5", "no connection"):
        assert word in text
    assert list(home.iterdir()) == []
