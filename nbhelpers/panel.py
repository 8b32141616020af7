"""What all panels share: the outer box, the status line, and the photos they offer."""

from __future__ import annotations

import functools
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from torch import Tensor

from . import runtime
from .images import find_images, flattened, read_picture, to_uint8

Photo = Path | np.ndarray
Photos = Mapping[str, Photo | str | Tensor] | Sequence[str | Path]  # as a reader gives them


@functools.lru_cache(maxsize=4)
def _read_file(path: Path) -> np.ndarray:
    return flattened(read_picture(path))


def read_photo(photo: Photo) -> np.ndarray:
    """uint8 (h, w, 3); of a file, transparent parts are made opaque. Raises ImageError."""
    return _read_file(photo) if isinstance(photo, Path) else photo


class Root(widgets.VBox):
    """The panel's outer box; its text form is short and always the same, so that saved notebooks stay comparable."""

    def __repr__(self) -> str:
        return "Interactive panel: needs a running kernel; the figure beside it shows the same comparison."


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
        self.image.value, self.image.layout.display = data.getvalue(), None

    def _draw_nothing(self, error: Exception) -> None:
        """Words in the place of the picture; an empty image would show as a broken one."""
        self.image.value, self.image.layout.display = b"", "none"
        self._say(f"⚠ {error}")


def picture_view() -> widgets.Image:
    """An empty image as wide as its page at most."""
    return widgets.Image(format="png", layout={"max_width": "100%", "width": "auto", "object_fit": "contain"})


def bundled_photos() -> dict[str, Path]:
    """The photos that come with the workbook, validation photos first, as ``{"val/name": path}``."""
    folders = [runtime.PHOTOS / part for part in ("val", "train")]
    files = [path for folder in folders if folder.is_dir() for path in find_images(folder)]
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def named_photos(photos: Photos | None) -> dict[str, Photo]:
    """What a panel is given as photos, by name: files, arrays or tensors; None: the bundled ones."""
    if photos is None:
        return bundled_photos()
    if isinstance(photos, Mapping):
        return {str(k): _photo(v) for k, v in photos.items()}
    return {Path(p).stem: Path(p) for p in photos}


def _photo(photo: Photo | str | Tensor) -> Photo:
    if isinstance(photo, Tensor):
        return to_uint8(photo)
    return Path(photo) if isinstance(photo, str) else photo
