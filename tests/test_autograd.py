"""pyquant.autograd: the derivatives of eager code are the registered ones."""

import pytest
import torch
from ops.test_linear import quantized
from ops.test_lora import adapter, seed_tensor

from pyquant import autograd

ops = torch.ops.pyquant


def problem(dtype=torch.bfloat16):
    weight, _ = quantized(48, 64)
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_()
    return x, weight, bias


def gradients(y, leaves):
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_linears_derivative_is_the_ops(with_bias):
    x, weight, bias = problem()
    bias = bias if with_bias else None
    leaves = [t for t in (x, bias) if t is not None]
    ours, theirs = autograd.linear_4bit(x, *weight, bias), ops.linear_4bit(x, *weight, bias)
    assert torch.equal(ours, theirs)
    for a, b in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frozen", ["", "x", "A", "B"])
def test_the_adapters_derivative_is_the_ops(dropout, frozen):
    x, weight, bias = problem()
    lora_A, lora_B = (factor.requires_grad_() for factor in adapter(48, 64, 8, torch.bfloat16))
    named = {"x": x, "A": lora_A, "B": lora_B}
    for name, tensor in named.items():
        tensor.requires_grad_(name != frozen)
    leaves = [bias, *(t for t in named.values() if t.requires_grad)]
    arguments = (x, *weight, bias, lora_A, lora_B, 2.0, dropout, seed_tensor(3) if dropout else None)
    (ours, xa), (theirs, same_xa) = autograd.lora_linear_4bit(*arguments), ops.lora_linear_4bit(*arguments)
    assert torch.equal(ours, theirs)
    assert torch.equal(xa, same_xa)
    assert not xa.requires_grad
    for a, b in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert torch.equal(a, b)


def test_the_second_derivative_passes_through():
    x, weight, _ = problem(torch.float32)

    def slope(linear):
        (dx,) = torch.autograd.grad((linear(x, *weight, None) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.sum(), x)[0]

    assert torch.allclose(slope(autograd.linear_4bit), slope(ops.linear_4bit))
    assert slope(autograd.linear_4bit).abs().sum() > 0


def test_compiled_gradients_are_the_same():
    x, weight, _ = problem(torch.float32)
    expected = torch.autograd.grad(ops.linear_4bit(x, *weight, None).sum(), x)[0]
    compiled = torch.compile(
        lambda v: autograd.linear_4bit(v, *weight, None).sum(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)


def test_nothing_of_the_weights_dense_size_is_saved():
    x, weight, bias = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        autograd.linear_4bit(x, *weight, bias)
    assert saved
    assert max(saved) <= 48 * 64 // 2
