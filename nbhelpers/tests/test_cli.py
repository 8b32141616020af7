"""The command line: help everywhere, one line per error, JSON and nothing else where JSON is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nbhelpers import checkpoints, models
from nbhelpers.__main__ import build_parser, main
from nbhelpers.images import load_image, save_image

COMMANDS = next(a for a in build_parser()._actions if a.dest == "command").choices


def noise(h: int, w: int) -> torch.Tensor:
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(h * w))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name, size in (("a.png", (40, 48)), ("b.png", (36, 36))):
        save_image(noise(*size), folder / name)
    return folder


@pytest.fixture
def tiny(runs):
    """A small network in an otherwise empty checkpoint folder."""
    torch.manual_seed(0)
    arguments = {"scale": 2, "channels": 8}
    card = {"scale": 2, "metrics": {"val_psnr_y": 31.416}}
    checkpoints.save("tiny_x2", models.build("ESPCN", **arguments), "ESPCN", arguments, card, [])
    return "tiny_x2"


def damaged(folder):
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: python -m nbhelpers" in text
    if not command:
        assert all(name in text for name in COMMANDS)


def test_every_command_of_the_plan_is_there():
    assert {"list", "upscale", "evaluate", "train", "study", "benchmark", "download", "tiles"} <= set(COMMANDS)


def test_help_is_quick_because_it_imports_no_torch():
    code = (
        "import sys\nfrom nbhelpers.__main__ import main\n"
        "for command in ([], ['upscale'], ['train'], ['evaluate']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'PIL', 'omegaconf'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list(tiny, tmp_path, capsys):
    assert main(["list"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["tiny_x2", "ESPCN", "2", f"{checkpoints.card(tiny)['parameters']:,}", "31.42"]
    assert main(["list", "--json"]) == 0
    out = capsys.readouterr()
    assert [c["name"] for c in json.loads(out.out)] == ["tiny_x2"] and out.err == ""
    assert main(["list", "--json", "--folder", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("model", ["bicubic", "tiny_x2"])
def test_evaluate_json_is_one_object_and_nothing_else(tiny, photos, capsys, model):
    damaged(photos)
    arguments = ["evaluate", "--model", model, "--hr", str(photos), "--scale", "2", "--json"]
    assert main(arguments) == 1, "some pictures were skipped"
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert out.out.count("\n") == 1
    assert list(result) == ["model", "scale", "protocol", "images", "mean", "skipped", "notes"]
    assert (result["model"], result["scale"]) == (model, 2) and "MATLAB" in result["protocol"]
    assert list(result["images"]) == ["a.png", "b.png"]
    assert set(result["mean"]) == {"psnr_y", "ssim_y", "psnr_rgb", "lpips"} == set(result["images"]["a.png"])
    assert result["mean"]["psnr_y"] > 5
    assert len(result["skipped"]) == 2
    assert out.err.count("skipped: ") == 2 and "bad.png" in out.err


def test_evaluate_json_has_no_infinity(photos, tmp_path, capsys):
    flat = save_image(torch.full((3, 40, 40), 0.5), tmp_path / "flat" / "grey.png").parent
    assert main(["evaluate", "--model", "bicubic", "--hr", str(flat), "--scale", "2", "--json", "--no-lpips"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["images"]["grey.png"]["psnr_y"] is None, "equal pictures have no finite PSNR"


def test_evaluate_prints_a_table_with_its_protocol(photos, capsys):
    assert main(["evaluate", "--model", "bicubic", "--hr", str(photos), "--scale", "3", "--no-lpips"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PSNR-Y (dB)" in lines[0] and lines[3].startswith("mean") and lines[4].startswith("x3; LR: ")
    assert "LPIPS-Squeeze" not in lines[0], "what was not asked for takes no room"
    assert lines[5:] == ["cut to a size that x3 divides: a.png"]


def test_real_process_on_a_file(tmp_path, photos):
    torch.manual_seed(0)
    arguments = {"scale": 2, "channels": 8}
    path = checkpoints.save("net", models.build("ESPCN", **arguments), "ESPCN", arguments, {}, [], tmp_path)
    command = [sys.executable, "-m", "nbhelpers", "upscale", str(photos / "a.png"), "-o", str(tmp_path / "big.png")]
    done = subprocess.run([*command, "--model", str(path), "--tile", "16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_image(tmp_path / "big.png").shape == (3, 80, 96)
    assert "1 of 1 pictures written" in done.stdout
    wrong = subprocess.run([*command, "--model", "bicubic"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.startswith("error: ")


def test_upscale_folder_with_damaged_files(tiny, photos, tmp_path, capsys):
    arguments = ["upscale", str(damaged(photos)), "-o", str(tmp_path / "out"), "--model", tiny]
    assert main(arguments) == 1
    out = capsys.readouterr()
    assert "2 of 4 pictures written" in out.out and "2 skipped:" in out.err
    assert "bad.png: is not a picture" in out.err and "empty.jpg: the file is empty" in out.err
    assert "Traceback" not in out.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    assert main([*arguments, "--skip-existing"]) == 1
    assert "0 of 4 pictures written" in capsys.readouterr().out


def test_upscale_of_good_files_ends_with_0(tiny, photos, tmp_path):
    assert main(["upscale", str(photos), "-o", str(tmp_path / "out"), "--model", tiny, "--format", ".jpg"]) == 0
    assert load_image(tmp_path / "out" / "a.jpg").shape == (3, 80, 96)


def test_upscale_of_an_empty_folder(tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["upscale", str(tmp_path / "empty"), "-o", str(tmp_path / "out"), "--model", tiny]) == 2
    assert "no pictures in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["evaluate", "--model", "espcn_x9", "--hr", "PHOTOS"], ["'espcn_x9'", "tiny_x2"]),
        (["evaluate", "--model", "bicubic", "--hr", "PHOTOS"], ["'bicubic'", "--scale"]),
        (["evaluate", "--model", "bicubic", "--hr", "PHOTOS", "--scale", "0"], ["scale 0"]),
        (["evaluate", "--model", "tiny_x2", "--hr", "PHOTOS", "--scale", "3"], ["'tiny_x2'", "by 2", "3"]),
        (["evaluate", "--model", "tiny_x2", "--hr", "PHOTOS/missing"], ["missing"]),
        (["evaluate", "--model", "tiny_x2", "--hr", "PHOTOS", "--lr", "PHOTOS/missing"], ["missing"]),
        (["evaluate", "--model", "tiny_x2", "--hr", "PHOTOS", "--device", "tpu"], ["'tpu'", "cpu"]),
        (["upscale", "PHOTOS/missing", "-o", "PHOTOS/out", "--model", "tiny_x2"], ["missing"]),
        (["upscale", "PHOTOS", "-o", "PHOTOS/out", "--model", "no_such"], ["'no_such'", "tiny_x2"]),
        (["upscale", "PHOTOS", "-o", "PHOTOS/out", "--model", "tiny_x2", "--tile", "-4"], ["tile -4"]),
        (["upscale", "PHOTOS", "-o", "PHOTOS", "--model", "tiny_x2"], ["overwritten", "a.png"]),
        (["upscale", "PHOTOS/a.png", "-o", "PHOTOS/a.xyz", "--model", "tiny_x2"], ["'.xyz'"]),
        (["train", "experiment=espcn_x9"], ["espcn_x9", "espcn_x4"]),
        (["train", "optimizer.rate=1"], ["optimizer.rate"]),
        (
            ["train", "init_from=null", "data.roots=[/no/such]", "trainer.progress=false"],
            ["no folder '/no/such'", "bundled"],
        ),
        (["study", "alchemy"], ["'alchemy'"]),
    ],
)
def test_errors_are_one_line_with_the_bad_value_and_code_2(tiny, photos, capsys, arguments, quoted):
    assert main([a.replace("PHOTOS", str(photos)) for a in arguments]) == 2
    out = capsys.readouterr()
    last = out.err.splitlines()[-1]  # a progress bar may stand before it
    assert out.out == "" and last.startswith("error: ") and out.err.count("error: ") == 1, out.err
    assert all(q in last for q in quoted), last


def test_train_show_prints_the_configuration_only(capsys):
    assert main(["train", "experiment=espcn_x2", "trainer.max_steps=7", "trainer.val_every=7", "--show"]) == 0
    out = capsys.readouterr()
    assert "max_steps: 7" in out.out and "scale: 2" in out.out and out.err == ""


def test_an_unknown_command_or_option_names_it(capsys):
    for arguments in (["upscal"], ["list", "--frobnicate"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert (arguments or ["COMMAND"])[-1] in capsys.readouterr().err


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    from nbhelpers import checkpoints

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "available", stop)
    assert main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err
