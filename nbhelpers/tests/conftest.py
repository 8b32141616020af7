"""Fixtures shared by the package's tests."""

from __future__ import annotations

import signal

import pytest
import torch

from nbhelpers import runtime

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
