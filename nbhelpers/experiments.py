"""Configurations of training runs: composed by Hydra from ``configs``, and checked before any work begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from . import checkpoints, runtime
from .configs import CONFIGS, experiments
from .degradation import Degradation, DegradationError
from .losses import ADVERSARIAL_LOSSES

SCHEDULES = ("cosine", "constant", "stages")
# Sections that most experiments do not have; their keys are checked where they are there.
OPTIONAL = ("adversarial", "scales")
CHOICES = {
    "resume": ("auto", "never"),
    "keep": ("best", "last"),
    "optimizer.schedule": SCHEDULES,
    "adversarial.optimizer.schedule": SCHEDULES,
    "adversarial.loss": ADVERSARIAL_LOSSES,
    "scales.region": ("points", "lattice", "square"),
}
AT_LEAST = {
    "data.batch": 1,
    "data.patch": 1,
    "trainer.max_steps": 1,
    "trainer.val_every": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.sample_every": 0,
    "adversarial.d_steps": 1,
    "adversarial.start_step": 0,
    "scales.samples": 0,
}


class TrainingError(RuntimeError):
    """A run that cannot start or go on (wrong settings, a loss that is not finite); says what to do."""


def _lr_patch(patch: int, scale: int) -> int:
    if patch % scale:
        raise ValueError(f"patch_size={patch} (pixels of the original) must be a multiple of scale={scale}")
    return patch // scale


# ${lr_patch:HR_PATCH,SCALE}: for a configuration that gives patches in pixels of the original, as document 000 does.
OmegaConf.register_new_resolver("lr_patch", _lr_patch, replace=True)


def compose(experiment: str | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration the command line would use: ``configs/train.yaml`` + experiment + overrides.

    An override ``experiment=NAME`` takes the place of ``experiment``.

    Raises TrainingError for an unknown experiment or key, with the names that look like it, or all experiments.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    named = any(o.startswith("experiment=") for o in overrides)
    first = [f"experiment={experiment}"] if experiment and not named else []
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra_compose("train", [*first, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error).splitlines()[0]
        hint = "`python -m nbhelpers train --show` prints all keys"
        raise TrainingError(f"{text}; {_near(overrides) or _all_experiments()}; {hint}") from None


def _near(overrides: Sequence[str]) -> str:
    """For keys that train.yaml does not have: which of its keys look like them; "" where none does."""
    base = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    known = list(_keys(base))
    asked = [o.partition("=")[0].lstrip("+~") for o in overrides]
    found = {key: get_close_matches(key, known, 3) for key in asked if key not in known and key != "experiment"}
    return "; ".join(f"did you mean {' or '.join(near)} by {key}?" for key, near in found.items() if near)


def _keys(section: dict, before: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")


def _all_experiments() -> str:
    return f"experiments: {', '.join(experiments())}"


def check(cfg: DictConfig) -> None:
    """Raise TrainingError, quoting key and value, for settings that could only fail later."""
    absent = [section for section in OPTIONAL if OmegaConf.select(cfg, section) is None]

    def values(rules: dict) -> Iterator[tuple[str, object, object]]:
        for key, rule in rules.items():
            if key.partition(".")[0] not in absent:
                yield key, rule, OmegaConf.select(cfg, key)

    for key, allowed, value in values(CHOICES):
        if value not in allowed:
            raise TrainingError(f"{key}={value} is unknown; choose one of {list(allowed)}")
    for key, least, value in values(AT_LEAST):
        if not isinstance(value, int) or value < least:
            raise TrainingError(f"{key}={value} must be a whole number of at least {least}")
    t = cfg.trainer
    for key in ("max_steps", "sample_every"):
        if t[key] % t.val_every:
            raise TrainingError(f"trainer.{key}={t[key]} is not a multiple of trainer.val_every={t.val_every}")
    stages = OmegaConf.select(cfg, "optimizer.stages")
    if stages is not None and not _fractions(stages):
        raise TrainingError(f"optimizer.stages={stages} must be a list of fractions of optimizer.lr above 0")
    if "adversarial" not in absent:
        _check_adversarial(cfg)
    if OmegaConf.select(cfg, "degradation") is not None:
        _check_degradation(cfg)
    if "scales" not in absent:
        _check_scales(cfg)
    if not str(cfg.name) or set(str(cfg.name)) & set('/\\:*?"<>|'):
        raise TrainingError(f"name={cfg.name} cannot be a file name; use letters, digits, '_' and '-'")


def _fractions(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(x, int | float) and 0 < x < math.inf for x in value)
    )


def _check_adversarial(cfg: DictConfig) -> None:
    weight, accumulate = cfg.adversarial.weight, cfg.trainer.accumulate_grad_batches
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise TrainingError(f"adversarial.weight={weight} must be a number of at least 0 (0: no adversarial term)")
    if accumulate != 1:
        raise TrainingError(
            f"trainer.accumulate_grad_batches={accumulate} does not go with the section adversarial, whose two "
            "networks take turns on each batch; use trainer.accumulate_grad_batches=1 and a larger data.batch"
        )


def _check_degradation(cfg: DictConfig) -> None:
    try:
        Degradation.of(cfg.degradation)
    except DegradationError as error:
        raise TrainingError(str(error)) from None
    for key in ("data.jpeg", "data.lr_roots", "data.val_lr_root"):
        if value := OmegaConf.select(cfg, key):
            raise TrainingError(
                f"{key}={value} does not go with the section degradation, which makes the small pictures itself; "
                "leave one of them out"
            )


def _check_scales(cfg: DictConfig) -> None:
    s = cfg.scales
    ends = list(s.range) if OmegaConf.is_list(s.range) else []
    if len(ends) != 2 or not all(_positive(x) for x in ends) or ends[0] > ends[1]:
        raise TrainingError(f"scales.range={s.range} must be two scales above 0, the smaller first")
    if not isinstance(s.grow, int | float) or not 0 <= s.grow <= 1:
        raise TrainingError(f"scales.grow={s.grow} must be a share of the run, 0 to 1")
    scales = list(s.validate) if OmegaConf.is_list(s.validate) else []
    if not scales or not all(_positive(x) for x in scales) or cfg.model.scale not in scales:
        raise TrainingError(
            f"scales.validate={s.validate} must be a list of scales with model.scale={cfg.model.scale} among them"
        )
    if not isinstance(cfg.model.scale, int):
        raise TrainingError(f"model.scale={cfg.model.scale} must be a whole number, the scale where none is asked for")
    for key in ("adversarial", "degradation", "prune", "data.lr_roots", "data.val_lr_root"):
        if OmegaConf.select(cfg, key) is not None:
            raise TrainingError(f"{key} does not go with the section scales, which makes pairs at many scales itself")


def _positive(x: object) -> bool:
    return isinstance(x, int | float) and 0 < x < math.inf


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Settings that two configurations do not share, as text; what cannot change the result is left out."""
    out = []
    for key in sorted({*before, *now}):
        x, y = before.get(key), now.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += differences(x, y, f"{prefix}{key}.")
        elif x != y and f"{prefix}{key}" not in ("resume", "save_dir", "trainer.progress"):
            out.append(f"{prefix}{key}: {x} before, {y} now")
    return out


def _some(changed: list[str], most: int = 6) -> str:
    more = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + more


def refuse_to_replace(cfg: DictConfig, kind: str = "upscaler") -> None:
    """TrainingError where ``cfg.name`` is a trained network of another kind or configuration; not with resume=never."""
    if cfg.resume == "never" or str(cfg.name) not in checkpoints.available(kind=None):
        return
    card = checkpoints.card(str(cfg.name))
    other = card.get("kind", "upscaler")
    changed = differences(card.get("config", {}), OmegaConf.to_container(cfg, resolve=True))
    if other == kind and not changed:
        return
    is_so = f"was trained with another configuration ({_some(changed)})" if other == kind else f"is of kind {other}"
    raise TrainingError(
        f"data/checkpoints/{cfg.name} {is_so}; choose name=... for a new network, or resume=never to replace it"
    )


def run_folder(cfg: DictConfig) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to resume from; refuses a folder made with another configuration.

    The folder is ``save_dir`` where an experiment has that key and it is set, else ``runs/train/NAME``.
    """
    given = OmegaConf.select(cfg, "save_dir")
    folder = Path(given).expanduser().absolute() if given else runtime.RUNS / "train" / str(cfg.name)
    last, config = folder / "last.ckpt", folder / "config.yaml"
    if given and not config.is_file() and any(folder.glob("*.ckpt")):  # which a new run would delete
        raise TrainingError(f"save_dir={given} holds checkpoints that are not of a run here; choose another folder")
    if cfg.resume == "never" or not (last.is_file() and config.is_file()):
        for old in folder.glob("*.ckpt"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with runtime.atomic_path(config) as part:
            part.write_text(OmegaConf.to_yaml(cfg, resolve=True))
        return folder, None
    before = OmegaConf.to_container(OmegaConf.load(config))
    if changed := differences(before, OmegaConf.to_container(cfg, resolve=True)):
        raise TrainingError(
            f"the run in {folder} has another configuration ({_some(changed)}); "
            "use resume=never to start again, or another name="
        )
    return folder, last
