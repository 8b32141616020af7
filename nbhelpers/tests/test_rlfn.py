"""M23-RLFN: the published size, any input size, how far it sees, tiles, its first weights, and training it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbhelpers import checkpoints, initialization, models, training
from nbhelpers.degrade import upscale_bicubic
from nbhelpers.experiments import TrainingError
from nbhelpers.inference import upscale
from nbhelpers.layers import BilinearUpsample
from nbhelpers.models import rlfn
from nbhelpers.pixel import StepTrainer
from nbhelpers.tests.test_training import BreaksAtStep3

SMALL = {"n_feats": 8, "n_blocks": 2, "use_m23": False}
TINY = [
    "scale=2", "n_feats=8", "n_blocks=1", "total_iters=6", "val_every=2", "batch_size=2", "patch_size=24",
    "data.roots=[bundled]", "data.val_root=bundled_val", "data.limit=2", "data.val_limit=1",
    "trainer.progress=false", "trainer.threads=1",
]  # fmt: skip


def network(scale: int = 2, **options: object) -> nn.Module:
    """One whose attention and details are as large as trained ones, so that what it sees shows."""
    torch.manual_seed(scale)
    model = models.build("M23_RLFN", scale=scale, **(SMALL | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


# --- the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_feats", "n_blocks", "scale", "expected"),
    [(52, 8, 4, 695_548), (64, 12, 4, 1_535_984), (52, 8, 3, 685_699), (52, 8, 2, 678_664)],
)
def test_it_has_the_size_of_the_published_code(n_feats, n_blocks, scale, expected):
    model = models.build("M23_RLFN", n_feats=n_feats, n_blocks=n_blocks, scale=scale, use_m23=False)
    assert models.count_parameters(model) == expected


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (6, 7), (31, 14)])
def test_any_size_from_one_pixel_on(scale, size):
    out = network(scale)(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, size[0] * scale, size[1] * scale) and torch.isfinite(out).all()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_without_details_it_is_bicubic(scale):
    model = network(scale)
    nn.init.zeros_(model.to_subpixels.weight), nn.init.zeros_(model.to_subpixels.bias)
    x = torch.rand(1, 3, 9, 14)
    torch.testing.assert_close(model(x), upscale_bicubic(x, scale), atol=1e-5, rtol=0)


def test_the_forward_pass_is_the_diagram_of_the_document():
    model, x = network(n_blocks=1), torch.rand(1, 3, 13, 8)
    head, block = model.head(x), model.body[0]
    c1, _, c2, _, c3 = block.branch
    y = c3(F.gelu(c2(F.gelu(c1(head)))))
    features = model.body_conv(head + y * block.esa.mask(y)) + head
    expected = F.pixel_shuffle(model.to_subpixels(features), 2) + upscale_bicubic(x, 2)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_attention_written_out():
    esa, x = rlfn.ESA(8), torch.randn(2, 8, 25, 13)
    small = esa.squeeze(x)
    cells = F.max_pool2d(F.pad(esa.shrink(small), (2, 9, 2, 9), value=-torch.inf), 7, 3)[..., :5, :3]
    wide = F.interpolate(esa.coarse(cells), scale_factor=6, mode="bilinear")[..., :25, :13]
    expected = x * torch.sigmoid(esa.expand(wide + esa.local(small)))
    torch.testing.assert_close(esa(x), expected)
    mask = esa.mask(x).detach()
    assert float(mask.min()) > 0 and float(mask.max()) < 1


@pytest.mark.parametrize("scale", [2, 6])
def test_bilinear_kernel_equals_interpolation(scale):
    x = torch.rand(2, 5, 4, 7)
    wanted = F.interpolate(x, scale_factor=scale, mode="bilinear")
    torch.testing.assert_close(BilinearUpsample(scale, 5)(x), wanted, atol=1e-6, rtol=0)


# --- how far it sees, and tiles -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_the_halo_is_the_receptive_field(n_blocks, monkeypatch):
    """The worst of the six places a pixel can have in its cell. A maximum would pass its gradient to one pixel only."""
    monkeypatch.setattr(rlfn.F, "max_pool2d", lambda x, size, **o: F.avg_pool2d(x, size, **o))
    model, side, seen = network(n_blocks=n_blocks), 12 * (3 + 6 * n_blocks), []
    for block in model.body:
        nn.init.constant_(block.esa.coarse[0].bias, 5), nn.init.constant_(block.esa.coarse[2].bias, 5)  # no ReLU shuts
    for at in range(side // 2, side // 2 + 6):
        x = torch.rand(1, 3, side, side, requires_grad=True)
        model(x)[0, :, 2 * at : 2 * at + 2, 2 * at : 2 * at + 2].sum().backward()
        rows = (x.grad[0].abs().amax((0, 2)) > 0).nonzero().flatten()
        assert int(rows.min()) > 0 and int(rows.max()) < side - 1, "the picture is too small to tell"
        seen += [at - int(rows.min()), int(rows.max()) - at]
    assert max(seen) == model.halo


@pytest.mark.parametrize("tile", [45, 60, 100])
def test_tiles_equal_the_whole_picture(tile):
    model, x = network(), torch.rand(3, 190, 230)
    whole = upscale(model, x, tile=0)
    torch.testing.assert_close(upscale(model, x, tile=tile), whole, atol=1e-5, rtol=0)
    model.grid = 1
    assert tile % 6 == 0 or (upscale(model, x, tile=tile) - whole).abs().max() > 1e-4, "it is the grid that makes it so"


# --- first weights --------------------------------------------------------------------------------------------


def test_every_layer_begins_by_the_spectrum():
    model = models.build("M23_RLFN", n_feats=8, n_blocks=2)
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        expected = initialization.m23_init_tensor(torch.empty_like(layer.weight))
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert not layer.bias.any()


@pytest.mark.parametrize("init", [None, *initialization.INITIALISERS])
def test_other_first_weights_by_name_and_seed(init):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = models.build("M23_RLFN", **SMALL, init=init)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and torch.isfinite(weights(1)).all()
    assert torch.equal(weights(1), weights(2)) == str(init).startswith("m23")


def test_fixup_starts_as_head_and_tail():
    model = models.build("M23_RLFN", **SMALL, init="fixup")
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(model.body(x), x)


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"scale": 5}, r"scale 5 is unknown; choose one of \[2, 3, 4\]"),
        ({"n_blocks": 0}, "n_blocks 0"),
        ({"n_feats": 3}, "n_feats 3"),
        ({"init": "he"}, "init='he' and use_m23=True"),
        ({"init": "hee", "use_m23": False}, "'hee' is unknown"),
    ],
)
def test_wrong_arguments_are_quoted(arguments, quoted):
    with pytest.raises(ValueError, match=quoted):
        models.build("M23_RLFN", **arguments)


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    path = checkpoints.save("net", network(), "M23_RLFN", {"scale": 2, **SMALL}, {}, [], tmp_path)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"head.weight has shape \(8, 3, 3, 3\).*needs \(12, 3, 3, 3\)"
    ):
        checkpoints.load_weights(models.build("M23_RLFN", **(SMALL | {"n_feats": 12}), scale=2), path)


def test_another_scale_starts_from_the_body(tmp_path):
    path = checkpoints.save("x2", network(2), "M23_RLFN", {"scale": 2, **SMALL}, {}, [], tmp_path)
    other = network(4)
    copied = set(checkpoints.copy_matching(other, path))
    assert set(other.state_dict()) - copied == {"to_subpixels.weight", "to_subpixels.bias"}


# --- training -------------------------------------------------------------------------------------------------


def test_options_of_the_documents_script_with_their_defaults():
    cfg = training.compose("m23_rlfn_div2k")
    given = {"total_iters": 300_000, "batch_size": 16, "patch_size": 256, "freq_weight": 0.05, "val_every": 5000}
    given |= {"scale": 4, "n_feats": 52, "n_blocks": 8, "save_dir": None, "resume": "auto"}
    assert {key: cfg[key] for key in given} == given
    assert (cfg.data.patch, cfg.data.batch, cfg.trainer.max_steps, cfg.trainer.val_every) == (64, 16, 300_000, 5000)
    assert dict(cfg.loss) == {"charbonnier": 1.0, "frequency": 0.05} and cfg.model.use_m23
    optimizer, schedule = training.PixelModule(network(), cfg).upscaler_optimizer()
    rates = []
    for step in (0, 99_999, 100_000, 199_999, 200_000, 299_999):
        rates.append(optimizer.param_groups[0]["initial_lr"] * schedule.lr_lambdas[0](step))
    assert rates == pytest.approx([2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 5e-5])
    with pytest.raises(ValueError, match=r"patch_size=250 .* multiple of scale=4"):
        training.fit(training.compose("m23_rlfn_div2k", ["patch_size=250"]), keep=False)


def test_a_folder_like_div2k_and_save_dir(runs, tmp_path, monkeypatch):
    """The document's layout below the current folder; three stages, interrupted in the second, resumed in save_dir."""
    from nbhelpers.images import save_image

    for part in ("train", "valid"):
        for name in ("0001.png", "0002.png"):
            save_image(torch.rand(3, 40, 44), tmp_path / "data" / f"DIV2K_{part}_HR" / name)
    monkeypatch.chdir(tmp_path)
    layout = [o for o in TINY if "bundled" not in o]
    whole = training.fit(training.compose("m23_rlfn_div2k", [*layout, "save_dir=out/whole"]))
    assert {p.name for p in (tmp_path / "out" / "whole").glob("*.ckpt")} >= {"best.ckpt", "last.ckpt", "step_2.ckpt"}
    assert [row["lr"] for row in whole.history] == pytest.approx([1e-4, 5e-5, 5e-5]), "the rate of the next step"
    cfg = training.compose("m23_rlfn_div2k", [*layout, "save_dir=out/broken"])
    pairs, *rest = training.open_data(cfg, progress=False)

    with pytest.raises(OSError, match="cable"):
        training.fit(cfg, (BreaksAtStep3(pairs), *rest))
    resumed = training.fit(cfg, (pairs, *rest))
    one, two = (r.model.state_dict() for r in (whole, resumed))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_checkpoints_of_others_in_save_dir_are_left_alone(tmp_path):
    (tmp_path / "theirs.ckpt").write_bytes(b"years of work")
    for resume in ("auto", "never"):
        cfg = training.compose("m23_rlfn_div2k", [*TINY, f"save_dir={tmp_path}", f"resume={resume}"])
        with pytest.raises(TrainingError, match=r"save_dir=.* holds checkpoints that are not of a run here"):
            training.fit(cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.ckpt"]


def test_single_steps_are_those_of_fit():
    cfg = training.compose("m23_rlfn_div2k", [*TINY, "optimizer.ema_decay=0.9", "keep=last"])
    data = training.open_data(cfg, progress=False)
    fitted = training.fit(cfg, data, keep=False)
    trainer = StepTrainer(training._network(cfg), cfg)
    stats = [trainer.train_step(*data[0][step]) for step in range(6)]
    assert [s["lr"] for s in stats] == pytest.approx([2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 5e-5])
    assert all(s.keys() == {"loss", "psnr", "lr"} and 5 < s["psnr"] < 60 for s in stats)
    assert sum(s["loss"] for s in stats[:2]) / 2 == pytest.approx(fitted.history[0]["train_loss"])
    one, two = fitted.model.state_dict(), trainer.final.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
