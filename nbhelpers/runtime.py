"""What machine is this? Seeds, devices, precision, folders and quick mode are decided here and nowhere else."""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

ROOT = Path(os.environ.get("NB_ROOT", Path(__file__).resolve().parent.parent))
DATA = ROOT / "data"
PHOTOS = DATA / "photos"
CHECKPOINTS = DATA / "checkpoints"
RESULTS = DATA / "results"
RUNS = Path(os.environ.get("NB_RUNS", ROOT / "runs"))

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def shared() -> Path | None:
    """Folder with the optional large packs (``../shared`` or ``NB_SHARED``), or None where it does not exist."""
    folder = Path(os.environ.get("NB_SHARED") or ROOT.parent / "shared")
    return folder if (folder / "data").is_dir() else None


def torch_home() -> Path:
    """Folder torchvision looks in for weights: ``TORCH_HOME``, else the shared pack's, else the usual cache."""
    if "TORCH_HOME" in os.environ:
        return Path(os.environ["TORCH_HOME"])
    pack = shared()
    if pack and (pack / "torch" / "hub").is_dir():
        return pack / "torch"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch"


def is_quick() -> bool:
    """True when ``NB_QUICK`` asks for the short form of every notebook (tests set it)."""
    return os.environ.get("NB_QUICK", "0").lower() not in ("", "0", "false", "no")


def quick(full: T, fast: T) -> T:
    """Return ``fast`` in quick mode (``NB_QUICK=1``), otherwise ``full``."""
    return fast if is_quick() else full


def seed_everything(seed: int) -> int:
    """Seed Python, NumPy and torch (all devices); returns the seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries still read the global generator
    torch.manual_seed(seed)
    return seed


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then CPU. Raises ValueError naming the devices that exist here."""
    have = ["cpu"]
    if torch.cuda.is_available():
        have.insert(0, "cuda")
    elif torch.backends.mps.is_available():
        have.insert(0, "mps")
    if name == "auto":
        return torch.device(have[0])
    if name.split(":")[0] not in have:
        raise ValueError(f"device {name!r} is not available here; choose one of {['auto', *have]}")
    return torch.device(name)


def synchronize() -> None:
    """Wait until the GPU, where there is one, has done what it was given; for measuring times."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tracking_uri() -> str:
    """Address of the MLflow store: ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(RUNS / 'mlflow.db').absolute()}"


def set_threads(n: int | None = None) -> int:
    """Set torch's CPU threads (default: ``NB_THREADS``, else ``OMP_NUM_THREADS``, else :func:`cores`); returns them."""
    if n is None:
        n = int(os.environ.get("NB_THREADS", os.environ.get("OMP_NUM_THREADS", cores())))
    torch.set_num_threads(max(1, n))
    return torch.get_num_threads()


def cpu_has_fast_bf16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 can be 80x slower."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def pick_precision(device: torch.device, wanted: str = "auto") -> str:
    """Arithmetic for convolutions: ``fp32``, ``bf16`` or ``fp16`` (CUDA only). ``auto`` takes bf16 where it is fast."""
    if wanted not in PRECISIONS:
        raise ValueError(f"precision {wanted!r} is unknown; choose one of {list(PRECISIONS)}")
    if wanted == "fp16" and device.type != "cuda":
        raise ValueError(f"precision 'fp16' needs a CUDA device, not {device.type!r}; use 'bf16' or 'fp32'")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_fast_bf16() else "fp32"


def autocast(device: torch.device, precision: str, keep_weights: bool = True) -> torch.autocast:
    """Autocast context for a precision from :func:`pick_precision`; disabled for ``fp32``.

    ``keep_weights``: trainable weights are converted once for the whole context, and held.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32", cache_enabled=keep_weights)


def memory_for(device: torch.device) -> float:
    """Bytes that a network's features may take while it works through a picture in tiles.

    Fixed on a CPU, so that 100 megapixels stay below 2 GB with Python and the decoded pictures; half of what is free
    on a GPU.
    """
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 0.75e9


def machine() -> str:
    """One line about this machine, to stand beside every timing."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    bf16 = "with" if cpu_has_fast_bf16() else "without"
    cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return (
        f"{platform.system()} {platform.machine()}, {threads} thread{'s'[: threads > 1]}, {cpu} {bf16} fast bf16, "
        f"torch {torch.__version__}"
    )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the real name only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: Pillow and NumPy choose the file format by it.
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    """Write rows (all with the first one's keys, or ``columns``, which no rows need) as UTF-8 CSV, atomically."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
