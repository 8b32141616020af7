"""Pictures in and out: every kind is read upright in 8 bits, bad files raise ImageError, writes are atomic."""

from __future__ import annotations

import errno
import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from nbhelpers import images
from nbhelpers.images import ImageError, find_images, load_image, read_picture, save_image

ORIENTATION = 0x0112


def ramp(h: int = 24, w: int = 40) -> np.ndarray:
    """A picture without any symmetry: red grows to the right, green downwards, blue is constant."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // (w - 1), y * 255 // (h - 1), np.full_like(x, 90)], -1).astype(np.uint8)


def put(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [  # what a camera does to the upright picture before it writes that orientation
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_orientation_is_undone(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = put(tmp_path / "photo.png", np.ascontiguousarray(undo(ramp())), exif=exif)
    assert np.array_equal(read_picture(path).rgb, ramp())


def test_alpha_is_kept_apart(tmp_path):
    rgba = np.dstack([ramp(), np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)])
    picture = read_picture(put(tmp_path / "a.png", rgba))
    assert np.array_equal(picture.rgb, rgba[..., :3]) and np.array_equal(picture.alpha, rgba[..., 3])
    grey = read_picture(put(tmp_path / "la.png", rgba, "LA"))
    assert np.array_equal(grey.alpha, rgba[..., 3]) and grey.rgb.shape == (24, 40, 3)
    assert np.array_equal(grey.rgb[..., 0], grey.rgb[..., 2])


def test_palette_with_and_without_transparency(tmp_path):
    index = Image.fromarray(np.tile(np.array([0, 1, 2], np.uint8), (5, 4)), "P")
    index.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 90])
    index.save(tmp_path / "plain.png")
    index.save(tmp_path / "clear.png", transparency=1)
    index.save(tmp_path / "partly.png", transparency=bytes([255, 128, 0]))
    plain, clear, partly = (read_picture(tmp_path / f"{n}.png") for n in ("plain", "clear", "partly"))
    assert plain.alpha is None and plain.rgb[0, :3].tolist() == [[255, 0, 0], [0, 200, 0], [0, 0, 90]]
    assert clear.alpha[0, :3].tolist() == [255, 0, 255]
    assert partly.alpha[0, :3].tolist() == [255, 128, 0] and np.array_equal(partly.rgb, plain.rgb)


def test_grey_and_one_bit(tmp_path):
    grey = ramp()[..., 0]
    assert np.array_equal(read_picture(put(tmp_path / "l.png", grey)).rgb, np.dstack([grey] * 3))
    bits = read_picture(put(tmp_path / "1.png", (grey > 100).astype(np.uint8) * 255, "1")).rgb
    assert np.array_equal(bits[..., 1], (grey > 100) * 255)


def test_cmyk_jpeg_is_close_to_its_rgb(tmp_path):
    picture = read_picture(put(tmp_path / "print.jpg", ramp(), "CMYK", quality=98, subsampling=0))
    assert picture.rgb.shape == (24, 40, 3)
    assert np.abs(picture.rgb.astype(int) - ramp()).mean() < 4


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        got = read_picture(tmp_path / name).rgb[..., 0]
        assert np.abs(got.astype(float) - deep / 257).max() <= 0.5001, name
    dark = np.full((4, 4), 200, np.uint16)  # a nearly black picture must not be taken for an 8-bit one
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert read_picture(tmp_path / "dark.png").rgb.max() == 1


def test_16_bit_rgb(tmp_path):
    """Pillow writes no 16-bit RGB, so the PPM is written by hand."""
    deep = (ramp().astype(np.uint32) * 257).astype(">u2")
    (tmp_path / "deep.ppm").write_bytes(b"P6 40 24 65535\n" + deep.tobytes())
    assert np.array_equal(read_picture(tmp_path / "deep.ppm").rgb, ramp())


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert np.array_equal(read_picture(tmp_path / "f.tif").rgb[..., 0], np.round(values * 255))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 5), c) for c in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "film.gif").rgb == [255, 0, 0]).all()


def test_colour_profile_is_kept(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = read_picture(put(tmp_path / "in.jpg", ramp(), icc_profile=profile))
    assert picture.icc == profile
    for name in ("out.png", "out.jpg", "out.webp", "out.tif"):
        save_image(picture.rgb, tmp_path / name, icc=picture.icc)
        assert read_picture(tmp_path / name).icc == profile, name
    assert read_picture(put(tmp_path / "cmyk.jpg", ramp(), "CMYK", icc_profile=profile)).icc is None


def test_open_file_and_tensor_form(tmp_path):
    path = put(tmp_path / "a.png", ramp())
    x = load_image(io.BytesIO(path.read_bytes()))
    assert x.dtype == torch.float32 and x.shape == (3, 24, 40) and x.min() >= 0 and x.max() == 1
    assert np.array_equal(images.to_uint8(x), ramp())
    assert images.to_uint8(torch.tensor([-3.0, 0.4999 / 255, 1.7]).reshape(3, 1, 1)).tolist() == [[[0, 0, 255]]]


def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    path = put(tmp_path / "a.png", ramp(), exif=b"Exif\0\0garbage, not a TIFF header")
    assert np.array_equal(read_picture(path).rgb, ramp())


# --- bad files ----------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    """{kind: (path, words that the message must hold)}."""
    whole = put(tmp_path / "whole.jpg", ramp(200, 300)).read_bytes()
    png = put(tmp_path / "whole.png", ramp(200, 300)).read_bytes()
    kinds = {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"Dear diary, this is no picture.", "not a picture"),
        "cut.jpg": (whole[: len(whole) // 2], "damaged or cut short"),
        "cut.png": (png[: len(png) // 2], "damaged or cut short"),
        "zeros.tif": (b"II*\0" + bytes(100), "picture"),
    }
    for name, (data, _) in kinds.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    found = {name: (tmp_path / name, why) for name, (_, why) in kinds.items()}
    return found | {
        "folder.png": (tmp_path / "folder.png", "is a folder"),
        "missing.png": (tmp_path / "missing.png", "no such file"),
    }


@pytest.mark.parametrize(
    "kind", ["empty.png", "text.jpg", "cut.jpg", "cut.png", "zeros.tif", "folder.png", "missing.png"]
)
def test_bad_file_raises_one_error_with_name_and_reason(bad, kind):
    path, why = bad[kind]
    with pytest.raises(ImageError, match=why) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and caught.value.path == path


def test_decompression_bomb(tmp_path, monkeypatch):
    path = put(tmp_path / "bomb.png", ramp(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"bomb\.png: is too large to open safely"):
        read_picture(path)


def test_unreadable_file_says_so(tmp_path, monkeypatch):
    path = put(tmp_path / "locked.png", ramp())

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"locked\.png: cannot be read \(Permission denied\)"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp"])
def test_random_damage_never_raises_anything_else(kind):
    buffer, rng = io.BytesIO(), random.Random(0)
    Image.fromarray(ramp()).convert("P" if kind in ("png", "gif") else "RGB").save(buffer, kind)
    whole, refused = buffer.getvalue(), 0
    for i in range(150):
        data = bytearray(whole[: rng.randrange(1, len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 3 * 2):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_picture(io.BytesIO(bytes(data))).rgb.dtype == np.uint8
            except ImageError:
                refused += 1
    assert refused > 10


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_round_trip(tmp_path, suffix):
    alpha = np.full((24, 40), 200, np.uint8)
    picture = read_picture(save_image(torch.rand(3, 24, 40), tmp_path / f"a{suffix}", alpha))
    assert np.array_equal(picture.alpha, alpha)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_round_trip(tmp_path, suffix):
    assert np.array_equal(read_picture(save_image(ramp(), tmp_path / f"a{suffix}")).rgb, ramp())


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".ppm"])
def test_alpha_is_refused_where_it_would_be_lost(tmp_path, suffix):
    with pytest.raises(ImageError, match="cannot hold transparency"):
        save_image(ramp(), tmp_path / f"a{suffix}", np.zeros((24, 40), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_and_oversize(tmp_path):
    with pytest.raises(ImageError, match=r"cannot write suffix '\.xyz'"):
        save_image(ramp(), tmp_path / "a.xyz")
    with pytest.raises(ImageError, match="could not be written"):
        save_image(np.zeros((2, 17000, 3), np.uint8), tmp_path / "a.webp")  # WebP ends at 16383 pixels
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, error):
    path = save_image(ramp(), tmp_path / "a.png")
    before = path.read_bytes()

    def half_written(self, target, *_, **options):
        target.write(b"half")
        assert list(tmp_path.iterdir()) == [path], "a process killed now would leave nothing behind"
        raise error

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises((ImageError, KeyboardInterrupt)) as caught:
        save_image(np.zeros((5, 5, 3), np.uint8), path)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value) and "a.png" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- finding ------------------------------------------------------------------------------------------------


def test_find_images(tmp_path):
    for name in ("b/2.png", "b/deep/3.JPG", "a/1.webp", "a/notes.txt", "a/.1.f00.png", "a/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    a, b = tmp_path / "a", tmp_path / "b"
    every = [a / "1.webp", b / "2.png", b / "deep" / "3.JPG"]
    assert find_images([b, a]) == every
    assert find_images([b, a], recursive=False) == every[:2]
    assert find_images(b, recursive=False) == [b / "2.png"]
    assert find_images([tmp_path, b, str(b), b / "deep" / "..", b / "2.png"]) == every, "overlapping roots count once"
    assert find_images(a / "notes.txt") == [a / "notes.txt"], "a file named outright is taken"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([a, tmp_path / "nowhere"])


def test_shuffle_is_reproducible(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(b"x")
    plain, one, again, two = (find_images(tmp_path, shuffle_seed=s) for s in (None, 1, 1, 2))
    assert one == again != two and sorted(one) == plain == sorted(two) and one != plain


def test_camera_model(tmp_path):
    exif = Image.Exif()
    exif[images.EXIF_MODEL] = "SM-G900\0 "
    assert images.camera_model(put(tmp_path / "a.jpg", ramp(), exif=exif)) == "SM-G900"
    assert images.camera_model(put(tmp_path / "b.jpg", ramp())) is None
    (tmp_path / "c.jpg").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"c\.jpg"):
        images.camera_model(tmp_path / "c.jpg")
