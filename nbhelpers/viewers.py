"""What happens inside a network: the output of any of its layers for a photo, attention factors among them; kernels.

:func:`feature_panel` and :func:`kernel_panel` return an object with ``.root`` to display and named controls, as the
panels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import panel, show
from .block_orthogonal import PLACEMENTS, BlockOrthogonalConv2d, orthogonality_error, parameter_counts
from .comparison import crop_window
from .images import ImageError, to_tensor

SHOWN = 12  # channels on one page
SIDE = 128  # of the part of a photo that the network sees


def layers(model: nn.Module) -> list[str]:
    """Names of the layers that one pass calls, in this order: those whose output is one batch "b c h w"."""
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, out: object) -> None:
            if isinstance(out, Tensor) and out.dim() == 4 and name not in called:
                called.append(name)

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if name and not any(m.children())]
    _run(model, torch.zeros(3, 16, 16), {m: note(name) for name, m in leaves})
    return called


def output_of(model: nn.Module, picture: Tensor, layer: str) -> Tensor:
    """Output "c h w" of a layer for a picture "3 h w" in [0, 1]. Raises ValueError for a layer that is not called."""
    modules, found = dict(model.named_modules()), []
    if layer not in modules:
        raise ValueError(f"layer {layer!r} is unknown; the network has {', '.join(layers(model))}")
    _run(model, picture, {modules[layer]: lambda module, given, out: found.append(out)})
    if not found:
        raise ValueError(f"layer {layer!r} is not called; choose one of {', '.join(layers(model))}")
    return found[0][0].float()


@torch.no_grad()
def _run(model: nn.Module, picture: Tensor, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        model.eval()(picture[None])
    finally:
        for handle in handles:
            handle.remove()


class FeaturePanel(panel.Panel):
    """Choosers of photo, layer and page around a picture of channels; see :func:`feature_panel`.

    Controls: ``photo, layer, page``; views: ``image, status``; ``maps`` holds what is shown, "c h w", None after an
    error.
    """

    def __init__(self, model: nn.Module, photos: Mapping[str, panel.Photo], layer: str | None = None):
        self.model, self.photos, self.maps = model, dict(photos), None
        names = layers(model)
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "5em"}}
        self.photo = widgets.Dropdown(options=list(self.photos), description="Photo", **wide)
        self.layer = widgets.Dropdown(options=names, value=layer or names[0], description="Layer", **wide)
        self.page = widgets.IntSlider(min=1, max=1, description="Page", **wide)
        self.image = panel.picture_view()
        self.status = widgets.HTML()
        self._arrange([self.photo, self.layer, self.page], self.image)
        self._follow([self.photo, self.layer])
        self.page.observe(lambda change: self._paint(), "value")
        self.update()

    def update(self) -> None:
        """Run the network for the controls as they stand; problems appear in words."""
        try:
            rgb = panel.read_photo(self.photos[self.photo.value])
            rows, columns = crop_window(*rgb.shape[:2], SIDE)
            self.maps = output_of(self.model, to_tensor(rgb[rows, columns]), self.layer.value)
        except (ImageError, ValueError, RuntimeError) as error:
            self.maps = None
            self._draw_nothing(error)
            return
        single = self.maps.shape[-2:] == (1, 1)
        self.page.max = 1 if single else -(-len(self.maps) // SHOWN)
        self._paint()

    def _paint(self) -> None:
        if self.maps is None:
            return
        c, h, w = self.maps.shape
        text = f"{self.layer.value}: {c} channels of {w} x {h} values, {self.maps.min():.2f} to {self.maps.max():.2f}"
        self._say(text)
        self._draw()

    def figure(self) -> Figure:
        """What is shown, for places without a kernel. Raises ValueError after an error."""
        if self.maps is None:
            raise ValueError("there is nothing to draw: the panel's status line says why")
        first = (self.page.value - 1) * SHOWN
        return show.feature_maps(self.maps, first, SHOWN)


def feature_panel(
    model: nn.Module,
    photos: panel.Photos | None = None,
    layer: str | None = None,
) -> FeaturePanel:
    """A viewer of every layer's output for the middle of a photo (default: the bundled ones).

    Channels are shown as pictures; factors that are one number per channel, as those of ECA-Lite, as bars.
    """
    return FeaturePanel(model, panel.named_photos(photos or None), layer)


class KernelPanel(panel.Panel):
    """Sliders that build the kernel of a block-orthogonal convolution; see :func:`kernel_panel`.

    Controls: ``num_matrices, r, placement``; views: ``image, status``; ``conv`` is the layer shown.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        self.sizes = (in_channels, out_channels, kernel_size)
        self.conv = self._build(1, 1, PLACEMENTS[0])  # says what is impossible
        most = in_channels * kernel_size**2 // out_channels
        divisors = [r for r in range(1, out_channels + 1) if out_channels % r == 0]
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "6em"}}
        self.num_matrices = widgets.IntSlider(min=1, max=most, description="matrices", **wide)
        self.r = widgets.SelectionSlider(options=divisors, description="blocks r", **wide)
        self.placement = widgets.Dropdown(options=PLACEMENTS, description="placement", **wide)
        self.image = panel.picture_view()
        self.status = widgets.HTML()
        controls = [self.num_matrices, self.r, self.placement]
        self._arrange(controls, self.image)
        self._follow(controls)
        self.update()

    def _build(self, *structure: object) -> BlockOrthogonalConv2d:
        with torch.random.fork_rng(devices=[]):  # the same numbers each time
            torch.manual_seed(0)
            return BlockOrthogonalConv2d(*self.sizes, *structure, bias=False).requires_grad_(False)

    def update(self) -> None:
        """Build the layer for the controls as they stand."""
        self.conv = self._build(self.num_matrices.value, self.r.value, self.placement.value)
        self._say(self.text())
        self._draw()

    def text(self) -> str:
        """Sizes of the kernel, channels it reads, and how far its blocks are from orthogonal."""
        counts, weight = parameter_counts(self.conv), self.conv.weight
        read = int(weight.abs().sum((0, 2, 3)).count_nonzero())
        return (
            f"{counts.free:,} free numbers, {counts.stored:,} stored, {counts.dense:,} in an ordinary kernel; "
            f"reads {read} of {self.sizes[0]} input channels; largest |QQᵀ − I| {orthogonality_error(self.conv):.0e}"
        )

    def figure(self) -> Figure:
        """What is shown, for places without a kernel."""
        m, r, placement = self.num_matrices.value, self.r.value, self.placement.value
        c_in, c_out, k = self.sizes
        name = f"num_matrices = {m}, r = {r}, {placement}: {c_out} x {c_in}·{k}·{k}"
        return show.kernel_matrices({name: self.conv.weight})


def kernel_panel(in_channels: int = 16, out_channels: int = 16, kernel_size: int = 3) -> KernelPanel:
    """The kernel of document 004's convolution as a picture, with sliders for its matrices and blocks.

    Raises BlockError for a kernel without room for a matrix.
    """
    return KernelPanel(in_channels, out_channels, kernel_size)
