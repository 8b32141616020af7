"""Where does cross-scale attention look? A panel with a place to choose on a photo, and the weights over the photo."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import show
from .comparison import crop_window
from .images import ImageError, to_tensor
from .models.continuous import ContinuousSR
from .models.lmf import LMLTE
from .panel import Panel, Photo, Photos, named_photos, picture_view, read_photo

SIDE = 96  # of the part of a photo that the network sees


@torch.no_grad()
def attention_at(model: LMLTE, picture: Tensor, row: int, column: int) -> dict[int, Tensor]:
    """Weights with which one pixel of a picture "3 h w" in [0, 1] asks all others: {s: map "h/s w/s" that sums to 1}.

    s is how much the map that is asked is shrunk. Raises ValueError for a network without cross-scale attention and
    a place outside the picture.
    """
    attention = getattr(model, "attention", None)
    if attention is None:
        raise ValueError("this network has no cross-scale attention; build an LMLTE with non_local_attn=True")
    h, w = picture.shape[-2:]
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"row {row}, column {column} lies outside the picture of {h}x{w} pixels")
    features = ContinuousSR.encode(model, picture[None])  # those of LMLTE have gone through the attention
    return dict(zip(attention.multi_scale, attention.weights(features, row, column), strict=True))


class AttentionPanel(Panel):
    """See :func:`attention_panel`. Controls: ``photo, across, down``; views: ``image, status``; ``maps`` is what
    :func:`attention_at` gives, None after an error."""

    def __init__(self, model: LMLTE, photos: Mapping[str, Photo]):
        self.model, self.photos, self.maps = model.eval(), dict(photos), None
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "5em"}}
        self.photo = widgets.Dropdown(options=list(self.photos), description="Photo", **wide)
        slider = functools.partial(widgets.IntSlider, min=0, max=100, value=50, **wide)
        self.across, self.down = slider(description="Across, %"), slider(description="Down, %")
        self.image = picture_view()
        self.status = widgets.HTML()
        controls = [self.photo, self.across, self.down]
        self._arrange(controls, self.image)
        self._follow(controls)
        self.update()

    def update(self) -> None:
        """Look from the place that the sliders give; problems appear in words."""
        try:
            rgb = read_photo(self.photos[self.photo.value])
            self.picture = to_tensor(rgb[crop_window(*rgb.shape[:2], SIDE)])
            h, w = self.picture.shape[-2:]
            self.place = round((h - 1) * self.down.value / 100), round((w - 1) * self.across.value / 100)
            self.maps = attention_at(self.model, self.picture, *self.place)
        except (ImageError, ValueError) as error:
            self.maps = None
            self._draw_nothing(error)
            return
        self._say(self.text())
        self._draw()

    def text(self) -> str:
        """How spread the weights are: how many places hold half of them. Raises ValueError after an error."""
        parts = []
        for scale, weights in self._shown().items():
            ordered = weights.flatten().sort(descending=True).values.cumsum(0)
            parts.append(
                f"1/{scale}: half of the weight on {int((ordered < 0.5).sum()) + 1} of {weights.numel()} places"
            )
        return f"row {self.place[0]}, column {self.place[1]}; " + "; ".join(parts)

    def figure(self) -> Figure:
        """What is shown, for places without a kernel. Raises ValueError after an error."""
        maps = {f"at 1/{s}": (self.picture, weights / weights.max()) for s, weights in self._shown().items()}
        fig = show.heat_maps(maps, "weight, parts of the largest")
        for axis in fig.axes[: len(maps)]:
            style = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2}
            axis.plot(self.place[1] + 0.5, self.place[0] + 0.5, color=show.COLOURS[2], **style)
        return fig

    def _shown(self) -> dict[int, Tensor]:
        if self.maps is None:
            raise ValueError("there is nothing to draw: the panel's status line says why")
        return self.maps


def attention_panel(model: LMLTE, photos: Photos | None = None) -> AttentionPanel:
    """A viewer of cross-scale attention for the middle of a photo (default: the bundled ones); a ring marks the pixel
    that asks."""
    return AttentionPanel(model, named_photos(photos or None))
