"""The tile cutter: which tiles come out, numbering, resuming, and what it says when something is wrong."""

import argparse
import errno
import json

import numpy as np
import pytest
from PIL import Image

from nbhelpers.datasets import store as store_module
from nbhelpers.datasets import tiles
from nbhelpers.datasets.store import TileError, TileStore, contact_sheet, tile_paths
from nbhelpers.datasets.tiles import cut_tiles, detail

TILE = 32


def textured(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_photo(path, rgb, camera=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if camera:
        exif[0x0110] = camera
    Image.fromarray(rgb).save(path, exif=exif)
    return path


@pytest.fixture
def photos(tmp_path):
    """Five photos: room for 3×4 tiles of 32 pixels at level 1, 1×2 at level 2, none at level 4."""
    for index in range(5):
        write_photo(tmp_path / "src" / f"sub{index % 2}" / f"{index}.png", textured(100, 140, index))
    return tmp_path / "src"


def cut(src, dst, **options):
    options = {"tile": TILE, "workers": 1, "progress": False} | options
    return cut_tiles(src, dst, **options)


def content(dst):
    """Every file below dst except the contact sheet, as bytes."""
    return {p.relative_to(dst).as_posix(): p.read_bytes() for p in dst.rglob("*.[pj][ns]*") if p.is_file()}


def journal(dst):
    return [json.loads(line) for line in (dst / "tiles.jsonl").read_text().splitlines()]


def test_tiles_are_exact_pieces_of_the_photo(photos, tmp_path):
    report = cut(photos, tmp_path / "t", levels=(1, 2))
    assert (report.tiles, report.new_tiles, report.photos) == (5 * (12 + 2), 70, 5)
    head, *entries = journal(tmp_path / "t")
    assert head["settings"]["tile"] == TILE
    number = 0
    for entry in entries:
        full = Image.open(photos.parent / entry["photo"])
        half = full.resize((70, 50), Image.Resampling.BICUBIC)
        assert entry["first"] == number
        for level, top, left in entry["cuts"]:
            source = np.asarray(full if level == 1 else half)
            tile = np.asarray(Image.open(tmp_path / "t" / str(number // 1000) / f"{number}.png"))
            assert np.array_equal(tile, source[top : top + TILE, left : left + TILE])
            number += 1
        # Grid cells of one level never overlap.
        assert len({(lv, y // TILE, x // TILE) for lv, y, x in entry["cuts"]}) == len(entry["cuts"])


def test_folders_hold_per_folder_tiles(photos, tmp_path):
    cut(photos, tmp_path / "t", per_folder=10)
    assert (tmp_path / "t" / "6" / "69.png").exists()
    assert sorted(int(p.stem) for p in (tmp_path / "t" / "3").iterdir()) == list(range(30, 40))
    assert TileStore(tmp_path).path(12678) == tmp_path / "12" / "12678.png"


def test_store_goes_on_after_the_highest_number(tmp_path):
    TileStore(tmp_path, per_folder=2, start=4).save(textured(8, 8, 0))
    assert TileStore(tmp_path, per_folder=2).save(textured(8, 8, 1)) == tmp_path / "2" / "5.png"


def test_per_image_takes_the_levels_in_turn(photos, tmp_path):
    report = cut(photos, tmp_path / "t", per_image=4, levels=(1, 2))
    assert report.tiles == 20
    assert all([c[0] for c in entry["cuts"]] == [1, 2, 1, 2] for entry in journal(tmp_path / "t")[1:])


def test_positions_depend_on_seed_and_relative_path_only(photos, tmp_path):
    def cuts(src, dst, **options):
        cut(src, tmp_path / dst, per_image=3, **options)
        return {e["photo"].split("/", 1)[1]: e["cuts"] for e in journal(tmp_path / dst)[1:]}

    whole = cuts(photos, "a")
    assert cuts(photos, "b", seed=1) != whole
    assert len({str(c) for c in whole.values()}) > 1
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    (moved / "sub0" / "0.png").unlink()
    fewer = cuts(moved, "c")
    assert len(fewer) == 4 and all(whole[name] == cells for name, cells in fewer.items())


def test_worker_processes_change_nothing(photos, tmp_path):
    cut(photos, tmp_path / "one")
    cut(photos, tmp_path / "two", workers=2)
    assert len(content(tmp_path / "one")) == 71
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_detail_measure():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    assert detail(np.full((64, 64, 3), 77, np.uint8)) == 0
    assert detail(ramp * 2) == pytest.approx(0, abs=1e-3)
    grey = np.random.default_rng(0).normal(128, 5, (256, 256, 1)).round().astype(np.uint8).repeat(3, 2)
    assert detail(grey) == pytest.approx(2 * 5, rel=0.03)


def test_flat_cells_are_dropped_and_counted(tmp_path):
    rgb = textured(TILE * 2, TILE * 4, 0)
    rgb[:, : TILE * 2] = 120
    write_photo(tmp_path / "src" / "a.png", rgb)
    report = cut(tmp_path / "src", tmp_path / "t", levels=(1,), per_image=4)
    assert report.tiles == 4 and report.flat <= 4
    assert all(left >= TILE * 2 for _, _, left in journal(tmp_path / "t")[1]["cuts"])
    report = cut(tmp_path / "src", tmp_path / "all", levels=(1,), min_detail=0)
    assert (report.tiles, report.flat) == (8, 0)
    assert cut(tmp_path / "src", tmp_path / "textured", levels=(1,)).flat == 4


def test_noisy_cameras_are_halved_first(tmp_path):
    rgb = textured(TILE * 2, TILE * 4, 0)
    write_photo(tmp_path / "src" / "phone.png", rgb, camera="Redmi Note 4")
    write_photo(tmp_path / "src" / "slr.png", rgb, camera="Canon EOS R5")
    report = cut(tmp_path / "src", tmp_path / "t", levels=(1,), shrink_cameras=("nikon", "redmi"))
    assert [len(entry["cuts"]) for entry in journal(tmp_path / "t")[1:]] == [2, 8]
    assert report.halved == 1


def test_bad_photos_are_reported_and_skipped(photos, tmp_path):
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("not a picture")
    whole = (photos / "sub0" / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    write_photo(photos / "tiny.png", textured(TILE - 1, 200, 0))
    report = cut(photos, tmp_path / "t")
    bad = ["src/cut.png", "src/empty.jpg", "src/text.png", "src/tiny.png"]
    assert [photo for photo, _ in report.failed] == bad
    assert report.tiles == 70 and report.photos == 9
    assert "skipped photos: 3 damaged, 1 too small" in str(report)
    assert "tiny.png: too small: 200×31 pixels, for tiles of 32" in str(report)
    # The next run knows them already and still names them.
    again = cut(photos, tmp_path / "t")
    assert again.resumed == 9 and again.new_tiles == 0 and again.failed == report.failed


def test_killed_run_goes_on_to_the_same_result(photos, tmp_path, monkeypatch):
    cut(photos, tmp_path / "whole")
    real, calls = TileStore.save, []

    def dies_in_the_third_photo(self, image):
        calls.append(1)
        if len(calls) == 35:
            raise KeyboardInterrupt
        return real(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(TileStore, "save", dies_in_the_third_photo)
        with pytest.raises(KeyboardInterrupt):
            cut(photos, tmp_path / "t")
    # As a kill leaves it: a cut-off last line, a half-written file, and one tile more than the photo had.
    with (tmp_path / "t" / "tiles.jsonl").open("a") as file:
        file.write('{"photo": "src/sub0/4.png", "fir')
    (tmp_path / "t" / "0" / ".34.abc.png").write_bytes(b"half")
    assert len(tile_paths(tmp_path / "t")) == 28
    report = cut(photos, tmp_path / "t")
    assert (report.resumed, report.new_tiles, report.tiles) == (2, 42, 70)
    assert content(tmp_path / "t") == content(tmp_path / "whole")


def test_limit_then_the_rest_equals_one_run(photos, tmp_path):
    cut(photos, tmp_path / "whole")
    assert cut(photos, tmp_path / "t", limit=2).photos == 2
    cut(photos, tmp_path / "t")
    assert content(tmp_path / "t") == content(tmp_path / "whole")


def test_other_settings_are_refused_with_both_values(photos, tmp_path):
    cut(photos, tmp_path / "t", limit=1)
    before = content(tmp_path / "t")
    with pytest.raises(TileError, match=r"tile was 32, now 16; seed was 0, now 7"):
        cut(photos, tmp_path / "t", tile=16, seed=7)
    assert content(tmp_path / "t") == before


def test_full_disk_is_one_clear_error_and_resumable(photos, tmp_path, monkeypatch):
    cut(photos, tmp_path / "whole")
    write, written = store_module.Path.write_bytes, []

    def full_after_20(path, data):
        written.append(path)
        if len(written) > 20:
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.Path, "write_bytes", full_after_20)
        with pytest.raises(TileError, match=r"disk of .*t is full.*Finished tiles are kept"):
            cut(photos, tmp_path / "t")
    assert len(list((tmp_path / "t" / "0").iterdir())) == 20
    cut(photos, tmp_path / "t")
    assert content(tmp_path / "t") == content(tmp_path / "whole")


def test_several_roots_same_names_and_tiles_inside_the_source(tmp_path):
    for year in ("2023", "2024"):
        write_photo(tmp_path / year / "summer" / "a.png", textured(TILE, TILE, int(year)))
    roots = [
        tmp_path / "2023" / "summer",
        tmp_path / "2024" / "summer",
        tmp_path / "2023" / "summer" / "a.png",
    ]
    cut(roots, tmp_path / "t")
    assert [e["photo"] for e in journal(tmp_path / "t")[1:]] == ["summer/a.png", "summer#2/a.png"]
    inside = tmp_path / "2023" / "tiles"
    assert cut(tmp_path / "2023", inside).photos == 1
    assert cut(tmp_path / "2023", inside).photos == 1


def test_unusable_folders_are_refused(photos, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(TileError, match=r"used is not empty and has no tiles\.jsonl"):
        cut(photos, tmp_path / "used")
    with pytest.raises(TileError, match="choose another tile folder"):
        cut(photos, photos.parent)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TileError, match="no photos found"):
        cut(tmp_path / "nothing", tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="missing"):
        cut(tmp_path / "missing", tmp_path / "t")
    with pytest.raises(TileError, match=r"no tiles\.jsonl"):
        tile_paths(tmp_path / "nothing")
    (tmp_path / "used" / "tiles.jsonl").write_text("rubbish\n")
    with pytest.raises(TileError, match="damaged"):
        cut(photos, tmp_path / "used")


SENSELESS = [
    {"tile": 4},
    {"per_image": 0},
    {"levels": ()},
    {"levels": (1, 1)},
    {"levels": (0,)},
    {"min_detail": -1.0},
    {"min_detail": float("nan")},
    {"per_folder": 0},
    {"workers": 0},
    {"limit": 0},
]


@pytest.mark.parametrize("bad", SENSELESS, ids=str)
def test_senseless_settings_are_quoted(photos, tmp_path, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError) as error:
        cut(photos, tmp_path / "t", **bad)
    assert f"{name}={value}" in str(error.value)
    assert not (tmp_path / "t").exists()


def test_contact_sheet_shows_a_sample_and_survives_deleted_tiles(photos, tmp_path):
    report = cut(photos, tmp_path / "t")
    with Image.open(report.contact_sheet) as sheet:
        assert sheet.size == (8 * 132 + 4, 8 * 132 + 4)
        assert np.asarray(sheet)[4:132, 4:132].std() > 10
    for path in tile_paths(tmp_path / "t")[3:]:
        path.unlink()
    assert len(tile_paths(tmp_path / "t")) == 3
    with Image.open(contact_sheet(tmp_path / "t")) as sheet:
        assert sheet.size == (2 * 132 + 4, 2 * 132 + 4)


def test_command_line(photos, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    tiles.add_arguments(parser)
    other = write_photo(tmp_path / "more" / "b.png", textured(TILE, TILE, 9), camera="Redmi").parent
    line = [photos, other, tmp_path / "t", "--tile", 32, "--levels", "1,2", "--per-image", 3, "--workers", 1]
    args = parser.parse_args([*map(str, line), "--shrink-cameras", "redmi, x", "--no-progress"])
    assert args.levels == (1, 2) and args.shrink_cameras == ("redmi", "x")
    assert tiles.run(args) == 0
    out = capsys.readouterr().out
    assert "15 tiles in" in out and "1 too small" in out and "16×16" not in out and "halved first" in out
    args.seed = 5
    assert tiles.run(args) == 2
    assert "error: " in (err := capsys.readouterr().err) and "seed was 0, now 5" in err and "Traceback" not in err
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "b", "--levels", "1,two"])
    assert "--levels" in capsys.readouterr().err
