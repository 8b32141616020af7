"""Figures for the notebooks; every function returns the matplotlib Figure and draws nothing by itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .images import to_uint8

# Okabe and Ito's palette: distinguishable with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def use_jpeg(quality: int = 80, dpi: int = 72) -> None:
    """Store this notebook's figures small: those with photos as JPEG, plots as PNG with few colours.

    Photos as PNG would make a notebook several megabytes large; a plot is three times as large as JPEG, and blurred.
    """
    from IPython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    plt.rcParams["figure.dpi"] = dpi
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality, "optimize": True})
    formatters = get_ipython().display_formatter.formatters
    as_jpeg = formatters["image/jpeg"].lookup_by_type(Figure)
    formatters["image/jpeg"].for_type(Figure, lambda fig: as_jpeg(fig) if _has_photos(fig) else None)
    formatters["image/png"].for_type(Figure, lambda fig: None if _has_photos(fig) else small_png(fig))


def _has_photos(fig: Figure) -> bool:
    return any(axis.images for axis in fig.axes)


def small_png(fig: Figure) -> bytes:
    """A plot as PNG with 32 colours, cut to what is drawn."""
    whole, small = io.BytesIO(), io.BytesIO()
    fig.savefig(whole, format="png", bbox_inches="tight")
    palette = Image.open(whole).convert("RGB").quantize(32, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(small, "PNG", optimize=True)
    return small.getvalue()


def new_figure(**options: object) -> tuple[Figure, object]:
    """``plt.subplots`` with this workbook's layout, not shown by pyplot itself."""
    fig, axes = plt.subplots(layout="constrained", **options)
    plt.close(fig)  # the cell shows the returned figure; pyplot must not show it a second time
    return fig, axes


def _zoomed(picture: Tensor, crop: tuple[int, int, int, int] | None) -> np.ndarray:
    array = to_uint8(picture)
    if crop is None:
        return array
    top, left, height, width = crop
    return array[top : top + height, left : left + width]


def side_by_side(
    pictures: Mapping[str, Tensor],
    crop: tuple[int, int, int, int] | None = None,
    title: str | None = None,
    context: Tensor | None = None,
    columns: int | None = None,
    height: float = 3.2,
) -> Figure:
    """Pictures (3, h, w) of one size next to each other, pixels shown as squares.

    ``crop`` = (top, left, height, width) zooms all of them into the same place; ``context`` is shown first, whole,
    with that place framed. Keys become the titles.
    """
    n = len(pictures) + (context is not None)
    columns = min(n, columns or n)
    rows = -(-n // columns)
    fig, axes = new_figure(nrows=rows, ncols=columns, figsize=(height * columns, (height + 0.35) * rows), squeeze=False)
    cells = iter(axes.flat)
    if context is not None:
        axis = next(cells)
        axis.imshow(to_uint8(context))
        axis.set_title("whole picture", fontsize=10)
        if crop:
            frame = Rectangle((crop[1], crop[0]), crop[3], crop[2], fill=False, edgecolor=COLOURS[4], linewidth=2)
            axis.add_patch(frame)
    for axis, (label, picture) in zip(cells, pictures.items(), strict=False):
        axis.imshow(_zoomed(picture, crop), interpolation="nearest")
        axis.set_title(label, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    if title:
        fig.suptitle(title, fontsize=12)
    return fig


def curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    y: str | Sequence[str],
    x: str = "step",
    labels: Mapping[str, str] | None = None,
    log: Sequence[str] = (),
    title: str | None = None,
    width: float = 4.6,
) -> Figure:
    """Training histories as lines: one panel per key in ``y``, one line per network; ``log`` lists log-scaled keys.

    ``width`` of a panel in inches.
    """
    keys = [y] if isinstance(y, str) else list(y)
    labels = labels or {}
    fig, axes = new_figure(ncols=len(keys), figsize=(width * len(keys), 3.2), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=True):
        for i, (name, rows) in enumerate(histories.items()):
            xs, ys = [r[x] for r in rows], [r[key] for r in rows]
            axis.plot(xs, ys, color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=3, linewidth=1.4, label=name)
        axis.set_xlabel(labels.get(x, x))
        axis.set_ylabel(labels.get(key, key))
        if key in log:
            axis.set_yscale("log")
        if not isinstance(xs[0], str):
            whole = all(float(v).is_integer() for v in xs)
            axis.locator_params(axis="x", nbins=6, integer=whole)  # numbers of five digits do not touch
        axis.grid(alpha=0.3)
    if len(histories) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if len(histories) > 6 else {}  # covers no line
        axes.flat[-1].legend(fontsize=8, **beside)
    if title:
        fig.suptitle(title, fontsize=12)
    return fig


def intervals(
    rows: Mapping[str, tuple[float, float]], xlabel: str, title: str | None = None, reference: str | None = None
) -> Figure:
    """Named values with their 95 % intervals, {name: (mean, half-width)}; ``reference`` draws a line at that row."""
    return interval_panels({xlabel: rows}, title, reference)


def interval_panels(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], title: str | None = None, reference: str | None = None
) -> Figure:
    """:func:`intervals` of several quantities beside each other, {x label: rows}; all have the same rows."""
    n, names = len(panels), list(next(iter(panels.values())))
    rows, ticks = len(names), 9 if len(panels) == 1 else 4
    if max(map(len, names)) > 35:  # long names leave little room for the axis
        ticks = min(ticks, 5)
    fig, axes = new_figure(
        ncols=n, sharey=True, squeeze=False, figsize=(6.4 if n == 1 else 1.9 + 2.6 * n, 0.42 * rows + 1.1)
    )
    for axis, (xlabel, values) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, (value, half)) in enumerate(values.items()):
            colour = COLOURS[1] if name == reference else COLOURS[0]
            axis.errorbar(value, i, xerr=half, fmt=MARKERS[0], color=colour, capsize=4, markersize=5)
        if reference:
            axis.axvline(values[reference][0], color=COLOURS[1], linewidth=1, linestyle="--")
        axis.set_xlabel(xlabel)
        axis.locator_params(axis="x", nbins=ticks)
        axis.grid(axis="x", alpha=0.3)
    first = axes.flat[0]
    first.set_yticks(range(rows), names)
    first.set_ylim(rows - 0.5, -0.5)  # the first row on top, none on the frame
    if title and n == 1:
        first.set_title(title, fontsize=11)
    elif title:
        fig.suptitle(title, fontsize=12)
    return fig


def heat_maps(layers: Mapping[str, tuple[Tensor, Tensor]], label: str, height: float = 3.2) -> Figure:
    """Maps over pictures, next to each other: {title: (picture "3 h w" in [0, 1], map of any "h w")}.

    All maps share one colour scale, named ``label``: with 0 in its middle, or from 0 up where nothing is negative. The
    picture shows through in grey.
    """
    fig, axes = new_figure(ncols=len(layers), figsize=(height * len(layers) + 0.6, height + 0.2), squeeze=False)
    most = max(float(values.abs().max()) for _, values in layers.values())
    signed = any(float(values.min()) < 0 for _, values in layers.values())
    scale = {"cmap": "PuOr", "vmin": -most} if signed else {"cmap": "Oranges", "vmin": 0}
    for axis, (title, (picture, values)) in zip(axes.flat, layers.items(), strict=True):
        extent = (0, picture.shape[-1], picture.shape[-2], 0)  # a map may be coarser than its picture
        axis.imshow(to_uint8(picture).mean(-1), cmap="gray", extent=extent)
        drawn = axis.imshow(values, **scale, vmax=most, alpha=0.65, extent=extent)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    fig.colorbar(drawn, ax=axes, label=label, fraction=0.02, pad=0.01)
    return fig


def feature_maps(maps: Tensor, first: int = 0, most: int = 12, columns: int = 6) -> Figure:
    """Channels ``first`` … of a layer's output "c h w" on one colour scale; one number per channel ("c 1 1") as bars.

    Blue is below zero, red above; factors between 0 and 1 go from black to yellow. The scale leaves out the one value
    in a thousand that is largest, or a few outliers would turn everything else grey.
    """
    if maps.shape[-2:] == (1, 1):
        fig, axis = new_figure(figsize=(7.2, 2.6))
        axis.bar(range(len(maps)), maps.flatten().tolist(), color=COLOURS[0])
        axis.set(xlabel="channel", ylabel="value", xlim=(-1, len(maps)))
        axis.grid(axis="y", alpha=0.3)
        return fig
    chosen = range(first, min(first + most, len(maps)))
    rows = -(-len(chosen) // columns)
    fig, axes = new_figure(nrows=rows, ncols=columns, squeeze=False, figsize=(1.5 * columns + 0.8, 1.7 * rows))
    factors = float(maps.min()) >= 0 and float(maps.max()) <= 1
    top = 1.0 if factors else float(maps.abs().flatten().sort().values[int(0.999 * (maps.numel() - 1))]) or 1.0
    style = {"cmap": "inferno", "vmin": 0} if factors else {"cmap": "RdBu_r", "vmin": -top}
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, i in zip(axes.flat, chosen, strict=False):
        drawn = axis.imshow(maps[i].numpy(), vmax=top, interpolation="nearest", **style)
        axis.set_title(str(i), fontsize=8)
    fig.colorbar(drawn, ax=axes, shrink=0.9)
    return fig


def kernel_matrices(kernels: Mapping[str, Tensor], title: str | None = None) -> Figure:
    """Kernels "c_out c_in k k" as matrices of c_out rows and c_in·k·k columns, on one colour scale, with what each
    takes of every input channel below: the root of the sum of its squares. Keys become the titles; zeros are white.
    """
    top = max(float(kernel.abs().max()) for kernel in kernels.values()) or 1.0
    heights = [2, 1] * len(kernels)
    fig, axes = new_figure(nrows=len(heights), figsize=(7.6, 0.55 * sum(heights) + 0.4), height_ratios=heights)
    for (name, kernel), matrix, bars in zip(kernels.items(), axes[::2], axes[1::2], strict=True):
        columns = kernel[0].numel()
        matrix.imshow(
            kernel.flatten(1), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest",
            extent=(0, columns, len(kernel), 0),
        )  # fmt: skip
        matrix.set_title(name, fontsize=9)
        matrix.set_xticks(range(0, columns + 1, max(1, len(kernel[0]) // 16) * kernel[0, 0].numel()), [])
        matrix.set_yticks([])
        channels = kernel.square().sum((0, 2, 3)).sqrt()
        if len(channels) > 100:  # gaps of less than a pixel would come and go
            bars.stairs(channels.tolist(), fill=True, color=COLOURS[0])
        else:
            bars.bar([i + 0.5 for i in range(len(channels))], channels.tolist(), width=0.9, color=COLOURS[0])
        bars.set(xlim=(0, len(channels)), ylim=(0, None))
        bars.tick_params(labelsize=7)
    axes[-1].set_xlabel("input channel (each is a group of neighbouring columns)", fontsize=8)
    if title:
        fig.suptitle(title, fontsize=11)
    return fig


def confusion(tables: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Which class is taken for which: tables "class answer" next to each other, {title: numbers}, with their numbers.

    Colours show the mistakes alone: the diagonal, which holds the right answers, is grey and does not set the scale.
    Tables with negative numbers (differences) have 0 in the middle of theirs: blue is fewer, red more.
    """
    fig, axes = new_figure(ncols=len(tables), sharey=True, squeeze=False, figsize=(1 + 3.9 * len(tables), 4.3))
    places = [i + 0.5 for i in range(len(names))]
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        values = np.asarray(table, dtype=float)
        mistakes = np.ma.masked_array(values, np.eye(len(names), dtype=bool))
        top, signed = float(np.abs(mistakes).max()) or 1.0, bool((values < 0).any())
        axis.pcolormesh(
            mistakes, cmap="RdBu_r" if signed else "Blues", vmin=-top if signed else 0, vmax=top, edgecolors="white",
            linewidth=0.5,
        )  # fmt: skip
        axis.set_facecolor("0.85")
        for (row, column), value in np.ndenumerate(values):
            dark = row != column and abs(value) > 0.6 * top
            number = f"{value:+.0f}" if signed and round(value) else f"{value:.0f}".replace("-", "")
            colour = "white" if dark else "black"
            axis.text(column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=7, color=colour)
        axis.set(xlim=(0, len(names)), ylim=(len(names), 0), aspect="equal", xlabel="answer")
        axis.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(places, names, fontsize=8)
        axis.set_title(title, fontsize=10)
    axes.flat[0].set_ylabel("class")
    return fig


def scatter(
    points: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str | None = None, note: str = ""
) -> Figure:
    """Named points in a plane, {name: (x, y)} or {name: (x, y, half-width of x, of y)}; the legend stands beside.

    ``note`` is written into the upper right corner, for example which direction is better. NaN points are left out.
    """
    fig, axis = new_figure(figsize=(7.6, 3.9))
    for i, (name, (x, y, *halves)) in enumerate(points.items()):
        # Colours and markers repeat after eight, but never the same two together.
        style = {"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8], "markersize": 6, "linestyle": "none"}
        xerr, yerr = halves or (None, None)
        axis.errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=0.8, capsize=2, label=name, **style)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.text(0.98, 0.97, note, transform=axis.transAxes, ha="right", va="top", fontsize=8, color="0.4")
    if title:
        axis.set_title(title, fontsize=11)
    return fig


def window(a: Tensor, b: Tensor, original: Tensor, side: int = 72) -> tuple[slice, slice, slice]:
    """Where two versions of a picture "3 h w" differ most in squared error to ``original``: an index of side x side.

    Corners are tried every eight pixels. Raises ValueError for a picture smaller than ``side``.
    """
    if min(original.shape[-2:]) < side:
        raise ValueError(f"a window of {side} pixels does not fit into {original.shape[-2]}x{original.shape[-1]}")
    error = ((a - original) ** 2 - (b - original) ** 2).mean(0, keepdim=True)
    means = F.avg_pool2d(error, side, stride=8)[0].abs()
    top, left = divmod(int(means.argmax()), means.shape[1])
    return slice(None), slice(top * 8, top * 8 + side), slice(left * 8, left * 8 + side)


def difference(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """Absolute difference of two pictures (3, h, w), times ``gain``, clamped to [0, 1]."""
    return ((a - b).abs() * gain).clamp(0, 1)
