"""Loggers: TensorBoard, MLflow's local store (parameters, curves, resume), any other by its class, clear refusals."""

from __future__ import annotations

import sys

import pytest
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from nbhelpers import classify, runtime, tracking
from nbhelpers.experiments import TrainingError
from nbhelpers.runtime import write_csv
from nbhelpers.studies import read

from .test_classify import COLLECTION, tiny


@pytest.fixture
def store(runs, monkeypatch):
    """No server from the environment, and no minutes of waiting for one that is not there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return runs


def test_a_run_is_in_mlflow_and_tensorboard_and_goes_on_there_after_an_interruption(store):
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    cfg = tiny("tracked", "logger=both", "model.r=2")
    with pytest.raises(KeyboardInterrupt):
        classify.fit(cfg, COLLECTION, callbacks=[Stop()])
    assert [(r["name"], r["status"]) for r in tracking.tracked_runs()] == [("tracked", "FAILED")]
    result = classify.fit(cfg, COLLECTION)
    classify.fit(tiny("other", "logger=mlflow", "max_epochs=1"), COLLECTION, keep=False)
    first, second = tracking.tracked_runs()
    assert (first["name"], first["status"]) == ("tracked", "FINISHED") and second["name"] == "other"
    assert first["model/r"] == "2" and first["data_module/subset_fraction"] == "1.0"
    assert first["parameters/free"] == str(result.counts.free)
    assert first["test_accuracy"] == pytest.approx(result.test["accuracy"])
    assert first["val_accuracy"] == pytest.approx(result.history[-1]["val_accuracy"])
    assert first.keys() == second.keys()
    client = tracking._client(tracking.store_uri())
    run = client.search_runs([client.get_experiment_by_name("classify").experiment_id], "run_name = 'tracked'")[0]
    curve = client.get_metric_history(run.info.run_id, "train_loss")
    assert [m.step for m in curve] == [row["step"] for row in result.history]
    assert (runtime.RUNS / "mlflow.db").is_file() and any((result.folder / "tensorboard").iterdir())
    write_csv(runtime.RUNS / "runs.csv", [first, second])
    assert read(runtime.RUNS / "runs.csv")[1]["test_accuracy"] == pytest.approx(second["test_accuracy"])


def test_store_is_chosen_by_argument_environment_default(store, monkeypatch):
    assert tracking.store_uri() == f"sqlite:///{runtime.RUNS / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert tracking.store_uri() == "http://from-environment"
    assert tracking.store_uri("http://given") == "http://given"


def test_a_store_without_the_experiment_names_those_it_has(store):
    tracking.prepare(tiny("x", "logger=mlflow", "mlflow.experiment=mine"))
    with pytest.raises(TrainingError, match=r"no MLflow experiment 'classify' in sqlite.*'mine'"):
        tracking.tracked_runs()


def test_a_server_that_does_not_answer_stops_the_run_before_it_trains(store):
    cfg = tiny("x", "logger=mlflow", "mlflow.tracking_uri=http://127.0.0.1:9")
    with pytest.raises(TrainingError, match=r"tracking_uri=http://127\.0\.0\.1:9 does not answer.*logger=tensorboard"):
        classify.fit(cfg, COLLECTION)


@pytest.mark.parametrize("keep", [True, False])
def test_choices(store, keep):
    folder = store / "run" if keep else None
    kinds = {
        choice: [type(x).__name__ for x in tracking.loggers(tiny("x", f"logger={choice}"), folder)]
        for choice in ("none", "tensorboard")
    }
    assert kinds == {"none": [], "tensorboard": ["TensorBoardLogger"] if keep else []}


def test_what_is_not_installed_is_left_out_or_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert tracking.loggers(tiny("x", "logger=both")) == []
    tracking.prepare(tiny("x", "logger=both"))
    with pytest.raises(TrainingError, match=r"logger=mlflow: the package 'mlflow' is not installed; .*requirements"):
        tracking.loggers(tiny("x", "logger=mlflow"))


def test_any_logger_of_lightning_by_its_class(store):
    section = f"logger={{_target_: pytorch_lightning.loggers.CSVLogger, save_dir: '{store}', name: mine}}"
    found = tracking.loggers(tiny("x", section))
    assert [type(x) for x in found] == [CSVLogger] and found[0].name == "mine"
    classify.fit(tiny("x", section, "max_epochs=2"), COLLECTION, keep=False)
    rows = read(store / "mine" / "version_0" / "metrics.csv")
    assert rows[0]["val_accuracy"] != "" and rows[-1]["test_accuracy"] != ""
    with pytest.raises(TrainingError, match=r"cannot be made.*NoLogger"):
        tracking.loggers(tiny("x", "logger={_target_: pytorch_lightning.loggers.NoLogger}"))
