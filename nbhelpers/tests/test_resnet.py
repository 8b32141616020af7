"""Classifiers of document 004: the counts of the claims, torchvision's own networks, the controls' sizes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from nbhelpers.block_orthogonal import BlockError, BlockOrthogonalConv2d, MaskedConv2d, parameter_counts
from nbhelpers.models.resnet import resnet, thin_width


def sizes(**options: object):
    with torch.device("meta"):
        model = resnet(kind="plain", **options)
    return parameter_counts(model)


def test_plain_networks_have_the_known_sizes():
    assert sizes().free == 11_173_962
    assert sizes(classes=1000, stem="imagenet").free == 11_689_512  # torchvision's documentation
    assert sizes(baseline_name="ResNet34", classes=1000, stem="imagenet").free == 21_797_672
    assert sizes(baseline_name="resnet_50", classes=1000, stem="imagenet").free == 25_557_032


def test_one_matrix_in_stages_3_and_4_leaves_the_claims_degrees_of_freedom():
    """Claim B1. Stored: matrices of 256 and 512 rows in the place of their angles."""
    model = resnet()
    counts = parameter_counts(model)
    assert counts.free == 1_505_866 and counts.dense == 11_173_962
    assert counts.free == sum(p.numel() for p in model.parameters())
    angles = 4 * 256 * 255 // 2 + 4 * 512 * 511 // 2
    assert counts.stored - counts.free == 4 * 256**2 + 4 * 512**2 - angles
    assert [entry.name for entry in model.report if entry.skipped] == ["layer3.0.downsample.0", "layer4.0.downsample.0"]
    assert len(model.report) == 10 and "no room for any of 1" in model.report[2].skipped


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@torch.no_grad()
def test_plain_network_is_torchvisions(stem):
    """Same names, same function; with the CIFAR stem but for the first convolution and the pooling."""
    ours, theirs = resnet(kind="plain", stem=stem).eval(), torchvision.models.resnet18(num_classes=10).eval()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["Resnet-18", "resnet50"])
@pytest.mark.parametrize("kind", ["orthogonal", "masked", "grouped", "plain"])
def test_every_kind_trains_a_step_and_is_seeded(name, kind):
    def made():
        torch.manual_seed(3)
        return resnet(name, classes=7, width=4, kind=kind, num_matrices=2, r=2, placement="permuted")

    model, again = made(), made()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    model(torch.rand(2, 3, 16, 16)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_masked_control_has_the_same_zeros_and_as_long_rows():
    torch.manual_seed(0)
    kinds = {"orthogonal": BlockOrthogonalConv2d, "masked": MaskedConv2d}
    first, second = (resnet(width=16, kind=kind, num_matrices=2, r=2, placement="spread") for kind in kinds)
    pairs = [(first.get_submodule(e.name), second.get_submodule(e.name)) for e in first.report if not e.skipped]
    assert len(pairs) == 8
    for a, b in pairs:
        assert type(a) is BlockOrthogonalConv2d and type(b) is MaskedConv2d
        assert torch.equal(a.weight != 0, b.weight != 0)
        length = b.weight.flatten(1).norm(dim=1).mean().item()
        assert length == pytest.approx(2**0.5, rel=0.05)
    assert parameter_counts(second).free == parameter_counts(first).stored


@pytest.mark.parametrize("m", [1, 3])
def test_controls_have_about_as_many_parameters(m):
    target = parameter_counts(resnet(width=32, num_matrices=m)).free
    grouped = parameter_counts(resnet(width=32, num_matrices=m, kind="grouped"))
    assert grouped.free == grouped.dense and 0.7 < grouped.free / target < 1.4
    width = thin_width(target)
    assert abs(sizes(width=width).free - target) == min(abs(sizes(width=w).free - target) for w in range(4, 30))


def test_a_network_thinner_than_one_channel_is_refused():
    with pytest.raises(ValueError, match=r"at least [\d,]+ parameters; 100 are too few"):
        thin_width(100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline_name": "vgg16"}, r"baseline_name 'vgg16' is unknown.*resnet18"),
        ({"stem": "patch"}, r"stem 'patch' is unknown.*imagenet"),
        ({"kind": "dense"}, r"kind 'dense' is unknown.*masked"),
        ({"width": 0}, r"width=0 must be at least 1"),
        ({"odk_layers": [5]}, r"odk_layers=\[5\]: the network has no stage 5, only \[1, 2, 3, 4\]"),
        ({"num_matrices": 10}, r"num_matrices=10 fits no convolution .*room for 9 of 10"),
        ({"r": 7}, "r=7 does not divide"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises((ValueError, BlockError), match=message):
        resnet(**{"width": 8, **options})
