"""The hallucination probe: the same patches every time, flat ones flat, and an energy that knows more from less."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import probes
from nbhelpers.degrade import gaussian_blur
from nbhelpers.inference import Bicubic
from nbhelpers.metrics import rgb_to_y


@pytest.mark.parametrize("scale", [2, 3, 4, 5])
def test_groups_and_sizes(scale):
    patches = probes.probe_patches(scale)
    assert tuple(patches) == probes.GROUPS
    assert [len(v) for v in patches.values()] == [12, 12, 8]
    for lr, hr in (pair for pairs in patches.values() for pair in pairs):
        assert hr.shape[-1] == lr.shape[-1] * scale >= 96 - scale
        assert hr.min() >= 0 and hr.max() <= 1 and hr.dtype == torch.float32


def test_patches_are_the_same_every_time():
    one = probes.probe_patches(4)
    probes.probe_patches.cache_clear()
    two = probes.probe_patches(4)
    assert one is not two
    for name, pairs in one.items():
        for a, b in zip(pairs, two[name], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_groups_are_what_they_are_called():
    patches = probes.probe_patches(4)
    energies = {name: [probes.energy(hr) for _, hr in pairs] for name, pairs in patches.items()}
    assert max(energies["flat"]) < 2.5 and min(energies["text"]) > 20  # grey levels
    # Defocused: the small picture holds all there is.
    assert probes.measure(Bicubic(4), {"defocused": patches["defocused"]})["defocused"]["psnr_y"] > 45
    spread = [float(rgb_to_y(hr * 255, full_range=True).std()) for _, hr in patches["defocused"]]
    assert sum(spread) / len(spread) > 15  # yet they are no empty walls


def test_energy_of_noise_is_known():
    noise = 8 / 255 * torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(0))
    assert probes.energy((0.5 + noise).expand(3, -1, -1)) == pytest.approx(8 * 0.946, rel=0.02)
    assert probes.energy(torch.full((3, 40, 40), 0.3)) == pytest.approx(0, abs=1e-6)


def test_added_energy_knows_more_from_less():
    _, hr = probes.probe_patches(2)["text"][0]
    assert probes.added_energy(hr, hr) == 0
    assert probes.added_energy(gaussian_blur(hr, 2.0), hr) < -5
    _, flat = probes.probe_patches(2)["flat"][0]
    pattern = 6 / 255 * (torch.arange(flat.shape[-1]) % 2 * 2 - 1)  # stripes of one pixel
    assert probes.added_energy(flat + pattern, flat) == pytest.approx(5, abs=1)


def test_measure_tells_an_inventing_network_from_an_honest_one():
    class Striped(Bicubic):
        def forward(self, x):
            out = super().forward(x)
            return out + 0.03 * (torch.arange(out.shape[-1]) % 2 * 2 - 1)

    honest, inventing = probes.measure(Bicubic(3)), probes.measure(Striped(3))
    assert tuple(honest) == probes.GROUPS
    assert honest["flat"]["energy"] < 0.2 and honest["defocused"]["energy"] < 0.2
    assert honest["text"]["energy"] < -10  # bicubic blurs it
    for group in ("flat", "defocused"):
        assert inventing[group]["energy"] > honest[group]["energy"] + 4
        assert inventing[group]["psnr_y"] < honest[group]["psnr_y"]


def test_a_folder_without_photos_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="96x96"):
        probes.probe_patches(4, tmp_path)
    with pytest.raises(ValueError, match="scale 0"):
        probes.probe_patches(0)


@pytest.mark.parametrize("scale", [2, 4])
def test_lattice_finds_a_pattern_on_the_grid_and_no_other(scale):
    torch.manual_seed(0)
    hr = 0.3 + 0.2 * torch.rand(3, 96, 128)
    pattern = torch.zeros(96, 128)
    pattern[::scale, ::scale] = 0.3
    other = torch.zeros(96, 128)
    other[::3, ::3] = 0.3
    assert probes.lattice(hr, hr, scale) == 0
    assert probes.lattice(hr + pattern, hr, scale) > 2
    assert abs(probes.lattice(hr + other, hr, scale)) < 0.5
    with pytest.raises(ValueError, match="96, 128"):
        probes.lattice(hr[:, 1:], hr, scale)
