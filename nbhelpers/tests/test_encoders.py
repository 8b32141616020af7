"""Encoders: published sizes, the reach they state, SwinIR against another implementation, checkpointing."""

from __future__ import annotations

import pytest
import torch

from nbhelpers import checkpoints, models
from nbhelpers.models.encoders import PRESETS, SwinIR, build_encoder, swin_reach

TINY = {
    "EDSR-b": {"n_feats": 4, "n_blocks": 2},
    "RDN": {"n_feats": 4, "n_blocks": 2, "n_layers": 2, "growth": 4},
    "SwinIR": {"embed_dim": 8, "depths": [3, 2], "num_heads": 2, "window_size": 4},
    "RLFN": {"n_feats": 8, "n_blocks": 2},
}


def tiny(preset: str, **sizes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder({"preset": preset, **TINY[preset], **sizes})


@pytest.mark.parametrize(
    ("preset", "parameters", "channels", "halo"),
    [
        ("EDSR-b", 1_220_416, 64, 34),
        ("RDN", 21_973_952, 64, 131),
        ("SwinIR-light", 903_660, 60, 102),
        ("SwinIR", 2_245_488, 96, 102),
        ("RLFN", 673_036, 52, 246),
    ],
)
def test_sizes(preset, parameters, channels, halo):
    """EDSR-baseline's and RDN's follow from their papers; SwinIR-light counts 878 K in its paper with the x2 upsampler
    (6,492) and without the 24 tables of 15 x 15 biases for 6 heads."""
    encoder = build_encoder(preset)
    assert models.count_parameters(encoder) == parameters
    assert (encoder.out_channels, encoder.halo) == (channels, halo)
    if preset == "SwinIR-light":
        assert round((parameters - 24 * 15 * 15 * 6 + 6492) / 1000) == 878


def test_the_documents_swinir():
    given = {"embed_dim": 96, "depths": (6, 6, 6, 6), "num_heads": 6, "window_size": 8, "patch_size": 1}
    assert PRESETS["SwinIR"] == (SwinIR, given)


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("size", [(1, 1), (9, 17), (16, 12)])
def test_features_are_of_the_pictures_size(preset, size):
    out = tiny(preset)(torch.rand(2, 3, *size))
    assert out.shape == (2, tiny(preset).out_channels, *size) and torch.isfinite(out).all()


@pytest.mark.parametrize("preset", [name for name in TINY if name != "RLFN"])  # of which test_rlfn finds it
def test_halo_is_the_reach(preset):
    """A changed pixel reaches ``halo`` pixels at the worst place of the grid, and nowhere further."""
    encoder = tiny(preset).double().eval()
    grid, far = getattr(encoder, "grid", 1), encoder.halo + 2
    side = -(-(2 * far + 1 + grid) // 4) * 4
    x = torch.rand(1, 3, side, side, dtype=torch.float64)
    before, reach = encoder(x), 0
    for place in range(side // 2, side // 2 + grid):
        changed = x.clone()
        changed[..., place, place] += 1
        moved = ((encoder(changed) - before).abs().amax(1)[0] > 0).nonzero() - place
        reach = max(reach, int(moved.abs().max()))
    assert reach == encoder.halo


def test_a_trained_upscaler_starts_the_encoder(tmp_path):
    """Of the features that M23-RLFN shuffles into a picture, the encoder gives the same."""
    sizes = {"n_feats": 8, "n_blocks": 1}
    donor = models.build("M23_RLFN", scale=2, use_m23=False, **sizes).eval()
    arguments = {"scale": 2, "use_m23": False, **sizes}
    checkpoints.save("donor", donor, "M23_RLFN", arguments, {}, [], tmp_path)
    model = models.build("LMLTE", encoder={"preset": "RLFN", **sizes}).eval()
    copied = checkpoints.copy_matching(model, "donor", tmp_path)
    assert copied == sorted(f"encoder.{k}" for k in model.encoder.state_dict())
    assert model.encoder.halo == donor.halo - 1
    x, features = torch.rand(1, 3, 14, 17), []
    donor.to_subpixels.register_forward_hook(lambda module, given, out: features.append(given[0]))
    with torch.no_grad():
        donor(x)
        torch.testing.assert_close(model.encode(x), features[0], atol=1e-5, rtol=1e-5)


def test_reach_without_attention_is_that_of_the_convolutions():
    assert swin_reach([0, 0], 8) == 4


def test_swinir_gives_the_features_of_another_implementation():
    """spandrel's SwinIR with the same weights, on a picture of whole windows."""
    from spandrel.architectures.SwinIR import SwinIR as Reference

    sizes = {"embed_dim": 8, "depths": [2, 4], "window_size": 4, "mlp_ratio": 2.0}
    ours = SwinIR(num_heads=2, **sizes).eval()
    theirs = Reference(num_heads=[2, 2], img_size=16, upsampler="pixelshuffledirect", upscale=2, **sizes).eval()
    names = {"conv_first": "head", "conv_after_body": "tail", "patch_embed.norm": "norm_first", "norm": "norm_last"}
    names |= {"residual_group.blocks": "blocks", "layers": "stages", "fc1": "0", "fc2": "3"}
    state = {}
    for name, weight in theirs.named_parameters():
        for old, new in names.items():
            anywhere = old in ("residual_group.blocks", "layers", "fc1", "fc2")
            name = name.replace(old, new) if anywhere or name.startswith(f"{old}.") else name
        state[name] = weight
    missing, unexpected = ours.load_state_dict({k: v for k, v in state.items() if "upsample" not in k}, strict=False)
    assert not unexpected and all("relative_position_index" in name for name in missing)
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        first = theirs.conv_first(x)
        expected = theirs.conv_after_body(theirs.forward_features(first)) + first
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", TINY)
def test_checkpointing_changes_nothing_but_memory(preset):
    plain, saving = tiny(preset), tiny(preset, checkpointing=True)
    x = torch.rand(1, 3, 8, 8)
    results, kept = [], []
    for encoder in (plain, saving):
        kept.append(0)

        def count(saved: torch.Tensor) -> torch.Tensor:
            kept[-1] += saved.nbytes
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            out = encoder(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in encoder.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)
    assert kept[1] < kept[0] / 2, "bytes kept for the gradient"


@pytest.mark.parametrize(
    ("encoder", "quoted"),
    [
        ("VGG", r"encoder 'VGG' is unknown; choose one of \['EDSR-b'"),
        ({"n_feats": 8}, "encoder None is unknown"),
        ({"preset": "RDN", "depth": 3}, r"encoder 'RDN' has no size \['depth'\]"),
        ({"preset": "EDSR-b", "n_blocks": 0}, "n_blocks 0 must be at least 1"),
        ({"preset": "SwinIR", "patch_size": 4}, "patch_size 4 must be 1"),
        ({"preset": "SwinIR", "embed_dim": 50}, "embed_dim 50 must be a multiple of num_heads 6"),
        ({"preset": "SwinIR", "depths": [2, 0]}, r"depths\[1\] 0"),
    ],
)
def test_wrong_arguments_are_quoted(encoder, quoted):
    with pytest.raises(ValueError, match=quoted):
        build_encoder(encoder)
