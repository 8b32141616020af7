"""Figures: intervals beside each other, maps over pictures, small plots."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from nbhelpers import show

ROWS = {"reference": (0.0, 0.0), "other": (0.3, 0.1), "one seed": (-0.2, math.nan)}


def test_panels_of_intervals_share_their_rows_and_keep_their_scales():
    fig = show.interval_panels(
        {"dB": ROWS, "levels": {k: (10 * m, 10 * h) for k, (m, h) in ROWS.items()}}, "t", "other"
    )
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == list(ROWS)
    assert left.get_ylim() == right.get_ylim() and left.yaxis_inverted()
    assert [a.get_xlabel() for a in fig.axes] == ["dB", "levels"]
    lines = [a.lines for a in fig.axes]  # the dashed line of the reference is the last
    assert [line[-1].get_xdata()[0] for line in lines] == [0.3, pytest.approx(3.0)]
    assert show.intervals(ROWS, "dB").axes[0].get_xlabel() == "dB"


def test_maps_share_a_symmetric_scale_and_cover_their_picture():
    pictures = torch.rand(2, 3, 16, 24)
    maps = (torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.5, 0.0]]), torch.full((2, 3), 5.0))
    fig = show.heat_maps({"a": (pictures[0], maps[0]), "b": (pictures[1], maps[1])}, "logit")
    for axis in fig.axes[:2]:
        photo, heat = axis.images
        assert heat.get_clim() == (-5.0, 5.0)
        assert photo.get_extent() == heat.get_extent() == [0, 24, 16, 0]


def test_small_png_keeps_the_colours_of_the_lines():
    """Few colours must not turn one network's line into another's."""
    rows = [{"step": i, "loss": 1 / (1 + i)} for i in range(20)]
    fig = show.curves({str(k): [r | {"loss": r["loss"] + k} for r in rows] for k in range(7)}, ["loss", "loss"])
    image = Image.open(io.BytesIO(show.small_png(fig)))
    assert image.mode == "P" and len(image.getcolors()) <= 32
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3) / 255
    for colour in show.COLOURS[:7]:
        assert np.abs(pixels - to_rgb(colour)).max(1).min() < 0.12, colour


def test_only_figures_with_photos_are_stored_as_jpeg():
    assert show._has_photos(show.side_by_side({"a": torch.rand(3, 8, 8)}))
    assert not show._has_photos(show.intervals(ROWS, "dB"))
