"""Cut folders of photos into lossless PNG tiles, once, so that training only has to load them.

    python -m nbhelpers tiles PHOTOS TILES --tile 256 --per-image 40 --shrink-cameras "Redmi,SM-G9"

Each photo is shrunk by every level (1, 2, 4 …), each level is laid out in a grid of tiles that do not
overlap, and grid cells are taken in a random order, turn by turn from each level, until `per_image` cells
with enough detail are found. The order depends only on the seed and on the photo's path relative to its root,
and numbers are given in the sorted order of the photos, so the number of workers changes nothing. Tile 12678
is `12/12678.png`.

`tiles.jsonl` in the tile folder is the journal: the settings, then one line per finished photo. A run that
was killed goes on from there. It also says from which photo, level and place each tile came.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from nbhelpers import runtime
from nbhelpers.datasets.store import Journal, TileError, TileReport, TileStore, contact_sheet, encode_png
from nbhelpers.images import camera_model, find_images, read_picture

MIN_DETAIL = 4.0  # grey levels per pixel; drops plain sky and walls, keeps soft foliage and skin
MAX_WORKERS = 61  # the most that a process pool can hold on Windows


@dataclass(frozen=True)
class TileSettings:
    """What decides which tiles come out. Stored in the journal: a resumed run must ask for the same.

    Attributes:
        tile: side of a tile in pixels.
        per_image: most tiles from one photo over all levels; None takes every grid cell.
        levels: factors by which a photo is shrunk before cutting, 1 being the photo itself.
        min_detail: tiles whose `detail` (grey levels per pixel) is lower are dropped.
        shrink_cameras: parts of EXIF camera models, case ignored; their photos are halved first.
        per_folder: tiles in one folder.
        seed: decides which grid cells are taken.
    """

    tile: int = 256
    per_image: int | None = None
    levels: tuple[int, ...] = (1, 2, 4)
    min_detail: float = MIN_DETAIL
    shrink_cameras: tuple[str, ...] = ()
    per_folder: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tile < 8:
            raise ValueError(f"tile={self.tile}: a tile needs at least 8 pixels a side")
        if self.per_image is not None and self.per_image < 1:
            raise ValueError(f"per_image={self.per_image}: give a number from 1, or None for every tile")
        if not self.levels or min(self.levels) < 1 or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels={self.levels}: give different whole factors from 1, for example 1,2,4")
        if not self.min_detail >= 0:
            raise ValueError(f"min_detail={self.min_detail}: give 0 (keep all) or more")
        if self.per_folder < 1:
            raise ValueError(f"per_folder={self.per_folder}: give a number from 1")


def cut_tiles(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    tile: int = 256,
    per_image: int | None = None,
    levels: Sequence[int] = (1, 2, 4),
    min_detail: float = MIN_DETAIL,
    shrink_cameras: Sequence[str] = (),
    per_folder: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> TileReport:
    """Cut the photos below `src` into 8-bit RGB PNG tiles of tile×tile pixels in `dst`, or go on with that.

    Damaged and too small photos are reported and skipped. The settings are explained at `TileSettings`. A
    script that calls this with several workers needs the usual `if __name__ == "__main__":`, since processes
    are spawned.

    Args:
        src: folders (searched recursively) or photos.
        workers: processes; None takes the CPU count, 1 stays in this process.
        limit: look only at the first `limit` photos. Not a setting: a later run may go further.

    Raises:
        ValueError: a setting that makes no sense.
        FileNotFoundError: a missing `src`.
        TileError: no photo found, `dst` holds something else or was begun with other settings, the disk is
            full, a worker was killed.
    """
    settings = TileSettings(tile, per_image, tuple(levels), float(min_detail), tuple(shrink_cameras), per_folder, seed)
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give a number from 1, or None")
    start = time.perf_counter()
    dst = Path(dst)
    jobs = _list_photos([src] if isinstance(src, (str, Path)) else list(src), dst)[:limit]
    try:
        journal = Journal(dst, asdict(settings))
        before = len(journal.photos)
        todo = [job for job in jobs if job.key not in journal.photos]
        store = TileStore(dst, per_folder, start=journal.next_number)
        store.drop_rest()
        _cut_all(todo, settings, store, journal, _pick_workers(workers, len(todo)), progress)
        sheet = contact_sheet(dst, seed=seed) if journal.next_number else None
    except OSError as error:
        raise TileError(_explain_os_error(error, dst)) from error
    report = _report(dst, jobs, journal, before)
    report.seconds, report.contact_sheet = time.perf_counter() - start, sheet
    return report


def detail(tile: np.ndarray) -> float:
    """How much a tile holds: standard deviation of its luma gradient, in grey levels (of 255) per pixel.

    Luma is 0.299 R + 0.587 G + 0.114 B of uint8 (h, w, 3). The gradient is its differences to the right and
    lower neighbour; the deviations in both directions are added as squares. A plain area and an even ramp,
    such as a clear sky, give 0; white noise of deviation s gives about 2 s.
    """
    luma = tile.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    right, down = np.diff(luma, axis=1), np.diff(luma, axis=0)
    return float(np.sqrt(right.var() + down.var()))


# --- one photo --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One photo; `key` names it in the journal, `rel`, its path relative to its root, seeds the order."""

    path: Path
    key: str
    rel: str


@dataclass
class _Cut:
    """Tiles of one photo as PNG files in memory; (level, top, left) of each, in pixels of its level."""

    pngs: list[bytes] = field(default_factory=list)
    cuts: list[tuple[int, int, int]] = field(default_factory=list)
    flat: int = 0
    halved: bool = False
    problem: str | None = None


def _cut_photo(job: _Job, settings: TileSettings) -> _Cut:
    """Runs in a worker: decode, shrink, choose, encode."""
    try:
        image = Image.fromarray(read_picture(job.path).rgb)
        model = (camera_model(job.path) or "") if settings.shrink_cameras else ""
    except Exception as error:  # image decoders raise many kinds; one bad photo must not stop the others
        return _Cut(problem=str(error).removeprefix(f"{job.path}: ") or type(error).__name__)
    size = f"{image.width}×{image.height}"
    result = _Cut(halved=any(name.lower() in model.lower() for name in settings.shrink_cameras))
    image = _shrink(image, 2) if result.halved else image
    photos = {level: np.asarray(_shrink(image, level)) for level in settings.levels}
    order = _cell_order(job.rel, {level: photo.shape[:2] for level, photo in photos.items()}, settings)
    if not order:
        halved = ", halved first" if result.halved else ""
        result.problem = f"too small: {size} pixels{halved}, for tiles of {settings.tile}"
    side = settings.tile
    for level, top, left in order:
        tile = photos[level][top : top + side, left : left + side]
        if detail(tile) < settings.min_detail:
            result.flat += 1
            continue
        result.pngs.append(encode_png(tile))
        result.cuts.append((level, top, left))
        if len(result.cuts) == settings.per_image:
            break
    return result


def _shrink(image: Image.Image, factor: int) -> Image.Image:
    """Pillow's bicubic, antialiased; up to factor-1 pixels at the right and lower border are left out."""
    width, height = image.width // factor, image.height // factor
    if factor == 1 or not (width and height):
        return image if factor == 1 else image.crop((0, 0, 0, 0))
    box = (0, 0, width * factor, height * factor)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _cell_order(rel: str, shapes: dict[int, tuple[int, int]], settings: TileSettings) -> list[tuple[int, int, int]]:
    """All grid cells as (level, top, left): random inside a level, taken from the levels in turn.

    In turn, because by chance alone level 4 with its 16 times fewer cells would hardly ever be drawn.
    """
    digest = hashlib.sha256(f"{settings.seed}:{rel}".encode("utf-8", "surrogatepass")).digest()
    rng, side, per_level = random.Random(int.from_bytes(digest[:8], "big")), settings.tile, []
    for level, (height, width) in shapes.items():
        # The grid as a whole is shifted at random within the pixels that it leaves over.
        top, left = (rng.randrange(n % side + 1) if n >= side else 0 for n in (height, width))
        cells = [
            (level, y, x) for y in range(top, height - side + 1, side) for x in range(left, width - side + 1, side)
        ]
        rng.shuffle(cells)
        per_level.append(cells)
    return [cell for cell in chain.from_iterable(zip_longest(*per_level)) if cell is not None]


# --- the run ----------------------------------------------------------------------------------------------


def _list_photos(roots: list[str | Path], dst: Path) -> list[_Job]:
    """Photos of all roots, each once, in root order and sorted within; nothing from below `dst`."""
    jobs, seen, labels, goal = [], set(), {}, dst.resolve()
    for root in map(Path, roots):
        whole = root.resolve()
        if goal == whole or goal in whole.parents:
            raise TileError(f"the photos ({root}) lie in the tile folder ({dst}): choose another tile folder")
        found = find_images(root)
        base = whole.parent if whole.is_file() else whole
        # Two roots may have the same name, as in 2023/summer and 2024/summer: the later ones get a number.
        if (label := labels.get(base)) is None:
            same = sum(other.name == base.name for other in labels)
            label = labels[base] = f"{base.name}#{same + 1}" if same else base.name
        for path in found:
            full = base / (path.name if whole.is_file() else path.relative_to(root))
            if goal in full.parents or full.resolve() in seen:
                continue
            seen.add(full.resolve())
            rel = full.relative_to(base).as_posix()
            jobs.append(_Job(full, f"{label}/{rel}", rel))
    if not jobs:
        raise TileError(f"no photos found in {', '.join(map(str, roots))}")
    return jobs


def _cut_all(
    jobs: list[_Job],
    settings: TileSettings,
    store: TileStore,
    journal: Journal,
    workers: int,
    progress: bool,
) -> None:
    """Store the tiles photo by photo; a photo is in the journal only after its last tile is on the disk."""
    with tqdm(total=len(jobs), desc="tiles", unit="photo", disable=not progress) as bar:
        for job, cut in _in_order(jobs, settings, workers):
            for png in cut.pngs:
                store.save(png)
            journal.append(job.key, cut.cuts, flat=cut.flat, halved=cut.halved, problem=cut.problem)
            bar.update()
            bar.set_postfix(tiles=store.next_number, refresh=False)


def _in_order(jobs: list[_Job], settings: TileSettings, workers: int) -> Iterator[tuple[_Job, _Cut]]:
    """Results in the order of `jobs`, whichever worker is faster; few wait in memory at a time."""
    if workers == 1:
        yield from ((job, _cut_photo(job, settings)) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(_cut_photo, job, settings)))
            if len(waiting) > 2 * workers:
                job, future = waiting.popleft()
                yield job, future.result()
        for job, future in waiting:
            yield job, future.result()
    except BrokenProcessPool as error:
        raise TileError(
            f"one of {workers} worker processes was killed, often for lack of memory. Finished tiles are "
            "kept: run the same command again with fewer workers to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the main process's to handle; and when that is killed, its workers must not stay behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _pick_workers(wanted: int | None, photos: int) -> int:
    """Starting a process costs seconds, so a handful of photos is cut here unless told otherwise."""
    most = wanted if wanted is not None else min(runtime.cores(), 1 + photos // 16)
    return max(1, min(most, photos, MAX_WORKERS))


def _explain_os_error(error: OSError, dst: Path) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        what = f"the disk of {dst} is full: free some space"
    else:
        what = f"{dst} could not be written ({error})"
    return f"{what}, then run the same command again. Finished tiles are kept and it goes on from there"


def _report(dst: Path, jobs: list[_Job], journal: Journal, before: int) -> TileReport:
    entries = {job.key: journal.photos[job.key] for job in jobs}
    new = list(journal.photos.values())[before:]
    return TileReport(
        dst=dst,
        photos=len(jobs),
        resumed=len(jobs) - len(new),
        tiles=journal.next_number,
        new_tiles=sum(len(entry["cuts"]) for entry in new),
        flat=sum(entry["flat"] for entry in entries.values()),
        halved=sum(entry["halved"] for entry in entries.values()),
        failed=[(key, entry["problem"]) for key, entry in entries.items() if entry["problem"]],
    )


# --- command line -----------------------------------------------------------------------------------------


def _list_of(kind: type) -> object:
    def parse(text: str) -> tuple:
        return tuple(kind(item.strip()) for item in text.split(",") if item.strip())

    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m nbhelpers tiles`."""
    default = TileSettings()
    add = parser.add_argument
    add("src", nargs="+", type=Path, metavar="SRC", help="folders of photos, searched recursively, or photos")
    add("dst", type=Path, metavar="DST", help="folder for the tiles; a run that was stopped goes on there")
    add("--tile", type=int, default=default.tile, help="side of a tile in pixels (default: %(default)s)")
    add("--per-image", type=int, metavar="N", help="most tiles from one photo (default: all that fit)")
    add("--levels", type=_list_of(int), default=default.levels, metavar="1,2,4",
        help="factors by which photos are shrunk before cutting (default: 1,2,4)")  # fmt: skip
    add("--min-detail", type=float, default=default.min_detail, metavar="X",
        help="drop tiles whose luma gradient has a lower standard deviation, in grey levels (of 255) per "
        "pixel; 0 keeps all (default: %(default)s)")  # fmt: skip
    add("--shrink-cameras", type=_list_of(str), default=(), metavar="A,B",
        help="halve photos first whose EXIF camera model contains one of these, case ignored")  # fmt: skip
    add("--per-folder", type=int, default=default.per_folder, help="tiles in a folder (default: %(default)s)")
    add("--seed", type=int, default=default.seed, help="decides which places are cut (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes (default: by CPU count and number of photos)")
    add("--limit", type=int, metavar="N", help="look only at the first N photos, to try the settings")
    add("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Cut as the arguments say, print the report; 0 is success, 1 no tile, 2 an error, 130 Ctrl-C."""
    options = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    try:
        report = cut_tiles(args.src, args.dst, progress=not args.no_progress, **options)
    except (TileError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(report)
    return 0 if report.tiles else 1


_OPTIONS = (
    "tile", "per_image", "levels", "min_detail", "shrink_cameras", "per_folder", "seed", "workers", "limit",
)  # fmt: skip
