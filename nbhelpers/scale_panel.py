"""A live slider of the scale, 1.0 to 8.0: bicubic beside a network that renders any scale from features kept."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
from matplotlib.figure import Figure
from torch import Tensor

from . import degrade, runtime, show
from .comparison import crop_window, timed
from .feature_cache import FeatureCache
from .images import ImageError, load_image, to_tensor
from .models.continuous import ContinuousSR
from .panel import Panel, Photo, Photos, named_photos
from .wipe import WipeViewer

SIDE = 96  # of the small picture, in pixels
SHRINK = 4  # a photo is made smaller by this first: its pixels then hold detail that is worth enlarging
LOW, HIGH, START = 1.0, 8.0, 4.0


@dataclass(frozen=True)
class ScaleView:
    """What is on show: ``small`` and its enlargements "3 h w" in [0, 1]; milliseconds, ``encoded`` says if features
    had to be made (their time is then part of ``network_ms``)."""

    scale: float
    small: Tensor
    bicubic: Tensor
    network: Tensor
    bicubic_ms: float
    network_ms: float
    encoded: bool


class ScalePanel(Panel):
    """See :func:`scale_panel`. Controls: ``photo, network, scale, across, down``; views: ``viewer, status``; ``result``
    is the last :class:`ScaleView`, None after an error; ``cache`` holds the features."""

    def __init__(self, networks: Mapping[str, ContinuousSR], photos: Mapping[str, Photo], device: str = "auto"):
        self.device = runtime.pick_device(device)
        self.precision = runtime.pick_precision(self.device)
        self.networks = {name: model.to(self.device).eval() for name, model in networks.items()}
        self.photos, self.cache, self.result = dict(photos), FeatureCache(), None
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "5em"}}
        self.photo = widgets.Dropdown(options=list(self.photos), description="Photo", **wide)
        self.network = widgets.Dropdown(options=list(self.networks), description="Network", **wide)
        self.network.layout.display = None if len(self.networks) > 1 else "none"
        self.scale = widgets.FloatSlider(
            min=LOW, max=HIGH, value=START, step=0.05, description="Scale", readout_format=".2f", **wide
        )
        slider = functools.partial(widgets.IntSlider, min=0, max=100, value=50, **wide)
        self.across, self.down = slider(description="Across, %"), slider(description="Down, %")
        self.viewer, self.status = WipeViewer(), widgets.HTML()
        controls = [self.scale, self.photo, self.network, self.across, self.down]
        self._arrange(controls, self.viewer)
        self._follow(controls)
        self.update()

    def update(self) -> None:
        """Render for the controls as they stand; problems appear in words, not as tracebacks."""
        try:
            self.result = self._render()
        except (ImageError, ValueError) as error:
            self.result = None
            self.viewer.show(("bicubic", None), ("network", None), message="Nothing to show, see the line above.")
            self._say(f"⚠ {error}")
            return
        self.viewer.show(("bicubic", self.result.bicubic), (self.network.value, self.result.network))
        self._say(self.text())

    def _render(self) -> ScaleView:
        small, scale, model = self._small(), self.scale.value, self.networks[self.network.value]
        misses = self.cache.misses
        bicubic, bicubic_ms = timed(lambda: degrade.upscale_bicubic(small, scale).clamp(0, 1))
        with runtime.autocast(self.device, self.precision):
            network, network_ms = timed(lambda: self.cache.upscale(model, small, scale).cpu())
        return ScaleView(scale, small, bicubic, network, bicubic_ms, network_ms, self.cache.misses > misses)

    def _small(self) -> Tensor:
        photo = _shrunk(self.photos[self.photo.value])
        return photo[
            (slice(None), *crop_window(*photo.shape[-2:], SIDE, self.across.value / 100, self.down.value / 100))
        ]

    def text(self) -> str:
        """The line of sizes and times under the controls. Raises ValueError after an error."""
        r = self._shown()
        sizes = " to ".join(f"{x.shape[-1]} x {x.shape[-2]}" for x in (r.small, r.network))
        how = "encoded and rendered" if r.encoded else "rendered from kept features"
        return f"x{r.scale:.2f}: {sizes} pixels; bicubic {r.bicubic_ms:.0f} ms, network {r.network_ms:.0f} ms ({how})"

    def figure(self) -> Figure:
        """What is shown, for places without a kernel. Raises ValueError after an error."""
        r = self._shown()
        pictures = {"bicubic": r.bicubic, self.network.value: r.network}
        return show.side_by_side(pictures, title=f"{self.photo.value}, x{r.scale:.2f}", height=3.6)

    def _shown(self) -> ScaleView:
        if self.result is None:
            raise ValueError("there is nothing to draw: the panel's status line says why")
        return self.result


@functools.lru_cache(maxsize=4)
def _from_file(path: Path) -> Tensor:
    return _smaller(load_image(path))


def _shrunk(photo: Photo) -> Tensor:
    """A photo, smaller by ``SHRINK``, "3 h w" in [0, 1]."""
    return _from_file(photo) if isinstance(photo, Path) else _smaller(to_tensor(photo))


def _smaller(photo: Tensor) -> Tensor:
    return degrade.downscale(degrade.crop_to_multiple(photo, SHRINK), SHRINK).clamp(0, 1)


def scale_panel(
    model: ContinuousSR | Mapping[str, ContinuousSR],
    photos: Photos | None = None,
    name: str = "network",
    device: str = "auto",
) -> ScalePanel:
    """A slider of the scale over bicubic and a network for any scale (or several, by name), side by side.

    The network sees ``SIDE`` x ``SIDE`` pixels of a photo (default: the bundled ones) made ``SHRINK`` times smaller.
    Each small picture is encoded once; a move of the slider only renders. Raises ValueError for a network for one
    scale.
    """
    networks = dict(model) if isinstance(model, Mapping) else {name: model}
    for name, network in networks.items():
        if not isinstance(network, ContinuousSR):
            raise ValueError(
                f"{name!r} enlarges by {network.scale} only; a slider of the scale needs a network for any"
            )
    return ScalePanel(networks, named_photos(photos), device)
