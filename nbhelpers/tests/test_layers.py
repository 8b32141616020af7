"""Depthwise convolutions with large kernels: the same values and gradients as PyTorch's, made in another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nbhelpers.layers import DepthwiseConv2d


def _gradients(layer, x, weights):
    x = x.clone().requires_grad_(True)
    out = layer(x)
    out.backward(weights)
    found = out.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    return found


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (9, 14), (2, 3), (1, 1)])
def test_training_equals_pytorch(kernel, h, w):
    torch.manual_seed(0)
    layer, x, weights = DepthwiseConv2d(8, kernel), torch.randn(2, 8, h, w), torch.randn(2, 8, h, w)
    expected = _gradients(layer.eval(), x, weights)  # PyTorch's own way
    for mine, theirs in zip(_gradients(layer.train(), x, weights), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_gradient_is_the_derivative():
    torch.manual_seed(0)
    layer = DepthwiseConv2d(2, 5).double().train()
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x), (
        x, layer.weight, layer.bias,
    ))  # fmt: skip


def test_autocast_computes_in_bf16_and_keeps_the_weights_gradient():
    torch.manual_seed(0)
    layer, x = DepthwiseConv2d(16, 7).train(), torch.randn(2, 16, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    exact = F.conv2d(x, layer.weight, layer.bias, padding=3, groups=16)
    assert torch.allclose(out.float(), exact, atol=0.05)


def test_input_without_gradient_still_trains_the_weights():
    layer = DepthwiseConv2d(4, 5).train()
    layer(torch.rand(1, 4, 8, 8)).sum().backward()
    assert layer.weight.grad.abs().min() > 0


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel 4"):
        DepthwiseConv2d(8, 4)
