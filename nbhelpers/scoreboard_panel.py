"""Charts of the scoreboard: quality against cost as figures, and panels to choose what is drawn and which photos."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from torch import Tensor

from . import degrade, runtime, show
from .claims import VERDICTS
from .cost_figures import label_points
from .images import load_image, to_uint8
from .inference import get_model, upscale
from .panel import Panel, picture_view
from .register import OPEN, Finding, known, without_verdict
from .scoreboard import AXES, BICUBIC, OURS, QUALITY, THEIRS, Axis, front, label

STYLES = {2: (show.COLOURS[0], "o"), 3: (show.COLOURS[1], "s"), 4: (show.COLOURS[2], "^")}  # by scale
NO_NETWORK = "nothing lit up"
POINT_STYLE = """
.nb-chart {position: relative; display: inline-block; max-width: 100%}
.nb-chart img {display: block; max-width: 100%}
.nb-point {position: absolute; width: 18px; height: 18px; margin: -9px; border-radius: 50%}
.nb-point:hover, .nb-point:focus {outline: 2px solid #D55E00; z-index: 9}
.nb-point:hover::after, .nb-point:focus::after {content: attr(data-text); position: absolute; bottom: 20px; left: 0;
  white-space: pre; padding: 4px 8px; border-radius: 4px; background: #222; color: #fff; font: 12px/1.4 sans-serif}
.nb-point.right:hover::after, .nb-point.right:focus::after {left: auto; right: 0}
.nb-point.top:hover::after, .nb-point.top:focus::after {bottom: auto; top: 20px}
"""


def _draw_rows(axis: object, rows: pd.DataFrame, x: Axis, y: Axis, size: float) -> None:
    """Points by scale (colour and marker) and kind (published ones are hollow), and bicubic's quality as lines."""
    for (scale, kind), some in rows[rows.kind != BICUBIC].groupby(["scale", "kind"]):
        colour, marker = STYLES.get(scale, (show.COLOURS[3], "D"))
        fill = colour if kind == OURS else "white"
        axis.scatter(some[x.key], some[y.key], size, fill, marker, edgecolors=colour, linewidths=1.3, zorder=3)
    for _, row in rows[rows.kind == BICUBIC].iterrows():
        for line, of in ((axis.axhline, y), (axis.axvline, x)):
            if of in QUALITY:
                line(row[of.key], color=STYLES[row.scale][0], linewidth=1, linestyle=":", zorder=1)
    for key, of in (("x", x), ("y", y)):
        if of.logarithmic:
            getattr(axis, f"set_{key}scale")("log")
            side = getattr(axis, f"{key}axis")
            side.set_major_locator(LogLocator(subs=(1, 3)))
            side.set_major_formatter(EngFormatter(sep=""))
            side.set_minor_formatter(NullFormatter())
    axis.set(xlabel=x.label, ylabel=y.label)
    axis.grid(alpha=0.3)


def drawn(rows: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """The networks that have both numbers. Raises ValueError where there is none."""
    found = rows[(rows.kind != BICUBIC) & rows[x.key].notna() & rows[y.key].notna()]
    if found.empty:
        raise ValueError(f"no network has both {x.label} and {y.label} here")
    return found


def chart(rows: pd.DataFrame, x: str = "parameters", y: str = "psnr_y", lit: str | None = None) -> Figure:
    """One network, one point, for rows of :func:`nbhelpers.scoreboard.table`; ``x`` and ``y`` are keys of ``AXES``.

    Filled points are ours, hollow ones published; a line joins those that none beats in both, a dotted one is
    bicubic. ``lit`` rings a network. Raises ValueError where no row has both numbers.
    """
    across, up = AXES[x], AXES[y]
    points = drawn(rows, across, up)
    several = points.scale.nunique() > 1
    fig, axis = plt.subplots(figsize=(9.2, 5.2), layout="constrained")
    plt.close(fig)  # the cell shows the returned figure; pyplot must not show it a second time
    _draw_rows(axis, rows, across, up, 42)
    for scale, some in points.groupby("scale"):
        best = front(some, across, up)
        axis.plot(best[x], best[y], color=STYLES.get(scale, ("0.5",))[0], linewidth=1.2, alpha=0.6, zorder=2)
    chosen = points[points.name == lit]
    axis.scatter(chosen[x], chosen[y], 190, "none", edgecolors=show.COLOURS[1], linewidths=2.2, zorder=4)
    for of, name in ((across, axis.set_xlabel), (up, axis.set_ylabel)):
        name(f"{of.label} ({'more' if of.more_is_better else 'less'} is better)")
    axis.margins(0.12, 0.1)
    _legend(axis, points, "")
    named = {label(row, several): (row[x], row[y]) for _, row in points.iterrows()}
    label_points(fig, axis, named, 7 if len(named) > 16 else 8)
    return fig


def _legend(owner: object, points: pd.DataFrame, place: str) -> None:
    """What marker and colour mean, without data."""
    handles = []
    for scale, kind in sorted(set(zip(points.scale, points.kind, strict=True))):
        colour, marker = STYLES.get(scale, (show.COLOURS[3], "D"))
        style = {"color": colour, "markerfacecolor": colour if kind == OURS else "white", "linestyle": "none"}
        handles.append(plt.Line2D([], [], marker=marker, label=f"×{scale}, {kind}", **style))
    where = {"loc": place, "ncols": len(handles)} if place else {"loc": "best"}
    owner.legend(handles=handles, fontsize=8, **where)


def grid(rows: pd.DataFrame, costs: Sequence[str] = ("parameters", "flops", "ms", "memory")) -> Figure:
    """Every quality against every cost in small panels without names: rows of :func:`nbhelpers.scoreboard.table`."""
    fig, axes = plt.subplots(
        len(QUALITY), len(costs), figsize=(2.7 * len(costs), 2.1 * len(QUALITY) + 0.4), sharex="col", sharey="row",
        layout="constrained",
    )  # fmt: skip
    plt.close(fig)
    for i, y in enumerate(QUALITY):
        for k, x in enumerate(AXES[key] for key in costs):
            _draw_rows(axes[i, k], rows, x, y, 20)
            axes[i, k].label_outer()
            axes[i, k].tick_params(labelsize=7)
            axes[i, k].xaxis.label.set_size(8)
            axes[i, k].yaxis.label.set_size(8)
    points = rows[rows.kind != BICUBIC]
    _legend(fig, points, "outside upper center")
    return fig


class ScoreboardPanel(Panel):
    """See :func:`scoreboard_panel`. Controls: ``x, y, scale, published, lit``; views: ``image, status``."""

    def __init__(self, rows: pd.DataFrame):
        self.rows = rows
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "6em"}}
        named = [(axis.label, axis.key) for axis in AXES.values()]
        scales = [("all", 0), *((f"×{s}", int(s)) for s in sorted(rows.scale.unique()))]
        names = rows[rows.kind != BICUBIC].name.drop_duplicates()
        self.x = widgets.Dropdown(options=named, value="parameters", description="Across", **wide)
        self.y = widgets.Dropdown(options=named, value="psnr_y", description="Up", **wide)
        self.scale = widgets.Dropdown(options=scales, value=scales[-1][1], description="Scale", **wide)
        self.lit = widgets.Dropdown(options=[NO_NETWORK, *names], description="Light up", **wide)
        self.published = widgets.Checkbox(value=True, description="published networks too", indent=False)
        self.image, self.status = widgets.HTML(), widgets.HTML()
        controls = [self.x, self.y, self.scale, self.lit, self.published]
        self._arrange(controls, self.image)
        self._follow(controls)
        self.update()

    def chosen(self) -> pd.DataFrame:
        """The rows that the controls leave."""
        rows = self.rows if self.published.value else self.rows[self.rows.kind != THEIRS]
        return rows[rows.scale == self.scale.value] if self.scale.value else rows

    def update(self) -> None:
        """Draw for the controls as they stand; problems appear in words."""
        try:
            points = drawn(self.chosen(), AXES[self.x.value], AXES[self.y.value])
        except ValueError as error:
            self.image.value = ""
            self._say(f"⚠ {error}")
            return
        missing = len(self.chosen()[self.chosen().kind != BICUBIC]) - len(points)
        unknown = f"; {missing} more lack one of the two numbers" if missing else ""
        self._say(f"{len(points)} networks{unknown}. Point at one, or click it, for its numbers.")
        self._draw()

    def figure(self) -> Figure:
        """What is shown, for places without a kernel. Raises ValueError where there is nothing to draw."""
        return chart(self.chosen(), self.x.value, self.y.value, self.lit.value)

    def _draw(self) -> None:
        """The figure as a picture, with a spot over each point that shows its numbers."""
        fig, data = self.figure(), io.BytesIO()
        fig.savefig(data, format="png", dpi=96)
        picture = base64.b64encode(data.getvalue()).decode()
        places = drawn(self.chosen(), AXES[self.x.value], AXES[self.y.value])
        at = fig.axes[0].transData.transform(places[[self.x.value, self.y.value]].to_numpy(float)) / fig.bbox.size
        spots = "".join(self._spot(row, *xy) for (_, row), xy in zip(places.iterrows(), at, strict=True))
        self.image.value = (
            f"<style>{POINT_STYLE}</style><div class='nb-chart'>"
            f"<img alt='chart' src='data:image/png;base64,{picture}'>{spots}</div>"
        )

    @staticmethod
    def _spot(row: pd.Series, x: float, y: float) -> str:
        side = " right" * int(x > 0.6) + " top" * int(y > 0.6)
        text = html.escape(facts(row), quote=True)
        place = f"left: {100 * x:.2f}%; top: {100 - 100 * y:.2f}%"
        return (
            f"<span class='nb-point{side}' tabindex='0' style='{place}' data-text='{text}' aria-label='{text}'></span>"
        )


def facts(row: pd.Series) -> str:
    """All that is known of a network, one line each."""
    known = [f"{axis.label}: {row[axis.key]:{axis.form}}" for axis in AXES.values() if pd.notna(row[axis.key])]
    return "\n".join([f"{label(row, True)}, {row.kind}", *known])


def scoreboard_panel(rows: pd.DataFrame) -> ScoreboardPanel:
    """Choosers of two axes and a scale over the chart of :func:`chart`, for :func:`nbhelpers.scoreboard.table`."""
    return ScoreboardPanel(rows)


MARKS = dict(zip((*VERDICTS, OPEN), (("o", 2), ("X", 1), ("D", 4), ("_", 6), ("|", 6)), strict=True))


def verdict_map(findings: Sequence[Finding]) -> Figure:
    """The register at a glance: a row per claim, in it a mark per verdict, in the order of the notebooks."""
    claims = known()
    without_verdict(findings)  # says which number is not known
    half = -(-len(claims) // 2)
    fig, axes = plt.subplots(ncols=2, figsize=(10.4, 0.22 * half + 0.7), layout="constrained")
    plt.close(fig)
    most = max((sum(f.id == c["id"] for f in findings) for c in claims), default=1)
    for axis, some in zip(axes, (claims[:half], claims[half:]), strict=True):
        for i, claim in enumerate(some):
            verdicts = [f.verdict for f in findings if f.id == claim["id"]] or [OPEN]
            for k, verdict in enumerate(sorted(verdicts, key=list(MARKS).index)):
                marker, colour = MARKS[verdict]
                axis.scatter(k, i, 26, show.COLOURS[colour], marker)
        axis.set(xlim=(-0.7, most - 0.3), ylim=(half - 0.5, -0.7), xticks=[])
        axis.set_yticks(range(len(some)), [f"{claim['id']}  {claim['short']}" for claim in some], fontsize=8)
        axis.grid(axis="y", alpha=0.25)
    handles = [
        plt.Line2D([], [], marker=m, color=show.COLOURS[c], linestyle="none", label=word)
        for word, (m, c) in MARKS.items()
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)
    return fig


def crop_rows(rows: Mapping[str, Sequence[Tensor]], columns: Sequence[str], side: float = 0.85) -> Figure:
    """Rows of small pictures "3 h w" in [0, 1], pixels shown as squares, with the rows' names at their left.

    ``columns`` stand above the first row; ``side`` of a picture in inches.
    """
    shape = {"nrows": len(rows), "ncols": 1 + len(columns), "squeeze": False}
    size = (side * len(columns) + 2.2, side * len(rows) + 0.3)
    fig, axes = plt.subplots(
        **shape, figsize=size, width_ratios=[2.2, *[side] * len(columns)], gridspec_kw={"wspace": 0.03, "hspace": 0.04}
    )
    plt.close(fig)
    fig.subplots_adjust(0, 0, 1, 1 - 0.25 / size[1])
    for (name, pictures), (first, *others) in zip(rows.items(), axes, strict=True):
        first.text(0, 0.5, name, va="center", fontsize=8)
        first.set_axis_off()
        for axis, picture in zip(others, pictures, strict=True):
            axis.imshow(to_uint8(picture), interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(title, fontsize=8, pad=3)
    return fig


@functools.lru_cache(maxsize=24)
def _small(photo: str, scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bundled validation photo, shrunk, and enlarged again by bicubic."""
    hr = degrade.crop_to_multiple(load_image(runtime.PHOTOS / "val" / f"{photo}.png"), scale)
    lr = degrade.downscale(hr, scale)
    return hr, lr, upscale(get_model("bicubic", scale), lr)


def windows(name: str, scale: int, photo: str, side: int = 48) -> list[Tensor]:
    """A bundled photo by bicubic, by a network, and as it was, "3 side side" where the first two differ most."""
    hr, lr, plain = _small(photo, int(scale))
    sr = upscale(get_model(name, int(scale)), lr)
    place = show.window(plain, sr, hr, side)
    return [picture[place].clamp(0, 1) for picture in (plain, sr, hr)]


class ExtremesPanel(Panel):
    """See :func:`extremes_panel`. Controls: ``network, side``; views: ``image, status``."""

    def __init__(self, rows: pd.DataFrame):
        self.rows = rows.reset_index(drop=True)
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "6em"}}
        options = [(label(row, True), i) for i, row in self.rows.iterrows()]
        sides = [(f"{n} x {n} pixels", n) for n in (32, 64, 128, 256)]
        self.network = widgets.Dropdown(options=options, description="Network", **wide)
        self.side = widgets.Dropdown(options=sides, value=64, description="Window", **wide)
        self.image, self.status = picture_view(), widgets.HTML()
        controls = [self.network, self.side]
        self._arrange(controls, self.image)
        self._follow(controls)
        self.update()

    def update(self) -> None:
        """Enlarge for the controls as they stand; problems appear in words."""
        row = self.rows.loc[self.network.value]
        try:
            self._draw()
        except (OSError, ValueError) as error:
            self.image.value = b""
            self._say(f"⚠ {error}")
            return
        self._say(
            f"{label(row, True)}: best {row.best} {row.best_gain:+.2f} dB, worst {row.worst} {row.worst_gain:+.2f} dB"
        )

    def figure(self) -> Figure:
        """What is shown, for places without a kernel."""
        row = self.rows.loc[self.network.value]
        found = {
            f"{which}: {row[which]}\n{row[f'{which}_gain']:+.2f} dB": windows(
                row["name"], row.scale, row[which], self.side.value
            )
            for which in ("best", "worst")
        }
        return crop_rows(found, ("bicubic", row["name"], "original"), side=2.6)


def extremes_panel(rows: pd.DataFrame) -> ExtremesPanel:
    """A chooser of a network over windows into its best and worst photo: :func:`nbhelpers.scoreboard.extremes`."""
    return ExtremesPanel(rows)
