"""RMSNorm with the short backward: transformers' values bit by bit, and float64's gradients."""

import importlib

import pytest
import torch

from preflab.models.fast import fused_norm

MODULES = {"Gemma3RMSNorm": "gemma3", "Gemma2RMSNorm": "gemma2", "SmolLM3RMSNorm": "smollm3"}
NAMES = sorted(fused_norm.ROUNDED_FIRST | fused_norm.FLOAT32 | fused_norm.ONE_PLUS)


def layer_of(name: str, dtype, width=24):
    """A frozen layer of transformers with random weights, with the short backward."""
    module = MODULES.get(name, name.removesuffix("RMSNorm").lower())
    layer = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)(width)
    torch.nn.init.normal_(layer.weight, 0.5)
    layer = layer.to(dtype).requires_grad_(False)
    fused_norm.attach(layer)
    fused_norm.attach(layer)
    return layer


def value_and_gradient(layer, x, gradient):
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, x, gradient.to(y.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name, dtype):
    layer = layer_of(name, dtype)
    x, gradient = 3 * torch.randn(2, 2, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    y, slope = value_and_gradient(layer, x, gradient)
    assert type(y.grad_fn).__name__ == "RMSNormBackward" and torch.equal(x, before)
    stock_y, stock_slope = value_and_gradient(lambda x: type(layer).forward(layer, x), x, gradient)
    assert torch.equal(y, stock_y) and y.dtype == slope.dtype == dtype
    # By hand in float64.
    w = layer.weight.double() + (name in fused_norm.ONE_PLUS)
    exact = value_and_gradient(
        lambda x: w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), x.double(), gradient.double()
    )[1]
    error, stock_error = ((s.double() - exact).norm() / exact.norm() for s in (slope, stock_slope))
    assert error <= 1.1 * stock_error + 1e-6


def test_trained_weights_keep_their_gradient():
    layer = layer_of("LlamaRMSNorm", torch.float32).requires_grad_()
    y = layer(torch.randn(3, 24, requires_grad=True))
    y.sum().backward()
    assert layer.weight.grad is not None and type(y.grad_fn).__name__ != "RMSNormBackward"
    with torch.no_grad():
        assert not layer(torch.randn(3, 24)).requires_grad


def test_other_classes_are_left_alone():
    class LlamaRMSNorm(torch.nn.RMSNorm):
        """Of the same name, not of transformers."""

    layer = LlamaRMSNorm(4)
    fused_norm.attach(layer)
    assert "forward" not in vars(layer)
