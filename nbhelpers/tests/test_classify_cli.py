"""``python -m nbhelpers classify``: pictures in, classes out; data sets, sweeps, tracked runs; one line per error."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from nbhelpers import checkpoints, classify, models, runtime
from nbhelpers.__main__ import main
from nbhelpers.classify_cli import COLUMNS, MISTAKES, evaluate, grid, infer, sweep
from nbhelpers.datasets.small_pictures import fit_picture
from nbhelpers.experiments import TrainingError
from nbhelpers.studies import read

from .test_classify import COLLECTION, COLOURS, TINY


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with "mine.npz" of coloured noise, "mine" trained on it, and pictures to recognise."""
    folder = tmp_path_factory.mktemp("home")
    arrays = {}
    for part, pictures in (("train", COLLECTION.train), ("test", COLLECTION.test)):
        arrays |= {f"x_{part}": pictures.images.permute(0, 2, 3, 1).numpy(), f"y_{part}": pictures.labels.numpy()}
    np.savez(folder / "mine.npz", **arrays, classes=COLOURS)
    photos = folder / "photos"
    (photos / "deep").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), (210, 60, 60), np.uint8)).save(photos / "red.png")
    Image.fromarray(np.full((30, 12, 4), (60, 60, 210, 255), np.uint8)).save(photos / "deep" / "blue_with_alpha.png")
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(photos / "grey.png")
    (photos / "bad.png").write_bytes(b"no picture")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "notes.txt").write_text("not asked")
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        overrides = [*TINY, "name=mine", "max_epochs=10", f"data_module.dataset={folder / 'mine.npz'}"]
        assert main(["classify", "train", *overrides]) == 0
    return folder


def use(folder, patch) -> None:
    patch.setattr(runtime, "RUNS", folder / "runs")
    patch.setattr(runtime, "CHECKPOINTS", folder / "checkpoints")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    use(home, monkeypatch)


def table(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- infer ------------------------------------------------------------------------------------------------


def test_folder_with_broken_pictures(home, tmp_path, capsys):
    out = tmp_path / "deep" / "out.csv"
    assert main(["classify", "infer", "mine", str(home / "photos"), "--csv", str(out)]) == 1
    shown = capsys.readouterr()
    rows = table(out)
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3
    found = {row["file"].rpartition("/")[2]: row for row in rows}
    assert found["red.png"]["class"] == "red" and found["blue_with_alpha.png"]["class"] == "blue"
    assert all(row["rank"] == "1" and 1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    assert all(f"{row['file']}" in shown.out and row["class"] in shown.out for row in rows)
    assert "2 skipped:" in shown.err and "bad.png" in shown.err and "empty.jpg" in shown.err
    assert "notes.txt" not in shown.err


def test_probabilities_are_those_of_the_network(home):
    path = home / "photos" / "red.png"
    found = infer("mine", [path], top=9)
    pixels = fit_picture(np.asarray(Image.open(path)), (12, 12))
    chances = classify.predict(checkpoints.load("mine"), pixels[None]).softmax(1)[0].sort(descending=True)
    assert [row["class"] for row in found.rows] == [COLOURS[i] for i in chances.indices]
    assert [row["probability"] for row in found.rows] == pytest.approx(chances.values.tolist(), abs=1e-4)
    assert [row["rank"] for row in found.rows] == [1, 2, 3] and found.skipped == []


def test_only_broken_pictures_write_nothing(home, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert main(["classify", "infer", "mine", str(home / "photos" / "bad.png"), "--csv", str(out)]) == 1
    assert not out.exists() and "1 skipped" in capsys.readouterr().err


def test_what_cannot_be_recognised_is_one_line(home, tmp_path, capsys):
    models_there = {"scale": 2, "channels": 4}
    checkpoints.save("upscaler", models.build("ESPCN", **models_there), "ESPCN", models_there, {"scale": 2}, [])
    red = str(home / "photos" / "red.png")
    for arguments, message in [
        (["none", red], "no network 'none'"),
        (["upscaler", red], "network 'upscaler' is no classifier; classifiers: ['mine']"),
        (["mine", str(home / "nothing")], "nothing"),
        (["mine", str(tmp_path)], "no pictures in"),
        (["mine", red, "--top", "0"], "top=0 must be at least 1"),
    ]:
        assert main(["classify", "infer", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_classifier_does_not_enlarge(home, tmp_path, capsys):
    red = str(home / "photos" / "red.png")
    assert main(["upscale", red, "-o", str(tmp_path / "out.png"), "--model", "mine"]) == 2
    assert "network 'mine' is no upscaler" in capsys.readouterr().err


# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluation_is_the_cards(home, capsys):
    metrics = checkpoints.card("mine")["metrics"]
    assert metrics["test_accuracy"] > 0.9
    assert main(["classify", "evaluate", "mine", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["pictures"] == 45 and found["data"] == "mine.npz"
    assert all(round(found[key], 4) == metrics[f"test_{key}"] for key in ("accuracy", "roc_auc", "loss"))
    assert main(["classify", "evaluate", "mine"]) == 0
    assert f"accuracy {metrics['test_accuracy']:.2%}" in capsys.readouterr().out


def test_mistakes_are_listed_the_surest_first(home, tmp_path, capsys):
    out = tmp_path / "mistakes.csv"
    # Labels that are one too high: what the network gets right becomes a mistake, and the other way round.
    arrays = dict(np.load(home / "mine.npz"))
    np.savez(tmp_path / "other.npz", **arrays | {"y_test": (arrays["y_test"] + 1) % 3})
    assert main(["classify", "evaluate", "mine", "--data", str(tmp_path / "other.npz"), "--mistakes", str(out)]) == 0
    rows = table(out)
    assert tuple(rows[0]) == MISTAKES and 40 < len(rows) <= 45
    assert f"accuracy {1 - len(rows) / 45:.2%}" in capsys.readouterr().out
    assert all(row["answer"] != row["class"] for row in rows)
    logits = classify.predict(checkpoints.load("mine"), COLLECTION.test.images)
    for row in rows:
        i = int(row["picture"])
        assert row["class"] == COLOURS[(COLLECTION.test.labels[i] + 1) % 3]
        assert row["answer"] == COLOURS[logits[i].argmax()]
        assert float(row["probability"]) == pytest.approx(float(logits[i].softmax(0).max()), abs=1e-4)
    chances = [float(row["probability"]) for row in rows]
    assert chances == sorted(chances, reverse=True) and len({row["picture"] for row in rows}) == len(rows)


def test_no_mistakes_leave_a_table_without_rows(tmp_path):
    (tmp_path / "red").mkdir()
    Image.fromarray(np.full((20, 20, 3), (220, 50, 50), np.uint8)).save(tmp_path / "red" / "1.png")
    evaluate("mine", str(tmp_path), mistakes=tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text() == ",".join(MISTAKES) + "\n"


def test_a_folder_of_classes_is_all_test(home, tmp_path, capsys):
    for name, colour in (("red", (220, 50, 50)), ("blue", (50, 50, 220))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((20, 20, 3), colour, np.uint8)).save(tmp_path / name / "1.png")
    found = evaluate("mine", str(tmp_path))
    assert found["pictures"] == 2 and found["accuracy"] == 1.0 and found["roc_auc"] == 1.0
    (tmp_path / "red" / "1.png").unlink()
    assert math.isnan(evaluate("mine", str(tmp_path))["roc_auc"])
    assert main(["classify", "evaluate", "mine", "--data", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roc_auc"] is None
    (tmp_path / "violet").mkdir()
    assert main(["classify", "evaluate", "mine", "--data", str(tmp_path)]) == 2
    assert "class 'violet' that is none of ['red', 'green', 'blue']" in capsys.readouterr().err


def test_another_data_set_must_have_the_same_classes(capsys):
    assert main(["classify", "evaluate", "mine", "--data", "bundled"]) == 2
    assert "bundled has the classes ['anemones'" in capsys.readouterr().err


# --- sweep ------------------------------------------------------------------------------------------------


def test_grid_is_every_combination_with_seeds_apart():
    variants, seeds = grid(["model.r=1,2", "max_epochs=3", "model.num_matrices=range(1,3)", "seed=4,5"])
    assert seeds == [4, 5]
    assert list(variants) == [f"r={r}, num_matrices={m}" for r in (1, 2) for m in (1, 2)]
    assert variants["r=2, num_matrices=1"] == ["max_epochs=3", "model.r=2", "model.num_matrices=1"]
    assert grid(["max_epochs=3"]) == ({"as given": ["max_epochs=3"]}, [0])
    assert list(grid(["model.odk_layers=[4],[3,4]"])[0]) == ["odk_layers=[4]", "odk_layers=[3,4]"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=a", "seed must be whole numbers"),
        ("name=x", "name is not for sweeps"),
        ("model.r=1,", r"'model\.r=1,' is no key=value or key=a,b"),
    ],
)
def test_what_is_no_grid_is_refused(override, message):
    with pytest.raises(TrainingError, match=message):
        grid([override])


def test_sweep_writes_table_and_best_and_runs_nothing_twice(home, capsys):
    fast = [o for o in TINY if "max_epochs" not in o] + [f"data_module.dataset={home / 'mine.npz'}"]
    asked = ["classify", "sweep", "--name", "tiny", *fast, "max_epochs=1,6", "seed=0,1"]
    assert main(asked) == 0
    rows = read(runtime.RUNS / "sweeps" / "tiny.csv")
    assert [(r["variant"], r["seed"]) for r in rows] == [(f"max_epochs={n}", s) for s in (0, 1) for n in (1, 6)]
    assert rows[0]["free"] < rows[0]["dense"] and rows[1]["steps"] == 6 * rows[0]["steps"]
    assert not list((runtime.RUNS / "train").glob("tiny*/*.ckpt"))
    best = runtime.RUNS / "sweeps" / "tiny_best.yaml"
    means = {n: sum(r["val_accuracy"] for r in rows if r["variant"] == f"max_epochs={n}") / 2 for n in (1, 6)}
    winner = OmegaConf.load(best).max_epochs
    assert means[winner] == max(means.values())
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"best: python -m nbhelpers classify train --config {best}"
    assert main(asked) == 0
    assert read(runtime.RUNS / "sweeps" / "tiny.csv") == rows  # the seconds, too
    assert main(["classify", "train", "--config", str(best), "name=chosen"]) == 0
    card = checkpoints.card("chosen")
    assert card["config"]["max_epochs"] == winner and f"--config {best}" in card["command"]
    assert card["metrics"]["test_accuracy"] == round(rows[[1, 6].index(winner)]["test_accuracy"], 4)


def test_sweep_without_validation_is_refused():
    with pytest.raises(TrainingError, match=r"valid_size=0 leaves a sweep nothing to choose"):
        sweep([*TINY, "data_module.valid_size=0"])


# --- train, runs ------------------------------------------------------------------------------------------


def test_train_says_what_came_out_and_what_was_skipped(home, capsys):
    overrides = [*TINY, "max_epochs=1", "name=said", f"data_module.dataset={home / 'mine.npz'}"]
    assert main(["classify", "train", *overrides]) == 0
    text = capsys.readouterr().out
    assert "said: accuracy" in text and "45 test pictures" in text and "free parameters" in text
    assert "layer3.0.downsample.0 (no room for any of 1 matrices in a kernel of 16 x 8·1·1)" in text


def test_show_prints_the_configuration_and_trains_nothing(capsys):
    assert main(["classify", "train", "model.r=4", "name=shown", "--show"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg == classify.compose(["model.r=4", "name=shown"])
    assert "shown" not in checkpoints.available(kind=None)
    assert main(["classify", "train", "model.rr=4"]) == 2
    assert "model.rr" in capsys.readouterr().err


def test_tracked_runs_become_a_table(home, tmp_path, capsys):
    overrides = [*TINY, "max_epochs=1", f"data_module.dataset={home / 'mine.npz'}", "mlflow.experiment=two"]
    assert main(["classify", "train", *overrides, "name=one", "logger=mlflow"]) == 0
    out = tmp_path / "runs.csv"
    assert main(["classify", "runs", "--experiment", "two", "--csv", str(out)]) == 0
    assert [row["name"] for row in table(out)] == ["one"]
    assert table(out)[0]["model/num_matrices"] == "1" and float(table(out)[0]["test_accuracy"]) > 0
    assert "FINISHED" in capsys.readouterr().out
    assert main(["classify", "runs", "--experiment", "three"]) == 2
    assert "no MLflow experiment 'three'" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["train", "sweep", "infer", "evaluate", "runs"])
def test_every_action_has_help_that_suffices(action, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["classify", action, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"classify {action}" in text and len(text.splitlines()) > 6


def test_torch_is_not_imported_for_help():
    code = (
        "import sys\nfrom nbhelpers.__main__ import main\n"
        "try: main(['classify', 'train', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
