"""Interactive panels: a network against bicubic on a photo, with the wipe viewer and numbers beside it.

Every builder returns a :class:`ComparisonPanel`: ``.root`` is the widget to display, each control is an attribute, and
setting a control's ``.value`` in code does what the reader's hand does. Plain ``observe`` callbacks throughout, because
captured output (``Output``, ``interact``) cannot be compared when notebooks run as tests.
"""

from __future__ import annotations

import functools
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import checkpoints, metrics, runtime, show
from .comparison import AS_IS, RESTORE, Comparison, compare_upscaling, crop_window
from .images import ImageError, find_images, read_picture, to_tensor, to_uint8
from .wipe import WipeViewer

SIZES = {"128 x 128": 128, "256 x 256": 256, "512 x 512": 512, "whole photo": 0}
BICUBIC_ONLY = "none yet: bicubic only"
NO_NETWORK = "No trained network found. Train one: python -m nbhelpers train experiment=espcn_x4"
NO_ORIGINAL = "no original exists, so no PSNR"
MOST_PIXELS = 16_000_000  # of one enlarged picture; more would keep the browser busy for seconds

Photo = Path | np.ndarray


@functools.lru_cache(maxsize=4)
def _read_file(path: Path) -> np.ndarray:
    return read_picture(path).rgb


def _read(photo: Photo) -> np.ndarray:
    return _read_file(photo) if isinstance(photo, Path) else photo


class Root(widgets.VBox):
    """The panel's outer box; its text form is short and always the same, so that saved notebooks stay comparable."""

    def __repr__(self) -> str:
        return "Interactive panel: needs a running kernel; the figure above shows the same comparison."


class Panel:
    """What the viewers share: controls in columns above a status line and a view, redrawn when a control moves.

    A subclass makes ``status``, calls :meth:`_arrange` and has ``update()``; :meth:`_draw` wants ``image`` and
    ``figure()``.
    """

    def _arrange(self, controls: Sequence[widgets.Widget], view: widgets.Widget) -> None:
        columns = {"display": "grid", "grid_template_columns": "repeat(auto-fit, minmax(min(100%, 270px), 1fr))"}
        self.root = Root([widgets.Box(list(controls), layout=columns), self.status, view], layout={"width": "100%"})

    def _follow(self, controls: Sequence[widgets.Widget]) -> None:
        for control in controls:
            control.observe(lambda change: self.update(), "value")

    def _repr_mimebundle_(self, **kwargs: object) -> object:
        return self.root._repr_mimebundle_(**kwargs)

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status'>{html.escape(text)}</div>"

    def _draw(self) -> None:
        data = io.BytesIO()
        self.figure().savefig(data, format="png", dpi=80)
        self.image.value = data.getvalue()


def picture_view() -> widgets.Image:
    """An empty image as wide as its page at most."""
    return widgets.Image(format="png", layout={"max_width": "100%", "width": "auto", "object_fit": "contain"})


class ComparisonPanel(Panel):
    """Photo, network and damage choosers around a wipe viewer; build it with the two functions below.

    Controls: ``photo, upload, network, mode, scale, size, across, down, quality, compare_with, lpips``; views:
    ``viewer, readout, status``; ``result`` holds the last :class:`Comparison`, None after an error. ``scale`` counts
    for networks for any scale and is hidden for the others.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module | Callable[[], nn.Module]],
        photos: Mapping[str, Photo],
        upload: bool,
        device: str = "auto",
    ):
        self.device = runtime.pick_device(device)
        self.precision = runtime.pick_precision(self.device)
        self.photos = dict(photos)
        self.result: Comparison | None = None
        self._networks = dict(networks)
        self._quiet = False
        self._make_controls()
        self.upload.layout.display = None if upload else "none"
        self.network.layout.display = None if upload or len(networks) > 1 else "none"
        self._arrange()
        for control in self._controls():
            control.observe(self._changed, "value")
        self.compare_with.observe(self._changed, "value")
        self.upload.observe(self._uploaded, "value")
        self._changed()

    # ---- layout ----
    def _make_controls(self) -> None:
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "7.5em"}}
        slider = functools.partial(widgets.IntSlider, min=0, max=100, value=50, readout_format="d", **wide)
        self.photo = widgets.Dropdown(options=list(self.photos), description="Photo", **wide)
        self.upload = widgets.FileUpload(accept="image/*", multiple=True, description="Upload photos", **wide)
        self.network = widgets.Dropdown(options=list(self._networks) or [BICUBIC_ONLY], description="Network", **wide)
        self.mode = widgets.ToggleButtons(options=[AS_IS, RESTORE], value=RESTORE, layout=wide["layout"])
        self.mode.style.button_width = "auto"
        self.mode.tooltips = [
            "enlarge the part shown; nothing to measure against",
            "shrink the part shown, enlarge it again, and measure against the original",
        ]
        self.scale = widgets.FloatSlider(
            min=1, max=8, value=4, step=0.1, description="Scale", continuous_update=False, readout_format=".1f", **wide
        )
        self.size = widgets.Dropdown(options=SIZES, value=256, description="Part shown", **wide)
        self.across, self.down = slider(description="Across, %"), slider(description="Down, %")
        self.quality = slider(min=5, value=100, description="JPEG quality", tooltip="100 = no damage")
        self.compare_with = widgets.Dropdown(
            options=["bicubic", "original"], value="bicubic", description="Compare with", **wide
        )
        self.lpips = widgets.Checkbox(
            value=False, description="LPIPS too (slower)", indent=False, layout={"width": "auto"}
        )
        self.viewer = WipeViewer()
        self.readout, self.status = widgets.HTML(), widgets.HTML()

    def _controls(self) -> tuple[widgets.Widget, ...]:
        """The controls that change the pictures."""
        place = (self.size, self.across, self.down)
        return (self.photo, self.network, self.mode, self.scale, *place, self.quality, self.lpips)

    def _arrange(self) -> None:
        columns = "repeat(auto-fit, minmax(min(100%, 270px), 1fr))"  # three on a wide page, one on a narrow one
        order = (self.photo, self.network, self.upload, self.mode, self.compare_with, self.quality, self.scale)
        grid = widgets.Box(
            [*order, self.size, self.across, self.down],
            layout={"display": "grid", "grid_template_columns": columns, "grid_gap": "2px 16px"},
        )
        below = widgets.Box(
            [self.readout, self.lpips],
            layout={"flex_flow": "row wrap", "grid_gap": "4px 24px", "align_items": "flex-end"},
        )
        self.root = Root([grid, self.status, self.viewer, below], layout={"width": "100%", "grid_gap": "6px"})

    # ---- reacting ----
    def _changed(self, change: object = None) -> None:
        if self._quiet:
            return
        self._quiet = True  # the controls adjusted here must not start a second round
        try:
            restoring = self.mode.value == RESTORE
            self.compare_with.disabled = not restoring
            if not restoring:
                self.compare_with.value = "bicubic"
            self.across.disabled = self.down.disabled = self.size.value == 0
        finally:
            self._quiet = False
        if change is not None and change["owner"] is self.compare_with and self.result is not None:
            self._paint()
        else:
            self.update()

    def update(self) -> None:
        """Compute and show the pictures for the controls as they stand; problems appear in words, not as tracebacks."""
        try:
            self.result, note = self._compute()
        except (ValueError, OSError, RuntimeError) as error:
            self.result = None
            self.viewer.show(("bicubic", None), ("network", None), message="Nothing to show, see the line above.")
            self.readout.value = ""
            self._say(str(error), problem=True)
            return
        self._paint()
        self._say(note)

    def _compute(self) -> tuple[Comparison, str]:
        if self.photo.value is None:
            raise ValueError("No photo to show: upload one.")
        rgb = _read(self.photos[self.photo.value])
        model = self._model()
        any_scale = hasattr(model, "at")
        self.scale.layout.display = None if any_scale else "none"
        model = model.at(self.scale.value) if any_scale else model
        scale = getattr(model, "scale", 4)
        size, note = self._fitting_size(rgb, scale)
        rows, columns = crop_window(*rgb.shape[:2], size, self.across.value / 100, self.down.value / 100)
        part = to_tensor(rgb[rows, columns])
        need = 16 if self.mode.value == AS_IS else math.ceil(16 * scale)
        if min(part.shape[-2:]) < need:
            raise ValueError(
                f"{self.photo.value} shows only {part.shape[-1]} x {part.shape[-2]} pixels; x{scale:g} in mode "
                f"“{self.mode.value}” needs at least {need} x {need}. Choose a larger part or another photo."
            )
        return compare_upscaling(
            part, model, scale, self.mode.value, self.quality.value, self.lpips.value, self._precision()
        ), note or f"{part.shape[-1]} x {part.shape[-2]} pixels of {self.photo.value}, x{scale:g}."

    def _precision(self) -> str:
        # Numbers are measured in fp32; where nothing is measured, the fast arithmetic of this machine serves.
        return "fp32" if self.mode.value == RESTORE else self.precision

    def _model(self) -> nn.Module | None:
        if self.network.value == BICUBIC_ONLY:
            return None
        model = self._networks[self.network.value]
        if not isinstance(model, nn.Module):
            model = self._networks[self.network.value] = model()
        return model.to(self.device).eval()

    def _fitting_size(self, rgb: np.ndarray, scale: float) -> tuple[int, str]:
        """The part's side, limited where the enlarged picture would be too large for a browser."""
        size, most = self.size.value, int(MOST_PIXELS / (scale**2 if self.mode.value == AS_IS else 1))
        h, w = rgb.shape[:2]
        if size or h * w <= most:
            return size, ""
        limit = math.isqrt(most)
        self.across.disabled = self.down.disabled = False
        return (
            limit,
            f"{self.photo.value} is {w} x {h} pixels: too large at x{scale:g}, so {limit} x {limit} are shown.",
        )

    # ---- uploads ----
    def add_photo(self, name: str, photo: Photo, select: bool = True) -> None:
        """Offer one more photo: a path, or uint8 (h, w, 3). Raises ImageError when a file cannot be read."""
        _read(photo)
        self.photos = {name: photo} | {k: v for k, v in self.photos.items() if k != name}
        current = self.photo.value
        self._quiet = True  # new options reset the choice; paint once, below
        self.photo.options = list(self.photos)
        self.photo.value = name if select or current is None else current
        self._quiet = False
        if self.photo.value != current or name == current:
            self.update()

    def _uploaded(self, change: dict) -> None:
        problems, added = [], 0
        for item in change["new"]:
            stream = io.BytesIO(bytes(item["content"]))
            stream.name = item["name"]
            try:
                if not stream.getbuffer().nbytes:
                    raise ImageError(item["name"], "the file is empty (0 bytes)")
                self.add_photo(item["name"], read_picture(stream).rgb)
                added += 1
            except ImageError as error:
                problems.append(str(error))
        if problems:
            self._say(f"{added} added, {len(problems)} not: " + "; ".join(problems), problem=True)

    # ---- showing ----
    def _paint(self) -> None:
        result = self.result
        name = self.network.value if result.network is not None else "network"
        left = self.compare_with.value
        shown = result.pictures()
        self.viewer.show(
            (self._label(left, left), shown[left]),
            (self._label(name, "network"), result.network),
            original=result.original,
            message=NO_NETWORK if result.network is None else "",
        )
        self.readout.value = self._table(name)

    def _label(self, text: str, key: str) -> str:
        score = self.result.scores.get(key)
        return f"{text}, {score['psnr_y']:.2f} dB" if score else text

    def _table(self, name: str) -> str:
        result = self.result
        keys = ("psnr_y", "ssim_y", "lpips")
        titles = [metrics.NAMES[key] for key in keys] if result.scores else []
        rows = []
        for key, ms in result.milliseconds.items():
            scores = result.scores.get(key, {})
            cells = [self._number(metric, scores[metric]) for metric in keys if scores] + [f"{ms:.0f}"]
            title = html.escape(name if key == "network" else key)
            rows.append(f"<tr><th scope='row'>{title}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        head = "".join(f"<th scope='col'>{t}</th>" for t in ("", *titles, "milliseconds"))
        note = metrics.protocol(result.scale) if result.scores else f"Mode “{AS_IS}”: {NO_ORIGINAL}."
        if self.quality.value < 100:
            note += f"; input damaged by JPEG quality {self.quality.value}"
        style = "<style>.nb-numbers th, .nb-numbers td {padding: 0 12px 0 0; text-align: right}</style>"
        return (
            f"{style}<table class='nb-numbers'><tr>{head}</tr>{''.join(rows)}</table>"
            f"<small style='line-height: 1.3; display: block; max-width: 70em'>{html.escape(note)}</small>"
        )

    def _number(self, metric: str, value: float | None) -> str:
        if value is not None:
            return f"{value:.2f}" if metric.startswith("psnr") else f"{value:.4f}"
        if metric == "lpips" and not self.lpips.value:
            return "off"
        return "not available" if metric == "lpips" else "part too small"

    def _say(self, text: str, problem: bool = False) -> None:
        # Sign and words carry the meaning; the frame only draws the eye.
        style = "border-left: 4px solid #d55e00; padding-left: 8px" if problem else ""
        sign = "⚠ " if problem else ""
        self.status.value = f"<div role='status' style='{style}; line-height: 1.4'>{sign}{html.escape(text)}</div>"

    def figure(self, crop: tuple[int, int, int, int] | None = None) -> Figure:
        """The comparison on show, for places without a kernel; ``crop`` = (top, left, height, width) enlarges a part.

        Raises ValueError when nothing is on show.
        """
        if self.result is None:
            raise ValueError("there is no picture to draw: the panel's status line says why")
        named = {
            self._label(self.network.value if key == "network" else key, key): picture
            for key, picture in self.result.pictures().items()
        }
        title = f"{self.photo.value}, x{self.result.scale:g}, mode “{self.mode.value}”"
        return show.side_by_side(named, crop=crop, title=title)


def bundled_photos() -> dict[str, Path]:
    """The photos that come with the workbook, validation photos first, as ``{"val/name": path}``."""
    folders = [runtime.PHOTOS / part for part in ("val", "train")]
    files = [path for folder in folders if folder.is_dir() for path in find_images(folder)]
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def named_photos(photos: Mapping[str, Photo | Tensor] | Sequence[str | Path] | None) -> dict[str, Photo]:
    if photos is None:
        return bundled_photos()
    if isinstance(photos, Mapping):
        return {str(k): to_uint8(v) if isinstance(v, Tensor) else v for k, v in photos.items()}
    return {Path(p).stem: Path(p) for p in photos}


def explorer_panel(
    photos: Mapping[str, Photo | Tensor] | Sequence[str | Path] | None = None, device: str = "auto"
) -> ComparisonPanel:
    """Every trained network against bicubic, on the bundled photos (or ``photos``) and on uploaded ones."""
    where = str(runtime.pick_device(device))
    networks = {name: functools.partial(checkpoints.cached, name, where) for name in checkpoints.available()}
    return ComparisonPanel(networks, named_photos(photos), upload=True, device=device)


def compare_panel(
    model: nn.Module | Mapping[str, nn.Module],
    photos: Mapping[str, Photo | Tensor] | Sequence[str | Path] | None = None,
    name: str = "network",
    device: str = "auto",
) -> ComparisonPanel:
    """This network (or several, by name) against bicubic on a chosen photo; the explorer without upload.

    A model is a plain module with attribute ``scale``; it is put into evaluation mode on ``device``.
    """
    networks = dict(model) if isinstance(model, Mapping) else {name: model}
    return ComparisonPanel(networks, named_photos(photos), upload=False, device=device)
