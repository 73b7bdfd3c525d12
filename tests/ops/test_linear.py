"""linear_4bit, linear_4bit_dx and dequantize_4bit as ops: values, gradients, layouts, determinism, compilation."""

import pytest
import reference
import torch

import pyquant.functional as F
from pyquant.bench.shapes import ODD_ROWS, ODD_WEIGHTS

ops = torch.ops.pyquant
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
each_shape = pytest.mark.parametrize(("n", "k"), ODD_WEIGHTS)
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double"])


def quantized(n, k, *, quant_type="nf4", blocksize=64, nested=True, device="cpu", storage=torch.uint8):
    """The ops' arguments for a random weight, and its exact values in float32."""
    weight = torch.randn(n, k) * k**-0.5
    packed, state = F.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    absmax = reference.decoded_absmax(*F.statistics(state))
    exact = reference.dequantize(packed, absmax, quant_type, blocksize, (n, k), torch.float32)
    statistics = [None if s is None else s.to(device) for s in F.statistics(state)]
    return (packed.to(device), *statistics, quant_type, blocksize, n, k), exact


def check_linear(x, dy, bias, weight_arguments, exact, device):
    """y, dx and dbias of one problem against float64."""
    problem = reference.LoraProblem(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), exact, bias)
    truth, baseline = problem.evaluate(torch.float64), problem.evaluate(x.dtype)
    leaf = x.detach().to(device).requires_grad_()
    bias_leaf = None if bias is None else bias.detach().to(device).requires_grad_()
    y = ops.linear_4bit(leaf, *weight_arguments, bias_leaf)
    assert y.dtype == x.dtype
    assert y.shape == dy.shape
    y.backward(dy.to(device))
    reference.assert_within_bound(y.detach().reshape(truth["y"].shape), baseline["y"], truth["y"], "y")
    reference.assert_within_bound(leaf.grad.reshape(truth["dx"].shape), baseline["dx"], truth["dx"], "dx")
    if bias is not None:
        reference.assert_within_bound(bias_leaf.grad, baseline["dbias"], truth["dbias"], "dbias")


@each_dtype
@each_type
@each_shape
def test_values_and_gradients_over_rows(device, dtype, quant_type, n, k):
    arguments, exact = quantized(n, k, quant_type=quant_type, device=device)
    for rows in ODD_ROWS:
        x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        check_linear(x, dy, None, arguments, exact, device)


@each_dtype
@nested_or_not
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
def test_values_and_gradients_over_blocksizes(device, dtype, nested, blocksize):
    for n, k in ((123, 77), (64, 192)):
        arguments, exact = quantized(n, k, blocksize=blocksize, nested=nested, device=device)
        x, dy = torch.randn(17, k).to(dtype), torch.randn(17, n).to(dtype)
        check_linear(x, dy, torch.randn(n).to(dtype), arguments, exact, device)


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 64), (3, 33), (257, 1), (16, 1030), (1030, 16)])
def test_extreme_shapes(device, dtype, n, k):
    arguments, exact = quantized(n, k, device=device)
    for rows in (1, 8, 33):
        x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        check_linear(x, dy, torch.randn(n).to(dtype), arguments, exact, device)


@each_dtype
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_leading_dimensions(device, dtype, leading):
    n, k = 96, 160
    arguments, exact = quantized(n, k, device=device)
    x, dy = torch.randn(*leading, k).to(dtype), torch.randn(*leading, n).to(dtype)
    check_linear(x, dy, torch.randn(n).to(dtype), arguments, exact, device)


@each_dtype
def test_non_contiguous_inputs_and_gradients(device, dtype):
    n, k = 123, 77
    arguments, _ = quantized(n, k, device=device)
    layouts = {
        "transposed": lambda columns: torch.randn(columns, 9).t(),
        "strided rows": lambda columns: torch.randn(18, columns)[::2],
        "strided columns": lambda columns: torch.randn(9, 2 * columns)[:, ::2],
        "offset": lambda columns: torch.randn(9, columns + 3)[:, 3:],
        "expanded": lambda columns: torch.randn(1, columns).expand(9, columns),
        "permuted": lambda columns: torch.randn(columns, 3, 3).permute(1, 2, 0),
    }
    for name, make in layouts.items():
        x, dy = make(k).to(dtype).to(device), make(n).to(dtype).to(device)
        assert torch.equal(ops.linear_4bit(x, *arguments, None), ops.linear_4bit(x.contiguous(), *arguments, None)), (
            name
        )
        assert torch.equal(ops.linear_4bit_dx(dy, *arguments), ops.linear_4bit_dx(dy.contiguous(), *arguments)), name


@each_dtype
def test_float_storage_views_of_the_weight(device, dtype):
    arguments, exact = quantized(96, 160, device=device, storage=torch.bfloat16)
    assert arguments[0].dtype == torch.bfloat16
    check_linear(torch.randn(5, 160).to(dtype), torch.randn(5, 96).to(dtype), None, arguments, exact, device)


def test_a_transposed_view_of_the_packed_weight_is_the_same_weight(device):
    (packed, *others), _ = quantized(64, 64, device=device)
    x = torch.randn(3, 64, device=device)
    assert torch.equal(ops.linear_4bit(x, packed.t(), *others, None), ops.linear_4bit(x, packed, *others, None))


@each_dtype
def test_each_row_depends_on_its_own_input_alone(device, dtype):
    arguments, _ = quantized(130, 192, device=device)
    x = torch.randn(64, 192, device=device).to(dtype)
    poisoned = x.clone()
    poisoned[7] = float("nan")
    y, other = ops.linear_4bit(x, *arguments, None), ops.linear_4bit(poisoned, *arguments, None)
    assert other[7].isnan().all()
    keep = torch.arange(64) != 7
    assert torch.equal(y[keep], other[keep])


@each_dtype
def test_zero_input_gives_the_bias_exactly(device, dtype):
    arguments, _ = quantized(123, 77, device=device)
    bias = torch.randn(123, device=device).to(dtype)
    y = ops.linear_4bit(torch.zeros(5, 77, device=device, dtype=dtype), *arguments, bias)
    assert torch.equal(y, bias.expand(5, 123))


@each_dtype
@each_shape
def test_two_runs_give_the_same_bits(device, dtype, n, k):
    arguments, _ = quantized(n, k, device=device)
    x, dy = torch.randn(123, k, device=device).to(dtype), torch.randn(123, n, device=device).to(dtype)
    assert torch.equal(ops.linear_4bit(x, *arguments, None), ops.linear_4bit(x, *arguments, None))
    assert torch.equal(ops.linear_4bit_dx(dy, *arguments), ops.linear_4bit_dx(dy, *arguments))


def test_the_number_of_threads_does_not_change_the_bits():
    arguments, _ = quantized(130, 192)
    x, dy = torch.randn(64, 192).bfloat16(), torch.randn(64, 130).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.linear_4bit(x, *arguments, None), ops.linear_4bit_dx(dy, *arguments)
        torch.set_num_threads(2)
        two = ops.linear_4bit(x, *arguments, None), ops.linear_4bit_dx(dy, *arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@each_dtype
@each_type
def test_every_cpu_instruction_set_meets_the_bound(dtype, quant_type, each_isa):
    for n, k in ODD_WEIGHTS:
        for blocksize in (32, 64):
            arguments, exact = quantized(n, k, quant_type=quant_type, blocksize=blocksize)
            for rows in (1, 5, 64):
                x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
                bias = torch.randn(n).to(dtype)
                for _ in each_isa():
                    check_linear(x, dy, bias, arguments, exact, "cpu")


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_bias_gradient_passes_gradcheck():
    arguments, _ = quantized(8, 16)
    x = torch.randn(3, 16)
    bias = torch.randn(8, requires_grad=True)
    # Linear in the bias, so that a wide step loses nothing and float32 suffices.
    assert torch.autograd.gradcheck(lambda b: ops.linear_4bit(x, *arguments, b), (bias,), eps=0.5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_input_gradient_passes_gradcheck():
    arguments, _ = quantized(8, 16)
    x = torch.randn(3, 16, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.linear_4bit(x, *arguments, None), (x,), eps=0.5, atol=1e-4)


def test_double_backward_goes_through_dx(device):
    arguments, exact = quantized(96, 160, device=device)
    exact = exact.double()

    def second_gradients(linear, x, dy):
        x, dy = x.requires_grad_(), dy.requires_grad_()
        (dx,) = torch.autograd.grad(linear(x), x, dy, create_graph=True)
        # A gradient penalty: dx is linear in dy.
        return torch.autograd.grad(dx.pow(2).sum(), dy)[0]

    x, dy = torch.randn(5, 160), torch.randn(5, 96)
    ours = second_gradients(lambda x: ops.linear_4bit(x, *arguments, None), x.to(device), dy.to(device))
    truth = second_gradients(lambda x: x @ exact.T, x.double(), dy.double())
    assert reference.relative_error(ours, truth) < 1e-5


def test_no_gradient_is_computed_that_nobody_needs(device):
    arguments, _ = quantized(64, 64, device=device)
    bias = torch.randn(64, device=device, requires_grad=True)
    x = torch.randn(2, 64, device=device)
    ops.linear_4bit(x, *arguments, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 2.0))
    assert x.grad is None
    assert not ops.linear_4bit(x, *arguments, None).requires_grad


def test_nothing_of_the_dense_size_is_saved_for_the_backward(device):
    n, k = 512, 512
    arguments, _ = quantized(n, k, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_4bit(torch.randn(2, k, device=device, requires_grad=True), *arguments, None)
    assert saved
    assert max(t.nbytes for t in saved) <= n * k // 2


@each_dtype
def test_compiled_without_graph_breaks(device, dtype):
    arguments, _ = quantized(123, 77, device=device)
    bias = torch.randn(123, device=device).to(dtype).requires_grad_()

    def loss(x, bias):
        return ops.linear_4bit(x.sin(), *arguments, bias).float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (4, 9):
        x = torch.randn(rows, 77, device=device).to(dtype).requires_grad_()
        expected = torch.autograd.grad(loss(x, bias), (x, bias))
        for ours, theirs in zip(torch.autograd.grad(compiled(x, bias), (x, bias)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@nested_or_not
@each_dtype
def test_opcheck(device, dtype, nested):
    arguments, _ = quantized(96, 77, nested=nested, device=device)
    *weight, n, k = arguments
    x = torch.randn(2, 3, k, device=device).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, n, device=device).to(dtype).requires_grad_()
    bias = torch.randn(n, device=device).to(dtype).requires_grad_()
    code = F.create_dynamic_map().to(device) if nested else None
    dense = torch.randn(7, 33, device=device).to(dtype)
    torch.library.opcheck(ops.linear_4bit.default, (x, *arguments, bias))
    torch.library.opcheck(ops.linear_4bit.default, (x.detach()[:, :0], *arguments, None))
    torch.library.opcheck(ops.linear_4bit_dx.default, (dy, *arguments))
    torch.library.opcheck(ops.quantize_4bit.default, (dense, "fp4", 64, code))
    torch.library.opcheck(ops.dequantize_4bit.default, (*weight, (n, k), dtype))
