"""Interactive panels: a network against bicubic on a photo, with the viewer and numbers beside it.

Every builder returns a :class:`ComparisonPanel`: ``.root`` is the widget to display, each control is an attribute, and
setting a control's ``.value`` in code does what the reader's hand does, and returns when the picture is there. Plain
``observe`` callbacks throughout, because captured output (``Output``, ``interact``) cannot be compared when notebooks
run as tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import math
from collections.abc import Callable, Iterator, Mapping

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import comparison, readout, runtime, show
from .comparison import AS_IS, RESTORE, Comparison, Damage, compare_upscaling, crop_window
from .images import to_tensor
from .jobs import Cancelled, Job, Worker
from .panel import Panel, Photo, Photos, Root, named_photos, read_photo
from .panel import bundled_photos as bundled_photos  # notebooks take these two from here
from .readout import NO_ORIGINAL as NO_ORIGINAL
from .wipe import WipeViewer

SIZES = {"128 x 128": 128, "256 x 256": 256, "512 x 512": 512, "whole photo": 0}
BICUBIC, ORIGINAL = "bicubic", "original"
BICUBIC_ONLY = "none yet: bicubic only"
NO_NETWORK = "No trained network found. Train one: python -m nbhelpers train experiment=espcn_x4"
MOST_ENLARGED = 250_000_000  # pixels of a whole photo enlarged: 750 MB


@dataclasses.dataclass(frozen=True)
class Request:
    """The controls as they stood when a picture was asked for."""

    photo: str | None
    network: str
    left: str
    mode: str
    scale: float
    size: int
    across: float
    down: float
    damage: Damage
    lpips: bool

    @property
    def other(self) -> str | None:
        """The network on the left side, if one is wanted there."""
        return None if self.left in (BICUBIC, ORIGINAL) else self.left


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is on show, and for which controls; ``other`` is the network of ``result.other``.

    ``cut``: only a part, since the whole would be too large.
    """

    request: Request
    other: str | None
    result: Comparison
    note: str
    cut: bool


class ComparisonPanel(Panel):
    """Photo, networks and damage above a viewer of two pictures; build it with :func:`compare_panel`.

    Controls: ``photo, size, across, down``; ``compare_with`` (the left side), ``network`` (the right one), ``mode,
    scale``; ``quality, blur, noise, lpips``; ``cancel``. Views: ``viewer, readout, status, progress``. ``result`` is
    the :class:`Comparison` on show, None after an error. ``scale`` counts for networks for any scale and is hidden for
    the others.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module | Callable[[], nn.Module]],
        photos: Mapping[str, Photo],
        device: str = "auto",
    ):
        self.device = runtime.pick_device(device)
        self.precision = runtime.pick_precision(self.device)
        self.photos = dict(photos)
        self.shown: Shown | None = None
        self.worker = Worker(self._tell)
        self._networks = dict(networks)
        self._any_scale: dict[str, bool] = {}
        self._remark = self._words = ""
        self._quiet = False
        self._make_controls()
        self._lay_out()
        for control in (*self._picture_controls(), self.compare_with):
            control.observe(self._changed, "value")
        self.cancel.on_click(lambda button: self.worker.cancel())
        self._changed()

    @property
    def result(self) -> Comparison | None:
        """What is on show."""
        return None if self.shown is None else self.shown.result

    # ---- layout ----
    def _make_controls(self) -> None:
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "7.5em"}}
        slider = functools.partial(widgets.IntSlider, min=0, max=100, value=50, readout_format="d", **wide)
        fine = functools.partial(widgets.FloatSlider, min=0, step=0.1, value=0, readout_format=".1f", **wide)
        dropdown = functools.partial(widgets.Dropdown, **wide)
        self.photo = dropdown(options=list(self.photos), description="Photo")
        self.size = dropdown(options=SIZES, value=256, description="Part shown")
        self.across, self.down = slider(description="Across, %"), slider(description="Down, %")
        self.compare_with = dropdown(options=[BICUBIC], description="Left side")
        self.network = dropdown(options=list(self._networks) or [BICUBIC_ONLY], description="Right side")
        self.mode = widgets.ToggleButtons(options=[AS_IS, RESTORE], value=RESTORE, layout=wide["layout"])
        self.mode.style.button_width = "auto"
        self.mode.tooltips = [
            "enlarge the part shown; nothing to measure against",
            "shrink the part shown, enlarge it again, and measure against the original",
        ]
        self.scale = fine(min=1, max=8, value=4, description="Scale", continuous_update=False)
        self.quality = slider(min=5, value=100, description="JPEG quality", tooltip="100 = no damage")
        self.blur = fine(max=4, description="Blur, px", tooltip="deviation of a Gaussian; 0 = none")
        self.noise = slider(max=50, value=0, description="Noise", tooltip="deviation in grey levels of 255; 0 = none")
        self.lpips = widgets.Checkbox(value=False, description="LPIPS too (slower)", indent=False)
        self.viewer, self.readout, self.status = WipeViewer(), widgets.HTML(), widgets.HTML()
        self.progress, self.progress_text = widgets.IntProgress(layout={"flex": "1 1 200px"}), widgets.Label()
        self.cancel = widgets.Button(description="Cancel", button_style="warning", layout={"flex": "none"})
        self.working = widgets.HBox([self.progress, self.progress_text, self.cancel], layout={"display": "none"})

    def _picture_controls(self) -> tuple[widgets.Widget, ...]:
        """The controls for which pictures are computed anew."""
        place = (self.photo, self.size, self.across, self.down)
        return (*place, self.network, self.mode, self.scale, self.quality, self.blur, self.noise, self.lpips)

    def _groups(self) -> dict[str, list[widgets.Widget]]:
        """Controls by heading."""
        return {
            "Photo": [self.photo, self.size, self.across, self.down],
            "Compare": [self.compare_with, self.network, self.mode, self.scale],
            "Damage to the input": [self.quality, self.blur, self.noise, self.lpips],
        }

    def _below(self) -> list[widgets.Widget]:
        return [self.readout]

    def _lay_out(self) -> None:
        columns = "repeat(auto-fit, minmax(min(100%, 240px), 1fr))"  # four on a wide page, one on a narrow one
        groups = [
            widgets.VBox([widgets.HTML(f"<b>{html.escape(title)}</b>"), *controls])
            for title, controls in self._groups().items()
        ]
        layout = {"display": "grid", "grid_template_columns": columns, "grid_gap": "2px 24px"}
        parts = [widgets.Box(groups, layout=layout), self.status, self.working, self.viewer, *self._below()]
        self.root = Root(parts, layout={"width": "100%", "grid_gap": "6px"})

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Within it, moved controls compute nothing."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    # ---- reacting ----
    def _changed(self, change: object = None) -> None:
        if self._quiet:
            return
        with self.quietly():  # the controls adjusted here must not start a second round
            self._offer_left_sides()
            self.across.disabled = self.down.disabled = self.size.value == 0
        wanted, shown = self._request(), self.shown
        of_left = change is not None and change["owner"] is self.compare_with
        if of_left and shown and not self.worker.job and wanted.other in (None, shown.other):
            self.shown = dataclasses.replace(shown, request=dataclasses.replace(shown.request, left=wanted.left))
            self._paint()
        else:
            self.update()

    def _offer_left_sides(self) -> None:
        original = [ORIGINAL] if self.mode.value == RESTORE else []
        names = [BICUBIC, *original, *(self._networks if len(self._networks) > 1 else ())]
        if names != list(self.compare_with.options):
            chosen = self.compare_with.value
            self.compare_with.options = names
            self.compare_with.value = chosen if chosen in names else BICUBIC

    def _request(self) -> Request:
        damage = Damage(self.quality.value, round(self.blur.value, 1), self.noise.value)
        place = (self.size.value, self.across.value / 100, self.down.value / 100)
        sides = (self.network.value, self.compare_with.value)
        return Request(self.photo.value, *sides, self.mode.value, self.scale.value, *place, damage, self.lpips.value)

    def update(self) -> None:
        """Compute and show the pictures for the controls as they stand; problems appear in words, not as tracebacks.

        What takes long goes on beside the page, with progress and a button to cancel.
        """
        request = self._request()
        self.worker.start(functools.partial(self._compute, request), functools.partial(self._finished, request))

    def _finished(self, request: Request, outcome: object) -> None:
        self.working.layout.display = "none"
        self.scale.layout.display = None if self._any_scale.get(request.network) else "none"
        remark, self._remark = self._remark, ""
        if isinstance(outcome, Cancelled):
            kept = self.shown and f" The picture is still that of {self.shown.note}"
            self._say(f"Cancelled.{kept or ''}", problem=True)
        elif isinstance(outcome, Exception):
            self.shown = None
            message = "Nothing to show, see the line above."
            self.viewer.show((BICUBIC, None), ("network", None), message=message)
            self.readout.value = ""
            self._say(f"{remark} {in_words(outcome)}", problem=True)
        else:
            self.shown = outcome
            if outcome.cut:
                self.across.disabled = self.down.disabled = False
            self._paint()
            self._say(f"{remark} {outcome.note}", problem=bool(remark))

    def _tell(self, job: Job) -> None:
        self.working.layout.display = None
        self.progress.max, self.progress.value = max(1, job.total), job.done
        self.progress_text.value = job.progress()
        if "Working" not in self.status.value:
            self._say("Working …")

    # ---- computing, on the worker's thread: reads no control ----
    def _compute(self, request: Request, job: Job) -> Shown:
        if request.photo is None:
            raise ValueError("No photo to show: add one.")
        job.stage(f"reading {request.photo}")
        rgb = read_photo(self.photos[request.photo])
        job.stage(f"loading {request.network}")
        model = self._model(request.network)
        self._any_scale[request.network] = hasattr(model, "at")
        model = model.at(request.scale) if hasattr(model, "at") else model
        scale = getattr(model, "scale", 4)
        size, cut = self._fitting_size(rgb, scale, request)
        part = to_tensor(rgb[crop_window(*rgb.shape[:2], size, request.across, request.down)])
        _check_part(part, scale, request)
        # Numbers are measured in fp32; where nothing is measured, the fast arithmetic of this machine serves.
        precision = "fp32" if request.mode == RESTORE else self.precision
        other = None if request.other is None else self._model(request.other)
        asked = (request.mode, request.damage, request.lpips, precision)
        result = compare_upscaling(part, model, scale, *asked, other=other, job=job)
        return Shown(request, request.other, result, _note(request, rgb, part, result, cut), cut)

    def _model(self, name: str) -> nn.Module | None:
        if name == BICUBIC_ONLY:
            return None
        model = self._networks[name]
        if not isinstance(model, nn.Module):
            model = self._networks[name] = model()
        return model.to(self.device).eval()

    def _fitting_size(self, rgb: np.ndarray, scale: float, request: Request) -> tuple[int, bool]:
        """The part's side, limited where the whole would be too large, and whether it is."""
        h, w = rgb.shape[:2]
        most = int(MOST_ENLARGED / scale**2) if request.mode == AS_IS else comparison.MOST_SHOWN
        return (math.isqrt(most), True) if not request.size and h * w > most else (request.size, False)

    # ---- showing ----
    def names(self) -> dict[str, str]:
        """What the keys "other" and "network" of the result are called. Raises ValueError after an error."""
        shown = self._on_show()
        return {"network": shown.request.network, "other": str(shown.other)}

    def _on_show(self) -> Shown:
        if self.shown is None:
            raise ValueError("there is no picture to draw: the panel's status line says why")
        return self.shown

    def _paint(self) -> None:
        shown = self._on_show()
        request, result = shown.request, shown.result
        left = "other" if request.other else request.left
        self.viewer.show(
            (self._label(left), result.pictures()[left]),
            (self._label("network"), result.network),
            original=result.original,
            message=NO_NETWORK if result.network is None else "",
        )
        self.readout.value = readout.table(result, self.names(), request.damage, request.lpips)

    def _label(self, key: str) -> str:
        shown = self._on_show()
        name = key if key == "network" and shown.result.network is None else self.names().get(key, key)
        score = shown.result.scores.get(key)
        return f"{name}, {score['psnr_y']:.2f} dB" if score else name

    def _say(self, text: str, problem: bool = False) -> None:
        # Sign and words carry the meaning; the frame only draws the eye.
        style = "border-left: 4px solid #d55e00; padding-left: 8px" if problem else ""
        self._words = ("⚠ " if problem else "") + text.strip()
        words = html.escape(self._words)
        self.status.value = f"<div role='status' style='{style}; line-height: 1.4'>{words}</div>"

    def text(self) -> str:
        """The status line: what is on show, or what went wrong."""
        return self._words

    def figure(self, crop: tuple[int, int, int, int] | None = None) -> Figure:
        """The comparison on show, for places without a kernel; ``crop`` = (top, left, height, width) enlarges a part.

        Raises ValueError when nothing is on show.
        """
        shown = self._on_show()
        named = {self._label(key): picture for key, picture in shown.result.pictures().items()}
        title = f"{shown.request.photo}, x{shown.result.scale:g}, mode “{shown.request.mode}”"
        return show.side_by_side(named, crop=crop, title=title)


def in_words(error: Exception) -> str:
    """What went wrong, in one line; errors that are not ours are named by their kind."""
    text = " ".join(str(error).split())[:400]
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}".strip(": ")


def _check_part(part: Tensor, scale: float, request: Request) -> None:
    need = 16 if request.mode == AS_IS else math.ceil(16 * scale)
    if min(part.shape[-2:]) < need:
        raise ValueError(
            f"{request.photo} shows only {part.shape[-1]} x {part.shape[-2]} pixels; x{scale:g} in mode "
            f"“{request.mode}” needs at least {need} x {need}. Choose a larger part or another photo."
        )


def _note(request: Request, rgb: np.ndarray, part: Tensor, result: Comparison, cut: bool) -> str:
    h, w = part.shape[-2:]
    text = f"{w} x {h} pixels of {request.photo}, x{result.scale:g}."
    if cut:
        whole = f"{rgb.shape[1]} x {rgb.shape[0]}"
        text = f"{request.photo} is {whole} pixels: too large at x{result.scale:g}, so {w} x {h} are shown."
    if result.reduced > 1:
        size = f"{round(w * result.scale)} x {round(h * result.scale)}"
        text += (
            f" The enlarged picture of {size} pixels is shown {result.reduced:.1f} times smaller, which hides fine"
            " differences: “Save enlarged photo” keeps every pixel, and a smaller part shows them."
        )
    return text


def explorer_panel(photos: Photos | None = None, device: str = "auto") -> ComparisonPanel:
    """Every network against bicubic or another, on the bundled photos (or ``photos``) and the reader's own.

    See :class:`nbhelpers.explorer.ExplorerPanel`.
    """
    from .explorer import ExplorerPanel  # which builds on this file

    return ExplorerPanel(named_photos(photos), device)


def compare_panel(
    model: nn.Module | Mapping[str, nn.Module],
    photos: Photos | None = None,
    name: str = "network",
    device: str = "auto",
) -> ComparisonPanel:
    """This network (or several, by name) against bicubic or each other on a chosen photo.

    A model is a plain module with attribute ``scale``; it is put into evaluation mode on ``device``.
    """
    networks = dict(model) if isinstance(model, Mapping) else {name: model}
    return ComparisonPanel(networks, named_photos(photos), device)
