"""Controlled comparisons behind the notebooks: named variants x seeds, resumable, one CSV row per finished run."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

from .. import metrics, runtime
from ..datasets.pairs import resolve_root
from ..degrade import crop_to_multiple, downscale
from ..images import find_images, load_image
from ..inference import upscale
from ..runtime import write_csv as write

STUDIES = (
    "espcn", "set5", "vgg", "pooling", "gan", "rrdb", "m23_init", "erblock", "damaged", "deployment", "cmsr",
    "block_orthogonal", "block_orthogonal_full", "lmf", "lmf_cost", "lmf_scales", "scoreboard",
)  # fmt: skip
QUICK = ["trainer.max_steps=4", "trainer.val_every=4"]
Row = dict[str, object]


@dataclass(frozen=True)
class Study:
    """One training per variant and seed. ``variants`` maps a name to Hydra overrides of ``experiment``.

    ``measure(result, cfg)`` turns a finished run into {table name: rows}; the table "" is the study's main CSV and
    gets exactly one row per run. Seeds are shared by all variants, so differences can be taken in pairs.
    A study of something else than upscalers brings its own ``compose(overrides) -> cfg`` and ``train(cfg) -> result``.
    ``quick`` overrides make the short form.
    """

    name: str
    experiment: str | None
    variants: Mapping[str, Sequence[str]]
    measure: Callable[[object, object], dict[str, list[Row]]]
    seeds: Sequence[int] = (0, 1, 2)
    tables: Sequence[str] = field(default=("",))
    compose: Callable[[Sequence[str]], object] | None = None
    train: Callable[[object], object] | None = None
    quick: Sequence[str] = tuple(QUICK)

    def path(self, table: str = "", folder: Path | None = None) -> Path:
        return (folder or runtime.RESULTS) / (f"{self.name}_{table}.csv" if table else f"{self.name}.csv")


def read(path: Path) -> list[Row]:
    """Rows of a results CSV; numbers are parsed, text stays text. A missing file gives no rows."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def fingerprint(cfg: object) -> str:
    """Short hash of everything that decides a run's result; runs made with other settings are done again."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("name", None), settings.pop("resume", None)
    # The letter keeps a hash of digits from being read back as a number.
    return "h" + hashlib.sha256(OmegaConf.to_yaml(settings).encode()).hexdigest()[:10]


def jobs(study: Study, quick: bool = False) -> list[tuple[str, int, object, str]]:
    """What a study consists of: (variant, seed, configuration, hash of what decides the result)."""
    from ..experiments import compose

    make = study.compose or functools.partial(compose, study.experiment)
    out = []
    for seed in study.seeds[: 1 if quick else None]:
        for variant, overrides in study.variants.items():
            cfg = make([*overrides, f"seed={seed}", *(study.quick if quick else ())])
            out.append((variant, seed, cfg, fingerprint(cfg)))
    return out


def _train_and_measure(study_train: Callable, measure: Callable, cfg: object) -> dict[str, list[Row]]:
    return measure(study_train(cfg), cfg)


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable]:
    """``map``, or one that does the same in so many processes of one thread each."""
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, runtime.set_threads, (1,)) as pool:
        yield pool.map


def run_study(
    study: Study, fresh: bool = False, quick: bool = False, folder: Path | None = None, processes: int = 1
) -> Path:
    """Train what is missing and write the tables after every run, to ``data/results`` unless a folder is given.

    ``quick`` writes to ``runs/`` instead. Several ``processes`` train one run each, where the study's functions can be
    pickled.
    """
    from ..training import fit

    train = study.train or functools.partial(fit, keep=False)
    folder = runtime.RUNS / "quick_results" if quick else folder or runtime.RESULTS
    tables = {t: [] if fresh or quick else read(study.path(t, folder)) for t in study.tables}
    todo = jobs(study, quick)
    wanted = {(v, s, h) for v, s, _, h in todo}
    for t, rows in tables.items():
        tables[t] = [r for r in rows if (r["variant"], r["seed"], str(r["settings"])) in wanted]
    done = {(r["variant"], r["seed"]) for r in tables[""]}
    missing = [job for job in todo if job[:2] not in done]
    one = functools.partial(_train_and_measure, train, study.measure)
    with _mapping(min(processes, len(missing) or 1)) as each:
        results = each(one, [job[2] for job in missing])
        for variant, seed, _, settings in (bar := tqdm(missing, desc=study.name, unit="run")):
            bar.set_postfix_str(f"{variant}, seed {seed}")
            measured = next(results)
            for t in study.tables:
                tables[t] += [{"variant": variant, "seed": seed, "settings": settings, **r} for r in measured[t]]
                write(study.path(t, folder), tables[t])
    return study.path("", folder)


@functools.lru_cache(maxsize=4)
def validation(scale: int, damage: Callable[[Tensor], Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
    """The bundled validation photos as (lr, hr) pictures "3 h w" in [0, 1]; ``damage`` changes the small ones."""
    pairs = []
    for path in find_images(resolve_root("bundled_val")):
        hr = crop_to_multiple(load_image(path), scale)
        lr = downscale(hr, scale)
        pairs.append((lr if damage is None else damage(lr), hr))
    return pairs


def score(
    model: torch.nn.Module, damage: Callable[[Tensor], Tensor] | None = None, lpips: bool = True
) -> dict[str, float | None]:
    """Means over the bundled validation photos: ``psnr_y`` (dB), ``ssim_y``, ``lpips`` (None without its weights).

    ``damage`` as in :func:`validation`.
    """
    rows = []
    for lr, hr in validation(model.scale, damage):
        rows.append(metrics.compare(upscale(model, lr), hr, model.scale, lpips=lpips))
    means = metrics.mean(rows)
    return {k: None if means[k] is None else round(means[k], 4) for k in ("psnr_y", "ssim_y", "lpips")}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean (Student's t); NaN for fewer than two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def summary(rows: Sequence[Row], key: str, reference: str | None = None) -> dict[str, dict[str, float]]:
    """Per variant: ``mean`` and 95 % ``half`` of ``key``; with a reference also paired ``gain`` and ``gain_half``."""
    by: dict[str, dict[int, float]] = {}
    for row in rows:
        by.setdefault(str(row["variant"]), {})[int(row["seed"])] = float(row[key])
    if reference is not None and reference not in by:
        raise ValueError(f"no variant {reference!r}; there are {list(by)}")
    out = {}
    for name, values in by.items():
        out[name] = {
            "mean": sum(values.values()) / len(values),
            "half": half_width(list(values.values())),
            "n": len(values),
        }
        if reference is not None:
            pairs = [values[s] - by[reference][s] for s in values if s in by[reference]]
            out[name] |= {"gain": sum(pairs) / len(pairs), "gain_half": half_width(pairs) if name != reference else 0.0}
    return out


def run(name: str, fresh: bool = False, quick: bool = False) -> int:
    """``python -m nbhelpers study NAME``. Raises ValueError for an unknown study."""
    if name not in STUDIES:
        raise ValueError(f"study {name!r} is unknown; choose one of {list(STUDIES)}")
    path = importlib.import_module(f"{__name__}.{name}").run(fresh=fresh, quick=quick)
    print(f"written: {path}")
    return 0
