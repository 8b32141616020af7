"""Metrics against closed forms, scikit-image, and the bicubic numbers that the literature prints for Set5."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nbhelpers import metrics, runtime
from nbhelpers.degrade import crop_to_multiple, upscale_bicubic
from nbhelpers.images import load_image, to_tensor

from .conftest import needs_shared


def pair(h: int = 48, w: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth picture and a noisy copy, both on 8-bit levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    base = np.stack([x * 4, y * 5, (x + y) * 2], -1) % 256
    noisy = np.clip(base + rng.normal(0, 12, base.shape), 0, 255)
    return to_tensor(noisy.astype(np.uint8)), to_tensor(base.astype(np.uint8))


def luma(x: torch.Tensor) -> np.ndarray:
    rgb = x.double().mul(255).round().permute(1, 2, 0).numpy()
    return 16 + rgb @ np.array([65.481, 128.553, 24.966]) / 255


def inside(a: np.ndarray, border: int) -> np.ndarray:
    return a[border:-border, border:-border]


def test_psnr_closed_form():
    hr = torch.full((3, 20, 20), 100 / 255)
    sr = hr + 5 / 255
    assert metrics.psnr_rgb(sr, hr, 2) == pytest.approx(10 * math.log10(255**2 / 25))
    step = 5 * (65.481 + 128.553 + 24.966) / 255
    assert metrics.psnr_y(sr, hr, 2) == pytest.approx(10 * math.log10(255**2 / step**2))
    assert metrics.psnr_y_full(sr, hr, 2) == pytest.approx(10 * math.log10(255**2 / 25))


@pytest.mark.parametrize("border", [2, 3, 4])
def test_psnr_against_scikit_image(border):
    sr, hr = pair()
    ya, yb = inside(luma(hr), border), inside(luma(sr), border)
    assert metrics.psnr_y(sr, hr, border) == pytest.approx(peak_signal_noise_ratio(ya, yb, data_range=255), abs=1e-9)
    rgb = [inside(x.mul(255).round().permute(1, 2, 0).double().numpy(), border) for x in (hr, sr)]
    assert metrics.psnr_rgb(sr, hr, border) == pytest.approx(peak_signal_noise_ratio(*rgb, data_range=255), abs=1e-9)


@pytest.mark.parametrize("border", [2, 4])
def test_ssim_against_scikit_image(border):
    sr, hr = pair()
    a, b = inside(luma(hr), border), inside(luma(sr), border)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = structural_similarity(a, b, **options)  # scikit-image averages the valid region too
    assert metrics.ssim_y(sr, hr, border) == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected < 0.95


def test_ssim_agrees_with_torchmetrics_inside_the_window():
    """Another implementation: a two-dimensional convolution; its mirrored border of half a window is cut."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    sr, hr = pair()
    a, b = (torch.from_numpy(np.ascontiguousarray(luma(x)))[None, None] for x in (sr, hr))
    _, full = structural_similarity_index_measure(a, b, sigma=1.5, data_range=255.0, return_full_image=True)
    assert metrics.ssim_y(sr, hr, 0) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-6)


def test_the_border_does_not_count():
    sr, hr = pair()
    spoilt = sr.clone()
    spoilt[:, :3], spoilt[:, -3:], spoilt[:, :, :3], spoilt[:, :, -3:] = 0, 1, 1, 0
    for name in ("psnr_y", "psnr_rgb", "psnr_y_full", "ssim_y"):
        measure = getattr(metrics, name)
        assert measure(spoilt, hr, 3) == measure(sr, hr, 3), name
        assert measure(spoilt, hr, 2) < measure(sr, hr, 2), name


def test_values_are_clamped_and_rounded_and_never_wrap():
    hr = torch.ones(3, 16, 16)
    assert metrics.psnr_rgb(torch.full_like(hr, 1.7), hr, 1) == math.inf
    assert metrics.psnr_rgb(hr - 0.4 / 255, hr, 1) == math.inf
    # 255 against 1 level: as uint8 the difference would wrap to 2 and look excellent.
    assert metrics.psnr_rgb(hr, torch.full_like(hr, 1 / 255), 1) == pytest.approx(20 * math.log10(255 / 254))
    with pytest.raises(ValueError, match=r"float pictures in \[0, 1\].*uint8"):
        metrics.psnr_y(hr.byte(), hr.byte(), 1)
    with pytest.raises(ValueError, match="uint8"):
        metrics.compare(hr, hr.byte(), 1)


def test_full_range_luma_reads_lower():
    sr, hr = pair()
    gap = metrics.psnr_y(sr, hr, 2) - metrics.psnr_y_full(sr, hr, 2)
    assert gap == pytest.approx(20 * math.log10(255 / 219), abs=0.05)  # 1.32 dB: 219 levels instead of 255


def test_shape_errors():
    a = torch.rand(3, 20, 20)
    with pytest.raises(ValueError, match=r"\(3, 20, 20\).*\(3, 20, 21\)"):
        metrics.psnr_y(a, torch.rand(3, 20, 21), 2)
    with pytest.raises(ValueError, match="same shape"):
        metrics.compare(a[None], a[None], 2)
    with pytest.raises(ValueError, match=r"8x20 pixels is all border \(4"):
        metrics.psnr_rgb(a[:, :8], a[:, :8], 4)
    with pytest.raises(ValueError, match=r"at least 11x11.*\(16, 10\)"):
        metrics.ssim_y(a[..., :14], a[..., :14], 2)


def test_equal_pictures():
    x = torch.rand(3, 24, 24)
    row = metrics.compare(x, x, 2, lpips=False)
    assert row["psnr_y"] == row["psnr_rgb"] == row["psnr_y_full"] == math.inf
    assert row["ssim_y"] == pytest.approx(1, abs=1e-9) and row["lpips"] is None


def test_compare_has_every_metric_and_agrees_with_each():
    sr, hr = pair()
    row = metrics.compare(sr, hr, 3, lpips=False)
    assert list(row) == list(metrics.NAMES)
    for name in ("psnr_y", "ssim_y", "psnr_rgb", "psnr_y_full"):
        assert row[name] == getattr(metrics, name)(sr, hr, 3)
    assert metrics.compare(sr[:, :14, :14], hr[:, :14, :14], 3, lpips=False)["ssim_y"] is None, "too small for SSIM"


def test_mean_is_of_decibels_and_none_where_one_is_missing():
    rows = [{"psnr_y": 30.0, "lpips": 0.1}, {"psnr_y": 40.0, "lpips": None}]
    assert metrics.mean(rows) == {"psnr_y": 35.0, "lpips": None}
    assert metrics.mean([]) == {}


def test_protocol_names_what_decides_the_number():
    text = metrics.protocol(3)
    for word in ("x3", "MATLAB", "16-235", "border 3 px", "8 bits", "sigma 1.5"):
        assert word in text


def test_lpips_without_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    x = torch.rand(3, 40, 40)
    assert not metrics.lpips_available() and metrics.lpips_squeeze(x, x) is None
    assert metrics.compare(x, x, 2)["lpips"] is None
    assert "not available: weights not downloaded" in metrics.LPIPS_MISSING
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded silently"


@needs_shared
def test_lpips_of_equal_and_different_pictures():
    sr, hr = pair()
    assert metrics.lpips_squeeze(hr, hr) == pytest.approx(0, abs=1e-6)
    assert metrics.lpips_squeeze(sr, hr) > 0.02
    assert metrics.lpips_squeeze(sr[:, :20], hr[:, :20]) is None, "too small for SqueezeNet"


@needs_shared
@pytest.mark.parametrize(("scale", "psnr", "lpips"), [(2, 33.67, 0.103), (3, 30.40, 0.193), (4, 28.43, 0.286)])
def test_bicubic_on_set5_gives_the_published_numbers(scale, psnr, lpips):
    folder = runtime.shared() / "data" / "bench" / "Set5"
    rows = []
    for path in sorted((folder / "HR").glob("*.png")):
        hr = crop_to_multiple(load_image(path), scale)
        lr = load_image(folder / "LR_bicubic" / f"X{scale}" / path.name)
        rows.append(metrics.compare(upscale_bicubic(lr, scale), hr, scale))
    mean = metrics.mean(rows)
    assert mean["psnr_y"] == pytest.approx(psnr, abs=0.01)
    assert mean["lpips"] == pytest.approx(lpips, abs=0.002)
    if scale == 4:
        assert mean["ssim_y"] == pytest.approx(0.8113, abs=0.0002)
