"""Notebook 02: its own feature loss is the package's, also on machines without VGG16's weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import make_layers

from nbhelpers import degrade, runtime
from nbhelpers.losses import PerceptualLoss

from . import test_features

home, vgg, pair = test_features.home, test_features.vgg, test_features.pair  # fixtures: random weights, no pack


def mechanism() -> str:
    """Source of the notebook's cell with the tag ``mechanism``."""
    notebook = json.loads((runtime.ROOT / "notebooks" / "02_vgg_loss.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in notebook["cells"] if "mechanism" in c["metadata"].get("tags", ())]
    return "".join(cell["source"])


def test_the_notebooks_loss_is_the_packages(vgg, pair):
    space = {"nn": nn, "F": F, "degrade": degrade, "make_layers": make_layers, "WIDTHS": [64, 64, "M", 128, 128]}
    exec(mechanism(), space)
    packaged = PerceptualLoss(depth="conv2_2", half_size=True)
    mine, (sr, hr) = space["VGGLoss"](packaged.network), pair
    assert float(mine(sr, hr)) == pytest.approx(float(packaged(sr, hr)), rel=1e-4)
    gradients = []
    for loss in (mine, packaged):
        moved = sr.clone().requires_grad_()
        loss(moved, hr).backward()
        gradients.append(moved.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-7) and float(gradients[0].abs().max()) > 0
    assert any(bool((f < 0).any()) for f in mine.features(sr)), "features before the activation have negative values"
