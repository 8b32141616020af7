"""Networks on disk: what is saved comes back, what is wrong is named, what is committed is what its card says."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nbhelpers import checkpoints, models, runtime
from nbhelpers.checkpoints import CheckpointError
from nbhelpers.degrade import downscale
from nbhelpers.images import find_images, load_image
from nbhelpers.inference import upscale

ARGUMENTS = {"scale": 2, "channels": 8}


def tiny(seed: int = 0, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build("ESPCN", **(ARGUMENTS | arguments))


@pytest.fixture
def folder(tmp_path):
    """A folder with one network, ``net``."""
    history = [{"step": 1, "val_psnr_y": 30.5}, {"step": 2, "val_psnr_y": ""}]
    checkpoints.save("net", tiny(), "ESPCN", ARGUMENTS, {"scale": 2, "note": "größer"}, history, tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "net.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_round_trip(folder):
    model = checkpoints.load("net", folder=folder)
    x = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.equal(model(x), tiny()(x))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.scale == 2 and model.halo == 4
    card = checkpoints.card("net", folder)
    assert card["note"] == "größer" and card["arguments"] == ARGUMENTS
    assert card["parameters"] == models.count_parameters(tiny())
    assert card["sha256"] == checkpoints.sha256(folder / "net.safetensors")
    first, second = checkpoints.history("net", folder)
    assert first == {"step": 1.0, "val_psnr_y": 30.5} and math.isnan(second["val_psnr_y"])
    by_path = checkpoints.load(folder / "net.safetensors")
    assert torch.equal(by_path.features[0].weight, model.features[0].weight)


def test_saving_again_replaces_and_leaves_no_rest(folder):
    checkpoints.save("net", tiny(1), "ESPCN", ARGUMENTS, {}, [{"step": 1}], folder)
    assert torch.equal(checkpoints.load("net", folder=folder).features[0].weight, tiny(1).features[0].weight)
    assert sorted(p.name for p in folder.iterdir()) == ["net.csv", "net.json", "net.safetensors"]
    assert (folder / "net.safetensors").stat().st_mode == (folder / "net.json").stat().st_mode, "readable to all"


def test_available_lists_complete_networks_only(folder):
    checkpoints.save("a_net", tiny(), "ESPCN", ARGUMENTS, {}, [], folder)
    checkpoints.save("v1.5", tiny(), "ESPCN", ARGUMENTS, {}, [], folder)
    (folder / "cardless.safetensors").write_bytes(b"")
    assert checkpoints.available(folder) == ["a_net", "net", "v1.5"]
    assert checkpoints.available(folder / "nowhere") == []
    assert checkpoints.load("v1.5", folder=folder).scale == 2


def test_unknown_name_lists_what_there_is(folder):
    for call in (checkpoints.load, checkpoints.card, checkpoints.history):
        with pytest.raises(CheckpointError, match=r"no network 'espcn_x9'; there are \['net'\]"):
            call("espcn_x9", folder=folder)
    with pytest.raises(CheckpointError, match=r"no network 'nett'; did you mean net\?"):
        checkpoints.load("nett", folder=folder)


def test_a_path_that_is_no_network_is_told_from_a_name(folder):
    (folder / "photo.jpg").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no such file: .*RealESRGAN_x4plus.pth$"):
        checkpoints.load(folder / "RealESRGAN_x4plus.pth", folder=folder)
    with pytest.raises(CheckpointError, match=r"photo.jpg is no network file that is known here; .*, .onnx"):
        checkpoints.load(folder / "photo.jpg", folder=folder)


def test_other_architecture_names_tensors_and_shapes(folder):
    edit(folder, arguments={"scale": 2, "channels": 16})
    with pytest.raises(CheckpointError, match=r"another architecture than ESPCN.*features\.0\.weight") as caught:
        checkpoints.load("net", folder=folder)
    assert "(8, 3, 5, 5)" in str(caught.value) and "(16, 3, 5, 5)" in str(caught.value)
    assert "more)" in str(caught.value), "not a page full of tensors"

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match=r"missing body\.weight.*missing body\.bias.*unexpected"):
        checkpoints.load_weights(Other(), folder / "net.safetensors")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arch": "Nope"}, r"card of net cannot be built.*'Nope' is unknown.*ESPCN"),
        ({"arguments": {"scale": 2, "wings": 3}}, r"cannot be built.*\['wings'\].*channels"),
        ({"arguments": {"scale": -1}}, r"cannot be built.*scale -1"),
        ({"arguments": None}, "cannot be built"),
    ],
)
def test_cards_that_cannot_be_built(folder, changes, why):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=why):
        checkpoints.load("net", folder=folder)


def test_changed_weights_are_noticed(folder):
    path = folder / "net.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"net\.safetensors does not match the SHA-256"):
        checkpoints.load("net", folder=folder)
    assert checkpoints.load("net", folder=folder, check=False).scale == 2


@pytest.mark.parametrize("size", [0, 5, 100, 2000])
def test_cut_file_without_hash_check(folder, size):
    path = folder / "net.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"net\.safetensors is not a readable safetensors file"):
        checkpoints.load("net", folder=folder, check=False)


def test_missing_and_damaged_card(folder):
    card = folder / "net.json"
    for data, why in ((b"{", "not valid JSON"), (b"\xff\xfe\x80", "not valid JSON"), (b"[1]", "holds a JSON list")):
        card.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"net\.json .*{why}"):
            checkpoints.load("net", folder=folder)
    card.unlink()
    with pytest.raises(CheckpointError, match=r"net\.json is missing"):
        checkpoints.load("net", folder=folder)


def test_missing_history(folder):
    (folder / "net.csv").unlink()
    with pytest.raises(CheckpointError, match=r"'net' has no training history.*net\.csv"):
        checkpoints.history("net", folder)


# --- the networks of this project ---------------------------------------------------------------------------

PARAMETERS = {"espcn_x2": 171_148, "espcn_x3": 188_443, "espcn_x4": 212_656}


def test_espcn_parameter_counts():
    for name, count in PARAMETERS.items():
        assert models.count_parameters(models.build("ESPCN", scale=int(name[-1]))) == count


def test_committed_networks_exist():
    if not checkpoints.available():
        pytest.skip("no networks in data/checkpoints yet")
    assert set(PARAMETERS) <= set(checkpoints.available())


@pytest.mark.parametrize("name", checkpoints.available())
def test_committed_network_is_what_its_card_says(name):
    card, model, history = checkpoints.card(name), checkpoints.load(name), checkpoints.history(name)
    count = sum(p.numel() for p in model.parameters())
    assert card["name"] == name and card["parameters"] == count == PARAMETERS.get(name, count)
    assert card["scale"] == model.scale
    assert card["command"].startswith(("python -m nbhelpers train ", "python -m nbhelpers prune "))
    sr = model(torch.full((1, 3, 12, 10), 0.5))
    assert sr.shape == (1, 3, 12 * model.scale, 10 * model.scale)
    assert (sr - 0.5).abs().max() < 0.1, "an even grey stays an even grey"
    steps = [row["step"] for row in history]
    assert len(history) >= 3 and steps == sorted(set(steps))
    scores = [row["val_psnr_y"] for row in history]
    kept = scores[-1] if card["config"].get("keep") == "last" else max(scores)
    assert card["metrics"]["val_psnr_y"] == pytest.approx(kept, abs=0.005)


@pytest.mark.parametrize("name", checkpoints.available(kind="discriminator"))
def test_committed_discriminator_tells_its_originals_from_the_generated(name):
    """A broken file would guess: half of the places right."""
    card, judge = checkpoints.card(name), checkpoints.load(name)
    generator = checkpoints.load(name.removesuffix("_discriminator"))
    right = []
    for path in find_images(runtime.PHOTOS / "val")[:4]:
        hr = load_image(path)[:, :256, :256]
        sr = upscale(generator, downscale(hr, card["scale"]))
        right.append((judge(hr[None]) > judge(sr[None])).float().mean())
    assert sum(right) / len(right) > 0.6


def test_half_precision_halves_the_file_and_loads_as_fp32(tmp_path):
    model = models.build("ESPCN", channels=32).eval()
    sizes = [
        checkpoints.save(name, model, "ESPCN", {"channels": 32}, {}, [], tmp_path, half=half).stat().st_size
        for name, half in (("full", False), ("half", True))
    ]
    assert sizes[1] < 0.55 * sizes[0]
    loaded = checkpoints.load("half", folder=tmp_path)
    assert all(p.dtype is torch.float32 for p in loaded.parameters())
    x = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(loaded(x), model(x), atol=2e-3, rtol=0)
