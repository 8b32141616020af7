"""Training pairs: aligned to the scale, every flip used, a pure function of seed and step, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nbhelpers import runtime, training
from nbhelpers.datasets import pairs as pairs_module
from nbhelpers.datasets.pairs import PhotoPairs, TilePairs, loader, open_pairs
from nbhelpers.datasets.photos import DataError, resolve_root, split
from nbhelpers.datasets.store import SHEET
from nbhelpers.degrade import downscale
from nbhelpers.tests.test_training import TINY


def textured(h: int, w: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))


def blocks(h: int, w: int, scale: int) -> torch.Tensor:
    """Blocks of scale x scale equal pixels whose colour tells the block's place: red its row, green its column."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    small = torch.stack([y, x, torch.full_like(x, 7)]).byte()
    return small.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def write(folder: Path, pictures: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


@pytest.fixture
def nearest(monkeypatch):
    """A downscaler that keeps a block's colour exactly, so that alignment can be checked to the bit."""
    monkeypatch.setitem(pairs_module.downscale.__globals__["DOWNSCALERS"], "first", lambda x, size: x[
        ..., :: x.shape[-2] // size[0], :: x.shape[-1] // size[1]
    ])  # fmt: skip
    return "first"


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("kind", ["memory", "tiles"])
def test_every_low_pixel_is_the_block_above_it(tmp_path, nearest, scale, kind):
    options = {"patch": 8, "batch": 32, "downscaler": nearest}
    sizes = ((30, 21), (20, 50), (9, 8))
    pictures = {f"{i}.png": blocks(h, w, scale) for i, (h, w) in enumerate(sizes)}
    if kind == "memory":
        pairs = PhotoPairs(list(pictures.values()), scale, **options)
    else:
        write(tmp_path, pictures)
        pairs = TilePairs(sorted(tmp_path.glob("*.png")), scale, **options)
    corners = set()
    for step in range(4):
        lr, hr = pairs[step]
        assert lr.shape == (32, 3, 8, 8) and hr.shape == (32, 3, 8 * scale, 8 * scale)
        assert lr.dtype == hr.dtype == torch.uint8
        assert torch.equal(hr, lr.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
        corners |= {(int(c[0].min()), int(c[1].min())) for c in lr}
    assert len(corners) > 60, "positions are spread over the photos"


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_of_a_photo_match_the_protocols_downscaling(scale):
    """Inside, where the crop's own border cannot be felt, shrinking the HR crop gives the LR crop."""
    pairs = PhotoPairs([textured(203, 157)], scale, patch=24, batch=16)
    lr, hr = pairs[5]
    again = downscale(hr.float() / 255, scale).mul(255).round()
    difference = (again - lr.float()).abs()[..., 4:-4, 4:-4]
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.001
    shifted = (again[..., 5:-3, 4:-4] - lr.float()[..., 4:-4, 4:-4]).abs()
    assert shifted.mean() > 10, "one pixel off would be seen"


def eight(x: torch.Tensor) -> list[torch.Tensor]:
    """torch's own flips and transposes of "c h w"."""
    flipped = [x, x.flip(1), x.flip(2), x.flip(1, 2)]
    return flipped + [f.transpose(1, 2) for f in flipped]


@pytest.mark.parametrize("kind", ["memory", "tiles"])
def test_all_eight_flips_appear_and_agree_with_torch(tmp_path, nearest, kind):
    photo = blocks(12, 12, 2)
    photo[:, 5:9, 2:7] = textured(4, 5)
    options = {"patch": 12, "batch": 40, "downscaler": nearest}
    if kind == "memory":
        pairs = PhotoPairs([photo], 2, **options)
        plain = PhotoPairs([photo], 2, augment=False, **options)
    else:
        paths = sorted(write(tmp_path, {"a.png": photo}).glob("*.png"))
        pairs, plain = TilePairs(paths, 2, **options), TilePairs(paths, 2, augment=False, **options)
    lr, hr = pairs[0]
    expected = eight(photo)
    seen = [next(i for i, e in enumerate(expected) if torch.equal(e, picture)) for picture in hr]
    assert set(seen) == set(range(8))
    assert all(torch.equal(low, eight(photo[:, ::2, ::2])[i]) for low, i in zip(lr, seen, strict=True))
    assert all(torch.equal(p, photo) for p in plain[0][1])


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("jpeg", [False, True])
def test_batches_are_a_function_of_seed_and_step(tmp_path, jpeg):
    photos = {"a.png": textured(60, 70), "b.png": textured(50, 90, 1)}
    paths = sorted(write(tmp_path, photos).glob("*.png"))
    for make in (lambda s: PhotoPairs(list(photos.values()), 2, patch=16, batch=4, seed=s, jpeg=jpeg), 
                 lambda s: TilePairs(paths, 2, patch=16, batch=4, seed=s, jpeg=jpeg)):  # fmt: skip
        one, two, other = make(0), make(0), make(1)
        torch.manual_seed(5)
        expected = [one[s] for s in (0, 1, 7, 10**6)]
        torch.manual_seed(6)  # the global generator must not matter, nor the order of asking
        assert all(same(two[s], e) for s, e in reversed(list(zip((0, 1, 7, 10**6), expected, strict=True))))
        assert not same(expected[0], expected[1]) and not same(other[0], expected[0])


def test_jpeg_damages_the_input_only():
    photo = textured(60, 60)
    clean, hurt = (PhotoPairs([photo], 2, patch=16, batch=4, jpeg=j)[3] for j in (False, True))
    assert torch.equal(clean[1], hurt[1]) and not torch.equal(clean[0], hurt[0])


def test_workers_give_the_same_batches(tmp_path):
    paths = sorted(write(tmp_path, {"a.png": textured(40, 40), "b.png": textured(40, 50, 1)}).glob("*.png"))
    pairs = TilePairs(paths, 2, patch=8, batch=2)
    alone = list(loader(pairs, 3, 7))
    spread = list(loader(pairs, 3, 7, workers=2))
    assert len(alone) == len(spread) == 4
    assert all(same(a, b) and same(a, pairs[s]) for s, a, b in zip(range(3, 7), alone, spread, strict=True))


def test_memory_limit_decides_between_memory_and_tiles(tmp_path):
    write(tmp_path / "sub", {f"{i}.png": textured(64, 64, i) for i in range(3)})
    held, report = open_pairs(tmp_path, 2, patch=8, batch=2, progress=False)
    assert isinstance(held, PhotoPairs) and report["lazy"] is False and report["photos"] == 3
    lazy, report = open_pairs(tmp_path, 2, patch=8, batch=2, memory_limit_gb=3 * 64 * 64 * 3 / 1e9 * 0.99)
    assert isinstance(lazy, TilePairs) and report["lazy"] is True and len(lazy.paths) == 3
    for a, b in zip(held[0], lazy[0], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert len(held) == len(lazy)


def test_limit_and_shuffle_seed_choose_photos(tmp_path):
    write(tmp_path, {f"{i}.png": textured(32, 32, i) for i in range(9)})

    def names(**options):
        chosen, _ = open_pairs(tmp_path, 2, patch=8, memory_limit_gb=0, limit=4, **options)
        return [p.name for p in chosen.paths]

    assert names() == ["0.png", "1.png", "2.png", "3.png"]
    assert names(shuffle_seed=1) == names(shuffle_seed=1) != names()


def test_unreadable_photos_are_skipped_and_reported(tmp_path):
    write(tmp_path, {"a.png": textured(32, 32), "c.png": textured(40, 40)})
    (tmp_path / "b.png").write_bytes(b"no picture")
    pairs, report = open_pairs(tmp_path, 2, patch=8, batch=2, progress=False)
    assert report["photos"] == 2 and len(report["skipped"]) == 1 and "b.png" in report["skipped"][0]
    assert pairs[0][0].shape == (2, 3, 8, 8)
    lazy = TilePairs(sorted(tmp_path.glob("*.png")), 2, patch=8, batch=12)
    assert lazy[0][0].shape == (12, 3, 8, 8), "a damaged tile is drawn again"


def test_a_bomb_is_skipped_too(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": textured(20, 20), "huge.png": textured(90, 90)})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, report = open_pairs(tmp_path, 2, patch=8, batch=2, progress=False)
    assert report["photos"] == 1 and "huge.png" in report["skipped"][0]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"none of 1 photos has 64 pixels.*patch=32 at scale 2.*smaller data\.patch"):
        PhotoPairs([textured(63, 200)], 2, patch=32)
    assert PhotoPairs([textured(63, 200), textured(64, 64)], 2, patch=32).skipped_small == 1
    small = write(tmp_path / "small", {"a.png": textured(20, 20)})
    with pytest.raises(DataError, match=r"unreadable or below 64 pixels; last: .*a\.png"):
        TilePairs(sorted(small.glob("*")), 2, patch=32)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pictures below .*empty"):
        open_pairs(tmp_path / "empty", 2)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of 1 pictures.*readable.*a\.png"):
        open_pairs(bad, 2, progress=False)
    with pytest.raises(DataError, match=r"nowhere'.*bundled"):
        open_pairs("nowhere", 2)


def test_roots(tmp_path, monkeypatch):
    assert resolve_root("bundled") == runtime.PHOTOS / "train" and resolve_root("bundled_val") == runtime.PHOTOS / "val"
    assert resolve_root("data/photos") == runtime.ROOT / "data/photos", "relative paths start at the project"
    assert resolve_root(tmp_path) == tmp_path
    monkeypatch.setenv("NB_SHARED", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"'train_large' is not on this machine.*bundled"):
        resolve_root("train_large")


def test_several_roots_count_each_photo_once(tmp_path):
    write(tmp_path / "a", {"1.png": textured(32, 32)})
    write(tmp_path / "a" / "deep", {"2.png": textured(32, 32, 1)})
    _, report = open_pairs([tmp_path / "a", tmp_path / "a" / "deep"], 2, patch=8, progress=False)
    assert report["photos"] == 2


def test_the_contact_sheet_is_no_training_tile(tmp_path):
    write(tmp_path / "0", {"0.png": textured(32, 32)})
    write(tmp_path, {SHEET: textured(100, 100)})
    pairs, report = open_pairs(tmp_path, 2, patch=8, memory_limit_gb=0)
    assert [p.name for p in pairs.paths] == ["0.png"] and report["photos"] == 1


def test_split_is_disjoint_and_reproducible():
    paths = [Path(f"{i:02}.png") for i in range(20)]
    train, valid = split(paths, 0.2, seed=3)
    assert len(valid) == 4 and not set(train) & set(valid) and sorted(train + valid) == paths
    assert split(list(reversed(paths)), 0.2, seed=3) == (train, valid), "the order given does not matter"
    assert split(paths, 0.2, seed=4) != (train, valid)
    assert [len(part) for part in split(paths[:2], 0.01)] == [1, 1]
    assert [len(part) for part in split(paths, 0)] == [20, 0]
    with pytest.raises(ValueError, match=r"1\.5 is outside"):
        split(paths, 1.5)


# --- Small pictures made elsewhere ------------------------------------------------------------------------


def paired(tmp_path: Path, scale: int = 2, mark: str = "", suffix: str = ".png") -> tuple[Path, Path]:
    """Two folders of three pictures each, one of them in a folder below; LR is every scale-th pixel of HR."""
    pictures = {"a.png": textured(40, 60), "b.png": textured(48, 36, 1), "deep/c.png": textured(36, 36, 2)}
    for name, picture in pictures.items():
        big, small = tmp_path / "HR" / name, tmp_path / "LR" / name
        write(big.parent, {big.name: picture})
        write(small.parent, {f"{small.stem}{mark}{suffix}": picture[:, ::scale, ::scale]})
    return tmp_path / "HR", tmp_path / "LR"


@pytest.mark.parametrize(("mark", "suffix"), [("", ".png"), ("", ".BMP"), ("x2", ".png")])
@pytest.mark.parametrize("limit_gb", [4.0, 0.0], ids=["memory", "tiles"])
def test_given_small_pictures_are_cut_where_their_originals_are(tmp_path, mark, suffix, limit_gb):
    hr_root, lr_root = paired(tmp_path, 2, mark, suffix)
    options = {"patch": 8, "batch": 12, "memory_limit_gb": limit_gb, "progress": False}
    pairs, report = open_pairs([hr_root], 2, lr_roots=[lr_root], **options)
    assert report["photos"] == 3 and report["lazy"] == (limit_gb == 0)
    plain, _ = open_pairs([hr_root], 2, lr_roots=[lr_root], augment=False, **options)
    for step in range(3):
        lr, hr = plain[step]
        assert torch.equal(lr, hr[..., ::2, ::2]), "neither moved nor shrunk here"
        lr, hr = pairs[step]
        # A flip of the original takes another one of each two pixels; turning it back shows the pair again.
        assert all(any(torch.equal(a[:, ::2, ::2], b) for a, b in zip(eight(h), eight(s), strict=True))
                   for h, s in zip(hr, lr, strict=True))  # fmt: skip


def test_files_may_be_paired_one_by_one(tmp_path):
    hr_root, lr_root = paired(tmp_path)
    pairs, _ = open_pairs([hr_root / "a.png"], 2, lr_roots=[lr_root / "a.png"], patch=8, batch=2, progress=False)
    same_folder, _ = open_pairs([hr_root / "a.png"], 2, lr_roots=[lr_root], patch=8, batch=2, progress=False)
    assert same(pairs[0], same_folder[0])


def test_an_unreadable_file_leaves_its_counterpart_out(tmp_path):
    hr_root, lr_root = paired(tmp_path)
    (lr_root / "b.png").write_bytes(b"no picture")
    pairs, report = open_pairs(hr_root, 2, lr_roots=lr_root, patch=8, batch=4, augment=False, progress=False)
    assert report["photos"] == 2 and "LR/b.png" in report["skipped"][0]
    assert all(torch.equal(pairs[s][0], pairs[s][1][..., ::2, ::2]) for s in range(3))


@pytest.mark.parametrize("limit_gb", [4.0, 0.0], ids=["memory", "tiles"])
def test_folders_that_do_not_match_are_refused_before_training(tmp_path, limit_gb):
    hr_root, lr_root = paired(tmp_path)

    def refused(message: str, scale: int = 2, lr_roots: object = lr_root) -> None:
        with pytest.raises(DataError, match=message):
            open_pairs(hr_root, scale, lr_roots=lr_roots, patch=8, memory_limit_gb=limit_gb, progress=False)

    refused(r"1 folders of originals but 2 of low-resolution pictures; data\.lr_roots", lr_roots=[lr_root, hr_root])
    refused(r"no folder .*nowhere", lr_roots=tmp_path / "nowhere")
    refused(r"HR/a\.png has 40x60 pixels and .*LR/a\.png 20x30; at scale 4 that must be 10x15", scale=4)
    refused(r"HR/a\.png has 40x60 pixels and .*HR/a\.png 40x60; at scale 2 that must be 20x30", lr_roots=hr_root)
    (lr_root / "b.png").rename(lr_root / "b2.png")
    refused(r"1 of 3 originals have no low-resolution picture .*first: b\.png in .*LR.*data\.lr_roots")
    write(lr_root, {"b.png": textured(18, 24)})
    refused(r"HR/b\.png has 48x36 pixels and .*LR/b\.png 18x24; at scale 2 that must be 24x18")
    write(hr_root, {"b.png": textured(49, 36)})
    refused(r"HR/b\.png has 49x36 pixels, which scale 2 does not divide; crop")


@pytest.mark.parametrize("limit_gb", [4.0, 0.0], ids=["memory", "tiles"])
def test_sizes_are_compared_upright(tmp_path, limit_gb):
    """A photo that its EXIF block turns fits a small picture stored upright, whatever its header says."""
    hr_root, lr_root = tmp_path / "HR", tmp_path / "LR"
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by a quarter
    picture = Image.fromarray(textured(40, 60).permute(1, 2, 0).numpy())
    hr_root.mkdir()
    picture.save(hr_root / "a.png", exif=turned)
    write(lr_root, {"a.png": textured(30, 20)})
    options = {"patch": 8, "batch": 2, "memory_limit_gb": limit_gb, "progress": False}
    pairs, _ = open_pairs(hr_root, 2, lr_roots=lr_root, **options)
    assert pairs[0][0].shape == (2, 3, 8, 8)


def test_validation_takes_given_small_pictures_too(tmp_path):
    hr_root, lr_root = paired(tmp_path)
    settings = [*TINY, "data.limit=null", "data.val_limit=null", f"data.roots=[{hr_root}]"]
    both = [*settings, f"+data.lr_roots=[{lr_root}]"]
    apart = [*both, f"data.val_root={hr_root}", f"+data.val_lr_root={lr_root}"]
    for overrides, photos, kept in ((apart, 3, 3), ([*both, "data.valid_fraction=0.4"], 2, 1)):
        pairs, validation, report = training.open_data(training.compose("espcn_x2", overrides), progress=False)
        assert report["photos"] == photos and len(validation) == kept
        assert all(torch.equal(lr, hr[:, ::2, ::2]) for lr, hr in validation)
        assert pairs[0][0].shape == (2, 3, 12, 12)
    wrong = training.compose("espcn_x2", [*settings, f"data.val_root={hr_root}", f"+data.val_lr_root={hr_root}"])
    with pytest.raises(DataError, match=r"40x60 pixels and .*40x60"):
        training.open_data(wrong, progress=False)
