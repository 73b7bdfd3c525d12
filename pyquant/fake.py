"""What each op returns without computing it: shapes, dtypes and devices, for meta tensors and ``torch.compile``."""

import torch

_op = torch.library.register_fake


@_op("pyquant::quantize_4bit")
def _(input, quant_type, blocksize, nested_code=None):
    numel = input.numel()
    blocks = (numel + blocksize - 1) // blocksize
    packed = input.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    if nested_code is None:
        empty = input.new_empty((0,), dtype=torch.float32)
        return packed, input.new_empty((blocks,), dtype=torch.float32), empty, torch.empty_like(empty)
    absmax = input.new_empty((blocks,), dtype=torch.uint8)
    nested_absmax = input.new_empty(((blocks + 255) // 256,), dtype=torch.float32)
    return packed, absmax, nested_absmax, input.new_empty((), dtype=torch.float32)


@_op("pyquant::dequantize_4bit")
def _(packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@_op("pyquant::linear_4bit")
def _(x, packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k, bias):
    torch._check(x.shape[-1] == k, lambda: f"linear_4bit: the last dimension of x must be {k}, got {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], n))


@_op("pyquant::linear_4bit_dx")
def _(dy, packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k):
    torch._check(dy.shape[-1] == n, lambda: f"linear_4bit_dx: the last dimension of dy must be {n}, got {dy.shape[-1]}")
    return dy.new_empty((*dy.shape[:-1], k))


def _rows(x):
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


@_op("pyquant::lora_linear_4bit")
def _(
    x, packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k, bias, lora_A, lora_B, scaling,
    dropout, seed,
):  # fmt: skip
    torch._check(x.shape[-1] == k, lambda: f"lora_linear_4bit: the last dimension of x must be {k}, got {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((_rows(x), lora_A.shape[0]))


@_op("pyquant::lora_linear_4bit_backward")
def _(
    dy, x, xa, packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k, lora_A, lora_B, scaling,
    dropout, seed, needs_dx,
):  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], k)) if needs_dx else dy.new_empty((0,))
    rank = lora_A.shape[0]
    return dx, x.new_empty((rank, k), dtype=torch.float32), x.new_empty((n, rank), dtype=torch.float32)
