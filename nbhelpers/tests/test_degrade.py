"""Low-resolution pictures: the protocol's resizer is MATLAB's, and every other kind of damage does what it says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from nbhelpers import degrade, runtime
from nbhelpers.degrade import crop_to_multiple, downscale, resize_bicubic, upscale_bicubic
from nbhelpers.images import load_image
from nbhelpers.layers import BicubicUpsample

from .conftest import needs_shared


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys(x: np.ndarray) -> np.ndarray:
    """Cubic convolution kernel of Keys (1981), a = -0.5."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def reference_axis(n_in: int, n_out: int) -> np.ndarray:
    """Resampling matrix (n_out, n_in): kernel widened when shrinking, taps beyond the edge read the edge pixel."""
    matrix, ratio = np.zeros((n_out, n_in)), n_out / n_in
    stretch = min(ratio, 1.0)
    for i in range(n_out):
        centre = (i + 0.5) / ratio - 0.5
        taps = np.arange(int(np.floor(centre - 2 / stretch)), int(np.ceil(centre + 2 / stretch)) + 1)
        weights = keys((centre - taps) * stretch)
        np.add.at(matrix[i], np.clip(taps, 0, n_in - 1), weights / weights.sum())
    return matrix


def reference(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = (torch.from_numpy(reference_axis(a, b)) for a, b in zip(x.shape[-2:], size, strict=True))
    return rows @ x @ columns.T


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_keys_cubic_with_replicated_border(scale):
    x = noise(3, 12 * scale, 7 * scale)
    small = resize_bicubic(x, (12, 7))
    assert torch.allclose(small, reference(x, (12, 7)), atol=1e-6)
    big = resize_bicubic(small, (12 * scale, 7 * scale))
    assert torch.allclose(big, reference(small, tuple(x.shape[-2:])), atol=1e-6)


def test_bicubic_of_another_ratio_agrees_inside():
    x = noise(3, 40, 54)
    ours, wanted = resize_bicubic(x, (27, 20)), reference(x, (27, 20))
    assert torch.allclose(ours[:, 4:-4, 4:-4], wanted[:, 4:-4, 4:-4], atol=1e-6)


@needs_shared
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_matlab_files_of_set5_are_met_within_two_grey_levels(scale):
    bench = runtime.shared() / "data" / "bench"
    spec = importlib.util.spec_from_file_location("matlab_imresize", bench / "matlab_imresize.py")
    matlab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matlab)
    for path in sorted((bench / "Set5" / "HR").glob("*.png")):
        hr = crop_to_multiple(load_image(path), scale)
        ours = downscale(hr, scale).mul(255).round()
        published = load_image(bench / "Set5" / "LR_bicubic" / f"X{scale}" / path.name).mul(255).round()
        assert (ours - published).abs().max() <= 2, path.name
        exact = matlab.imresize(hr.permute(1, 2, 0).double().numpy() * 255, 1 / scale)
        unrounded = resize_bicubic(hr.double(), tuple(ours.shape[-2:])).permute(1, 2, 0).numpy() * 255
        assert np.abs(unrounded - exact).max() < 1e-3, path.name


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (17, 13)])
def test_bicubic_layer_equals_the_function(scale, size):
    x = noise(2, 3, *size).float()
    assert torch.allclose(BicubicUpsample(scale)(x), upscale_bicubic(x, scale), atol=3e-6)


@pytest.mark.parametrize("method", degrade.DOWNSCALERS)
def test_downscalers_give_8_bit_levels_of_the_right_size(method):
    x = noise(2, 3, 24, 36).float()
    small = downscale(x, 4, method)
    assert small.shape == (2, 3, 6, 9) and small.min() >= 0 and small.max() <= 1
    assert torch.equal(small.mul(255).round() / 255, small)
    assert torch.equal(downscale(x[0], 4, method), small[0]), "one picture and a batch agree"
    assert abs(float(small.mean() - x.mean())) < 0.1
    flat = torch.full((3, 24, 36), 77 / 255)
    assert torch.equal(downscale(flat, 4, method), torch.full((3, 6, 9), 77 / 255))


def test_the_antialiased_downscalers_agree_and_the_others_do_not():
    x = noise(3, 96, 96).float()
    inner = (slice(None), slice(4, -4), slice(4, -4))
    ours = downscale(x, 4)[inner].mul(255)
    difference = {m: float((downscale(x, 4, m)[inner] * 255 - ours).abs().max()) for m in degrade.DOWNSCALERS}
    assert difference["torch_antialias"] <= 1 and difference["pillow"] <= 2
    assert difference["torch_no_antialias"] > 40
    assert difference["bilinear_antialias"] > 2 and difference["linear_light"] > 5


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"24x35.*does not divide by scale 4.*crop_to_multiple"):
        downscale(torch.rand(3, 24, 35), 4)
    with pytest.raises(ValueError, match=r"'lanczos' is unknown.*matlab"):
        downscale(torch.rand(3, 24, 36), 4, "lanczos")
    with pytest.raises(ValueError, match=r"2x9 pixels is smaller than the scale 3"):
        crop_to_multiple(torch.rand(3, 2, 9), 3)
    with pytest.raises(ValueError, match=r"\(24, 36\)"):
        resize_bicubic(torch.rand(24, 36), (6, 9))
    assert crop_to_multiple(torch.rand(3, 11, 9), 4).shape == (3, 8, 8)


def test_linear_light_round_trip_and_known_values():
    x = torch.linspace(0, 1, 256)
    assert torch.allclose(degrade.linear_to_srgb(degrade.srgb_to_linear(x)), x, atol=1e-5)
    assert float(degrade.srgb_to_linear(torch.tensor(0.5))) == pytest.approx(0.21404, abs=1e-4)
    # Half black, half white pixels give off half the light, which sRGB writes as 188 and not as 128.
    board = torch.tensor([0.0, 1.0]).repeat(32, 16)
    board = torch.stack([board, board.flip(1)], 1).reshape(1, 64, 32).expand(3, -1, -1)
    assert int(downscale(board, 4, "linear_light")[0, 8, 4] * 255) == 188
    assert int(downscale(board, 4)[0, 8, 4] * 255) in (127, 128)


def photo() -> torch.Tensor:
    return crop_to_multiple(load_image(sorted((runtime.PHOTOS / "val").glob("*.png"))[0]), 8)[:, :128, :128]


def test_jpeg_gets_worse_with_lower_quality():
    x = photo()
    errors = [float((degrade.jpeg(x, q) - x).square().mean()) for q in (99, 95, 90, 80, 70, 50, 10)]
    assert errors == sorted(errors) and errors[0] > 0 and errors[-1] > 10 * errors[0]
    assert degrade.jpeg(x[None], 50).shape == (1, *x.shape)
    assert torch.equal(degrade.jpeg(x[None], 50)[0], degrade.jpeg(x, 50))


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_jpeg_quality_outside_the_range(quality):
    with pytest.raises(ValueError, match=rf"JPEG quality {quality} is outside 1\.\.100"):
        degrade.jpeg(torch.rand(3, 16, 16), quality)


def test_random_jpeg_is_a_function_of_the_generator():
    x = photo().expand(12, -1, -1, -1)
    one, again, other = (degrade.random_jpeg(x, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    known = {q: degrade.jpeg(x[0], q) for q in degrade.JPEG_QUALITIES}
    drawn = {q for p in one for q, y in known.items() if torch.equal(p, y)}
    assert len(drawn) >= 3, "pictures of one batch get different qualities, all from the list"
    assert all(any(torch.equal(p, y) for y in known.values()) for p in one)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
def test_blur_spreads_a_point_by_sigma(sigma):
    point = torch.zeros(1, 61, 61)
    point[0, 30, 30] = 1
    spread = degrade.gaussian_blur(point, sigma)[0]
    offset = torch.arange(61.0) - 30
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(0) * offset**2).sum()) == pytest.approx(sigma**2, rel=0.05)
    assert torch.equal(degrade.gaussian_blur(point, 0), point)


def test_blur_of_a_picture_smaller_than_its_kernel():
    assert degrade.gaussian_blur(torch.full((3, 5, 4), 0.5), 3.0).allclose(torch.tensor(0.5))


def test_noise_has_the_stated_deviation_and_a_seed():
    grey = torch.full((3, 200, 200), 0.5)
    one, again, other = (degrade.add_noise(grey, 15, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float((one - grey).std() * 255) == pytest.approx(15, rel=0.02)
    assert abs(float((one - grey).mean() * 255)) < 0.3
    dark = degrade.add_noise(torch.zeros(3, 50, 50), 30)
    assert dark.min() == 0 and dark.max() <= 1
