"""Figures: intervals beside each other, maps over pictures, small plots."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from nbhelpers import cost_figures, show

ROWS = {"reference": (0.0, 0.0), "other": (0.3, 0.1), "one seed": (-0.2, math.nan)}


def test_panels_of_intervals_share_their_rows_and_keep_their_scales():
    fig = show.interval_panels(
        {"dB": ROWS, "levels": {k: (10 * m, 10 * h) for k, (m, h) in ROWS.items()}}, "t", "other"
    )
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == list(ROWS)
    assert left.get_ylim() == right.get_ylim() == (2.5, -0.5)  # from the top down, no row on the frame
    assert [a.get_xlabel() for a in fig.axes] == ["dB", "levels"]
    lines = [a.lines for a in fig.axes]  # the dashed line of the reference is the last
    assert [line[-1].get_xdata()[0] for line in lines] == [0.3, pytest.approx(3.0)]
    assert show.intervals(ROWS, "dB").axes[0].get_xlabel() == "dB"


def test_long_names_leave_room_between_the_numbers_below():
    """The numbers must not run together where names take half of the figure's width."""
    rows = {f"lean, local attention, half the blocks ({i} K, 152 MMAC)": (i / 10 - 0.4, 0.02) for i in range(8)}
    fig = show.intervals(rows, "gain in PSNR-Y (dB), paired, ± 95 %")
    fig.draw_without_rendering()
    low, high = fig.axes[0].get_xlim()
    shown = [t for t in fig.axes[0].get_xticklabels() if low <= t.get_position()[0] <= high]
    boxes = [label.get_window_extent() for label in shown]
    assert len(boxes) >= 3
    assert all(b.x0 - a.x1 > 0.5 * fig.dpi / 72 * shown[0].get_size() for a, b in itertools.pairwise(boxes))


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


def test_bars_of_all_parts_and_shares():
    shares = {"flops_share": 0.75, "bytes_share": 0.5, "ms_share": 0.004}
    rest = {key: 1 - value for key, value in shares.items()}
    rows = [{"part": "head", **shares}, {"part": "blocks", **rest}, {"part": "total", **dict.fromkeys(shares, 1.0)}]
    fig = cost_figures.module_bars({"a": rows, "b": rows[1:]}, title="t")
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["head", "blocks"] and left.yaxis_inverted()
    assert [[round(bar.get_width(), 3) for bar in bars] for bars in left.containers] == [
        [75, 25],
        [50, 50],
        [0.4, 99.6],
    ]
    assert [t.get_text() for t in right.get_yticklabels()] == ["blocks"] and left.get_ylim() == right.get_ylim()
    assert "< 1 %" in [t.get_text() for t in left.texts], "a part too small for its bar is not nothing"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["FLOPs", "bytes moved", "milliseconds"]
    one = cost_figures.module_bars({"a": rows}, {"ms_share": "time"})
    assert len(one.axes) == 1 and len(one.axes[0].containers) == 1


@pytest.mark.parametrize("spread", [0.0, 0.02, 2.0])
def test_names_in_the_roofline_cover_neither_each_other_nor_a_point(spread):
    points = {f"network {i}": (20 * (1 + spread * i), 100 / (1 + spread * (i % 3))) for i in range(8)}
    peaks = {"fp32": 257.0, "bf16": 1800.0, "bandwidth": 18.0}
    fig = cost_figures.roofline(points | {"shuffle": (0.0, 5.0)}, peaks, "t")
    fig.draw_without_rendering()
    (axis,) = fig.axes
    names = [t for t in axis.texts if t.get_text().startswith("network")]
    assert len(names) == 8 and not any("shuffle" in t.get_text() for t in axis.texts), "no arithmetic, no point"
    boxes = [Text.get_window_extent(t) for t in names]  # of an annotation it would be with its line
    assert all(not a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    marks = axis.transData.transform(list(points.values()))
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert all(axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 for box in boxes)
    roofs = [line.get_xydata() for line in axis.lines if len(line.get_xdata()) == 3]
    for (_, ridge, end), top in zip(roofs, (257.0, 1800.0), strict=True):
        assert tuple(ridge) == pytest.approx((top / 18, top)) and end[1] == top, "memory up to the ridge, then level"


def test_the_window_is_where_two_pictures_differ_most():
    original = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    a, b = original + 0.01, original.clone()
    a[:, 40:64, 64:88] += 0.5
    at = show.window(a, b, original, side=24)
    assert at == show.window(b, a, original, side=24) == (slice(None), slice(40, 64), slice(64, 88))
    with pytest.raises(ValueError, match="a window of 96 pixels does not fit into 90x120"):
        show.window(a, b, original, side=96)


def test_confusion_shows_all_numbers_and_scales_by_the_mistakes():
    counts = torch.tensor([[90, 10], [4, 96]])
    change = torch.tensor([[-5.0, 5.0], [0.2, -0.2]])
    fig = show.confusion({"counts": counts, "change": change}, ["cat", "dog"])
    left, right = fig.axes
    assert [t.get_text() for t in left.texts] == ["90", "10", "4", "96"]
    assert [t.get_text() for t in right.texts] == ["-5", "+5", "0", "0"]
    assert left.collections[0].get_clim() == (0, 10) and right.collections[0].get_clim() == (-5, 5)
    assert left.collections[0].get_array().mask.tolist() == [[True, False], [False, True]]
    assert [t.get_text() for t in left.get_yticklabels()] == ["cat", "dog"]
    assert not left.images  # a plot, stored as PNG
    assert show.confusion({"all right": 100 * torch.eye(2)}, ["cat", "dog"]).axes[0].collections[0].get_clim() == (0, 1)
