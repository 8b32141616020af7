"""Real-ESRGAN's damage: what each part does, that the draw is repeatable, what training and the command make of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from nbhelpers import checkpoints, runtime, training
from nbhelpers.__main__ import main
from nbhelpers.datasets.pairs import MARGIN, PhotoPairs, TilePairs
from nbhelpers.degradation import PRESETS, Degradation, DegradationError, blur_kernel, convolve, sinc_kernel
from nbhelpers.degrade import add_noise, add_shot_noise, downscale, gaussian_blur, jpeg, resize_bicubic
from nbhelpers.experiments import TrainingError, compose
from nbhelpers.images import find_images, load_image, save_image
from nbhelpers.metrics import psnr_rgb
from nbhelpers.tests.test_pairs import same, textured, write
from nbhelpers.tests.test_training import TINY

NAMES = sorted(p.stem for p in PRESETS.glob("*.yaml"))
MODES = ["area", "bilinear_no_antialias", "torch_no_antialias"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Six middles of the validation photos, "6 3 96 96"."""
    paths = find_images(runtime.PHOTOS / "val")[:6]
    return torch.stack([load_image(path)[:, 208:304, 208:304] for path in paths])


# --- The whole pipeline -----------------------------------------------------------------------------------


def test_with_everything_off_it_is_the_protocols_bicubic(photos):
    for settings in ({}, {"first": None, "second": {"blur": None}}):
        assert torch.equal(Degradation.of(settings)(photos, 4, seeded()), downscale(photos, 4))
    never = {"probability": 0}
    stage = {
        "blur": {"sigma": [3, 3], **never},
        "noise": {"sigma": [30, 30], "poisson": [3, 3], **never},
        "jpeg": {"quality": [10, 10], **never},
        "resize": {"range": [0.5, 2], "modes": ["area"]},  # no share goes up or down
    }
    off = Degradation.of({"first": stage, "second": {k: v for k, v in stage.items() if k != "resize"}})
    assert torch.equal(off(photos, 4, seeded()), downscale(photos, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_presets_give_8_bit_pictures_of_the_right_size(photos, name, scale):
    lr = Degradation.preset(name)(photos[:, :, :, :72], scale, seeded())
    assert lr.shape == (6, 3, 96 // scale, 72 // scale) and lr.min() >= 0 and lr.max() <= 1
    assert torch.equal(lr.mul(255).round() / 255, lr)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_function_of_the_generator_and_treats_pictures_differently(photos, name):
    degradation = Degradation.preset(name)
    torch.manual_seed(1)
    one = degradation(photos, 4, seeded(3))
    torch.manual_seed(2)  # neither the global generator nor Python's may matter
    assert torch.equal(degradation(photos, 4, seeded(3)), one)
    assert not torch.equal(degradation(photos, 4, seeded(4)), one)
    alike = degradation(photos[:1].expand(8, -1, -1, -1), 4, seeded())
    assert len({tuple(p.flatten().tolist()) for p in alike}) == 8


def test_presets_keep_the_mean_colour_and_the_light_one_is_lighter(photos):
    error = {}
    for name in NAMES:
        lr = torch.cat([Degradation.preset(name)(photos, 4, seeded(seed)) for seed in range(5)])
        hr = photos.repeat(5, 1, 1, 1)
        shift = (lr.mean((-2, -1)) - hr.mean((-2, -1))).mul(255)
        assert shift.abs().max() < 25 and shift.mean().abs() < 3, name
        error[name] = float((lr - downscale(hr, 4)).square().mean())
    assert 0 < 3 * error["light"] < error["real_esrgan"]


def test_nothing_is_moved():
    """Without noise and JPEG the middle of a blob stays where it is, whatever is blurred and resized."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    blob = torch.exp(-((y - 53.5).square() + (x - 39.5).square()) / 2 / 10**2).expand(1, 3, -1, -1)
    settings = yaml.safe_load((PRESETS / "real_esrgan.yaml").read_text())
    for stage in ("first", "second"):
        settings[stage] |= {"noise": None, "jpeg": None}
    lr = Degradation.of(settings)(blob.expand(40, -1, -1, -1), 4, seeded())[:, 0]
    steps = torch.arange(24.0) * 4 + 1.5
    weight = lr.sum((1, 2))
    centres = torch.stack([(lr.sum(2) * steps).sum(1) / weight, (lr.sum(1) * steps).sum(1) / weight], 1)
    moved = centres - torch.tensor([53.5, 39.5])
    assert moved.abs().max() < 1 and moved.mean(0).abs().max() < 0.3, "originals' pixels"


PARTS = {
    "blur": ({"blur": {"sigma": [1, 1]}}, {"blur": {"sigma": [4, 4]}}),
    "turned blur": (
        {"blur": {"sigma": [1, 2], "anisotropic": 1}},
        {"blur": {"sigma": [5, 9], "anisotropic": 1}},
    ),
    "plateau": ({"blur": {"sigma": [0.5, 0.5], "plateau": 1}}, {"blur": {"sigma": [3, 3], "plateau": 1}}),
    "sinc": ({"blur": {"sigma": [1, 1], "probability": 0, "sinc": 1}}, {"blur": {"sigma": [1, 1], "sinc": 1}}),
    "resize": (
        {"resize": {"down": 1, "range": [0.9, 1], "modes": MODES}},
        {"resize": {"down": 1, "range": [0.05, 1], "modes": MODES}},
    ),
    "gaussian noise": (
        {"noise": {"sigma": [9, 9], "poisson": [0, 0], "gaussian": 1}},
        {"noise": {"sigma": [50, 50], "poisson": [0, 0], "gaussian": 1}},
    ),
    "poisson noise": (
        {"noise": {"sigma": [0, 0], "poisson": [1, 1], "gaussian": 0}},
        {"noise": {"sigma": [0, 0], "poisson": [4, 4], "gaussian": 0}},
    ),
    "jpeg": ({"jpeg": {"quality": [80, 80]}}, {"jpeg": {"quality": [10, 10]}}),
}


@pytest.mark.parametrize("stage", ["first", "second"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_does_damage_and_more_where_it_is_stronger(photos, part, stage):
    clean = downscale(photos, 4)
    weak, strong = (Degradation.of({stage: settings})(photos, 4, seeded()) for settings in PARTS[part])
    score = [psnr_rgb(torch.cat([*damaged], 2), torch.cat([*clean], 2), 0) for damaged in (weak, strong)]
    assert score[1] < score[0] - 0.5 and score[1] < 45, score


def test_ends_of_the_ranges_are_met():
    """On flat grey the deviation is the strength drawn: all of the range, and nothing outside."""
    grey = torch.full((60, 3, 40, 40), 0.5)
    noise = {"sigma": [5, 20], "poisson": [0, 0], "gaussian": 1}
    lr = Degradation.of({"first": {"noise": noise}})(grey, 1, seeded())
    deviation = lr.std((1, 2, 3)) * 255
    assert 4.7 < deviation.min() < 6.5 and 18.5 < deviation.max() < 21


def test_the_second_jpeg_comes_last_or_before_the_resizing(photos):
    last, before = (
        Degradation.of({"second": {"jpeg": {"quality": [9, 9]}}, "final": {"jpeg_last": p}})(photos, 4, seeded())
        for p in (1, 0)
    )
    assert torch.equal(last, jpeg(resize_bicubic(photos, (24, 24)), 9))
    assert torch.equal(before, downscale(jpeg(photos, 9), 4))


def test_the_final_low_pass_filter_takes_the_finest_detail(photos):
    clean, filtered = (Degradation.of({"final": {"sinc": p}})(photos, 2, seeded()) for p in (0, 1))
    assert filtered.diff(dim=-1).square().mean() < 0.97 * clean.diff(dim=-1).square().mean()


# --- Kernels and noise ------------------------------------------------------------------------------------


def test_a_round_kernel_is_the_gaussian_of_degrade(photos):
    for sigma in (0.5, 1.7, 3.0):
        inside = (slice(None), slice(12, -12), slice(12, -12))
        ours = convolve(photos[0], blur_kernel(sigma, sigma))
        assert torch.allclose(ours[inside], gaussian_blur(photos[0], sigma)[inside], atol=2e-3)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (31, 40)])
def test_convolution_by_fourier_transform_is_convolution(size):
    x = torch.rand(3, *size, generator=seeded(), dtype=torch.float64)
    kernel = torch.rand(7, 7, generator=seeded(1), dtype=torch.float64)
    padded = F.pad(x[None], (3,) * 4, mode="replicate")
    wanted = F.conv2d(padded, kernel.flip(0, 1).expand(3, 1, 7, 7), groups=3)[0]
    assert torch.allclose(convolve(x, kernel), wanted)


def test_kernels_have_the_stated_deviations_along_their_axes():
    kernel = blur_kernel(4, 1.5, angle=math.pi / 6)
    steps = torch.arange(kernel.shape[0]) - kernel.shape[0] // 2.0
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    along = x * math.cos(math.pi / 6) + y * math.sin(math.pi / 6)
    across = y * math.cos(math.pi / 6) - x * math.sin(math.pi / 6)
    assert float(kernel.sum()) == pytest.approx(1)
    assert float((kernel * along**2).sum()) == pytest.approx(16, rel=0.06), "cut at 3 sigma"
    assert float((kernel * across**2).sum()) == pytest.approx(2.25, rel=0.06)
    assert float((kernel * along * across).sum()) == pytest.approx(0, abs=0.05)


def test_shapes_of_kernels():
    for beta in (0.5, 1.0, 4.0):  # the larger, the flatter the top
        middle = blur_kernel(4, 4, beta=beta)[12]
        assert float(middle[14] / middle[12]) == pytest.approx(math.exp(-(0.25**beta) / 2))
    middle = blur_kernel(3, 3, beta=2.0, plateau=True)[9]
    assert float(middle[10] / middle[9]) > 0.98 and float(middle[12] / middle[9]) == pytest.approx(0.5, abs=0.01)


def test_sinc_passes_what_is_below_its_cutoff_only():
    kernel = sinc_kernel(math.pi / 2)
    x = torch.arange(128.0)
    for frequency, least, most in ((0.2 * math.pi, 0.9, 1.1), (0.8 * math.pi, 0, 0.1)):
        wave = (torch.cos(frequency * x) / 2).expand(3, 128, -1)
        passed = convolve(wave, kernel)[:, 20:-20, 20:-20].std() / wave.std()
        assert least <= passed <= most
    assert float(sinc_kernel(math.pi).max()) > 0.6 > 0.3 > float(kernel.max())


def test_grey_noise_is_the_same_in_all_channels():
    flat = torch.full((2, 3, 50, 50), 0.5)
    for add in (add_noise, add_shot_noise):
        coloured, grey = (add(flat, 3.0, seeded(), grey) - flat for grey in (False, True))
        assert torch.allclose(grey[:, 0], grey[:, 2]) and not torch.allclose(coloured[:, 0], coloured[:, 2])
        assert float(grey.std()) == pytest.approx(float(coloured.std()), rel=0.05)


def test_shot_noise_grows_with_the_root_of_the_light():
    for value in (0.0, 0.1, 0.4):
        noise = add_shot_noise(torch.full((3, 200, 200), value), 0.5, seeded()) - value
        assert float(noise.std() * 255) == pytest.approx(0.5 * math.sqrt(value * 255), rel=0.02, abs=1e-6)
        assert float(noise.mean() * 255) == pytest.approx(0, abs=0.05)


# --- Settings ---------------------------------------------------------------------------------------------

BLUR = {"sigma": [0.2, 3]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"third": {}}, r"degradation\.third is unknown.*first.*second.*final"),
        ({"first": {"blurr": BLUR}}, r"degradation\.first\.blurr is unknown.*'blur'"),
        ({"first": {"blur": {**BLUR, "sigmas": 1}}}, r"degradation\.first\.blur\.sigmas is unknown.*'sigma'"),
        (
            {"first": {"blur": {"sigma": [3, 0.2]}}},
            r"degradation\.first\.blur\.sigma=\[3, 0\.2\] must be \[least, most\]",
        ),
        ({"first": {"blur": {"sigma": 3}}}, r"blur\.sigma=3 must be \[least, most\]"),
        ({"first": {"blur": {"sigma": [0, 3]}}}, r"blur\.sigma=\[0, 3\].*from 0\.01"),
        ({"second": {"blur": {**BLUR, "probability": 1.5}}}, r"degradation\.second\.blur\.probability=1\.5 .*0 to 1"),
        ({"first": {"blur": {**BLUR, "sinc": "no"}}}, r"blur\.sinc=no must be a number"),
        ({"first": {"blur": {**BLUR, "plateau": 0.6, "generalized": 0.7}}}, r"generalized=0\.7 and plateau=0\.6"),
        ({"first": {"blur": {}}}, r"degradation\.first\.blur lacks sigma.*null"),
        ({"first": {"blur": True}}, r"degradation\.first\.blur=True must be a section"),
        ({"first": {"jpeg": {"quality": [30, 101]}}}, r"jpeg\.quality=\[30, 101\].*from 1 to 100"),
        ({"first": {"noise": {"sigma": [-1, 3], "poisson": [0, 1]}}}, r"noise\.sigma=\[-1, 3\]"),
        ({"first": {"resize": {"range": [0.5, 0.9], "modes": MODES}}}, r"resize\.range=\[0\.5, 0\.9\] must hold 1"),
        ({"first": {"resize": {"range": [0.5, 2], "modes": ["lanczos"]}}}, r"modes=\['lanczos'\].*area"),
        ({"first": {"resize": {"range": [0.5, 2], "modes": MODES, "up": 0.6, "down": 0.6}}}, r"up=0\.6 and down=0\.6"),
        ({"final": {"modes": []}}, r"degradation\.final\.modes=\[\]"),
        ({"final": {"jpeg_last": -0.1}}, r"degradation\.final\.jpeg_last=-0\.1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_key_and_value(settings, message):
    with pytest.raises(DegradationError, match=message):
        Degradation.of(settings)


def test_wrong_pictures_and_presets(photos, tmp_path):
    with pytest.raises(ValueError, match=r"96x96 pixels do not divide by scale 5"):
        Degradation()(photos, 5, seeded())
    with pytest.raises(ValueError, match=r"'b 3 h w', got shape \(3, 96, 96\)"):
        Degradation()(photos[0], 4, seeded())
    with pytest.raises(DegradationError, match=r"no degradation 'heavy'; choose from light, real_esrgan"):
        Degradation.preset("heavy")
    own = tmp_path / "own.yaml"
    own.write_text("first: {jpeg: {quality: [20, 30]}}\n")
    assert Degradation.preset(own).first.jpeg.quality == (20, 30)


# --- In training ------------------------------------------------------------------------------------------


def config(*overrides: str):
    return compose("espcn_x2", [*TINY, "+degradation=real_esrgan", *overrides])


def test_the_section_is_added_and_changed_on_the_command_line():
    cfg = config("degradation.first.blur.sigma=[1,2]", "degradation.second.noise=null")
    degradation = Degradation.of(cfg.degradation)
    assert degradation.first.blur.sigma == (1, 2) and degradation.second.noise is None
    assert Degradation.of(config().degradation) == Degradation.preset("real_esrgan")
    training.check(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["degradation.first.jpeg.quality=[90,20]"], r"degradation\.first\.jpeg\.quality=\[90, 20\]"),
        (["+degradation.first.fog=1"], r"degradation\.first\.fog is unknown"),
        (["data.jpeg=true"], r"data\.jpeg=True does not go with the section degradation"),
        (["+data.lr_roots=[some/LR]"], r"data\.lr_roots=\['some/LR'\] does not go with"),
    ],
)
def test_training_refuses_wrong_settings_before_it_begins(overrides, message):
    with pytest.raises(TrainingError, match=message):
        training.fit(config(*overrides), data=())


@pytest.mark.parametrize("kind", ["memory", "tiles"])
def test_damaged_batches_are_a_function_of_seed_and_step(tmp_path, kind):
    photos = {"a.png": textured(90, 70), "b.png": textured(64, 99, 1)}
    paths = sorted(write(tmp_path, photos).glob("*.png"))

    def make(seed: int):
        settings = {"patch": 16, "batch": 4, "seed": seed, "degradation": Degradation.preset("light")}
        kinds = {"memory": (PhotoPairs, list(photos.values())), "tiles": (TilePairs, paths)}
        return kinds[kind][0](kinds[kind][1], 2, **settings)

    one, two, other = make(0), make(0), make(1)
    expected = [one[step] for step in (0, 7, 10**6)]
    assert all(same(two[s], e) for s, e in reversed(list(zip((0, 7, 10**6), expected, strict=True))))
    assert not same(expected[0], expected[1]) and not same(other[0], expected[0])
    lr, hr = expected[0]
    assert lr.shape == (4, 3, 16, 16) and hr.shape == (4, 3, 32, 32) and lr.dtype == hr.dtype == torch.uint8


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_originals_of_damaged_pairs_stay_aligned(scale):
    """With all damage off, LR is what the protocol makes of HR, up to what is seen beyond the crop's border."""
    pairs = PhotoPairs([textured(203, 157)], scale, patch=24, batch=16, degradation=Degradation())
    corners = set()
    for step in range(6):
        lr, hr = pairs[step]
        again = downscale(hr.float() / 255, scale).mul(255).round()
        assert ((again - lr.float()).abs()[..., 4:-4, 4:-4] <= 1).all()
        corners.add(tuple(hr[0, :, 0, 0].tolist()))
    assert len(corners) > 3


def test_photos_must_have_room_for_the_margin():
    side = (16 + MARGIN) * 2
    settings = {"patch": 16, "batch": 2, "degradation": Degradation()}
    assert PhotoPairs([textured(side, side)], 2, **settings)[0][0].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=rf"has {side} pixels on both sides, which patch=16 and {MARGIN} more"):
        PhotoPairs([textured(side - 1, side)], 2, **settings)


def test_a_network_trains_on_damage_and_its_card_says_so(runs):
    training.train(config("name=damaged", "trainer.max_steps=5"))
    card = checkpoints.card("damaged")
    assert "LR: damaged as the section degradation says" in card["metrics"]["protocol"]
    assert card["config"]["degradation"]["second"]["jpeg"]["quality"] == [30, 95]
    assert math.isfinite(card["metrics"]["val_psnr_y"])


# --- The command ------------------------------------------------------------------------------------------


def test_the_command_writes_what_training_validates_on(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name, side in (("b", 50), ("a", 41)):
        save_image(torch.rand(3, side, 44, generator=seeded(side)), photos / "sub" / f"{name}.png")
    assert main(["damage", str(photos), "-o", str(out), "--scale", "2"]) == 0
    assert "2 of 2 pictures written" in capsys.readouterr().out
    cfg = config(f"data.val_root={photos}", "data.val_limit=null", "seed=5")
    _, validation, _ = training.open_data(cfg, progress=False)
    for name, (lr, hr) in zip("ab", validation, strict=True):
        file = load_image(out / "sub" / f"{name}.png")
        assert torch.equal(file, lr) and file.shape[-2] * 2 == hr.shape[-2]
    assert main(["evaluate", "--model", "bicubic", "--hr", str(photos), "--lr", str(out), "--scale", "2"]) == 0
    assert main(["damage", str(photos), "-o", str(tmp_path / "other"), "--scale", "2", "--seed", "1"]) == 0
    assert not torch.equal(load_image(tmp_path / "other" / "sub" / "a.png"), load_image(out / "sub" / "a.png"))


def test_the_command_skips_what_it_cannot_read_and_names_bad_values(tmp_path, capsys):
    folder = save_image(torch.rand(3, 16, 16), tmp_path / "in" / "a.png").parent
    save_image(torch.rand(3, 3, 16), folder / "thin.png")
    (folder / "bad.png").write_bytes(b"x")
    assert main(["damage", str(folder), "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "1 of 3 pictures written" in printed.out
    assert "bad.png: is not a picture" in printed.err and "thin.png: is smaller than the scale 4" in printed.err
    for arguments, quoted in ((["--scale", "0"], "scale 0"), (["--preset", "fog"], "'fog'")):
        assert main(["damage", str(folder), "-o", str(tmp_path / "out2"), *arguments]) == 2
        assert quoted in capsys.readouterr().err
