"""Networks for any scale: published counts, the published way of rendering, any size, tiles, precision, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nbhelpers import checkpoints, inference, models
from nbhelpers.degrade import upscale_bicubic
from nbhelpers.models import continuous, sampling
from nbhelpers.models.cross_scale import CrossScaleAttention
from nbhelpers.models.lmf import LIIF, LMLTE, LTE

SMALL = {"preset": "EDSR-b", "n_feats": 6, "n_blocks": 1}
SIZES = [
    ((5, 7), (13, 30)),
    ((2, 20), (4, 70)),  # some places lie halfway between two input pixels
    ((6, 4), (12, 8)),
    ((1, 3), (4, 4)),
    ((7, 6), (4, 5)),
    ((4, 5), (31, 17)),
]


def network(arch: str = "LMLTE", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    start = {"start": "default"} if arch == "LMLTE" else {}  # ours begins without details
    return models.build(arch, **{"encoder": SMALL, **start, **options}).eval()


def every_pixel(size: tuple[int, int], batch: int = 1) -> Tensor:
    return sampling.make_coord(size).expand(batch, -1, -1)


# --- published numbers ----------------------------------------------------------------------------------------


def test_parameters_as_published():
    """EDSR-baseline, hidden 128, hyper-network 128 → 288 → 288, render network 16 wide and 8 deep."""
    model = models.build("LMLTE")
    assert models.count_parameters(model) == 1_490_883
    assert [m.weight.shape for m in model.hyper if hasattr(m, "weight")] == [(288, 128), (288, 288)]
    assert len(model.render_mlp.layers) == 8 and model.render_mlp.layers[0].weight.shape == (16, 16)


@pytest.mark.parametrize(
    ("arch", "per_pixel", "per_input_pixel", "claimed"),
    [
        (LIIF, 1_383_424, 0, {2: "1383K", 4: "1383K", 8: "1383K"}),
        (LTE, 789_504, 294_912, {2: "863K", 4: "808K", 8: "794K"}),
        (LMLTE, 8_384, 267_264, {2: "75K", 4: "25K", 8: "13K"}),
    ],
)
def test_decoder_multiply_adds_of_an_output_pixel(arch, per_pixel, per_input_pixel, claimed):
    model, x = arch(), torch.rand(1, 3, 6, 6)
    features = torch.rand(1, 64, 6, 6)
    for scale, text in claimed.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.render(features, x, (6 * scale, 6 * scale))
        once = 0 if arch is LIIF else sum(m.weight.numel() for n, m in model.named_modules() if "phase" in n)
        macs = (counter.get_total_flops() / 2 - once) / (36 * scale**2)
        assert macs == per_pixel + per_input_pixel / scale**2
        assert f"{macs / 1000:.0f}K" == text


# --- against the published way --------------------------------------------------------------------------------


def as_published(model: torch.nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Local ensemble by nearest ``grid_sample`` at four shifted coordinates, mixed by the opposite areas (LIIF)."""
    features, coords = model.encode(x), every_pixel(size, len(x))
    (h, w), ratio = x.shape[-2:], (size[0] / x.shape[-2], size[1] / x.shape[-1])
    latent = model.latent(features, ratio).permute(0, 3, 1, 2)
    centres = sampling.make_coord((h, w)).view(1, h, w, 2).permute(0, 3, 1, 2).expand(len(x), -1, -1, -1)
    said, areas = [], []
    for vy in (-1, 1):
        for vx in (-1, 1):
            at = (coords + torch.tensor([vy / h + 1e-6, vx / w + 1e-6])).clamp(-1 + 1e-6, 1 - 1e-6).flip(-1)[:, None]
            own, centre = (F.grid_sample(m, at, "nearest", align_corners=False)[:, :, 0].mT for m in (latent, centres))
            offsets = (coords - centre) * torch.tensor([h, w]) / 2
            decoded = model.decode(own.flatten(0, 1), offsets.flatten(0, 1)[:, None], ratio)
            said.append(decoded.view(*coords.shape[:2], 3))
            areas.append(offsets.prod(-1).abs() + 1e-9)
    mixed = sum(s * (a / sum(areas))[..., None] for s, a in zip(said, reversed(areas), strict=True))
    base = 0.5
    if model.skip:
        base = F.grid_sample(x, coords.flip(-1)[:, None], "bilinear", "border", align_corners=False)[:, :, 0].mT
    return (mixed * 0.5 + base).mT.unflatten(2, size)


@pytest.mark.parametrize("arch", ["LIIF", "LTE", "LMLTE"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_rendering_is_the_published_one(arch, shape, size):
    model, x = network(arch), torch.rand(2, 3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x, size), as_published(model, x, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"local_ensemble": False}, {"local_size": 1}, {"cell_decode": False}])
@pytest.mark.parametrize("skip", ["bilinear", "bicubic", None])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_points_chunks_and_parts_are_the_whole_picture(options, skip, shape, size):
    model, x = network(skip=skip, **options), torch.rand(2, 3, *shape)
    with torch.no_grad():
        features = model.encode(x)
        whole = model.render(features, x, size)
        points = model.render(features, x, size, every_pixel(size, 2), chunk=11)
        torch.testing.assert_close(points.unflatten(2, size), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.render(features, x, size, chunk=5), whole, atol=1e-6, rtol=0)
        rows, columns = torch.tensor([1, 1, 3]), slice(2, size[1] - 1)
        part = model.render(features, x, size, rows=rows, columns=columns)
    torch.testing.assert_close(part, whole[:, :, rows, columns], atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", ["LIIF", "LMLTE"])
@pytest.mark.parametrize("options", [{}, {"local_ensemble": False}])
@pytest.mark.parametrize("latents", [1, 3 * 14, 5 * 14])
def test_strips_of_latents_are_the_whole_picture(monkeypatch, arch, options, latents):
    model, x = network(arch, **options), torch.rand(2, 3, 11, 7)
    for size in ((33, 21), (29, 9), (5, 7)):
        with torch.no_grad():
            whole = model(x, size)
            monkeypatch.setattr(continuous, "LATENTS", latents)
            torch.testing.assert_close(model(x, size), whole, atol=1e-6, rtol=0)
            monkeypatch.undo()


def test_without_details_the_skip_is_left():
    x = torch.rand(1, 3, 6, 8)
    for skip in ("bilinear", "bicubic"):
        model = network(skip=skip)
        torch.nn.init.zeros_(model.render_mlp.last.weight)
        torch.nn.init.zeros_(model.render_mlp.last.bias)
        for scale in (1, 2, 3, 2.5):
            size = (round(6 * scale), round(8 * scale))
            if skip == "bicubic":
                expected = upscale_bicubic(F.pad(x, (4,) * 4, mode="replicate"), scale)
                cut = round(4 * scale)
                expected = expected[..., cut : cut + size[0], cut : cut + size[1]]
            else:
                expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(model(x, size), expected, atol=1e-5, rtol=0)


# --- sizes, views, state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "size"),
    [(4, (28, 44)), (2.7, (19, 30)), ((2, 3.5), (14, 38)), (1, (7, 11)), (0.5, (4, 6)), (12, (84, 132))],
)
def test_any_scale(scale, size):
    with torch.no_grad():
        assert network().at(scale)(torch.rand(1, 3, 7, 11)).shape == (1, 3, *size)


def test_a_view_shares_the_weights_and_leaves_the_network_alone():
    model = network(scale=4)
    view = model.at(2)
    assert (model.scale, view.scale) == (4, 2) and view.encoder is model.encoder
    assert all(a is b for a, b in zip(model.parameters(), view.parameters(), strict=True))


def test_nothing_is_kept_between_calls():
    model, one, two = network(), torch.rand(1, 3, 5, 6), torch.rand(1, 3, 8, 4)
    with torch.no_grad():
        features = model.encode(one)
        first = model.render(features, one, (9, 13))
        model(two)
        model.render(model.encode(two), two, (30, 20))
        assert torch.equal(model.render(features, one, (9, 13)), first)


@pytest.mark.parametrize("skip", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [2.7, (3, 1.9), 0.4, 4])
def test_tiles_equal_the_whole_picture(skip, scale):
    model, x = network(skip=skip).at(scale), torch.rand(3, 37, 41)
    whole = inference.upscale(model, x, tile=0)
    for tile in (7, 16):
        torch.testing.assert_close(inference.upscale(model, x, tile=tile), whole, atol=1e-5, rtol=0)
    assert inference.upscale(model, x, tile=7, overlap=0).sub(whole).abs().max() > 1e-4, "it is the overlap"


def test_tiles_of_windows_equal_the_whole_picture():
    sizes = {"preset": "SwinIR", "embed_dim": 8, "depths": [2], "num_heads": 2, "window_size": 4}
    model, x = network(encoder=sizes).at(1.7), torch.rand(3, 70, 90)
    whole = inference.upscale(model, x, tile=0)
    torch.testing.assert_close(inference.upscale(model, x, tile=25), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_in", "n_out"), [(7, 7), (7, 19), (32, 45), (5, 40), (8, 3)])
@pytest.mark.parametrize("each", [1, 3])
def test_a_lattice_has_as_many_pixels_in_every_gap(n_in, n_out, each):
    low, seen = sampling.axis(n_in, n_out).low, set()
    for _ in range(60):
        drawn = sampling.lattice(n_in, n_out, each)
        assert not (drawn.diff() < 0).any()
        assert torch.equal(low[drawn].unique(return_counts=True)[1], torch.full((len(low.unique()),), each))
        seen |= set(drawn.tolist())
    assert seen == set(range(n_out))


def test_a_picture_above_the_bound_is_refused_whole_and_made_in_tiles(monkeypatch):
    for module in (continuous, inference):
        monkeypatch.setattr(module, "MOST_PIXELS", 3000)
    model, x = network().at(5), torch.rand(3, 16, 17)
    with pytest.raises(ValueError, match=r"80x85 pixels are more than the 3,000 rendered at once; enlarge in tiles"):
        model(x[None])
    assert inference.upscale(model, x, tile=8).shape == (3, 80, 85)


# --- switches -----------------------------------------------------------------------------------------------------

SWITCHES = [
    {},
    {"local_ensemble": False},
    {"cell_decode": False},
    {"mod_input": False},
    {"modulation": False},
    {"positional_encoding": False},
    {"non_local_attn": True, "multi_scale": [2, 3]},
    {"mod_input": False, "positional_encoding": False, "skip": None},
]


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_gradients_reach_every_weight(options):
    model, x = network(**options).train(), torch.rand(2, 3, 6, 7)
    features = model.encode(x)
    grid = model.render(features, x, (14, 15))
    points = model.render(features, x, (14, 15), torch.rand(2, 30, 2) * 2 - 1)
    (grid.square().mean() + points.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_switches_change_the_network():
    plain, x = network(), torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        for options in SWITCHES[1:]:
            assert not torch.allclose(network(**options)(x), plain(x), atol=1e-6), options


def test_above_the_training_the_cell_stays_that_of_the_largest_scale():
    """As published: a network that saw scales to 4 is told the cell of scale 4 at 8."""
    like = torch.zeros(1)
    assert network().cell((8, 2), like).tolist() == [2 / 4, 2 / 2]
    assert network(max_scale=16).cell((8, 2), like).tolist() == [2 / 8, 2 / 2]


@pytest.mark.parametrize("arch", ["LIIF", "LTE", "LMLTE"])
def test_bf16_is_close_to_fp32_and_half_coordinates_are_refused(arch):
    model, x = network(arch), torch.rand(1, 3, 40, 44)
    with torch.no_grad():
        exact = model.at(3.3)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.at(3.3)(x)
        assert rough.dtype == torch.float32
        assert (rough - exact).abs().max() < 0.02 and (rough - exact).abs().mean() < 2e-3
        coords = every_pixel((132, 145)).bfloat16()
        with pytest.raises(ValueError, match="expected float32 coordinates"):
            model.render(model.encode(x), x, (132, 145), coords)
    wide = every_pixel((1, 512))
    assert (wide.bfloat16().float() - wide).abs().max() * 512 / 2 > 0.4, "so many pixels would a coordinate be off"


# --- cross-scale attention ----------------------------------------------------------------------------------------


def test_attention_is_the_documents_formula():
    layer, x = CrossScaleAttention(6, multi_scale=[2, 3], softmax_scale=2.0), torch.randn(2, 6, 7, 9)
    expected = x.clone()
    query = layer.query(x).flatten(2)
    for s in (2, 3):
        small = F.avg_pool2d(x, s, ceil_mode=True, count_include_pad=False)
        key, value = layer.key(small).flatten(2), layer.value(small).flatten(2)
        weights = (2.0 * query.mT @ key / 6**0.5).softmax(-1)
        expected = expected + (weights @ value.mT).mT.unflatten(2, (7, 9))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    maps = layer.weights(x[:1], 3, 4)
    assert [m.shape for m in maps] == [(4, 5), (3, 3)]
    assert all(float(m.sum()) == pytest.approx(1, abs=1e-5) for m in maps)


def test_attention_runs_by_the_kernel_that_never_holds_all_weights():
    layer, x = CrossScaleAttention(6), torch.randn(1, 6, 20, 22, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # an error where it does not apply
        layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_with_attention_every_pixel_sees_all():
    model = network(non_local_attn=True)
    assert model.halo is None and network().halo == 6
    x = torch.rand(1, 3, 30, 30)
    changed = x.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        assert (model(x) - model(changed))[..., -1, -1].abs().max() > 0


# --- as one of the workbook's networks ----------------------------------------------------------------------------


def test_committed_form_and_command_line(tmp_path, capsys):
    from nbhelpers.__main__ import main
    from nbhelpers.images import load_image, save_image

    arguments = {"encoder": SMALL, "scale": 4, "hidden": 16, "hyper_width": 8, "render_depth": 2}
    path = checkpoints.save("any", models.build("LMLTE", **arguments), "LMLTE", arguments, {"scale": 4}, [], tmp_path)
    assert checkpoints.load(path).scale == 4
    save_image(torch.rand(3, 60, 50), tmp_path / "hr" / "a.png")
    for model in (str(path), "bicubic"):
        assert main(["evaluate", "--model", model, "--hr", str(tmp_path / "hr"), "--scale", "2.7", "--json"]) == 0
        assert '"scale": 2.7' in (out := capsys.readouterr().out) and "border 3 px" in out
    save_image(torch.rand(3, 21, 30), tmp_path / "small.png")
    for scale, size in (("2.7", (57, 81)), ("4", (84, 120))):
        out = tmp_path / f"big{scale}.png"
        command = ["upscale", str(tmp_path / "small.png"), "-o", str(out), "--model", str(path), "--scale", scale]
        assert main([*command, "--tile", "9"]) == 0
        assert load_image(out).shape == (3, *size)
    for model in (str(path), "bicubic"):
        command = ["upscale", str(tmp_path / "small.png"), "-o", str(out), "--model", model, "--size", "70x33"]
        assert main(command) == 0
        assert load_image(out).shape == (3, 33, 70)


def test_upscale_takes_a_scale_or_a_size():
    model, x = network(), torch.rand(3, 7, 11)
    rgb = x.mul(255).round().byte().movedim(0, -1).numpy()
    for scale, size in ((2.7, (19, 30)), ((2, 3.5), (14, 38)), (0.5, (4, 6))):
        expected = inference.upscale(model.at(scale), x)
        assert expected.shape == (3, *size) and torch.equal(inference.upscale(model, x, scale=scale), expected)
        assert inference.upscale(model, rgb, size=size).shape == (*size, 3)
    assert torch.equal(inference.upscale(model, x, size=(14, 22)), inference.upscale(model.at(2), x))
    fixed = models.build("ESPCN", scale=2, channels=8).eval()
    assert inference.upscale(fixed, x, scale=2).shape == inference.upscale(fixed, x, size=(14, 22)).shape == (3, 14, 22)
    for call, quoted in (
        (lambda: inference.upscale(model, x, scale=2, size=(14, 22)), r"scale=2 or size=\(14, 22\), not both"),
        (lambda: inference.upscale(model, x, scale=-1), "scale -1 must be a number above 0"),
        (lambda: inference.upscale(model, x, size=(0, 22)), "0x22 is an empty picture"),
        (lambda: inference.upscale(fixed, x, scale=3), "enlarges by 2, not by the 3"),
        (lambda: inference.upscale(fixed, x, size=(15, 22)), "ESPCN makes 14x22 pixels of these, not 15x22"),
    ):
        with pytest.raises(ValueError, match=quoted):
            call()


def test_another_encoders_checkpoint_is_refused(tmp_path):
    path = checkpoints.save("any", network(), "LMLTE", {"encoder": SMALL}, {}, [], tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"holds another architecture than LMLTE: .*encoder\."):
        checkpoints.load_weights(network(encoder=SMALL | {"n_feats": 8}), path)


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"scale": 0}, "scale 0 must be a number above 0"),
        ({"scale": (2, -1)}, r"scale \(2, -1\) must be"),
        ({"scale": "4"}, "scale '4' must be"),
        ({"skip": "nearest"}, "skip 'nearest' is unknown"),
        ({"local_size": 3}, "local_size 3 must be 2"),
        ({"hidden": 5}, "hidden 5 must be an even number"),
        ({"render_depth": 0}, "render_depth 0"),
        ({"mod_input": False, "modulation": False}, "leave the hyper-network without a task"),
        ({"non_local_attn": True, "multi_scale": []}, r"multi_scale \[\] must be whole numbers"),
        ({"non_local_attn": True, "softmax_scale": 0}, "softmax_scale 0 must be above 0"),
    ],
)
def test_wrong_arguments_are_quoted(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        network(**arguments)


def test_wrong_calls_are_quoted():
    model, x = network(), torch.rand(1, 3, 6, 6)
    features = model.encode(x)
    cases = [
        (lambda: model.at(float("nan")), "scale nan must be"),
        (lambda: model.at(0.05)(x), "size 0x0 is an empty picture"),
        (lambda: model(x, (0, 9)), "size 0x9 is an empty picture"),
        (lambda: model(x, (4.5, 9)), "must be two whole numbers"),
        (lambda: model.encode(x[0]), r"expected pictures 'b 3 h w' of at least one pixel, got shape \(3, 6, 6\)"),
        (lambda: model.encode(torch.rand(1, 3, 0, 6)), r"got shape \(1, 3, 0, 6\)"),
        (lambda: model.render(features, x, (9, 9), torch.full((1, 4, 2), 1.01)), r"lie in \[-1, 1\].* 1.01"),
        (lambda: model.render(features, x, (9, 9), torch.full((1, 4, 2), float("nan"))), r"lie in \[-1, 1\]"),
        (lambda: model.render(features, x, (9, 9), torch.zeros(1, 0, 2)), "at least one"),
        (lambda: model.render(features, x, (9, 9), chunk=0), "chunk 0 must be at least 1"),
        (lambda: model.render(features, x, (9, 9), rows=torch.tensor([3, 1])), "in rising order"),
        (lambda: model.render(features, x[..., :5], (9, 9)), r"features are of 6x6 pixels, but lr is \(1, 3, 6, 5\)"),
        (lambda: model.render(features, x, (10**5, 10**5)), "more than the 33,554,432 rendered at once"),
        (lambda: inference.get_model(models.build("ESPCN", scale=2, channels=8), 3), "enlarges by 2, not by the 3"),
        (lambda: inference.get_model("bicubic", 0.5), "scale 0.5 must be at least 1"),
    ]
    for call, quoted in cases:
        with pytest.raises(ValueError, match=quoted):
            call()
