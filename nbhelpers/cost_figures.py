"""Figures of what networks cost: shares of their parts, the machine's roofline, points with their names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from .show import COLOURS, MARKERS, new_figure


def module_bars(
    networks: Mapping[str, Sequence[Mapping[str, object]]],
    shares: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Figure:
    """Where a network's arithmetic sits and where its time: bars for each part, one panel per network.

    ``networks`` = {name: rows of :func:`nbhelpers.profiling.module_rows`}; ``shares`` = {key of a row: legend}, by
    default those of FLOPs, bytes and milliseconds. The row "total" is left out.
    """
    shares = shares or {"flops_share": "FLOPs", "bytes_share": "bytes moved", "ms_share": "milliseconds"}
    panels = {name: [row for row in rows if row["part"] != "total"] for name, rows in networks.items()}
    most, n, thick = max(map(len, panels.values())), len(panels), 0.8 / len(shares)
    fig, axes = new_figure(ncols=n, squeeze=False, figsize=(0.6 + 4.2 * n, 1.3 + 0.22 * most * len(shares)))
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=True):
        for i, (key, label) in enumerate(shares.items()):
            values = [100 * row[key] for row in rows]
            places = [k + (i - (len(shares) - 1) / 2) * thick for k in range(len(rows))]
            bars = axis.barh(places, values, thick, color=COLOURS[i], label=label)
            axis.bar_label(
                bars, [f"{v:.0f} %" if v >= 1 else "< 1 %" if v else "0" for v in values], padding=2, fontsize=7
            )
        axis.set_yticks(range(len(rows)), [row["part"] for row in rows])
        axis.set_ylim(most - 0.5, -0.5)  # the first part on top, bars of all panels equally thick
        axis.set_xlim(0, 115)
        axis.set_xticks(range(0, 101, 25))
        axis.set_xlabel("share of the network (%)")
        axis.set_title(name, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shares), fontsize=8)
    if title:
        fig.suptitle(title, fontsize=12)
    return fig


def roofline(points: Mapping[str, tuple[float, float]], peaks: Mapping[str, float], title: str | None = None) -> Figure:
    """What a machine could do and what it does: {name: (FLOPs per byte, GFLOP/s reached)} below its roofs.

    ``peaks`` come from :func:`nbhelpers.profiling.machine_peaks`: GFLOP/s by precision, and "bandwidth" in GB/s, the
    slanted roof. Points without arithmetic are left out. After Williams et al. 2009.
    """
    points = {name: (x, y) for name, (x, y) in points.items() if x > 0 and y > 0}
    bandwidth, tops = peaks["bandwidth"], {name: top for name, top in peaks.items() if name != "bandwidth"}
    xs, ys = ([place[i] for place in points.values()] or [1.0] for i in range(2))
    left, right = min(xs) / 3, 6 * max(*xs, *(top / bandwidth for top in tops.values()))
    bottom, above = min(*ys, left * bandwidth) / 2, 3 * max(*ys, *tops.values())
    fig, axis = new_figure(figsize=(7.6, 4.4))
    grey = {"fontsize": 8, "color": "0.35"}
    for name, top in tops.items():
        axis.plot([left, top / bandwidth, right], [left * bandwidth, top, top], color="0.35", linewidth=1.3, zorder=1)
        axis.annotate(
            f"{name}: {top:,.0f} GFLOP/s", (right, top), (-4, 4), textcoords="offset points", ha="right", **grey
        )
    along = {"rotation": math.degrees(math.atan(1.3 * bandwidth)), "transform_rotates_text": True}
    axis.text(
        left * 1.15,
        left * 1.15 * 1.3 * bandwidth,
        f"memory: {bandwidth:,.1f} GB/s",
        rotation_mode="anchor",
        **along,
        **grey,
    )
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, above))
    axis.set(xlabel="arithmetic intensity (FLOP per byte moved)", ylabel="GFLOP/s")
    axis.grid(alpha=0.3)
    for i, (x, y) in enumerate(points.values()):
        axis.plot(x, y, color=COLOURS[i % 8], marker=MARKERS[(i + i // 8) % 8], markersize=7, linestyle="none")
    if title:
        axis.set_title(title, fontsize=11)
    label_points(fig, axis, points)
    return fig


def label_points(fig: Figure, axis: object, points: Mapping[str, tuple[float, float]], size: float = 8) -> None:
    """Write each point's name as near as it covers neither another name nor a point; a thin line leads to the point."""
    fig.draw_without_rendering()  # the layout decides where the points lie
    point = fig.dpi / 72  # in pixels
    marks = [axis.transData.transform(place) for place in points.values()]
    taken = [Bbox.from_bounds(x - 5 * point, y - 5 * point, 10 * point, 10 * point) for x, y in marks]
    taken += [text.get_window_extent() for text in axis.texts]
    angles = [math.radians(turn) for turn in (0, 25, -25, 50, -50, 180, 155, 205, 130, 230, 90, 270)]
    for name, place in points.items():
        text = axis.annotate(name, place, (0, 0), textcoords="offset points", va="center", fontsize=size)
        box = text.get_window_extent()
        for far, angle in itertools.product(range(9, 150, 8), angles):
            dx, dy = far * math.cos(angle), far * math.sin(angle)
            moved = box.translated(point * dx - (box.width if dx < 0 else 0), point * dy)
            seen = axis.bbox.padded(-3 * point)  # text is a little wider in another resolution
            inside = seen.x0 < moved.x0 and moved.x1 < seen.x1 and seen.y0 < moved.y0 < seen.y1
            if inside and not moved.count_overlaps(taken):
                break
        taken.append(moved)
        text.remove()
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.5"} if far > 9 else None
        side = {"ha": "right" if dx < 0 else "left", "va": "center", "fontsize": size}
        side["path_effects"] = [withStroke(linewidth=3, foreground="white")]  # readable where it crosses a line
        axis.annotate(name, place, (dx, dy), textcoords="offset points", arrowprops=line, **side)
