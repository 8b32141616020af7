"""Small labelled pictures: bundled patches, CIFAR from a server on this machine, files of one's own, augmentation."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from nbhelpers import runtime
from nbhelpers.datasets import small_pictures as data
from nbhelpers.datasets.classification import DataError, LabelledPictures
from nbhelpers.datasets.download import DownloadError
from nbhelpers.datasets.small_pictures import augment, fit_picture, hold_out, open_collection

from .test_download import server  # noqa: F401 - a fixture


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- bundled ----------------------------------------------------------------------------------------------


def test_bundled_patches_are_those_of_ten_photos():
    found = open_collection("bundled")
    assert len(found.names) == 10 and "photos" in found.description
    assert found.train.labels.bincount().tolist() == [112] * 10 and found.test.labels.bincount().tolist() == [32] * 10
    assert found.train.images.shape == (1120, 3, 32, 32) and found.train.images.dtype == torch.uint8
    photo = np.asarray(Image.open(runtime.PHOTOS / "train" / f"{found.names[3]}.png").convert("RGB")).copy()
    assert torch.equal(found.test.images[found.test.labels == 3][0], torch.from_numpy(photo[:32, :32]).permute(2, 0, 1))


def test_no_region_is_in_training_and_test(tmp_path, monkeypatch):
    """Pictures whose pixels tell where they are: region and photo of every patch."""
    (tmp_path / "train").mkdir()
    y, x = np.mgrid[:384, :384] // data.REGION
    for number, name in enumerate(data.PATCH_PHOTOS):
        Image.fromarray(np.stack([y, x, 0 * x + number], 2).astype(np.uint8)).save(tmp_path / "train" / f"{name}.png")
    monkeypatch.setattr(runtime, "PHOTOS", tmp_path)
    found = open_collection("bundled")
    places = []
    for part in (found.train, found.test):
        assert part.images.float().flatten(2).std(2).max() == 0  # a patch lies in one region
        assert torch.equal(part.images[:, 2, 0, 0].long(), part.labels)
        places.append({tuple(p) for p in part.images[:, :, 0, 0].tolist()})
    assert not places[0] & places[1] and len(places[0] | places[1]) == 360
    (tmp_path / "train" / "raccoon.png").unlink()
    with pytest.raises(DataError, match=r"raccoon\.png.*git checkout -- data/photos"):
        open_collection("bundled")


# --- CIFAR, from a server on this machine ------------------------------------------------------------------


def members(classes: int, images: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Files of a small CIFAR archive: planes of red, green and blue, pickled as the original ones are."""
    key = "labels" if classes == 10 else "fine_labels"
    out = {}
    for name, pixels in images.items():
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        out[name] = pickle.dumps({"data": rows, key: [i % classes for i in range(len(rows))]})
    names = [f"class {i}" for i in range(classes)]
    return out | {"meta": pickle.dumps({"label_names" if classes == 10 else "fine_label_names": names})}


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, server, runs, monkeypatch):  # noqa: F811 - the fixture
    """(name, server, training pixels, test pixels): two training files of three pictures, four test pictures."""
    from torchvision.datasets import CIFAR10, CIFAR100

    name = request.param
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    images = {"a": noise(3, 32, 32, 3), "b": noise(3, 32, 32, 3, seed=1), "test": noise(4, 32, 32, 3, seed=2)}
    files = members(10 if name == "cifar10" else 100, images)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as pack:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    hashes = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    server.files["tiny.tar.gz"] = buffer.getvalue()
    changes = {
        "url": f"{server.url}/tiny.tar.gz",
        "filename": "tiny.tar.gz",
        "tgz_md5": hashlib.md5(buffer.getvalue()).hexdigest(),
        "train_list": [[file, hashes[file]] for file in ("a", "b")],
        "test_list": [["test", hashes["test"]]],
        "meta": kind.meta | {"filename": "meta", "md5": hashes["meta"]},
    }
    for key, value in changes.items():
        monkeypatch.setattr(kind, key, value)
    return name, server, np.concatenate([images["a"], images["b"]]), images["test"]


def folder():
    return runtime.RUNS / "downloads" / "mine"


def test_cifar_is_downloaded_once_into_the_ignored_folder(cifar):
    name, server, train, test = cifar  # noqa: F811
    for _ in range(2):
        found = open_collection(name, "mine")
        assert torch.equal(found.train.images, torch.from_numpy(train).permute(0, 3, 1, 2))
        assert torch.equal(found.test.images, torch.from_numpy(test).permute(0, 3, 1, 2))
        assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.test.labels.tolist() == [0, 1, 2, 3]
    assert server.asked == ["tiny.tar.gz"] and (folder() / "tiny.tar.gz").is_file()
    assert found.names[3] == "class 3" and found.description == name.upper().replace("R1", "R-1")


def test_an_archive_put_there_by_hand_is_enough(cifar):
    name, server, train, _ = cifar  # noqa: F811
    folder().mkdir(parents=True)
    (folder() / "tiny.tar.gz").write_bytes(server.files["tiny.tar.gz"])
    assert len(open_collection(name, "mine").train) == len(train) and server.asked == []


def test_a_damaged_file_is_unpacked_again(cifar):
    name, server, train, _ = cifar  # noqa: F811
    open_collection(name, "mine")
    unpacked = next(folder().glob("*/b"))
    unpacked.write_bytes(unpacked.read_bytes()[:-9])
    found = open_collection(name, "mine")
    assert torch.equal(found.train.images, torch.from_numpy(train).permute(0, 3, 1, 2)) and len(server.asked) == 1


def test_a_changed_archive_is_not_used(cifar):
    name, server, *_ = cifar  # noqa: F811
    server.files["tiny.tar.gz"] += b"more"
    with pytest.raises(DownloadError, match=r"tiny\.tar\.gz is damaged or has changed"):
        open_collection(name, "mine")
    assert not any(folder().glob("*"))


def test_without_internet_the_error_says_what_to_put_where(cifar):
    name, server, *_ = cifar  # noqa: F811
    with pytest.raises(DownloadError, match=r"no connection to .*tiny\.tar\.gz.*by hand.*mine"):
        data.cifar(name, folder(), base_url="http://127.0.0.1:9")
    assert server.asked == []


def test_the_packs_pictures_are_decoded_once(runs, monkeypatch):
    images, packed = {}, {}
    for part, count in (("train", 12), ("test", 11)):
        images[part] = [Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)) for i in range(count)]
        streams = []
        for image in images[part]:
            image.save(stream := io.BytesIO(), "JPEG")
            streams.append(stream.getvalue())
        packed[f"jpeg_{part}"] = np.frombuffer(b"".join(streams), np.uint8)
        packed[f"offset_{part}"] = np.cumsum([0, *map(len, streams)])
        packed[f"y_{part}"] = np.arange(count, dtype=np.uint8) % 10
    (runs / "data" / "cifar10").mkdir(parents=True)
    np.savez(runs / "data" / "cifar10" / "cifar10_jpeg.npz", **packed)
    monkeypatch.setattr(runtime, "shared", lambda: runs)
    first = open_collection("cifar10_jpeg", "here")
    monkeypatch.setattr(runtime, "shared", lambda: None)
    again = open_collection("cifar10_jpeg", "here")
    assert torch.equal(first.train.images, again.train.images)
    assert first.train.images[:, 0, 5, 5].tolist() == [20 * i for i in range(12)]
    assert first.test.labels.tolist() == [*range(10), 0] and first.names[2] == "bird" and "JPEG" in first.description


def test_without_the_pack_its_pictures_are_named(runs, monkeypatch):
    monkeypatch.setattr(runtime, "shared", lambda: None)
    with pytest.raises(DataError, match=r"'cifar10_jpeg' needs the optional pack \.\./shared.*use cifar10"):
        open_collection("cifar10_jpeg")


# --- files of one's own -----------------------------------------------------------------------------------


def arrays(**changes: object) -> dict[str, object]:
    train, test = noise(6, 8, 8, 3), noise(3, 8, 8, 3, seed=1)
    labels = {"y_train": np.array([0, 1, 2, 0, 1, 2]), "y_test": np.array([[2], [1], [0]], dtype=np.uint8)}
    return {"x_train": train, "x_test": test, **labels} | changes


def saved(tmp_path, **changes: object):
    path = tmp_path / "my.npz"
    np.savez(path, **{key: value for key, value in arrays(**changes).items() if value is not None})
    return path


def test_keras_layout_is_read(tmp_path):
    found = open_collection(str(saved(tmp_path)))
    assert torch.equal(found.train.images, torch.from_numpy(arrays()["x_train"]).permute(0, 3, 1, 2))
    assert found.test.labels.tolist() == [2, 1, 0] and found.names == ("0", "1", "2") and found.train.classes == 3
    assert found.description == "my.npz"
    assert open_collection(str(saved(tmp_path, classes=["a", "b", "c", "d"]))).names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"lacks y_test; Keras layout has x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((6, 8, 8, 3))}, r"x_train is float64 \(6, 8, 8, 3\); it must be uint8"),
        ({"x_test": noise(3, 8, 8)}, r"x_test is uint8 \(3, 8, 8\); it must be uint8 of shape \(n, h, w, 3\)"),
        ({"x_test": noise(3, 9, 8, 3)}, r"x_train \(6, 8, 8, 3\) and x_test \(3, 9, 8, 3\) differ in size"),
        ({"y_train": np.arange(5)}, r"y_train must hold 6 whole numbers from 0"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, r"y_train must hold 6 whole numbers from 0"),
        ({"y_test": np.array([0.0, 1.0, 2.0])}, r"y_test must hold 3 whole numbers from 0"),
        ({"classes": ["a", "b"]}, r"names 2 classes but has labels up to 2"),
        ({"x_train": np.array([None])}, r"is not a readable \.npz file"),  # a pickle
    ],
)
def test_a_wrong_file_is_described(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        open_collection(str(saved(tmp_path, **changes)))


def test_what_is_no_collection_is_quoted(tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"broken\.npz is not a readable \.npz file"):
        open_collection(str(broken))
    with pytest.raises(DataError, match=r"'cifar11' is neither a file nor a folder, nor one of \['bundled', 'cifar10'"):
        open_collection("cifar11")


@pytest.fixture
def class_folders(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise(40, 50, 3, seed=10 * number + i)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_class_folders_are_read_and_broken_pictures_named(class_folders, capsys):
    (class_folders / "train" / "cat" / "bad.png").write_bytes(b"no picture")
    found = open_collection(str(class_folders))
    assert found.names == ("cat", "dog") and found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 0, 1, 1] and found.train.images.shape == (6, 3, 32, 32)
    expected = fit_picture(noise(40, 50, 3, seed=11))
    assert torch.equal(found.train.images[4], expected)
    assert "left out" in capsys.readouterr().out


def test_class_folders_that_do_not_fit_are_refused(class_folders, tmp_path_factory):
    (class_folders / "test" / "bird").mkdir()
    with pytest.raises(DataError, match=r"has a class 'bird' that is none of \['cat', 'dog'\]"):
        open_collection(str(class_folders))
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match=r"has no folder 'train'; it needs train/CLASS"):
        open_collection(str(empty))
    (empty / "train").mkdir(), (empty / "test").mkdir()
    with pytest.raises(DataError, match="has no folders of classes"):
        open_collection(str(empty))
    (empty / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="has no readable pictures"):
        open_collection(str(empty))


@pytest.mark.parametrize(("shape", "window"), [((64, 100), (0, 18, 64, 64)), ((90, 32), (29, 0, 32, 32))])
def test_pictures_are_cut_in_the_middle_and_scaled_down(shape, window):
    rgb = noise(*shape, 3)
    top, left, h, w = window
    middle = torch.from_numpy(rgb[top : top + h, left : left + w].copy()).permute(2, 0, 1)
    expected = middle if h == 32 else torch.nn.functional.interpolate(
        middle[None].float(), (32, 32), mode="bicubic", antialias=True
    )[0].clamp(0, 255).round().byte()  # fmt: skip
    assert torch.equal(fit_picture(rgb), expected)
    assert fit_picture(np.full((1, 7, 3), 9, np.uint8)).unique().tolist() == [9]


# --- what training makes of them --------------------------------------------------------------------------


def numbered(n: int) -> LabelledPictures:
    return LabelledPictures(torch.arange(n)[:, None, None, None], torch.arange(n) % 10, 10)


def test_hold_out_gives_the_documents_numbers():
    train, valid = hold_out(numbered(50_000))
    assert (len(train), len(valid)) == (45_000, 5_000)
    assert torch.equal(torch.cat([train.images, valid.images]).flatten().sort().values, torch.arange(50_000))


def test_a_smaller_subset_lies_within_a_larger_one_and_the_share_held_out_is_of_the_subset():
    parts = {f: hold_out(numbered(1000), f, 0.2, seed=3) for f in (0.1, 0.5)}
    assert [len(x) for x in parts[0.1]] == [80, 20]
    small, large = (set(torch.cat([a.images, b.images]).flatten().tolist()) for a, b in parts.values())
    assert small < large
    other = hold_out(numbered(1000), 0.1, 0.2, seed=4)[0].images
    assert not torch.equal(other, parts[0.1][0].images)
    assert len(hold_out(numbered(10), 1.0, 0.0)[1]) == 0


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0, 0.1), r"subset_fraction=0 must lie above 0"),
        ((1.5, 0.1), r"subset_fraction=1\.5"),
        ((0.5, 1), r"valid_size=1 must lie between 0 and below 1"),
        ((0.1, 0.6), r"leave none of 10 pictures"),
    ],
)
def test_impossible_shares_are_quoted(fractions, message):
    with pytest.raises(DataError, match=message):
        hold_out(numbered(10), *fractions)


def test_augmentation_shifts_and_mirrors_and_is_decided_by_seed_and_step():
    picture = torch.arange(1, 1 + 3 * 8 * 8, dtype=torch.uint8).view(1, 3, 8, 8)
    batch = picture.expand(200, -1, -1, -1)
    first = augment(batch, seed=1, step=2, padding=2)
    assert torch.equal(first, augment(batch, 1, 2, 2))
    assert not torch.equal(first, augment(batch, 1, 3, 2)) and not torch.equal(first, augment(batch, 2, 2, 2))
    padded = torch.nn.functional.pad(picture[0], (2, 2, 2, 2))
    windows = [padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    possible = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(-1))}
    found = {tuple(x.flatten().tolist()) for x in first}
    assert found <= possible and len(found) > 40  # of 50
    assert first.is_contiguous(memory_format=torch.channels_last)
