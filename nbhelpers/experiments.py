"""Configurations of training runs: composed by Hydra from ``configs``, and checked before any work begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from . import runtime

CONFIGS = Path(__file__).resolve().parent / "configs"
CHOICES = {"resume": ("auto", "never"), "optimizer.schedule": ("cosine", "constant")}
AT_LEAST_ONE = ("data.batch", "data.patch", "trainer.max_steps", "trainer.val_every", "trainer.accumulate_grad_batches")


class TrainingError(RuntimeError):
    """A run that cannot start or go on (wrong settings, a loss that is not finite); says what to do."""


def experiments() -> list[str]:
    """Names of the experiments under ``configs/experiment``."""
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))


def compose(experiment: str | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration the command line would use: ``configs/train.yaml`` + experiment + overrides.

    Raises TrainingError for an unknown experiment or key, listing the experiments there are.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    first = [f"experiment={experiment}"] if experiment else []
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra_compose("train", [*first, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error).splitlines()[0]
        hint = "`python -m nbhelpers train --show` prints all keys"
        raise TrainingError(f"{text}; experiments: {', '.join(experiments())}; {hint}") from None


def check(cfg: DictConfig) -> None:
    """Raise TrainingError, quoting key and value, for settings that could only fail later."""
    for key, allowed in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            raise TrainingError(f"{key}={value} is unknown; choose one of {list(allowed)}")
    for key in AT_LEAST_ONE:
        if not isinstance(value := OmegaConf.select(cfg, key), int) or value < 1:
            raise TrainingError(f"{key}={value} must be a whole number of at least 1")
    t = cfg.trainer
    if t.max_steps % t.val_every:
        raise TrainingError(f"trainer.max_steps={t.max_steps} is not a multiple of trainer.val_every={t.val_every}")
    if not str(cfg.name) or set(str(cfg.name)) & set('/\\:*?"<>|'):
        raise TrainingError(f"name={cfg.name} cannot be a file name; use letters, digits, '_' and '-'")


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Settings that two configurations do not share, as text; what cannot change the result is left out."""
    out = []
    for key in sorted({*before, *now}):
        x, y = before.get(key), now.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += differences(x, y, f"{prefix}{key}.")
        elif x != y and f"{prefix}{key}" not in ("resume", "trainer.progress"):
            out.append(f"{prefix}{key}: {x} before, {y} now")
    return out


def run_folder(cfg: DictConfig) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to resume from; refuses a folder made with another configuration."""
    folder = runtime.RUNS / "train" / str(cfg.name)
    last, config = folder / "last.ckpt", folder / "config.yaml"
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
            f"the run in runs/train/{cfg.name} has another configuration ({'; '.join(changed)}); "
            "use resume=never to start again, or another name="
        )
    return folder, last
