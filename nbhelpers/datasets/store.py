"""Numbered picture files on disk: the store, its journal, report and contact sheet. `tiles` fills it."""

from __future__ import annotations

import io
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from nbhelpers.runtime import atomic_path

JOURNAL = "tiles.jsonl"
SHEET = "contact_sheet.jpg"
FORMAT = 1


class TileError(RuntimeError):
    """Cutting cannot start or go on; the message says why and what to do. Finished tiles are kept."""


@dataclass
class TileReport:
    """What a run did. `tiles` counts all tiles in `dst`, `new_tiles` those of this run; `failed` lists the
    photos that gave none as (photo, reason) with reason "too small: …" or what is wrong with the file."""

    dst: Path
    photos: int = 0
    resumed: int = 0
    tiles: int = 0
    new_tiles: int = 0
    flat: int = 0
    halved: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    contact_sheet: Path | None = None

    def __str__(self) -> str:
        small = sum(why.startswith("too small") for _, why in self.failed)
        lines = [
            f"{self.tiles} tiles in {self.dst} ({self.new_tiles} new, {self.seconds:.1f} s) from "
            f"{self.photos - len(self.failed)} of {self.photos} photos ({self.resumed} done before)",
            f"dropped for too little detail: {self.flat} tiles; halved by camera model: {self.halved} photos",
            f"skipped photos: {len(self.failed) - small} damaged, {small} too small",
        ]
        lines += [f"  {photo}: {why}" for photo, why in self.failed[:20]]
        if len(self.failed) > 20:
            lines.append(f"  … and {len(self.failed) - 20} more, see {self.dst / JOURNAL}")
        if self.contact_sheet:
            lines.append(f"contact sheet: {self.contact_sheet}")
        # File names that are not valid Unicode cannot be printed as they are.
        return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


class TileStore:
    """Numbered PNG files, `per_folder` to a folder: number 12678 is `root/12/12678.png`.

    Useful for any large set of pictures. Without `start` it goes on after the highest number in `root`.
    """

    def __init__(self, root: str | Path, per_folder: int = 1000, start: int | None = None):
        self.root, self.per_folder = Path(root), per_folder
        self.next_number = self._after_last() if start is None else start

    def _after_last(self) -> int:
        folders = [p for p in self.root.glob("*") if p.name.isdigit() and p.is_dir()]
        numbers = (int(p.stem) for folder in folders for p in folder.glob("*.png") if p.stem.isdigit())
        return max(numbers, default=-1) + 1

    def path(self, number: int) -> Path:
        """Where picture `number` lies."""
        return self.root / str(number // self.per_folder) / f"{number}.png"

    def save(self, image: np.ndarray | bytes) -> Path:
        """Write uint8 (h, w, 3), or a ready PNG as bytes, under the next number; returns its path."""
        data = image if isinstance(image, bytes) else encode_png(image)
        path = self.path(self.next_number)
        with atomic_path(path) as part:
            part.write_bytes(data)
        self.next_number += 1
        return path

    def drop_rest(self) -> None:
        """Delete what a killed run left behind: files from the next number on, and half-written ones."""
        number = self.next_number
        while self.path(number).exists():
            self.path(number).unlink()
            number += 1
        for part in self.path(number).parent.glob(".*.png"):
            part.unlink()


def encode_png(rgb: np.ndarray) -> bytes:
    """uint8 (h, w, 3) → a PNG file in memory."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="png")
    return buffer.getvalue()


def tile_paths(dst: str | Path) -> list[Path]:
    """Every finished tile of `dst` in number order, by the journal; tiles deleted by hand are left out.

    Raises TileError when `dst` holds no journal, or a damaged one.
    """
    settings, photos, _ = read_journal(Path(dst) / JOURNAL)
    store = TileStore(dst, settings["per_folder"], start=0)
    total = sum(len(entry["cuts"]) for entry in photos.values())
    return [path for path in map(store.path, range(total)) if path.exists()]


class Journal:
    """`tiles.jsonl`, append-only; `photos` maps a photo's key to its line, in order."""

    def __init__(self, dst: Path, settings: dict):
        self.path, self.photos = dst / JOURNAL, {}
        self.next_number = 0
        wanted = json.loads(json.dumps(settings))  # tuples become lists, as they come back from the file
        if self.path.exists():
            stored, self.photos, size = read_journal(self.path)
            _check_same(stored, wanted, dst)
            self.next_number = sum(len(entry["cuts"]) for entry in self.photos.values())
            # What follows the last whole line is from a run that was killed while it wrote.
            with self.path.open("r+b") as file:
                file.truncate(size)
        else:
            if dst.is_dir() and any(not p.name.startswith(".") for p in dst.iterdir()):
                raise TileError(f"{dst} is not empty and has no {JOURNAL}: choose an empty or new folder")
            with atomic_path(self.path) as part:
                part.write_text(json.dumps({"format": FORMAT, "settings": wanted}) + "\n", encoding="ascii")

    def append(self, key: str, cuts: list[tuple[int, int, int]], **facts: object) -> None:
        """Add a finished photo with the (level, top, left) of its tiles, which took the next numbers."""
        entry = {"photo": key, "first": self.next_number, "cuts": cuts, **facts}
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.photos[key] = entry
        self.next_number += len(cuts)


def read_journal(path: Path) -> tuple[dict, dict[str, dict], int]:
    """Return (settings, lines by photo, bytes up to the last whole line)."""
    if not path.exists():
        raise TileError(f"{path.parent} has no {JOURNAL}: it is not a finished or begun tile folder")
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    try:
        head, *lines = [json.loads(line) for line in data[:size].splitlines()]
        return head["settings"], {entry["photo"]: entry for entry in lines}, size
    except (ValueError, KeyError, TypeError) as error:
        raise TileError(f"{path} is damaged ({error}): cut into a new folder") from error


def _check_same(stored: dict, wanted: dict, dst: Path) -> None:
    other = [name for name in wanted if stored.get(name) != wanted[name]]
    if other:
        both = "; ".join(f"{name} was {stored.get(name)!r}, now {wanted[name]!r}" for name in other)
        raise TileError(f"{dst} was begun with other settings ({both}): repeat them or take another folder")


def contact_sheet(dst: str | Path, count: int = 64, side: int = 128, seed: int = 0) -> Path:
    """Write `contact_sheet.jpg` into `dst`: a random sample of up to `count` tiles, each side×side pixels.

    Raises TileError when `dst` holds no tiles.
    """
    paths = tile_paths(dst)
    if not paths:
        raise TileError(f"{dst} holds no tiles, so there is nothing to show")
    chosen = random.Random(seed).sample(range(len(paths)), min(count, len(paths)))
    paths = [paths[i] for i in sorted(chosen)]
    columns = int(np.ceil(np.sqrt(len(paths))))
    gap, rows = 4, -(-len(paths) // columns)
    size = [n * (side + gap) + gap for n in (columns, rows)]
    sheet = Image.new("RGB", (size[0], size[1]), "white")
    for index, path in enumerate(paths):
        with Image.open(path) as tile:
            thumb = tile.resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(thumb, tuple(gap + n * (side + gap) for n in (index % columns, index // columns)))
    with atomic_path(Path(dst) / SHEET) as part:
        sheet.save(part, format="jpeg", quality=90)
    return Path(dst) / SHEET
