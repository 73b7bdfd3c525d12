"""What the ops refuse, and what they say."""

import pytest
import torch
from ops.test_linear import quantized
from ops.test_lora import adapter, seed_tensor

import pyquant.functional as F

ops = torch.ops.pyquant
N, K = 96, 77
NAMES = ("packed", "absmax", "nested_absmax", "nested_code", "offset", "quant_type", "blocksize", "n", "k")


def weight(nested=True, **changes):
    """The ops' arguments for a weight, some of them replaced by a value or a function of the right value."""
    arguments, _ = quantized(N, K, nested=nested)
    named = dict(zip(NAMES, arguments, strict=True))
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    return tuple(named.values())


def every_op(arguments):
    """(op's name, call) for each op that takes a weight."""
    *head, n, k = arguments
    x, dy, xa = torch.randn(2, K), torch.randn(2, N), torch.randn(2, 8)
    factors = adapter(N, K, 8, torch.float32)
    yield "dequantize_4bit", lambda: ops.dequantize_4bit(*head, (n, k), torch.float32)
    yield "linear_4bit", lambda: ops.linear_4bit(x, *arguments, None)
    yield "linear_4bit_dx", lambda: ops.linear_4bit_dx(dy, *arguments)
    yield "lora_linear_4bit", lambda: ops.lora_linear_4bit(x, *arguments, None, *factors, 1.0, 0.0, None)
    yield (
        "lora_linear_4bit_backward",
        lambda: ops.lora_linear_4bit_backward(dy, x, xa, *arguments, *factors, 1.0, 0.0, None, True),
    )


@pytest.mark.parametrize(
    ("nested", "changes", "message"),
    [
        (True, {"quant_type": "int4"}, "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        (True, {"blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
        (True, {"blocksize": 16}, "blocksize must be a power of two from 32 to 4096, got 16"),
        (True, {"blocksize": 8192}, "blocksize must be a power of two from 32 to 4096, got 8192"),
        (True, {"blocksize": 0}, "blocksize must be a power of two from 32 to 4096, got 0"),
        (True, {"packed": lambda t: t[:-1]}, "packs into 3696 bytes, the packed weight has 3695"),
        (True, {"packed": lambda t: t.float()}, "packs into 3696 bytes, the packed weight has 14784"),
        (True, {"absmax": lambda t: t[1:]}, "in blocks of 64 has 116 absmax values, got 115"),
        (True, {"absmax": lambda t: t.float()}, "absmax must be uint8 with double quantization, got Float"),
        (False, {"absmax": lambda t: t.to(torch.uint8)}, "absmax must be float32 without double quantization"),
        (False, {"absmax": lambda t: t.double()}, "absmax must be float32 without double quantization"),
        (True, {"nested_absmax": lambda t: t.repeat(2)}, "nested_absmax must be float32 with 1 values, got Float with"),
        (True, {"nested_code": lambda t: t[:16]}, "nested_code must be float32 with 256 values, got Float with 16"),
        (True, {"offset": lambda t: t.bfloat16()}, "offset must be float32 with 1 values, got BFloat16 with 1"),
        (True, {"offset": None}, "double quantization needs nested_absmax, nested_code and offset together"),
        (True, {"nested_code": None}, "double quantization needs nested_absmax, nested_code and offset together"),
    ],
)
def test_a_bad_weight_is_refused_by_every_op(nested, changes, message):
    for name, call in every_op(weight(nested, **changes)):
        with pytest.raises(RuntimeError) as error:
            call()
        assert message in str(error.value), name
        assert f"{name}: " in str(error.value)


def test_a_shape_that_is_not_positive_is_refused():
    arguments = weight(n=0)
    with pytest.raises(RuntimeError, match=r"linear_4bit: the weight's shape must be positive, got \[0, 77\]"):
        ops.linear_4bit(torch.randn(2, K), *arguments, None)
    with pytest.raises(RuntimeError, match=r"linear_4bit_dx: the weight's shape must be positive, got \[0, 77\]"):
        ops.linear_4bit_dx(torch.randn(2, 0), *arguments)
    with pytest.raises(RuntimeError, match=r"dequantize_4bit: the weight's shape must be positive, got \[0, 77\]"):
        ops.dequantize_4bit(*arguments[:-2], (0, K), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    arguments = weight()
    with pytest.raises(RuntimeError, match="linear_4bit: x must be float32, float16 or bfloat16, got"):
        ops.linear_4bit(torch.ones(2, K, dtype=dtype), *arguments, None)
    with pytest.raises(RuntimeError, match="linear_4bit_dx: dy must be float32, float16 or bfloat16, got"):
        ops.linear_4bit_dx(torch.ones(2, N, dtype=dtype), *arguments)
    with pytest.raises(RuntimeError, match="quantize_4bit: input must be float32, float16 or bfloat16, got"):
        ops.quantize_4bit(torch.ones(64, dtype=dtype), "nf4", 64, None)
    with pytest.raises(RuntimeError, match="dequantize_4bit: dtype must be float32, float16 or bfloat16, got"):
        ops.dequantize_4bit(*arguments[:-2], (N, K), dtype)


def test_wrong_shapes_of_the_activation_are_refused():
    arguments = weight()
    with pytest.raises(RuntimeError, match=r"linear_4bit: the last dimension of x must be the .* = 77, got 96"):
        ops.linear_4bit(torch.randn(2, N), *arguments, None)
    with pytest.raises(RuntimeError, match=r"linear_4bit_dx: the last dimension of dy must be .* = 96, got 77"):
        ops.linear_4bit_dx(torch.randn(2, K), *arguments)
    with pytest.raises(RuntimeError, match="linear_4bit: x must have at least one dimension"):
        ops.linear_4bit(torch.tensor(1.0), *arguments, None)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match="the last dimension of x must be 77, got 96"):
        ops.linear_4bit(torch.randn(2, N, device="meta"), *meta, None)


@pytest.mark.parametrize("bias", [torch.randn(N + 1), torch.randn(N).bfloat16(), torch.randn(N).double()])
def test_a_bias_of_another_length_or_dtype_is_refused(bias):
    with pytest.raises(RuntimeError, match=r"linear_4bit: bias must have 96 values of the dtype of x \(Float\), got"):
        ops.linear_4bit(torch.randn(2, K), *weight(), bias)


def test_bad_adapters_are_refused():
    lora_A, lora_B = adapter(N, K, 8, torch.float32)
    for bad in (
        (lora_A.t(), lora_B),
        (lora_A, lora_B.t()),
        (lora_A[:4], lora_B),
        (lora_A[:, 1:], lora_B),
        (lora_A, lora_B[1:]),
        (lora_A[:0], lora_B[:, :0]),
        (lora_A[0], lora_B),
    ):
        with pytest.raises(RuntimeError, match=r"lora_A must be \[r, 77\] and lora_B \[96, r\] for one rank r > 0"):
            ops.lora_linear_4bit(torch.randn(2, K), *weight(), None, *bad, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="lora_A must be float32, float16 or bfloat16, got Double"):
        ops.lora_linear_4bit(torch.randn(2, K), *weight(), None, lora_A.double(), lora_B, 1.0, 0.0, None)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_dropout_outside_zero_to_one_is_refused(p):
    factors = adapter(N, K, 8, torch.float32)
    with pytest.raises(RuntimeError, match="dropout must be at least 0 and less than 1, got"):
        ops.lora_linear_4bit(torch.randn(2, K), *weight(), None, *factors, 1.0, p, seed_tensor(1))


@pytest.mark.parametrize("seed", [None, torch.tensor([1], dtype=torch.int32), torch.tensor([1, 2])])
def test_dropout_without_a_proper_seed_is_refused(seed):
    factors = adapter(N, K, 8, torch.float32)
    with pytest.raises(RuntimeError, match="dropout needs seed, an int64 tensor with one element"):
        ops.lora_linear_4bit(torch.randn(2, K), *weight(), None, *factors, 1.0, 0.1, seed)


def test_a_backward_whose_tensors_disagree_is_refused():
    factors = adapter(N, K, 8, torch.float32)
    x, dy, xa = torch.randn(2, K), torch.randn(2, N), torch.randn(2, 8)

    def backward(dy, x, xa):
        ops.lora_linear_4bit_backward(dy, x, xa, *weight(), *factors, 1.0, 0.0, None, True)

    with pytest.raises(RuntimeError, match="dy and x must agree in dtype and in every dimension but the last"):
        backward(dy[:1], x, xa)
    with pytest.raises(RuntimeError, match="dy and x must agree in dtype and in every dimension but the last"):
        backward(dy.bfloat16(), x, xa)
    with pytest.raises(RuntimeError, match=r"xa must be what lora_linear_4bit returned for x, \[2, 8\]"):
        backward(dy, x, xa[:, :4])


def test_nothing_to_quantize_is_refused():
    with pytest.raises(RuntimeError, match="quantize_4bit: input has no elements"):
        ops.quantize_4bit(torch.empty(0), "nf4", 64, None)
    with pytest.raises(RuntimeError, match="nested_code must be float32 with 256 values"):
        ops.quantize_4bit(torch.randn(64), "nf4", 64, torch.randn(16))


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    x = torch.randn(2, K)
    for name in ("packed", "absmax", "nested_absmax", "nested_code", "offset"):
        with pytest.raises(RuntimeError, match=r"are on different devices \(.*\); move one with \.to\(device\)"):
            ops.linear_4bit(x, *weight(**{name: lambda t: t.cuda()}), None)
    packed, state = F.quantize_4bit(torch.randn(N, K).cuda())
    with pytest.raises(RuntimeError, match="are on different devices"):
        F.matmul_4bit(x, packed, state)
