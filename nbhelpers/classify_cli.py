"""``python -m nbhelpers classify …``: train, sweep, evaluate, infer, and a table of tracked runs.

found = infer("mine", ["holiday/"], top=3)            # rows: file, rank, class, probability; what was skipped
report = evaluate("mine", "cifar10")                  # accuracy, roc_auc, loss on the test pictures
table, best = sweep(["model.num_matrices=1,2,4", "seed=0,1,2"], name="matrices")
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("file", "rank", "class", "probability")
MISTAKES = ("picture", "class", "answer", "probability")
CHUNK = 500  # pictures decoded at once


@dataclass
class Recognised:
    """``rows`` as in COLUMNS, the likeliest class of each picture first; ``skipped``: what was not read, and why."""

    rows: list[dict[str, object]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load(name: str | Path) -> tuple[object, dict]:
    """(network in eval mode, its card) of a trained classifier; CheckpointError for any other network."""
    from . import checkpoints

    card = checkpoints.card(name)
    if card.get("kind") != "classifier":
        there = checkpoints.available(kind="classifier")
        raise checkpoints.CheckpointError(f"network {str(name)!r} is no classifier; classifiers: {there}")
    return checkpoints.load(name), card


def infer(name: str | Path, inputs: Sequence[str | Path], top: int = 1, workers: int = 4) -> Recognised:
    """Classes of pictures, of any size: each is cut to the largest part in the middle that has the shape the network
    was trained on, and scaled down to it; computed in fp32.

    ``inputs`` are files and folders (recursively). A picture that cannot be read is skipped. Raises ValueError for
    ``top`` below 1, FileNotFoundError for an input that is not there, CheckpointError for a bad network.
    """
    from .classify import predict
    from .datasets.small_pictures import read_pictures
    from .images import find_images

    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    model, card = load(name)
    out = Recognised()
    paths = find_images(inputs)
    for chunk in (paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)):
        images, kept, skipped = read_pictures(chunk, tuple(card["size"]), workers)
        out.skipped += skipped
        if not kept:
            continue
        chances, classes = predict(model, images).softmax(1).topk(min(top, len(card["classes"])))
        for path, values, numbers in zip(kept, chances.tolist(), classes.tolist(), strict=True):
            for rank, (value, number) in enumerate(zip(values, numbers, strict=True), start=1):
                row = (str(path), rank, card["classes"][number], round(value, 4))
                out.rows.append(dict(zip(COLUMNS, row, strict=True)))
    return out


def evaluate(
    name: str | Path,
    data: str | None = None,
    data_dir: str = "data",
    workers: int = 4,
    mistakes: Path | None = None,
) -> dict[str, object]:
    """``accuracy``, ``roc_auc`` and ``loss`` in fp32 on the test pictures of a data set, and how many they are.

    ``data`` as ``data_module.dataset`` (default: what the network was trained on), or a folder ``CLASS/…`` that is all
    test. ``mistakes``: also write the wrong answers to this CSV, the surest first, with MISTAKES as columns; "picture"
    is the number in the test set, from 0. Raises DataError where its classes are not those of the network.
    """
    from . import runtime
    from .classify import predict, scores
    from .datasets.classification import DataError
    from .datasets.small_pictures import open_collection, read_class_folders

    model, card = load(name)
    data = data or card["config"]["data_module"]["dataset"]
    folder = Path(data).expanduser()
    if folder.is_dir() and not (folder / "test").is_dir():
        pictures, names = read_class_folders(folder, card["classes"], workers, tuple(card["size"]))
        description = folder.name
    else:
        found = open_collection(data, data_dir, workers)
        pictures, names, description = found.test, found.names, found.description
    numbered = all(n.isdigit() for n in names)  # an .npz need not name its classes
    if len(names) != len(card["classes"]) or not (numbered or list(names) == card["classes"]):
        raise DataError(f"{data} has the classes {list(names)}, the network {str(name)!r} {card['classes']}")
    logits = predict(model, pictures.images)
    if mistakes:
        chances, answers = logits.softmax(1).max(1)
        wrong = (answers != pictures.labels).nonzero().flatten()
        wrong = wrong[chances[wrong].argsort(descending=True, stable=True)].tolist()
        classes, labels, answers = card["classes"], pictures.labels.tolist(), answers.tolist()
        rows = [(i, classes[labels[i]], classes[answers[i]], round(float(chances[i]), 4)) for i in wrong]
        runtime.write_csv(mistakes, [dict(zip(MISTAKES, row, strict=True)) for row in rows], MISTAKES)
    return {"model": str(name), "data": description, "pictures": len(pictures), **scores(logits, pictures.labels)}


# --- sweeps -----------------------------------------------------------------------------------------------


def grid(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[int]]:
    """({variant: overrides}, seeds) of a sweep in Hydra's syntax: ``key=a,b``, ``choice(…)``, ``range(…)``.

    Every combination is a variant; values of ``seed`` are repetitions. Raises TrainingError for what does not parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from .experiments import TrainingError

    fixed, axes, seeds = [], [], [0]
    try:
        for given in OverridesParser.create().parse_overrides(list(overrides)):
            key = given.get_key_element()
            if key in ("name", "resume"):
                raise TrainingError(f"{key} is not for sweeps, which name and resume their runs themselves; use --name")
            if not given.is_sweep_override() and key != "seed":
                fixed.append(given.input_line)
                continue
            values = list(given.sweep_string_iterator()) if given.is_sweep_override() else [given.value()]
            if key == "seed":
                seeds = [int(value) for value in values]
            else:
                axes.append([f"{key}={value}" for value in values])
    except HydraException as error:
        given = getattr(error, "override", None) or " ".join(overrides)
        raise TrainingError(f"{given!r} is no key=value or key=a,b ({str(error).splitlines()[0]})") from None
    except ValueError as error:
        raise TrainingError(f"seed must be whole numbers ({error})") from None
    variants = {}
    for point in itertools.product(*axes):
        label = ", ".join(text.rpartition(".")[2] if "." in text.split("=")[0] else text for text in point)
        variants[label or "as given"] = [*fixed, *point]
    return variants, seeds


def sweep(overrides: Sequence[str], name: str = "sweep", fresh: bool = False) -> tuple[Path, Path]:
    """Train every combination of :func:`grid`; (table, configuration of the best), ``runs/sweeps/NAME.csv`` and
    ``NAME_best.yaml``. The best has the highest mean validation accuracy over its seeds.

    A killed sweep goes on with the same call: finished runs are in the table, the unfinished one resumes.
    """
    from omegaconf import OmegaConf

    from . import classify, runtime
    from .experiments import TrainingError
    from .studies import Study, fingerprint, read, run_study, summary

    def compose(changes: Sequence[str]) -> object:
        cfg = classify.compose(changes)
        cfg.name = f"{name}_{fingerprint(cfg)}"
        classify.check(cfg)
        if not cfg.data_module.valid_size:
            raise TrainingError("data_module.valid_size=0 leaves a sweep nothing to choose the best by; use 0.1")
        return cfg

    def train(cfg: object) -> classify.RunResult:
        result = classify.fit(cfg)
        for path in result.folder.glob("*.ckpt"):  # hundreds of megabytes in the end, and the table has what counts
            path.unlink()
        return result

    variants, seeds = grid(overrides)
    study = Study(
        name, None, variants, lambda result, cfg: {"": [classify.measured(result)]}, seeds, compose=compose, train=train
    )
    table = run_study(study, fresh, folder=runtime.RUNS / "sweeps")
    means = summary(read(table), "val_accuracy")
    winner = max(means, key=lambda v: means[v]["mean"])
    cfg = classify.compose([*variants[winner], f"seed={seeds[0]}", f"name={name}_best"])
    best = table.with_name(f"{name}_best.yaml")
    with runtime.atomic_path(best) as part:
        part.write_text(OmegaConf.to_yaml(cfg))
    return table, best


# --- commands ---------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from . import classify, runtime

    cfg = classify.compose(args.overrides, args.config)
    if args.show:
        print(OmegaConf.to_yaml(cfg, resolve=True), end="")
        return 0
    given = ["--config", str(args.config)] if args.config else []
    result = classify.train(cfg, " ".join(["python -m nbhelpers classify train", *given, *args.overrides]))
    if not classify.is_main_process():
        return 0
    counts, test = result.counts, result.test
    tested = f"{result.pictures[2]} test pictures"
    print(f"{cfg.name}: accuracy {test['accuracy']:.2%}, ROC-AUC {test['roc_auc']:.4f} on {tested}")
    print(f"{result.collection.description}; {counts.free:,} free parameters, {counts.stored:,} stored")
    skipped = [f"{entry.name} ({entry.skipped})" for entry in result.model.report if entry.skipped]
    if skipped:
        print("convolutions left as they were:", "; ".join(skipped))
    print(f"written: {runtime.CHECKPOINTS / str(cfg.name)}.safetensors, .json, .csv")
    return 0


def _infer(args: argparse.Namespace) -> int:
    from . import runtime

    found = infer(args.model, args.inputs, args.top, args.workers)
    width = max((len(str(row["file"])) for row in found.rows), default=0)
    for row in found.rows:
        print(f"{row['file']:<{width}}  {row['class']}  {row['probability']:.1%}")
    if args.csv and found.rows:
        runtime.write_csv(args.csv, found.rows)
    if not found.rows and not found.skipped:
        raise FileNotFoundError(f"no pictures in {', '.join(map(str, args.inputs))}")
    if found.skipped:
        print(f"{len(found.skipped)} skipped:", *found.skipped, sep="\n  ", file=sys.stderr)
    return 1 if found.skipped else 0


def _evaluate(args: argparse.Namespace) -> int:
    result = evaluate(args.model, args.data, args.data_dir, args.workers, args.mistakes)
    if args.json:
        finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result.items()}
        print(json.dumps(finite, ensure_ascii=False))
        return 0
    print(f"{result['model']} on {result['data']}, {result['pictures']} test pictures")
    print(f"accuracy {result['accuracy']:.2%}, ROC-AUC {result['roc_auc']:.4f}, cross-entropy {result['loss']:.4f}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    table, best = sweep(args.overrides, args.name, args.fresh)
    print(f"written: {table}")
    print(f"best: python -m nbhelpers classify train --config {best}")
    return 0


def _runs(args: argparse.Namespace) -> int:
    from . import runtime, tracking

    rows = tracking.tracked_runs(args.experiment, args.tracking_uri)
    for row in rows:
        score = row.get("test_accuracy", "")
        print(f"{row['name']:<32}{row['status']:<12}{score if score == '' else format(score, '.2%')}")
    if args.csv and rows:
        runtime.write_csv(args.csv, rows)
        print(f"written: {args.csv}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of ``classify``."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    key_value = "any key that `classify train --show` prints"

    p = commands.add_parser("train", help="train a classifier and write data/checkpoints/NAME")
    p.add_argument("overrides", nargs="*", metavar="key=value", help=key_value)
    p.add_argument("--config", type=Path, help="start from this saved configuration (.yaml of a run or a sweep's best)")
    p.add_argument("--show", action="store_true", help="print the whole configuration and stop")
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "sweep", help="train every combination: key=a,b …; table and best configuration to runs/sweeps"
    )
    p.add_argument("overrides", nargs="+", metavar="key=value", help=f"{key_value}; several values: key=a,b")
    p.add_argument("--name", default="sweep", help="of the table (default: %(default)s)")
    p.add_argument("--fresh", action="store_true", help="drop finished runs and start again (default: resume)")
    p.set_defaults(run=_sweep)

    p = commands.add_parser("infer", help="class and probability of pictures and folders of pictures")
    p.add_argument("model", help="name of a trained classifier, or its .safetensors file")
    p.add_argument("inputs", nargs="+", metavar="PICTURES", help="files or folders (folders recursively)")
    p.add_argument("--top", type=int, default=1, help="so many classes per picture, the likeliest first")
    p.add_argument("--csv", type=Path, metavar="OUT", help="also write file, rank, class, probability")
    p.set_defaults(run=_infer)

    q = commands.add_parser("evaluate", help="accuracy and ROC-AUC on the test pictures of a data set")
    q.add_argument("model", help="name of a trained classifier, or its .safetensors file")
    q.add_argument(
        "--data", help="bundled, cifar10, cifar100, cifar10_jpeg, a .npz file or a folder (default: its own)"
    )
    q.add_argument("--data-dir", default="data", help="folder of downloads, below runs/downloads unless absolute")
    q.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    q.add_argument("--mistakes", type=Path, metavar="OUT", help="also write picture, class, answer, probability")
    q.set_defaults(run=_evaluate)
    for command in (p, q):
        command.add_argument("--workers", type=int, default=4, help="threads that decode pictures")

    p = commands.add_parser("runs", help="runs tracked by MLflow, as a table")
    p.add_argument("--experiment", default="classify", help="default: %(default)s")
    p.add_argument("--tracking-uri", help="store or server (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    p.add_argument("--csv", type=Path, metavar="OUT", help="write all parameters and metrics")
    p.set_defaults(run=_runs)
