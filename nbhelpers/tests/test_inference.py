"""Enlarging any picture: tiles equal the whole, memory stays bounded, folders survive bad files, measures agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nbhelpers import checkpoints, inference, metrics, models, runtime
from nbhelpers.degrade import crop_to_multiple, downscale, upscale_bicubic
from nbhelpers.images import ImageError, load_image, read_picture, save_image, to_tensor, to_uint8
from nbhelpers.inference import evaluate, plan_outputs, upscale, upscale_file, upscale_files

needs_fast_bf16 = pytest.mark.skipif(not runtime.cpu_has_fast_bf16(), reason="this CPU has no fast bfloat16")
# Elsewhere convolutions may add up in another order for another input size.
EXACT = torch.backends.mkldnn.is_available()


def network(scale: int = 2, channels: int = 32, **options: object) -> torch.nn.Module:
    """An ESPCN whose weights are as large as trained ones, so that every pixel sees its whole receptive field."""
    torch.manual_seed(scale)
    model = models.build("ESPCN", scale=scale, channels=channels, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


def picture(h: int, w: int, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(256, (3, h, w), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def png(path, h: int = 20, w: int = 24, seed: int = 0, alpha=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_image(picture(h, w, seed), path, alpha)


# --- tiles ----------------------------------------------------------------------------------------------------


def assert_same(tiled: torch.Tensor, whole: torch.Tensor) -> None:
    if EXACT:
        assert torch.equal(tiled, whole)
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert np.abs(to_uint8(tiled).astype(int) - to_uint8(whole)).max() <= (0 if EXACT else 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("tile", [16, 32, 96, 130])  # 131 = 1 · 130 + 1 and 97 = 6 · 16 + 1 leave one thin pixel
def test_tiled_equals_whole(scale, tile):
    model, x = network(scale), picture(97, 131)
    assert_same(upscale(model, x, tile=tile), upscale(model, x, tile=0))


@pytest.mark.parametrize(
    ("size", "tile"), [((3, 4000), 999), ((4000, 3), 1000), ((1, 300), 90), ((60, 161), 80), ((160, 97), 96)]
)
@pytest.mark.parametrize("channels", [8, 128])
def test_tiled_equals_whole_for_thin_pictures(size, tile, channels):
    model, x = network(2, channels), picture(*size)
    assert_same(upscale(model, x, tile=tile), upscale(model, x, tile=0))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_tiled_equals_whole_for_bicubic(scale):
    model, x = inference.Bicubic(scale), picture(97, 131)
    whole = upscale(model, x, tile=0)
    for tile in (13, 96):
        assert_same(upscale(model, x, tile=tile), whole)
    assert torch.allclose(whole.double(), upscale_bicubic(x.double(), scale).clamp(0, 1), atol=3e-6)


@needs_fast_bf16
@pytest.mark.parametrize("scale", [2, 4])
def test_tiled_equals_whole_in_bf16(scale):
    model, x = network(scale, 128), picture(97, 131)
    whole = upscale(model, x, tile=0, precision="bf16")
    for tile in (48, 130):
        assert_same(upscale(model, x, tile=tile, precision="bf16"), whole)
    exact = upscale(model, x, tile=0)
    assert not torch.equal(whole, exact) and (whole - exact).abs().max() < 0.1, "it is bf16, and still close"


def test_large_pictures_are_cut_by_themselves(monkeypatch):
    monkeypatch.setattr(inference, "AUTO_TILE", 40)
    monkeypatch.setattr(inference, "PROBE", 16)
    model, x, seen = network(), picture(90, 130), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    auto = upscale(model, x)
    assert seen.pop(0) == (16, 16), "the probe that shows how much memory it takes"
    assert len(seen) == 3 * 4 and max(h * w for h, w in seen) < 90 * 130
    assert_same(auto, upscale(model, x, tile=0))


def test_too_small_an_overlap_leaves_seams_at_the_cuts_only():
    model, x = network(), picture(120, 150)
    difference = (upscale(model, x, tile=50, overlap=1) - upscale(model, x, tile=0)).abs().amax(0)
    assert difference.max() > 1e-3
    away = torch.ones(240, dtype=torch.bool), torch.ones(300, dtype=torch.bool)
    for near in away:
        for cut in range(100, len(near), 100):
            near[cut - 8 : cut + 8] = False  # 4 input pixels, the halo, on each side
    assert difference[away[0]][:, away[1]].max() < 1e-5


def test_the_halo_is_the_receptive_field():
    """A gradient reaches exactly ``halo`` input pixels far: less would leave seams, more would waste work."""
    model = network(2, 16)
    x = picture(31, 31)[None].requires_grad_()
    model(x)[0, :, 30:32, 30:32].sum().backward()
    rows = (x.grad[0].abs().amax((0, 2)) > 0).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (15 - model.halo, 15 + model.halo)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2, 2)])
@pytest.mark.parametrize("model", [network(3), inference.Bicubic(3)], ids=["espcn", "bicubic"])
def test_tiny_and_thin_pictures(size, model):
    for options in ({}, {"tile": 2}, {"tile": 0}):
        sr = upscale(model, picture(*size), **options)
        assert sr.shape == (3, size[0] * 3, size[1] * 3) and sr.min() >= 0 and sr.max() <= 1


def test_array_and_tensor_agree():
    model, x = network(3), picture(50, 61)
    array = to_uint8(x)
    for tile in (0, 20):
        out = upscale(model, array, tile=tile)
        assert out.dtype == np.uint8 and out.shape == (150, 183, 3)
        assert np.array_equal(out, to_uint8(upscale(model, to_tensor(array), tile=tile)))


def test_output_is_clamped_and_on_the_cpu():
    model = network()
    with torch.no_grad():
        model.to_subpixels.bias.add_(torch.linspace(-2, 2, 12))
    sr = upscale(model, picture(9, 9))
    assert sr.min() == 0 and sr.max() == 1 and sr.device.type == "cpu" and not sr.requires_grad


def test_a_look_in_the_middle_of_training_changes_nothing():
    model = network()
    model.features[1].eval()
    upscale(model.train(), picture(20, 20))
    assert model.training and model.features[0].training
    model(picture(8, 8)[None]).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tile": -3}, "tile -3"),
        ({"overlap": -1}, "overlap -1"),
        ({"device": "tpu"}, "'tpu'.*cpu"),
        ({"precision": "int4"}, "'int4'.*fp32"),
        ({"precision": "fp16"}, "fp16.*CUDA"),
    ],
)
def test_wrong_options(options, why):
    with pytest.raises(ValueError, match=why):
        upscale(network(), picture(9, 9), **options)


@pytest.mark.parametrize(
    "wrong",
    [torch.rand(1, 3, 9, 9), torch.rand(9, 9, 3), torch.zeros(3, 9, 9, dtype=torch.uint8), torch.rand(3, 0, 5),
     np.zeros((9, 9, 3), np.float32), np.zeros((3, 9, 9), np.uint8), np.zeros((9, 9), np.uint8)],
)  # fmt: skip
def test_wrong_pictures(wrong):
    with pytest.raises(ValueError, match=r"expected a uint8 array.*got .*\("):
        upscale(network(), wrong)


# --- files ----------------------------------------------------------------------------------------------------


def test_upscale_file_keeps_alpha_orientation_and_profile(tmp_path):
    rgba = np.dstack([to_uint8(picture(12, 20)), np.tile(np.arange(20, dtype=np.uint8) * 12, (12, 1))])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.ascontiguousarray(np.rot90(rgba))).save(tmp_path / "in.png", exif=exif, icc_profile=b"profile")
    model = network(3)
    got = read_picture(upscale_file(model, tmp_path / "in.png", tmp_path / "sub" / "out.png"))
    assert got.rgb.shape == (36, 60, 3) and got.icc == b"profile"
    assert np.array_equal(got.rgb, upscale(model, np.ascontiguousarray(rgba[..., :3])))
    assert got.alpha.shape == (36, 60) and np.abs(got.alpha[:, 1::3].astype(int) - rgba[0, :, 3]).max() <= 1
    assert 0x0112 not in Image.open(tmp_path / "sub" / "out.png").getexif(), "upright now; not to be turned twice"


def test_folder_run_reports_bad_files_and_goes_on(tmp_path):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "sub" / "z.png")
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    (tmp_path / "in" / "notes.png").write_text("no picture")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    report = upscale_files(network(), plan_outputs([tmp_path / "in"], out), progress=False)
    assert report.written == [out / "a.png", out / "sub" / "z.png"] and report.seconds > 0
    assert len(report.skipped) == 3
    for name, why in (("empty.jpg", "empty"), ("notes.png", "not a picture"), ("cut.png", "cut short")):
        assert any(name in message and why in message for message in report.skipped)
    assert sorted(p.name for p in out.rglob("*.*")) == ["a.png", "z.png"]


def test_a_picture_too_large_for_its_format_is_reported(tmp_path):
    png(tmp_path / "in" / "wide.png", 2, 9000)
    png(tmp_path / "in" / "x.png")
    plan = plan_outputs([tmp_path / "in"], tmp_path / "out", ".webp")
    report = upscale_files(inference.Bicubic(2), plan, progress=False)
    assert [p.name for p in report.written] == ["x.webp"] and "wide.webp" in report.skipped[0]


def test_skip_existing_does_only_what_is_missing(tmp_path):
    for name in ("a", "b"):
        png(tmp_path / "in" / f"{name}.png")
    plan = plan_outputs([tmp_path / "in"], tmp_path / "out")
    upscale_files(network(), plan, progress=False)
    kept, gone = tmp_path / "out" / "a.png", tmp_path / "out" / "b.png"
    kept.write_bytes(b"mine")
    gone.unlink()
    assert upscale_files(network(), plan, skip_existing=True, progress=False).written == [gone]
    assert kept.read_bytes() == b"mine"


def test_plan_keeps_structure_and_names_single_files(tmp_path):
    a, b = png(tmp_path / "in" / "a.jpg"), png(tmp_path / "in" / "deep" / "b.png")
    out = tmp_path / "out"
    assert plan_outputs([tmp_path / "in"], out) == {a: out / "a.png", b: out / "deep" / "b.png"}
    assert plan_outputs([tmp_path / "in"], out, "same") == {a: out / "a.jpg", b: out / "deep" / "b.png"}
    assert plan_outputs([a, b, str(a)], out) == {a: out / "a.png", b: out / "b.png"}, "named twice, done once"
    assert plan_outputs([a], tmp_path / "big.webp") == {a: tmp_path / "big.webp"}
    (tmp_path / "v1.2").mkdir()
    assert plan_outputs([a], tmp_path / "v1.2") == {a: tmp_path / "v1.2" / "a.png"}, "an existing folder is a folder"
    with pytest.raises(ImageError, match=r"big\.xyz: cannot write suffix"):
        plan_outputs([a], tmp_path / "big.xyz")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan_outputs([tmp_path / "nowhere"], out)


def test_plan_refuses_collisions_and_overwriting(tmp_path):
    a, jpg = png(tmp_path / "in" / "a.png"), png(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png would both be written to .*out"):
        plan_outputs([tmp_path / "in"], tmp_path / "out")
    plan_outputs([tmp_path / "in"], tmp_path / "out", "same")
    with pytest.raises(ValueError, match=r"input .*a\.png would be overwritten"):
        plan_outputs([a], tmp_path / "in")
    with pytest.raises(ValueError, match=r"would be overwritten"):
        plan_outputs([a], tmp_path / "in" / ".." / "in" / "a.png")
    other = png(tmp_path / "other" / "a.png")
    with pytest.raises(ValueError, match=r"input .*in.a\.png would be overwritten|both be written"):
        plan_outputs([other, a], tmp_path / "in")
    assert plan_outputs([jpg], tmp_path / "big.jpg")


def test_output_below_the_input_is_not_enlarged_again(tmp_path):
    a = png(tmp_path / "a.png")
    out = tmp_path / "out"
    upscale_files(network(), plan_outputs([tmp_path], out), progress=False)
    assert plan_outputs([tmp_path], out) == {a: out / "a.png"}


# --- models and evaluation ------------------------------------------------------------------------------------


def test_get_model(tmp_path):
    checkpoints.save("net", network(2, 8), "ESPCN", {"scale": 2, "channels": 8}, {}, [], tmp_path)
    path = tmp_path / "net.safetensors"
    assert inference.get_model(path, 2).scale == 2 and inference.get_model("bicubic", 3).scale == 3
    model = network()
    assert inference.get_model(model) is model
    with pytest.raises(ValueError, match=r"net\.safetensors.*enlarges by 2, not by the 4"):
        inference.get_model(path, 4)
    with pytest.raises(ValueError, match=r"'bicubic'.*--scale"):
        inference.get_model("bicubic")
    with pytest.raises(ValueError, match="scale 0 must be"):
        inference.get_model("bicubic", 0)


@pytest.fixture
def hr(tmp_path):
    """Three originals, one in a subfolder with the name of another, one not divisible by the scale."""
    png(tmp_path / "hr" / "a.png", 60, 72, 1)
    png(tmp_path / "hr" / "sub" / "a.png", 61, 75, 2)
    png(tmp_path / "hr" / "b.png", 48, 48, 3)
    return tmp_path / "hr"


def test_evaluate_makes_the_small_pictures_by_the_protocol(hr):
    result = evaluate("bicubic", hr, scale=4, lpips=False)
    assert list(result) == ["model", "scale", "protocol", "images", "mean", "skipped", "notes"]
    assert set(result["images"]) == {"a.png", "b.png", "sub/a.png"}, "equal names in two folders are two pictures"
    original = crop_to_multiple(load_image(hr / "sub" / "a.png"), 4)
    expected = metrics.compare(upscale_bicubic(downscale(original, 4), 4), original, 4, lpips=False)
    row = result["images"]["sub/a.png"]
    assert list(row) == ["psnr_y", "ssim_y", "psnr_rgb", "lpips"] and row["lpips"] is None
    assert row["psnr_y"] == pytest.approx(expected["psnr_y"], abs=0.01)
    mean = sum(r["psnr_y"] for r in result["images"].values()) / 3
    assert result["mean"]["psnr_y"] == pytest.approx(mean)
    assert result["protocol"] == metrics.protocol(4, "MATLAB-style bicubic, made here")
    assert result["notes"] == ["cut to a size that x4 divides: sub/a.png"]


def test_evaluate_says_why_there_is_no_lpips(hr, monkeypatch):
    monkeypatch.setattr(metrics, "lpips_available", lambda: False)
    notes = evaluate("bicubic", hr / "b.png", scale=2)["notes"]
    assert len(notes) == 1 and "download lpips" in notes[0]


@pytest.mark.parametrize("form", ["{stem}.png", "{stem}x2.png", "{stem}.bmp"])
def test_evaluate_with_given_small_pictures(hr, tmp_path, form):
    model, lr = network(2, 8), tmp_path / "lr"
    for path in hr.rglob("*.png"):
        small = downscale(crop_to_multiple(load_image(path), 2), 2)
        folder = lr / path.parent.relative_to(hr)
        folder.mkdir(parents=True, exist_ok=True)
        save_image(small, folder / form.format(stem=path.stem))
        save_image(small[:, :5], folder / f"{path.stem}x1.png")  # another scale's picture beside it
        save_image(small[:, :5], folder / f"{path.stem}xe.png")
    given, made = evaluate(model, hr, lr, lpips=False), evaluate(model, hr, lpips=False)
    assert given["images"] == made["images"] and given["skipped"] == []
    assert "given files" in given["protocol"] and given["model"] == "ESPCN"
    for path in lr.rglob("a*2.*" if "x2" in form else "a.*"):
        save_image(1 - load_image(path), path)  # a change of the given files must show
    assert evaluate(model, hr, lr, lpips=False)["images"] != made["images"]


def test_evaluate_reports_what_it_cannot_use(hr, tmp_path):
    (hr / "broken.png").write_bytes(b"no")
    png(hr / "dot.png", 5, 90)
    result = evaluate("bicubic", hr, scale=2, lpips=False)
    assert len(result["images"]) == 3 and len(result["skipped"]) == 2
    assert "broken.png" in result["skipped"][0] and "dot.png" in result["skipped"][1]
    lr = tmp_path / "lr"
    png(lr / "b.png", 24, 23)
    with pytest.raises(ImageError, match=r"none of 1 pictures.*b\.png: its LR picture has 23 x 24.*needs 24 x 24"):
        evaluate("bicubic", hr / "b.png", lr, scale=2, lpips=False)


def test_evaluate_errors(hr, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*empty"):
        evaluate("bicubic", empty, scale=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate("bicubic", tmp_path / "nowhere", scale=2)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        evaluate("bicubic", hr, tmp_path / "nowhere", scale=2)
    with pytest.raises(FileNotFoundError, match=r"no low-resolution picture for a\.png in .*empty"):
        evaluate("bicubic", hr, empty, scale=2)
