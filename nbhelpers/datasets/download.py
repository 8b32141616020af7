"""Public photo collections by name, downloaded once and checked against a known hash.

    folder = fetch("div2k_valid")       # a folder of photos, ready for find_images or cut_tiles

Archives land in `runs/downloads/NAME` and are unpacked there; the second call touches no network. A file
counts as complete only when its hash is right, so a cut connection or a half-copied file is never used.
Without internet, put the archive there by hand: the error says which file, from where, into which folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

from nbhelpers import runtime

CHUNK = 1 << 20  # bytes read at a time; pooch's own 1 kB is slow for files of gigabytes
TIMEOUT = (15, 60)  # seconds to connect, seconds without a single byte
COMPLETE = ".complete.json"  # written last, so an unpacking that was killed is done again


class DownloadError(RuntimeError):
    """A collection could not be fetched; the message gives the URL, the folder and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to download: its name on the server and its hash as `algorithm:hex`, such as `md5:0cc1…`."""

    name: str
    hash: str


@dataclass(frozen=True)
class Source:
    """Where a collection lies and how it unpacks.

    `files[0]` is the archive (.zip, .tgz, .tar.gz or .tar), the others are kept as they are. All go to the
    sub-folder `folder` of the target; `photos` is the folder of photos inside it once unpacked.
    """

    base_url: str
    files: tuple[RemoteFile, ...]
    folder: str
    photos: str
    terms: str


def _div2k(part: str, md5: str) -> Source:
    stem = f"DIV2K_{part}_HR"
    return Source(
        base_url="https://data.vision.ee.ethz.ch/cvl/DIV2K/",
        files=(RemoteFile(f"{stem}.zip", f"md5:{md5}"),),
        folder="",
        photos=stem,
        terms="DIV2K: academic research use only; see https://data.vision.ee.ethz.ch/cvl/DIV2K/",
    )


def _flowers102() -> Source:
    # torchvision owns the names and hashes; same layout, so Flowers102(root=target) finds the files too.
    from torchvision.datasets import Flowers102

    table = Flowers102._file_dict
    return Source(
        base_url=Flowers102._download_url_prefix,
        files=tuple(RemoteFile(table[key][0], f"md5:{table[key][1]}") for key in ("image", "label", "setid")),
        folder="flowers-102",
        photos="jpg",
        terms="Flowers-102: research use; see https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    )


SOURCES: dict[str, Callable[[], Source]] = {
    "div2k_train": lambda: _div2k("train", "bdc2d9338d4e574fe81bf7d158758658"),  # 800 photos, 3.5 GB
    "div2k_valid": lambda: _div2k("valid", "9fcdda83005c5e5997799b69f955ff88"),  # 100 photos, 0.4 GB
    "flowers102": _flowers102,  # 8189 photos, 0.3 GB
}


def fetch(name: str, target: Path | str | None = None, progress: bool = True, base_url: str | None = None) -> Path:
    """Download, check and unpack a collection, unless it is already there; return its folder of photos.

    Args:
        name: one of `SOURCES`: "div2k_train", "div2k_valid", "flowers102".
        target: folder for archive and photos; `runs/downloads/NAME` when None.
        progress: show a progress bar in bytes.
        base_url: another server that holds the same files, for example a mirror. Hashes stay the same.

    Raises:
        ValueError: unknown name.
        DownloadError: no connection, a server error, a wrong hash, an unsafe archive, a full disk.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown collection {name!r}; known are {', '.join(SOURCES)}")
    source = SOURCES[name]()
    target = Path(target) if target is not None else runtime.RUNS / "downloads" / name
    folder = target / source.folder
    photos = folder / source.photos
    if _is_complete(photos, source):
        return photos
    url = (base_url or source.base_url).rstrip("/") + "/"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [fetch_file(file, url, folder, progress) for file in source.files]
        _unpack(paths[0], folder, photos, source, progress)
    except OSError as error:
        raise DownloadError(f"could not write the collection {name!r} to {folder}: {error}") from error
    return photos


def _is_complete(photos: Path, source: Source) -> bool:
    """True when `photos` was unpacked to the end from the archive with this hash and has lost no file."""
    try:
        mark = json.loads((photos / COMPLETE).read_text(encoding="utf-8"))
        extras = all((photos.parent / file.name).exists() for file in source.files[1:])
        return extras and mark["hash"] == source.files[0].hash and mark["files"] <= _count(photos)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _count(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder)) - (folder / COMPLETE).exists()


# --- download ---------------------------------------------------------------------------------------------


def fetch_file(file: RemoteFile, base_url: str, folder: Path, progress: bool) -> Path:
    """Return the path of `file` in `folder`, hash checked; download it when it is missing or wrong."""
    import pooch

    path, url = folder / file.name, base_url + file.name
    was_wrong = ""
    if path.exists() and not _has_hash(path, file.hash):
        # A damaged copy has no use, and left in place it would be hashed again at every call.
        was_wrong = f" The copy found in that folder had the hash {_hash(path, file.hash)} and was removed."
        path.unlink()
    if path.exists():
        return path
    pooch.get_logger().setLevel("WARNING")  # the bar says as much, and errors carry the URL
    try:
        with _bar(file.name, progress) as bar:
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK, timeout=TIMEOUT)
            pooch.retrieve(url, file.hash, fname=file.name, path=folder, downloader=downloader)
    except Exception as error:
        raise DownloadError(_explain(error, url, file, folder) + was_wrong) from error
    return path


def fetch_weights(url: str, folder: Path, progress: bool = True) -> Path:
    """Fetch a weight file whose name ends in the first digits of its SHA-256, as torchvision's do; returns its path.

    Does nothing where the whole file is there; a cut or damaged one is replaced once the new one has the right hash.
    Raises DownloadError as :func:`fetch` does, ValueError for a name without a hash.
    """
    import pooch

    found = re.search(r"-([0-9a-f]{8})\.pth$", url)
    if not found:
        raise ValueError(f"{url} does not end in a hash, such as -397923af.pth")
    path, wanted = folder / Path(url).name, found[1]

    def digits(file: Path) -> str:
        return pooch.file_hash(str(file), alg="sha256")[: len(wanted)]

    if path.is_file() and digits(path) == wanted:
        return path
    try:
        with runtime.atomic_path(path) as part:
            with _bar(path.name, progress) as bar:
                pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK, timeout=TIMEOUT)(url, str(part), None)
            if (got := digits(part)) != wanted:
                raise ValueError(f"its hash is sha256:{got}…")
    except Exception as error:
        raise DownloadError(_explain(error, url, RemoteFile(path.name, f"sha256:{wanted}…"), folder)) from error
    return path


def _hash(path: Path, expected: str) -> str:
    import pooch

    algorithm = expected.partition(":")[0]
    return f"{algorithm}:{pooch.file_hash(str(path), alg=algorithm)}"


def _has_hash(path: Path, expected: str) -> bool:
    return _hash(path, expected).lower() == expected.lower()


def _explain(error: Exception, url: str, file: RemoteFile, folder: Path) -> str:
    """One message for whatever pooch or requests raised: what happened, where, what to do."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        what = f"the server answered {error.response.status_code} for {url}"
    elif isinstance(error, requests.exceptions.ChunkedEncodingError):
        what = f"the connection broke while {url} was arriving; the partial file was removed"
    elif isinstance(error, requests.RequestException):
        what = f"no connection to {url} ({type(error).__name__})"
    elif isinstance(error, ValueError) and "hash" in str(error).lower():
        # pooch checks a temporary file and deletes it, so nothing wrong is left in the folder.
        what = f"what arrived from {url} is damaged or has changed and was removed: {error}"
    else:
        what = f"{url} could not be downloaded: {type(error).__name__}: {error}"
    return (
        f"{what}. Try again, or download {url} by hand and put it in {folder.resolve()} "
        f"under the name {file.name} (expected {file.hash}); the next call will use it."
    )


class _ByteBar(tqdm):
    """What pooch needs: true in an `if` before the size is known; its last chunk does not pass the end."""

    def __bool__(self) -> bool:
        return True

    def update(self, n: float | None = 1) -> bool | None:
        return super().update(min(n, self.total - self.n) if self.total else n)


@contextmanager
def _bar(label: str, progress: bool) -> Iterator[tqdm | bool]:
    """A byte counter, closed whatever happens; False (pooch's "no bar") when `progress` is off."""
    if not progress:
        yield False
        return
    with _ByteBar(desc=label, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar


# --- unpack -----------------------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, photos: Path, source: Source, progress: bool) -> None:
    """Unpack beside the goal and rename at the end, so that `photos` is never a half-filled folder."""
    part = folder / f".{archive.name}.unpacking"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with _bar(f"unpack {archive.name}", progress) as bar:
            for name, stream in _members(archive):
                _write_member(_safe_path(part, name, archive), stream, bar)
        unpacked = part / source.photos
        if not unpacked.is_dir():
            raise DownloadError(f"{archive} has no folder {source.photos!r}; delete it and try again")
        mark = {"hash": source.files[0].hash, "files": _count(unpacked), "terms": source.terms}
        (unpacked / COMPLETE).write_text(json.dumps(mark), encoding="utf-8")
        if photos.exists():
            shutil.rmtree(photos)
        unpacked.replace(photos)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{archive} cannot be unpacked ({error}); delete it and try again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, stream) for every regular file. Links and devices are refused: photos need none."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as pack:
            for info in pack.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise DownloadError(f"{archive} holds a link, {info.filename!r}: not unpacked")
                if not info.is_dir():
                    with pack.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive) as pack:
        for info in pack:
            if not (info.isfile() or info.isdir()):
                raise DownloadError(f"{archive} holds a link or device, {info.name!r}: not unpacked")
            if info.isfile() and (stream := pack.extractfile(info)) is not None:
                yield info.name, stream


def _safe_path(root: Path, name: str, archive: Path) -> Path:
    """Where member `name` goes below `root`; refuses names that would leave it on any system."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].startswith("/") or ":" in name:
        raise DownloadError(f"{archive} holds the unsafe name {name!r}: nothing was unpacked; delete it")
    return root.joinpath(*parts)


def _write_member(path: Path, stream: IO[bytes], bar: tqdm | bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        while chunk := stream.read(CHUNK):
            out.write(chunk)
            if bar is not False:
                bar.update(len(chunk))
