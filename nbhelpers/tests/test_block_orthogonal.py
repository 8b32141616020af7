"""The layer: orthogonal also after training, right gradients, the placements, the zeros that cost nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbhelpers import counting
from nbhelpers.block_orthogonal import (
    PLACEMENTS,
    BlockError,
    BlockOrthogonalConv2d,
    MaskedConv2d,
    cayley,
    make_block_orthogonal,
    orthogonality_error,
    parameter_counts,
    used_columns,
)

SHAPES = [(1, 1), (2, 4), (4, 2), (4, 1)]  # matrices, blocks; 4 is all that 16 channels and 3x3 have room for


def layer(m: int = 2, r: int = 2, placement: str = "left_zeros", kind=BlockOrthogonalConv2d, **options: object):
    torch.manual_seed(0)
    return kind(16, 32, 3, m, r, placement, **{"padding": 1, **options})


def matrix(conv: nn.Module) -> torch.Tensor:
    return conv.weight.detach().flatten(1)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("m", "r"), SHAPES)
def test_rows_are_orthogonal_and_the_rest_is_zero(m, r, placement):
    conv = layer(m, r, placement)
    w = matrix(conv)
    torch.testing.assert_close(w @ w.T, m * torch.eye(32), atol=1e-5, rtol=0)
    assert (w != 0).sum() == conv.stored == m * 32 * 32 // r
    unit = matrix(layer(m, r, placement, unit_rows=True))
    torch.testing.assert_close(unit, w / m**0.5)


@pytest.mark.parametrize(("m", "r"), SHAPES)
def test_left_zeros_is_the_documents_matrix(m, r):
    """Zeros on the left, then the matrices side by side, each with its blocks on the diagonal."""
    conv = layer(m, r)
    blocks = conv.blocks().detach().view(m, r, 32 // r, 32 // r)
    expected = torch.cat([torch.zeros(32, 16 * 9 - m * 32), *(torch.block_diag(*matrix) for matrix in blocks)], 1)
    assert torch.equal(matrix(conv), expected)


def test_one_matrix_of_512_rows_reads_57_channels_of_512():
    columns = used_columns(512, 512, 9, 1, "left_zeros")
    assert len((columns // 9).unique()) == 57 and columns[-1] == 512 * 9 - 1


def test_spread_reads_every_channel_equally_often_at_changing_positions():
    columns = used_columns(64, 64, 9, 2, "spread")
    assert torch.equal((columns // 9).bincount(), torch.full((64,), 2))
    assert (columns % 9).bincount().min() >= 128 // 9
    for inputs, outputs, m in [(16, 32, 4), (7, 5, 12), (3, 1, 27)]:
        columns = used_columns(inputs, outputs, 9, m, "spread")
        assert len(columns.unique()) == m * outputs and columns.max() < inputs * 9


def test_permuted_is_decided_by_the_seed():
    first, again, other = (used_columns(16, 32, 9, 2, "permuted", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 64


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_output_is_that_of_an_ordinary_convolution(placement, stride):
    """Also where channels are left out of the computation."""
    conv = layer(2, 2, placement, stride=stride, dilation=2, padding=2)
    x = torch.rand(2, 16, 9, 8)
    expected = F.conv2d(x, conv.weight, conv.bias, stride, 2, 2)
    torch.testing.assert_close(conv(x), expected, atol=1e-6, rtol=1e-5)
    assert layer(1, bias=False).bias is None


def test_channels_that_are_not_read_cost_nothing():
    plain = nn.Conv2d(64, 64, 3, padding=1)
    one = BlockOrthogonalConv2d(64, 64, 3, 1, 1, padding=1).eval()
    one(torch.zeros(1, 64, 1, 1))  # makes the kernel
    assert one.read == slice(56, 64)
    assert counting.flops(one, (1, 64, 8, 8)) * 8 == counting.flops(plain, (1, 64, 8, 8))


# --- orthogonality ----------------------------------------------------------------------------------------


def test_cayley_makes_rotations_of_which_the_trace_is_zero_on_average():
    torch.manual_seed(0)
    q = BlockOrthogonalConv2d(100, 100, 3, 9, 1).blocks().detach()
    assert torch.allclose(torch.linalg.det(q), torch.ones(9), atol=1e-4)
    assert abs(float(q.diagonal(dim1=1, dim2=2).mean())) < 0.02
    assert torch.equal(cayley(torch.zeros(1, 3, 3)), torch.eye(3)[None])


@pytest.mark.parametrize("size", [24, 160])  # in a batch, and one by one
def test_inverses_are_those_of_a_loop_and_of_double_precision(size):
    a = torch.randn(3, size, size).tril(-1)
    a = a - a.mT
    one = torch.eye(size)
    torch.testing.assert_close(cayley(a), torch.stack([cayley(x[None])[0] for x in a]), atol=1e-5, rtol=0)
    inverse = torch.from_numpy(np.linalg.inv((one + a.double()).numpy()))  # not by MKL, whose batches fail at times
    expected = (one - a.double()) @ inverse
    torch.testing.assert_close(cayley(a).double(), expected, atol=1e-4, rtol=0)


def test_several_large_blocks_on_two_threads_are_right_and_say_nothing():
    """A batch of such matrices makes MKL fail here (``SLASWP``), which a test in this process could not hear."""
    code = (
        "import torch; torch.set_num_threads(2); torch.manual_seed(0)\n"
        "from nbhelpers.block_orthogonal import BlockOrthogonalConv2d, orthogonality_error\n"
        "conv = BlockOrthogonalConv2d(192, 192, 3, 3, 1)\n"
        "conv.blocks().sum().backward()\n"
        "assert orthogonality_error(conv) < 1e-5 and conv.free.grad.isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "oneMKL" not in done.stdout + done.stderr, done.stderr[-1000:]


@pytest.mark.parametrize("bf16", [False, True])
def test_blocks_stay_orthogonal_in_training(bf16):
    """Large steps, so that the angles leave their start far behind."""
    conv, head = layer(2, 2), nn.Linear(32, 2)
    adam = torch.optim.Adam([*conv.parameters(), *head.parameters()], lr=0.05)
    x = torch.rand(8, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(8) % 2
    start, losses = conv.blocks().detach().clone(), []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(head(conv(x).relu().mean((2, 3))).float(), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (conv.blocks() - start).abs().max() > 0.3
    assert orthogonality_error(conv) < 1e-5
    w = matrix(conv)
    torch.testing.assert_close(w @ w.T, 2 * torch.eye(32), atol=2e-5, rtol=0)


def test_kernel_is_made_in_full_precision_under_autocast():
    conv = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.kernel().dtype == torch.float32 and torch.equal(conv.weight, layer().weight)
        assert conv(torch.rand(1, 16, 5, 5)).dtype == torch.bfloat16
    half = layer().bfloat16()
    assert half(torch.rand(1, 16, 5, 5).bfloat16()).dtype == torch.bfloat16
    assert orthogonality_error(half) < 1e-5  # any numbers make a rotation, also rounded ones


@pytest.mark.parametrize("kind", [BlockOrthogonalConv2d, MaskedConv2d])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients(kind, placement):
    torch.manual_seed(0)
    conv = kind(3, 4, 3, 2, 2, placement, padding=1, stride=2, unit_rows=True).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.double, requires_grad=True)
    names = [name for name, _ in conv.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *conv.parameters()))


# --- the kernel that is kept ------------------------------------------------------------------------------


def test_kernel_is_made_once_in_eval_mode_and_anew_when_something_changes():
    conv = layer().eval().requires_grad_(False)
    first = conv.kernel()
    assert conv.kernel() is first
    conv.free += 0.1
    second = conv.kernel()
    assert second is not first and not torch.equal(second, first)
    conv.load_state_dict(layer().state_dict())
    assert torch.equal(conv.kernel(), first)
    assert conv.train().kernel() is not conv.kernel()
    conv.free.data *= 2  # unseen by the counter of changes
    assert not torch.equal(conv.eval().kernel(), first)
    assert conv.double().kernel().dtype == torch.double


def test_gradients_reach_the_blocks_in_eval_mode_too():
    conv, x = layer().eval(), torch.rand(1, 16, 4, 4)
    with torch.no_grad():
        conv(x)
    conv(x).sum().backward()
    assert conv.free.grad.abs().sum() > 0
    with torch.inference_mode():
        made, kept = conv(x), conv.kernel()
    conv.requires_grad_(False)
    x.requires_grad_()
    conv(x).sum().backward()  # the kernel kept under inference_mode serves here as well
    assert conv.kernel() is kept and x.grad.abs().sum() > 0 and torch.equal(conv(x), made)


# --- impossible and special -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 32, 3, 5), r"num_matrices=5 must lie between 1 and 4 for a kernel of 32 x 16·9"),
        ((16, 32, 3, 0), r"num_matrices=0 must lie between 1 and 4"),
        ((16, 32, 3, 1, 3), r"r=3 does not divide the 32 output channels"),
        ((16, 32, 3, 1, 0), r"r=0 does not divide the 32"),
        ((16, 32, 1, 1), r"kernel of 32 x 16·1 has no room for a matrix of 32 x 32"),
        ((16, 32, 3, 1, 1, "right"), r"placement 'right' is unknown.*left_zeros"),
    ],
)
def test_impossible_arguments_are_quoted_with_what_is_allowed(arguments, message):
    with pytest.raises(BlockError, match=message):
        BlockOrthogonalConv2d(*arguments)


def test_groups_are_refused():
    with pytest.raises(BlockError, match=r"groups=2 .*groups=1 and r"):
        BlockOrthogonalConv2d(16, 32, 3, 1, 1, groups=2)


def test_blocks_of_one_row_have_nothing_to_learn():
    conv = layer(1, 32)
    assert conv.free.numel() == 0 and torch.equal(conv.blocks(), torch.ones(32, 1, 1))
    conv(torch.rand(1, 16, 4, 4)).sum().backward()


# --- whole networks ---------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(x))


def test_stages_are_replaced_and_what_has_no_room_is_named():
    model = Toy()
    report = make_block_orthogonal(model, [2], num_matrices=4, r=4)
    assert [entry.name for entry in report] == ["layer2.0", "layer2.2"] and report[0].skipped is None
    assert report[1].skipped == "no room for any of 4 matrices in a kernel of 24 x 16·1·1"
    assert isinstance(model.layer2[0], BlockOrthogonalConv2d) and model.layer2[0].stride == (2, 2)
    assert type(model.layer1[0]) is nn.Conv2d and model(torch.rand(1, 3, 6, 6)).shape == (1, 24, 3, 3)
    everywhere = make_block_orthogonal(Toy(), [1, 2], num_matrices=4)
    assert everywhere[0].skipped == "room for 3 of 4 matrices in a kernel of 8 x 3·3·3"
    # 216 + 16 and 24·16 + 24 are untouched; the layer has 16 biases and 4·4 blocks of 4x4, with 6 angles each.
    counts = parameter_counts(model)
    assert counts.free - 640 == 16 + 16 * 6
    assert counts.stored - 640 == 16 + 16 * 16 and counts.dense - 640 == 16 + 16 * 8 * 9


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([3], {}, r"odk_layers=\[3\]: the network has no stage 3, only \[1, 2\]"),
        ([2], {"num_matrices": 5}, r"num_matrices=5 fits no convolution of odk_layers=\[2\].*room for 4 of 5"),
        ([2], {"num_matrices": 0}, r"num_matrices=0 must lie between 1 and 4"),
        ([2], {"r": 3}, "r=3 does not divide the 16"),
        ([2], {"kind": "dense"}, r"kind 'dense' is unknown.*masked"),
    ],
)
def test_what_no_network_can_do_is_refused(stages, options, message):
    with pytest.raises(BlockError, match=message):
        make_block_orthogonal(Toy(), stages, **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"padding_mode": "reflect"}, r"layer1\.0: padding_mode='reflect' is not possible here; only 'zeros' is"),
        ({"groups": 2}, r"groups=2 is not possible beside blocks"),
    ],
)
def test_convolutions_that_would_change_their_meaning_are_refused(option, message):
    model = nn.Module()
    model.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, **option))
    with pytest.raises(BlockError, match=message):
        make_block_orthogonal(model, [1])
