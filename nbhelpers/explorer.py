"""The explorer: every network on any photo, the reader's own photos and network files, comparisons saved to files."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np

from . import checkpoints, inference, runtime, saving
from .deploy_scales import is_part
from .images import ImageError, flattened, read_picture, save_image, to_uint8
from .jobs import Cancelled, Job, Worker
from .models.external import SUFFIXES
from .panel import Photo, read_photo
from .panels import ComparisonPanel, in_words

NETWORK_SUFFIXES = (*SUFFIXES, *checkpoints.EXPORTED)
MOST_SENT = 200_000_000  # bytes of a file handed to the browser; larger ones stay on the kernel's disk


class ExplorerPanel(ComparisonPanel):
    """All networks found on this machine, and what the reader adds; build it with ``panels.explorer_panel``.

    Beside the controls of :class:`ComparisonPanel`: ``file, trusted, load`` for network files, ``save_png, save_webp,
    save_html, save_photo``. Photos and network files may also be dropped on the viewer.
    """

    def __init__(self, photos: Mapping[str, Photo], device: str = "auto"):
        self.saver = Worker(lambda job: self._say("Saving …"))
        super().__init__(found_networks(str(runtime.pick_device(device))), photos, device)
        self.viewer.takes_files = True
        self.viewer.on_files = self.add_files
        self.viewer.on_receiving = self._receiving
        self.load.on_click(lambda button: self.add_network(self.file.value))

    # ---- layout ----
    def _make_controls(self) -> None:
        super()._make_controls()
        self.file = widgets.Text(placeholder="path of .pth, .safetensors, .onnx, .pt2", layout={"width": "auto"})
        self.trusted = widgets.Checkbox(description="I trust its maker (.pt2 can run code)", indent=False)
        self.load = widgets.Button(description="Load network", layout={"width": "auto"})
        self.saved_as = []
        for suffix, title in ((".png", "PNG"), (".webp", "WebP that flickers"), (".html", "HTML that wipes")):
            button = widgets.Button(description=title, icon="download", layout={"width": "auto"})
            button.on_click(lambda _, suffix=suffix: self.save(self._file_name(suffix), download=True))
            setattr(self, f"save_{suffix[1:]}", button)
            self.saved_as.append(button)
        self.save_photo = widgets.Button(description="Save enlarged photo", icon="download", layout={"width": "auto"})
        self.save_photo.on_click(lambda _: self.save_enlarged(self._file_name(".png", "enlarged"), download=True))

    def _groups(self) -> dict[str, list[widgets.Widget]]:
        return super()._groups() | {"Network from a file": [self.file, self.trusted, self.load]}

    def _below(self) -> list[widgets.Widget]:
        row = [widgets.Label("Save comparison:"), *self.saved_as, self.save_photo]
        return [widgets.Box(row, layout={"flex_flow": "row wrap", "align_items": "center"}), *super()._below()]

    # ---- files from the reader ----
    def _receiving(self, name: str, done: int, size: int) -> None:
        if size > 2**21:
            self._say(f"Receiving {name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB")

    def add_files(self, files: Sequence[tuple[str, bytes | str]]) -> None:
        """Offer photos and networks; each is (file name, content), or (file name, what was wrong with it).

        The first new one is shown; what cannot be read is told in words.
        """
        if not files:
            self._say("What was dropped holds no file: save the picture first, then drop the file.", problem=True)
            return
        self.worker.start(functools.partial(self._read_files, _numbered(files)), self._take)

    def _read_files(self, files: Mapping[str, bytes | str], job: Job) -> tuple[dict, dict, list[str]]:
        """Photos, networks and problems, from the worker's thread."""
        photos, networks, problems = {}, {}, []
        folder = runtime.RUNS / "uploads"
        for name, data in files.items():  # first, for some networks are two files
            if Path(name).suffix.lower() in (*NETWORK_SUFFIXES, ".json") and isinstance(data, bytes):
                with runtime.atomic_path(folder / name) as part:
                    part.write_bytes(data)
        for done, (name, data) in enumerate(files.items()):
            job.stage(f"reading {name}")
            job.step(done, len(files))
            try:
                if isinstance(data, str):
                    raise ImageError(name, data)
                if Path(name).suffix.lower() in NETWORK_SUFFIXES:
                    networks |= self._read_network(folder / name)
                elif Path(name).suffix.lower() != ".json":
                    photos[name] = _decoded(name, data)
            except Exception as error:  # of whatever class: it is the reader's file
                problems.append(in_words(error))
        return photos, networks, problems

    def _take(self, outcome: object) -> None:
        self.working.layout.display = "none"
        if isinstance(outcome, Exception):
            self._say("Cancelled." if isinstance(outcome, Cancelled) else in_words(outcome), problem=True)
            return
        photos, networks, problems = outcome
        added = len(photos) + len(networks)
        if problems:
            self._remark = f"{added} added, {len(problems)} not: " + "; ".join(problems) + "."
        if not added:
            self._say(self._remark, problem=True)
            self._remark = ""
            return
        with self.quietly():
            self._offer(photos, networks)
        self.update()

    def _offer(self, photos: Mapping[str, Photo], networks: Mapping[str, object]) -> None:
        if photos:
            self.photos = {**photos, **{k: v for k, v in self.photos.items() if k not in photos}}
            self.photo.options = list(self.photos)
            self.photo.value = next(iter(photos))
        if networks:
            self._networks = {**networks, **{k: v for k, v in self._networks.items() if k not in networks}}
            self.network.options = list(self._networks)
            self.network.value = next(iter(networks))
            self._offer_left_sides()

    def add_photo(self, name: str, photo: Photo) -> None:
        """Offer one more photo and show it: a path, or uint8 (h, w, 3). Raises ImageError when it cannot be read."""
        read_photo(photo)
        with self.quietly():
            self._offer({name: photo}, {})
        self.update()

    def add_network(self, path: str | Path) -> None:
        """Offer the network of a weight or exported file and show it; what is wrong with it is told in words."""
        path = Path(str(path).strip()).expanduser()
        if not path.name:
            self._say("Write the path of a network file first.", problem=True)
            return

        def read(job: Job) -> tuple[dict, dict, list[str]]:
            job.stage(f"loading {path.name}")
            return {}, self._read_network(path), []

        self.worker.start(read, self._take)

    def _read_network(self, path: Path) -> dict[str, object]:
        if not path.is_file():
            raise ValueError(f"{path} is a folder, not a network" if path.is_dir() else f"no such file: {path}")
        if path.suffix.lower() == ".pt2" and not self.trusted.value:
            raise ValueError(f"{path.name} can run code when it is opened: tick “I trust its maker” first")
        return {path.name: inference.get_model(path)}

    # ---- files for the reader ----
    def _file_name(self, suffix: str, what: str = "") -> Path:
        request = self.shown.request if self.shown else self._request()
        words = (Path(request.photo or "photo").stem, what or request.left, "" if what else "and", request.network)
        name = re.sub(r"[^\w.-]+", "_", "_".join(filter(None, words)))
        return runtime.RUNS / "comparisons" / f"{name}{suffix}"

    def save(self, path: str | Path, download: bool = False) -> None:
        """Write what the viewer shows: .png (side by side), .webp (animated), .html (wipes without a kernel).

        With ``download`` the file is also given to the reader's browser. Problems are told in words.
        """
        try:
            on_show = self._on_show()
            names = f"{on_show.request.left} and {on_show.request.network}"
            title = f"{on_show.request.photo}, x{on_show.result.scale:g}: {names}"
            saved = saving.Saved.of(self.viewer, title, self.readout.value)
        except ValueError as error:
            self._say(in_words(error), problem=True)
            return

        def work(job: Job) -> Path:
            with runtime.atomic_path(Path(path)) as part:
                part.write_bytes(saving.encode(saved, path))
            return Path(path)

        self.saver.start(work, functools.partial(self._saved, download))

    def save_enlarged(self, path: str | Path, download: bool = False) -> None:
        """Write the right side's enlarged photo with all its pixels, as PNG, JPEG or WebP by the suffix of ``path``."""
        try:
            result = self._on_show().result
            if result.network is None:
                raise ValueError("there is no network's picture to save")
        except ValueError as error:
            self._say(in_words(error), problem=True)
            return

        def work(job: Job) -> Path:
            return save_image(to_uint8(result.network) if result.whole is None else result.whole, path)

        self.saver.start(work, functools.partial(self._saved, download))

    def _saved(self, download: bool, outcome: object) -> None:
        if isinstance(outcome, Exception):
            self._say(f"Not saved: {in_words(outcome)}", problem=True)
            return
        size, where = outcome.stat().st_size, outcome
        if outcome.is_relative_to(runtime.RUNS.parent):
            where = outcome.relative_to(runtime.RUNS.parent)
        text = f"Saved as {where} ({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'})"
        if download and size <= MOST_SENT:
            kind = {".html": "text/html", ".webp": "image/webp"}.get(outcome.suffix, "image/png")
            self.viewer.download(outcome.name, kind, outcome.read_bytes())
            text += "; your browser got it too"
        self._say(f"{text}.")


def found_networks(device: str) -> dict[str, object]:
    """How to load each network of data/checkpoints, ours and exported ones: {name: function}."""
    found = {name: functools.partial(checkpoints.cached, name, device) for name in checkpoints.available()}
    for path in sorted(runtime.CHECKPOINTS.glob("*.onnx")):
        if not (is_part(path) and path.stem.endswith("renderer")):
            found[path.name] = functools.partial(checkpoints.load, path)
    return found


def _numbered(files: Sequence[tuple[str, bytes | str]]) -> dict[str, bytes | str]:
    """Files by name; a name that comes twice gets a number, since telephones number their photos alike."""
    found: dict[str, bytes | str] = {}
    for name, data in files:
        stem, suffix, count = Path(name).stem, Path(name).suffix, 1
        while name in found:
            count += 1
            name = f"{stem} ({count}){suffix}"
        found[name] = data
    return found


def _decoded(name: str, data: bytes) -> np.ndarray:
    if not data:
        raise ImageError(name, "the file is empty (0 bytes)")
    stream = io.BytesIO(data)
    stream.name = name
    return flattened(read_picture(stream))
