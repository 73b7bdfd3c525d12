"""lora_linear_4bit and its backward as ops: values, the dropout mask, gradients, determinism, compilation."""

import pytest
import reference
import torch
from ops.test_linear import each_dtype, each_type, nested_or_not, quantized

from pyquant.bench.shapes import LORA_RANKS, ODD_ROWS, ODD_WEIGHTS

ops = torch.ops.pyquant
SCALING = 1.75


def adapter(n, k, rank, dtype, device="cpu"):
    """lora_A and lora_B as large beside the weight as a trained adapter's."""
    lora_A = (torch.randn(rank, k) * k**-0.5).to(dtype)
    lora_B = (torch.randn(n, rank) * rank**-0.5).to(dtype)
    return lora_A.to(device), lora_B.to(device)


def seed_tensor(seed, device="cpu"):
    return torch.tensor([seed], dtype=torch.int64, device=device)


def check_lora(x, dy, bias, weight, exact, lora_A, lora_B, p=0.0, seed=0, device="cpu"):
    """y, xa's effect and every gradient of one problem against float64."""
    k = x.shape[-1]
    flat_x, flat_dy = x.reshape(-1, k), dy.reshape(-1, dy.shape[-1])
    mask = reference.dropout_mask(seed, p, *flat_x.shape)
    problem = reference.LoraProblem(flat_x, flat_dy, exact, bias, lora_A, lora_B, SCALING, mask)
    truth, baseline = problem.evaluate(torch.float64), problem.evaluate(x.dtype)
    leaves = {
        name: tensor.detach().to(device).requires_grad_()
        for name, tensor in (("x", x), ("bias", bias), ("A", lora_A), ("B", lora_B))
        if tensor is not None
    }
    y, xa = ops.lora_linear_4bit(
        leaves["x"], *weight, leaves.get("bias"), leaves["A"], leaves["B"], SCALING, p,
        seed_tensor(seed, device) if p else None,
    )  # fmt: skip
    assert xa.shape == (len(flat_x), len(lora_A))
    assert y.dtype == xa.dtype == x.dtype
    assert not xa.requires_grad
    y.backward(dy.to(device))
    reference.assert_within_bound(y.detach().reshape(truth["y"].shape), baseline["y"], truth["y"], "y")
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        gradient = leaf.grad.reshape(truth[f"d{name}"].shape)
        reference.assert_within_bound(gradient, baseline[f"d{name}"], truth[f"d{name}"], f"d{name}", xa.numel())


@each_dtype
@pytest.mark.parametrize("rank", LORA_RANKS)
@pytest.mark.parametrize(("n", "k"), ODD_WEIGHTS)
def test_values_and_gradients_over_rows(device, dtype, rank, n, k):
    weight, exact = quantized(n, k, device=device)
    for rows in ODD_ROWS:
        x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        check_lora(x, dy, None, weight, exact, *adapter(n, k, rank, dtype), device=device)


@each_dtype
@each_type
@nested_or_not
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bias_formats_and_leading_dimensions(device, dtype, quant_type, nested, p):
    for blocksize, (n, k) in ((32, (123, 77)), (64, (64, 192)), (1024, (96, 160))):
        weight, exact = quantized(n, k, quant_type=quant_type, blocksize=blocksize, nested=nested, device=device)
        x, dy = torch.randn(2, 3, 4, k).to(dtype), torch.randn(2, 3, 4, n).to(dtype)
        bias = torch.randn(n).to(dtype)
        check_lora(x, dy, bias, weight, exact, *adapter(n, k, 8, dtype), p=p, seed=5, device=device)


@each_dtype
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_values_and_gradients(device, dtype, p):
    for n, k in ODD_WEIGHTS:
        weight, exact = quantized(n, k, device=device)
        for rows, rank in ((1, 16), (5, 1), (64, 16), (123, 64)):
            x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
            for seed in (0, 1234567890123456789):
                check_lora(x, dy, None, weight, exact, *adapter(n, k, rank, dtype), p=p, seed=seed, device=device)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("k", [64, 77])
def test_the_forward_mask_is_the_written_one(device, p, k):
    weight, _ = quantized(64, k, device=device)
    # With A the identity, xa is the dropped input itself.
    lora_A, lora_B = torch.eye(k, device=device), torch.zeros(64, k, device=device)
    x = torch.ones(200, k, device=device)
    for seed in (0, 1, 2**40 + 3, 2**63 - 1):
        _, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 1.0, p, seed_tensor(seed, device))
        mask = reference.dropout_mask(seed, p, 200, k)
        assert torch.equal(xa.cpu() != 0, mask != 0)
        torch.testing.assert_close(xa.cpu().double(), mask, rtol=1e-6, atol=0)


def test_the_mask_drops_a_share_of_p_in_every_row_and_column(device):
    k, rows, p = 256, 1024, 0.3
    weight, _ = quantized(64, k, device=device)
    lora_A, lora_B = torch.eye(k, device=device), torch.zeros(64, k, device=device)
    x = torch.ones(rows, k, device=device)
    dropped = {
        seed: (
            ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 1.0, p, seed_tensor(seed, device))[1] == 0
        ).double().cpu()
        for seed in (1, 2)
    }  # fmt: skip
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped[1].mean() - p) < 5 * deviation / (rows * k) ** 0.5
    assert ((dropped[1].mean(0) - p).abs() < 6 * deviation / rows**0.5).all()
    assert ((dropped[1].mean(1) - p).abs() < 6 * deviation / k**0.5).all()
    # Different seeds and neighbouring elements are independent.
    assert abs((dropped[1] * dropped[2]).mean() - p * p) < 0.005
    assert abs((dropped[1][:, 1:] * dropped[1][:, :-1]).mean() - p * p) < 0.005


@each_dtype
def test_the_seed_alone_decides_the_bits(device, dtype):
    n, k = 123, 77
    weight, _ = quantized(n, k, device=device)
    x, dy = torch.randn(33, k, device=device).to(dtype), torch.randn(33, n, device=device).to(dtype)

    def run(seed):
        lora_A, lora_B = (factor.requires_grad_() for factor in fixed)
        leaf = x.clone().requires_grad_()
        y, _ = ops.lora_linear_4bit(leaf, *weight, None, lora_A, lora_B, 2.0, 0.4, seed_tensor(seed, device))
        return [y.detach(), *torch.autograd.grad(y, (leaf, lora_A, lora_B), dy)]

    fixed = adapter(n, k, 16, dtype, device)
    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_float32_adapters_beside_16_bit_inputs_get_float32_gradients(device, dtype):
    n, k, rank, rows = 130, 192, 16, 64
    weight, exact = quantized(n, k, device=device)
    x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
    masters = adapter(n, k, rank, torch.float32)
    lora_A, lora_B = (factor.to(device).requires_grad_() for factor in masters)
    y, _ = ops.lora_linear_4bit(x.to(device), *weight, None, lora_A, lora_B, SCALING, 0.0, None)
    y.backward(dy.to(device))
    problem = reference.LoraProblem(x, dy, exact, None, *masters, SCALING)
    truth, baseline = problem.evaluate(torch.float64), problem.evaluate(dtype)
    reference.assert_within_bound(y.detach(), baseline["y"], truth["y"], "y")
    for name, factor in (("dA", lora_A), ("dB", lora_B)):
        assert factor.grad.dtype == torch.float32
        reference.assert_within_bound(factor.grad, baseline[name], truth[name], name)
        # Not a 16-bit gradient in a float32 coat.
        assert (factor.grad.to(dtype).float() != factor.grad).float().mean() > 0.5


@each_dtype
def test_a_zero_adapter_gives_the_plain_linear(device, dtype):
    n, k = 123, 77
    weight, _ = quantized(n, k, device=device)
    x = torch.randn(33, k, device=device).to(dtype)
    lora_A, lora_B = adapter(n, k, 16, dtype, device)
    y, _ = ops.lora_linear_4bit(x, *weight, None, lora_A, torch.zeros_like(lora_B), 2.0, 0.0, None)
    torch.testing.assert_close(y, ops.linear_4bit(x, *weight, None), rtol=0, atol=0 if device == "cpu" else 1e-2)


def test_non_contiguous_inputs_and_adapters(device):
    n, k = 123, 77
    weight, _ = quantized(n, k, device=device)
    x, dy = torch.randn(k, 9, device=device).t(), torch.randn(n, 9, device=device).t()
    lora_A, lora_B = torch.randn(k, 8, device=device).t(), torch.randn(8, n, device=device).t()

    def run(*tensors):
        x, dy, lora_A, lora_B = (t.detach().requires_grad_() for t in tensors)
        y, _ = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 2.0, 0.2, seed_tensor(3, device))
        return [y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)]

    strided = run(x, dy, lora_A, lora_B)
    contiguous = run(*(t.contiguous() for t in (x, dy, lora_A, lora_B)))
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_an_input_that_needs_no_gradient_gets_none(device):
    weight, exact = quantized(64, 64, device=device)
    lora_A, lora_B = (f.requires_grad_() for f in adapter(64, 64, 8, torch.float32, device))
    x = torch.randn(4, 64, device=device)
    y, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 2.0, 0.0, None)
    y.sum().backward()
    problem = reference.LoraProblem(x.cpu(), torch.ones(4, 64), exact, None, lora_A.cpu(), lora_B.cpu(), 2.0)
    truth = problem.evaluate(torch.float64)
    assert reference.relative_error(lora_A.grad, truth["dA"]) < 1e-5
    assert reference.relative_error(lora_B.grad, truth["dB"]) < 1e-5
    dx, _, _ = ops.lora_linear_4bit_backward(
        torch.ones(4, 64, device=device), x, xa, *weight, lora_A.detach(), lora_B.detach(), 2.0, 0.0, None, False
    )
    assert dx.numel() == 0


def test_no_rows_give_zero_adapter_gradients(device):
    weight, _ = quantized(64, 64, device=device)
    lora_A, lora_B = (f.requires_grad_() for f in adapter(64, 64, 8, torch.bfloat16, device))
    x = torch.empty(3, 0, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    y, _ = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 2.0, 0.5, seed_tensor(1, device))
    assert y.shape == (3, 0, 64)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not lora_A.grad.any()
    assert not lora_B.grad.any()


@each_dtype
def test_every_cpu_instruction_set_meets_the_bound(dtype, each_isa):
    for n, k in ODD_WEIGHTS:
        weight, exact = quantized(n, k)
        for rows, rank, p in ((1, 8, 0.0), (5, 16, 0.3), (64, 64, 0.3)):
            x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
            factors = adapter(n, k, rank, dtype)
            for _ in each_isa():
                check_lora(x, dy, torch.randn(n).to(dtype), weight, exact, *factors, p=p, seed=9)


@each_dtype
def test_compiled_without_graph_breaks(device, dtype):
    n, k = 123, 77
    weight, _ = quantized(n, k, device=device)
    factors = [f.requires_grad_() for f in adapter(n, k, 8, dtype, device)]
    seed = seed_tensor(4, device)

    def loss(x, lora_A, lora_B):
        y, _ = ops.lora_linear_4bit(x.sin(), *weight, None, lora_A, lora_B, 2.0, 0.2, seed)
        return y.float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (4, 9):
        leaves = [torch.randn(rows, k, device=device).to(dtype).requires_grad_(), *factors]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@nested_or_not
@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck(device, dtype, nested, p):
    weight, _ = quantized(96, 77, nested=nested, device=device)
    x, dy = torch.randn(2, 3, 77, device=device).to(dtype), torch.randn(2, 3, 96, device=device).to(dtype)
    bias = torch.randn(96, device=device).to(dtype)
    factors = adapter(96, 77, 8, dtype, device)
    seed = seed_tensor(4, device) if p else None
    with_grad = [t.clone().requires_grad_() for t in (x, bias, *factors)]
    arguments = (with_grad[0], *weight, *with_grad[1:], 2.0, p, seed)
    torch.library.opcheck(ops.lora_linear_4bit.default, arguments)
    _, xa = ops.lora_linear_4bit(x, *weight, bias, *factors, 2.0, p, seed)
    for needs_dx in (True, False):
        arguments = (dy, x, xa, *weight, *factors, 2.0, p, seed, needs_dx)
        torch.library.opcheck(ops.lora_linear_4bit_backward.default, arguments)
