"""Where the numbers of a run go besides its own CSV: TensorBoard, MLflow, or any logger of pytorch-lightning.

MLflow's local store is one SQLite file, ``runs/mlflow.db``; ``pip install mlflow`` adds the pages that
``mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`` shows. A server is named by URL in ``mlflow.tracking_uri``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from . import runtime
from .experiments import TrainingError

CHOICES = ("tensorboard", "mlflow", "both", "none")
RUN_ID = "mlflow_run_id"
MISSING = "logger={}: the package {!r} is not installed; use logger=none, or `pip install -r requirements.txt`"


def store_uri(tracking_uri: str | None = None) -> str:
    """Address of the MLflow store: the one given, else :func:`nbhelpers.runtime.tracking_uri`."""
    return tracking_uri or runtime.tracking_uri()


def loggers(cfg: DictConfig, folder: Path | None = None, resumed: bool = False) -> list:
    """Lightning's loggers for a run with the keys ``logger``, ``mlflow`` and ``name``.

    TensorBoard writes below ``folder``, and is left out without one. A ``resumed`` run goes on with the MLflow run
    whose number the folder holds. ``both`` takes what is installed; raises TrainingError where a logger that was asked
    for by name is not, or is unknown.
    """
    if isinstance(cfg.logger, DictConfig):
        return [_instantiate(cfg.logger)]
    if cfg.logger not in CHOICES:
        raise TrainingError(f"logger={cfg.logger} is unknown; choose one of {list(CHOICES)} or {{_target_: CLASS, …}}")
    found = []
    for name, make in (("tensorboard", _tensorboard), ("mlflow", _mlflow)):
        if cfg.logger not in (name, "both"):
            continue
        try:
            made = make(cfg, folder, resumed)
        except ModuleNotFoundError as error:
            if cfg.logger == "both":
                continue
            raise TrainingError(MISSING.format(name, error.name or name)) from None
        found += [made] if made is not None else []
    return found


def _instantiate(section: DictConfig) -> object:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(section)
    except InstantiationException as error:
        text = " ".join(str(error).split())
        raise TrainingError(f"logger={OmegaConf.to_container(section)} cannot be made: {text}") from None


def _tensorboard(cfg: DictConfig, folder: Path | None, resumed: bool) -> object | None:
    from pytorch_lightning.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="") if folder else None


def _mlflow(cfg: DictConfig, folder: Path | None, resumed: bool) -> object:
    from pytorch_lightning.loggers import MLFlowLogger

    uri = _experiment(cfg)
    number = folder / RUN_ID if folder else None
    known = number.read_text().strip() if resumed and number.is_file() else None
    logger = MLFlowLogger(cfg.mlflow.experiment, str(cfg.name), uri, run_id=known)
    if number and logger.run_id and logger.run_id != known:
        with runtime.atomic_path(number) as part:
            part.write_text(logger.run_id)
    return logger


def prepare(cfg: DictConfig) -> None:
    """Make MLflow's store and experiment where ``logger`` names it; before several processes want to at once."""
    if cfg.logger in ("mlflow", "both"):
        with contextlib.suppress(ModuleNotFoundError):
            _experiment(cfg)


def _experiment(cfg: DictConfig) -> str:
    """Make the experiment where it is not there; returns the address of its store."""
    uri = store_uri(cfg.mlflow.tracking_uri)
    client, name = _client(uri), cfg.mlflow.experiment
    if client.get_experiment_by_name(name) is None:
        # Nothing of ours is stored there; the default would be a folder wherever the command happens to run.
        files = str((runtime.RUNS / "mlflow_files").absolute()) if uri.startswith("sqlite") else None
        client.create_experiment(name, files)
    return uri


def _client(uri: str) -> object:
    import alembic  # noqa: F401 - a local store needs it, and mlflow-skinny alone would say so in 30 lines
    import sqlalchemy  # noqa: F401
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic", "pytorch_lightning.loggers.mlflow"):  # they tell of every new file and table
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise TrainingError(f"mlflow.tracking_uri={uri} does not answer ({text}); use logger=tensorboard") from None
    return client


def tracked_runs(experiment: str = "classify", tracking_uri: str | None = None) -> list[dict[str, object]]:
    """All runs of an MLflow experiment, oldest first: name, status, parameters and last metrics, one column each.

    Raises TrainingError where the store does not answer or has no such experiment.
    """
    uri = store_uri(tracking_uri)
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [e.name for e in client.search_experiments()]
        raise TrainingError(f"no MLflow experiment {experiment!r} in {uri}; there are {names}")
    runs, token = [], None
    while True:
        page = client.search_runs(
            [found.experiment_id], max_results=1000, order_by=["start_time ASC"], page_token=token
        )
        runs += page
        if not (token := page.token):
            break
    rows = [
        {"name": run.info.run_name, "status": run.info.status, **dict(sorted(run.data.params.items()))}
        | dict(sorted(run.data.metrics.items()))
        for run in runs
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "") for key in columns} for row in rows]


def report(found: list, metrics: Mapping[str, float], step: int) -> None:
    """Give final numbers to loggers whose training is over, and close them again."""
    for logger in found:
        logger.log_metrics(dict(metrics), step)
        logger.finalize("success")
