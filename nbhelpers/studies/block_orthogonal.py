"""How few parameters can a ResNet live with? Block-orthogonal kernels on CIFAR-10 (document 004; claims B1-B4).

ResNet-18 at half width on a tenth of CIFAR-10 after JPEG, so that a CPU can train it often enough for intervals: both
stems, three placements, several numbers of matrices and blocks, and the controls (a thin ResNet with as many
parameters, the same zeros without the orthogonality, grouped convolutions, twice the learning rate); then some of them
on 3 % and 1 % of the pictures, with half as many steps. The last epoch counts, nothing is chosen by its score. The same
seed means the same pictures, so differences can be taken in pairs. :mod:`.block_orthogonal_full` is for a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from tqdm.auto import tqdm

from .. import classify, profiling, runtime, tracking
from ..block_orthogonal import BlockOrthogonalConv2d
from ..datasets.small_pictures import Collection, open_collection
from ..models.resnet import resnet
from . import Row, Study, run_study, write

REFERENCE = "plain"
BASE = [
    "data_module.dataset=cifar10_jpeg", "data_module.subset_fraction=0.1", "data_module.batch_size=64", "max_epochs=6",
    "learning_rate=0.002", "keep=last", "half=false", "model.width=32", "mlflow.experiment=block_orthogonal",
    "trainer.device=cpu", "trainer.threads=1", "trainer.progress=false",
]  # fmt: skip
SEEDS = range(4)
_PLAIN, _THREE, _FASTER = ["model.kind=plain"], ["model.num_matrices=3"], ["learning_rate=0.004"]
_THIN_1, _THIN_3 = ([*_PLAIN, f"model.width={width}"] for width in (12, 16))  # thin_width's, for 1 and 3 matrices
_TENTH: dict[str, list[str]] = {
    REFERENCE: _PLAIN,
    "1 matrix": [],
    "3 matrices": _THREE,
    "4 matrices of 4 blocks": ["model.num_matrices=4", "model.r=4"],
    "1 matrix, spread": ["model.placement=spread"],
    "1 matrix, permuted": ["model.placement=permuted"],
    "1 matrix, not orthogonal": ["model.kind=masked"],
    "grouped as 1 matrix": ["model.kind=grouped"],
    "thin as 1 matrix": _THIN_1,
    "thin as 3 matrices": _THIN_3,
    "plain, ImageNet stem": [*_PLAIN, "model.stem=imagenet"],
    "1 matrix, ImageNet stem": ["model.stem=imagenet"],
    "plain, twice the rate": [*_PLAIN, *_FASTER],
    "1 matrix, twice the rate": _FASTER,
}
LITTLE_DATA = (REFERENCE, "1 matrix", "thin as 1 matrix")
_FRACTIONS = {"3 %": ["data_module.subset_fraction=0.03", "max_epochs=10"]}
_FRACTIONS["1 %"] = ["data_module.subset_fraction=0.01", "max_epochs=30"]


def _named(variant: str, overrides: Sequence[str]) -> list[str]:
    """With a name for the run's place in MLflow."""
    words = "".join(c if c.isalnum() else " " for c in variant.replace("%", "percent")).split()
    return [*overrides, f"name={'_'.join(words)}"]


VARIANTS = {name: _named(name, overrides) for name, overrides in _TENTH.items()} | {
    f"{name}, {share}": _named(f"{name}, {share}", [*_TENTH[name], *change])
    for share, change in _FRACTIONS.items()
    for name in LITTLE_DATA
}
# Any machine has these pictures; the form is to see that everything works.
QUICK = [
    "data_module.dataset=bundled", "data_module.subset_fraction=0.2", "max_epochs=1", "model.width=4", "logger=none",
]  # fmt: skip


_base = functools.cache(functools.partial(classify.compose, BASE))


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The study's setting with ``key=value`` overrides; Hydra reads it once, not for each run."""
    return OmegaConf.merge(_base(), OmegaConf.from_dotlist(list(overrides)))


@functools.lru_cache(maxsize=1)
def _pictures(dataset: str, data_dir: str) -> Collection:
    return open_collection(dataset, data_dir)


def train(cfg: DictConfig) -> classify.RunResult:
    """One network, from its initial weights to the last epoch."""
    return classify.fit(cfg, _pictures(cfg.data_module.dataset, cfg.data_module.data_dir), keep=False)


def measure(result: classify.RunResult, cfg: DictConfig) -> dict[str, list[Row]]:
    """Scores and cost of a run (``mmacs``: millions of multiply-adds per picture), its curve, its answers by class.

    ``confusion`` has a row for each class of the test pictures, and how many of them got which answer.
    """
    m, side = cfg.model, result.collection.test.images.shape[-1]
    row: Row = {key: m[key] for key in ("kind", "stem", "width", "num_matrices", "r", "placement")}
    row |= {"fraction": cfg.data_module.subset_fraction, "train_pictures": result.pictures[0]}
    row |= classify.measured(result)
    row["mmacs"] = round(profiling.flops(result.model, (1, 3, side, side)) / 2e6, 2)
    row["ms_per_step"] = round(1e3 * result.seconds / result.steps, 1)
    curve = [
        {"epoch": r["epoch"], "train_loss": round(r["train_loss"], 5), "val_accuracy": round(r["val_accuracy"], 4)}
        for r in result.history
    ]
    names = result.collection.names
    answers = [
        {"class": name} | dict(zip(names, counts, strict=True))
        for name, counts in zip(names, result.confusion.tolist(), strict=True)
    ]
    return {"": [row], "curves": curve, "confusion": answers}


STUDY = Study("block_orthogonal", None, VARIANTS, measure, SEEDS, ("", "curves", "confusion"), compose, train, QUICK)


# --- time -------------------------------------------------------------------------------------------------


def _step(model: nn.Module, batch: int, precision: str, layout: torch.memory_format) -> Callable[[], None]:
    """One training step of a classifier of 32×32 pictures, as in :mod:`nbhelpers.classify`."""
    model = model.to(memory_format=layout)
    adam = torch.optim.AdamW(model.parameters())
    x, y = torch.rand(batch, 3, 32, 32).contiguous(memory_format=layout), torch.randint(10, (batch,))

    def run() -> None:
        with runtime.autocast(torch.device("cpu"), precision):
            logits = model(x)
        adam.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        adam.step()

    return run


def step_times(batch: int = 128, repeats: int = 5, width: int = 64, progress: str = "") -> list[Row]:
    """Median and quartiles in ms of a training step of ResNet-18 with the CIFAR stem on this CPU, all in one run.

    ``relative``: to the plain network in the fast precision of this machine, channels last.
    """
    fast = runtime.pick_precision(torch.device("cpu"))
    last, first = torch.channels_last, torch.contiguous_format
    settings: dict[str, tuple[dict, str, torch.memory_format]] = {
        "plain": ({"kind": "plain"}, fast, last),
        "plain, fp32": ({"kind": "plain"}, "fp32", first),
        "m = 1, left_zeros, fp32": ({}, "fp32", first),
    }
    for m in (1, 2, 4):
        for placement in ("left_zeros", "spread"):
            settings[f"m = {m}, {placement}"] = ({"num_matrices": m, "placement": placement}, fast, last)
    settings["m = 4, r = 4, left_zeros"] = ({"num_matrices": 4, "r": 4}, fast, last)
    runs = [_step(resnet(width=width, **m), batch, precision, layout) for m, precision, layout in settings.values()]
    times = profiling.latencies_ms(runs, repeats, warmup=1, progress=progress)
    return [
        {
            "what": name,
            "precision": precision,
            "ms": round(t.median, 1),
            "low": round(t.low, 1),
            "high": round(t.high, 1),
        }
        | {"relative": round(t.median / times[0].median, 3)}
        for (name, (_, precision, _)), t in zip(settings.items(), times, strict=True)
    ]


def construction_times(size: int = 512, matrices: int = 1, repeats: int = 5, progress: str = "") -> list[Row]:
    """Median ms to make ``matrices`` orthogonal matrices of ``size`` rows and their gradient: ours against the three
    ways of ``torch.nn.utils.parametrizations.orthogonal``, in fp32, all in one run.

    torch's are made one by one: a batch of large ones fails on two threads, see ``block_orthogonal._inverse``.
    """
    ours = BlockOrthogonalConv2d(size, size, 3, matrices, 1)
    gradient = torch.randn(matrices, size, size)
    makers: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {"ours": (ours, ours.blocks)}
    for way in ("cayley", "matrix_exp", "householder"):
        layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(matrices))
        for layer in layers:
            orthogonal(layer, orthogonal_map=way)
        makers[f"torch, {way}"] = (layers, lambda layers=layers: torch.stack([layer.weight for layer in layers]))

    def both(module: nn.Module, make: Callable[[], Tensor]) -> None:
        module.zero_grad()
        make().backward(gradient)

    runs = [functools.partial(both, *pair) for pair in makers.values()]
    times = profiling.latencies_ms(runs, repeats, warmup=1, progress=progress)
    return [
        {"what": name, "size": size, "matrices": matrices, "ms": round(t.median, 2)}
        for name, t in zip(makers, times, strict=True)
    ]


def speed(folder: Path) -> None:
    """Measure both, into ``block_orthogonal_steps.csv`` and ``block_orthogonal_construction.csv``."""
    write(folder / f"{STUDY.name}_steps.csv", step_times(progress="steps"))
    rows = []
    for size, matrices in tqdm([(512, 1), (512, 4), (256, 4), (64, 8)], desc="construction", leave=False):
        rows += construction_times(size, matrices)
    write(folder / f"{STUDY.name}_construction.csv", rows)


def run(fresh: bool = False, quick: bool = False, dataset: str = "cifar10_jpeg", processes: int | None = None) -> Path:
    """``python -m nbhelpers study block_orthogonal``: 20 variants x 4 seeds, one core each, and the times; 75 minutes
    on two cores.

    ``dataset`` is any ``data_module.dataset``; one that is not the default writes ``block_orthogonal_NAME.csv``.
    Runs are tracked by MLflow, experiment ``block_orthogonal``, where it is installed.
    """
    study, threads = STUDY, runtime.set_threads()
    if dataset != "cifar10_jpeg":
        variants = {name: [*overrides, f"data_module.dataset={dataset}"] for name, overrides in VARIANTS.items()}
        study = replace(STUDY, name=f"{STUDY.name}_{Path(dataset).stem}", variants=variants)
    if quick:
        study = replace(study, variants={name: study.variants[name] for name in (REFERENCE, "1 matrix", "3 matrices")})
        return run_study(study, fresh, quick)
    first = compose(next(iter(study.variants.values())))
    _pictures(first.data_module.dataset, first.data_module.data_dir)  # decoded, or downloaded, once
    tracking.prepare(first)
    path = run_study(study, fresh, processes=processes or threads)
    runtime.set_threads(threads)
    if fresh or not path.with_name(f"{STUDY.name}_steps.csv").is_file():
        speed(path.parent)
    return path
