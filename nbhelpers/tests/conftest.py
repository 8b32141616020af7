"""Fixtures shared by the package's tests."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from nbhelpers import checkpoints, models, runtime
from nbhelpers.images import save_image

needs_shared = pytest.mark.skipif(
    runtime.shared() is None, reason="needs the optional pack ../shared (Set5, LPIPS weights), which is not here"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests are small; more threads than cores left would only make them wait."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """Processes started from a script in the background inherit that Ctrl-C is ignored; tests send it to theirs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty runs folder and checkpoint folder for this test."""
    monkeypatch.setattr(runtime, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runtime, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path


@pytest.fixture
def small_photos(runs, monkeypatch):
    """Two smooth random pictures of 200x208 in place of the bundled training photos, and one for validation."""
    generator = torch.Generator().manual_seed(0)
    for name in ("train/a", "train/b", "val/c"):
        small = torch.rand(1, 3, 14, 15, generator=generator)
        picture = nn.functional.interpolate(small, size=(200, 208), mode="bicubic")[0].clamp(0, 1)
        save_image(picture, runs / "photos" / f"{name}.png")
    monkeypatch.setattr(runtime, "PHOTOS", runs / "photos")
    return runs


def tiny_network(scale: int) -> nn.Module:
    """An untrained ESPCN, always the same for a scale."""
    torch.manual_seed(scale)
    return models.build("ESPCN", scale=scale, channels=8).eval()


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """Two untrained networks in place of the committed ones."""
    for scale in (2, 4):
        arguments = {"scale": scale, "channels": 8}
        checkpoints.save(f"tiny_x{scale}", tiny_network(scale), "ESPCN", arguments, {}, [], folder=tmp_path)
    monkeypatch.setattr(runtime, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(runtime, "RUNS", tmp_path / "runs")
    checkpoints.cached.cache_clear()
    yield ["tiny_x2", "tiny_x4"]
    checkpoints.cached.cache_clear()
