"""Quantization, dequantization and 4-bit matrix products under bitsandbytes' names, arguments and defaults.

The bytes are bitsandbytes' too: packed weights, statistics and codebooks are bit for bit what its 0.50 release makes.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from pyquant.autograd import linear_4bit
from pyquant.errors import CheckpointError

__all__ = [
    "BLOCKSIZES",
    "NESTED_BLOCKSIZE",
    "QUANT_TYPES",
    "QuantState",
    "create_dynamic_map",
    "dequantize_4bit",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
QUANT_TYPES = ("fp4", "nf4")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
}  # fmt: skip


# The states of all weights on a device share these two, as nobody writes to a codebook; copies would be two kernels a
# weight. Made outside the caller's modes, which would be kept with them otherwise.


@lru_cache(maxsize=64)
def _codebook(quant_type: str, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        code = torch.tensor(_CODES[quant_type], dtype=torch.float32)
        return code.div_(code.abs().max()).to(device)


@lru_cache(maxsize=64)
def _dynamic_codebook(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return create_dynamic_map().to(device)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> torch.Tensor:
    """The codebook of a 4-bit type.

    Args:
        typename: ``"nf4"`` or ``"fp4"``.
        device: where to put it; the current CUDA device by default where there is one, else the CPU.
        blocksize: ignored, as both types have one codebook for every block size.

    Returns:
        float32 ``[16]``, the value of each code, between -1 and 1.

    Raises:
        ValueError: for another type.
    """
    _check_quant_type(typename)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _codebook(typename, torch.device("cpu")).to(device, copy=True)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """The *dynamic* 8-bit codebook that double quantization stores absmax in (Dettmers, 2016, "8-Bit Approximations
    for Parallelism in Deep Learning").

    A code has a sign, a run of zeros that gives a power of ten, and the rest as a linear fraction between 0.1 and 1.

    Returns:
        float32 ``[256]``, ascending, between -1 and 1; with fewer bits, zeros fill it up.
    """
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]

    def add(steps: int, exponent: int) -> None:
        boundaries = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        for sign in (1, -1) if signed else (1,):
            values.extend((sign * 10**exponent * means).tolist())

    for i in range(max_exponent_bits):
        add(2 ** (i + fraction_bits + (0 if signed else 1)), i - max_exponent_bits + 1)
    extra = 2**fraction_bits - 1
    if extra > 0:
        add(extra, 0)
    values.extend([0.0] * (256 - len(values)))
    return torch.tensor(sorted(values), dtype=torch.float32)


def _check_quant_type(quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {_dtype_name(dtype)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _blocks(numel: int, blocksize: int) -> int:
    return -(-numel // blocksize)


class QuantState:
    """What is needed to undo the quantization of one tensor.

    Attributes:
        absmax: scale of each block: float32 ``[blocks]``, or uint8 codes of the same shape with double quantization.
        shape: of the tensor before quantization.
        code: float32 ``[16]``, the codebook. Not to be written to: states share it, and the one of `state2`.
        dtype: of the tensor before quantization; what dequantization returns.
        blocksize: elements that share one absmax.
        quant_type: ``"nf4"`` or ``"fp4"``.
        offset: float32 scalar, the mean that double quantization subtracts from absmax; None without.
        state2: with double quantization, another `QuantState` with ``absmax`` (float32 ``[ceil(blocks / 256)]``),
            ``code`` (float32 ``[256]``) and ``blocksize`` (256); None without.
    """

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = tuple(f"bitsandbytes__{name}" for name in QUANT_TYPES)
    valid_qs_keys = (
        "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type", "blocksize", "dtype",
        "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    )  # fmt: skip

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: Sequence[int] | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: "QuantState | None" = None,
    ):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.state2 is not None

    def __getattr__(self, name):
        # FSDP resolves the checkpoint key "quant_state.bitsandbytes__nf4" attribute by attribute.
        if name.startswith("bitsandbytes__") and "absmax" in self.__dict__:
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __getitem__(self, index):
        """bitsandbytes' old list form: ``[absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]``."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other):
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            _equal_or_both_none(self.absmax, other.absmax)
            and _equal_or_both_none(self.code, other.code)
            and _equal_or_both_none(self.offset, other.offset)
            and (None if self.shape is None else tuple(self.shape))
            == (None if other.shape is None else tuple(other.shape))
            and (self.dtype, self.blocksize, self.quant_type) == (other.dtype, other.blocksize, other.quant_type)
            and self.state2 == other.state2
        )

    __hash__ = None

    def to(self, device: torch.device | str | int) -> "QuantState":
        """Moves the statistics to a device, in place. Returns self."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.to(device)
        return self

    def nbytes(self) -> int:
        """Bytes of the statistics, the codebooks (shared by all layers) left out."""
        total = self.absmax.nbytes
        if self.nested:
            total += self.offset.nbytes + self.state2.absmax.nbytes
        return total

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of a checkpoint.

        Args:
            packed: put what is not a tensor into one uint8 tensor of JSON, so that every value is a tensor.
        """
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _dtype_name(self.dtype),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.nested:
            entries.update(
                nested_absmax=self.state2.absmax,
                nested_blocksize=self.state2.blocksize,
                # A copy: safetensors refuses tensors that share storage.
                nested_quant_map=self.state2.code.clone(),
                nested_dtype=_dtype_name(self.state2.dtype),
                nested_offset=self.offset.item(),
            )
        if not packed:
            return entries
        entries["quant_map"] = self.code.clone()
        tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
        others = {key: value for key, value in entries.items() if not isinstance(value, torch.Tensor)}
        text = json.dumps(others).encode()
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> "QuantState":
        """Reads `as_dict`'s entries, packed or not, and checks that they fit together.

        Args:
            qs_dict: keys may carry a prefix that ends in a dot. Left unchanged.
            device: where to put the tensors.

        Raises:
            CheckpointError: an entry is missing, unknown, malformed, or disagrees with another.
        """
        entries = _unpack(qs_dict)
        quant_type = _entry(entries, "quant_type")
        if quant_type not in QUANT_TYPES:
            raise CheckpointError(f"quant_type in the checkpoint is {quant_type!r}, expected 'nf4' or 'fp4'")
        blocksize = _entry(entries, "blocksize")
        if blocksize not in BLOCKSIZES:
            raise CheckpointError(f"blocksize in the checkpoint is {blocksize!r}, expected one of {BLOCKSIZES}")
        shape = _entry(entries, "shape")
        if not (isinstance(shape, list | tuple) and shape and all(isinstance(n, int) and n > 0 for n in shape)):
            raise CheckpointError(f"shape in the checkpoint is {shape!r}, expected positive integers")
        dtype = _float_dtype(entries, "dtype")
        blocks = _blocks(math.prod(shape), blocksize)

        code = _tensor(entries, "quant_map", torch.float32, 16)
        if not torch.equal(code.cpu(), _codebook(quant_type, torch.device("cpu"))):
            raise CheckpointError(
                f"quant_map in the checkpoint is not the {quant_type} codebook; "
                f"the file is damaged or was written by another format"
            )
        offset = state2 = None
        if any(key.startswith("nested_") for key in entries):
            nested_blocksize = _entry(entries, "nested_blocksize")
            if nested_blocksize != NESTED_BLOCKSIZE:
                raise CheckpointError(
                    f"nested_blocksize in the checkpoint is {nested_blocksize!r}, only {NESTED_BLOCKSIZE} is supported"
                )
            value = _entry(entries, "nested_offset")
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise CheckpointError(f"nested_offset in the checkpoint is {value!r}, expected a finite number")
            absmax = _tensor(entries, "absmax", torch.uint8, blocks)
            # float32 whatever the default dtype is: rounded to bfloat16, the offset would corrupt every weight.
            offset = torch.tensor(float(value), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=_tensor(entries, "nested_absmax", torch.float32, _blocks(blocks, NESTED_BLOCKSIZE)).to(device),
                code=_tensor(entries, "nested_quant_map", torch.float32, 256).to(device),
                blocksize=nested_blocksize,
                dtype=_float_dtype(entries, "nested_dtype"),
            )
        else:
            absmax = _tensor(entries, "absmax", torch.float32, blocks)
        return cls(
            absmax=absmax.to(device),
            shape=torch.Size(shape),
            code=code.to(device),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )


def _equal_or_both_none(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.device == b.device and torch.equal(a, b)


def _unpack(qs_dict: dict[str, Any]) -> dict[str, Any]:
    """One flat dict from a checkpoint's entries: prefixes stripped, the JSON parsed."""
    entries: dict[str, Any] = {}
    json_tensors = []
    for key, value in qs_dict.items():
        name = key.split(".")[-1]
        if "quant_state" in key and isinstance(value, torch.Tensor):
            json_tensors.append((key, name, value))
        else:
            entries[name] = value
    if "quant_type" not in entries and not json_tensors:
        raise CheckpointError(
            "the checkpoint has no quant_state.bitsandbytes__nf4 (or __fp4) entry beside a 4-bit weight; "
            "it is incomplete, or the weight is not quantized"
        )
    if len(json_tensors) > 1 or any(name not in QuantState.valid_qs_type_keys for _, name, _ in json_tensors):
        raise CheckpointError(
            f"expected one quant_state entry that ends in {' or '.join(QuantState.valid_qs_type_keys)}, "
            f"got {', '.join(key for key, _, _ in json_tensors)}"
        )
    for key, name, value in json_tensors:
        try:
            parsed = json.loads(bytes(value.detach().cpu().to(torch.uint8).tolist()).decode())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{key} is not JSON ({error}); the checkpoint is damaged") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{key} holds {parsed!r}, expected a JSON object; the checkpoint is damaged")
        entries.update(parsed)
        if entries.get("quant_type") != name.removeprefix("bitsandbytes__"):
            raise CheckpointError(f"{key} says quant_type {entries.get('quant_type')!r}; the two disagree")
    unknown = sorted(set(entries) - set(QuantState.valid_qs_keys))
    if unknown:
        raise CheckpointError(f"unknown entries beside a 4-bit weight: {', '.join(unknown)}")
    return entries


def _entry(entries: dict[str, Any], name: str) -> Any:
    if name not in entries:
        raise CheckpointError(f"the 4-bit weight's entry {name!r} is missing; the checkpoint is incomplete")
    return entries[name]


def _float_dtype(entries: dict[str, Any], name: str) -> torch.dtype:
    value = _entry(entries, name)
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name} in the checkpoint is {value!r}, expected float32, float16 or bfloat16")
    return dtype


def _tensor(entries: dict[str, Any], name: str, dtype: torch.dtype, length: int) -> torch.Tensor:
    value = _entry(entries, name)
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.numel() != length:
        found = f"{_dtype_name(value.dtype)} with {value.numel()}" if isinstance(value, torch.Tensor) else repr(value)
        raise CheckpointError(
            f"{name} must be {_dtype_name(dtype)} with {length} values for this weight's shape and blocksize, "
            f"the checkpoint has {found}"
        )
    return value.reshape(-1)


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantizes a tensor to 4 bits in blocks (QLoRA, Dettmers et al., 2023).

    Args:
        A: float32, float16 or bfloat16, any shape and strides. Blocks run over its row-major order.
        absmax: written with the blocks' scales if given: float32 ``[blocks]``, uint8 with `compress_statistics`.
        out: written with the packed bytes if given.
        blocksize: elements that share one scale: 32, 64 (default), 128, … 4096.
        compress_statistics: quantize the scales to 8 bits as well (double quantization).
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are viewed as.

    Returns:
        The packed tensor, ``[ceil(numel / 2) / itemsize(quant_storage), 1]``, and the state that undoes it.

    Raises:
        ValueError: an argument has an unsupported value, or `A` is empty.
        RuntimeError: `A` holds NaN or infinity. On a GPU this is not looked at here, as the look would wait for the
            kernel; `pyquant.nn.Linear4bit` and `pyquant.replace_linear` look once for a whole weight.
    """
    blocksize = 64 if blocksize is None else blocksize
    _check_blocksize(blocksize)
    _check_quant_type(quant_type)
    _check_float("A", A.dtype)
    if A.numel() == 0:
        raise ValueError(f"A of shape {tuple(A.shape)} has no elements to quantize")
    nbytes = (A.numel() + 1) // 2
    if nbytes % quant_storage.itemsize:
        raise ValueError(
            f"{A.numel()} elements pack into {nbytes} bytes, which {_dtype_name(quant_storage)} does not divide; "
            f"use quant_storage=torch.uint8"
        )

    nested_code = _dynamic_codebook(A.device) if compress_statistics else None
    packed, scales, nested_absmax, offset = torch.ops.pyquant.quantize_4bit(A, quant_type, blocksize, nested_code)
    state2 = None
    if compress_statistics:
        state2 = QuantState(nested_absmax, code=nested_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    state = QuantState(
        absmax=scales,
        shape=A.shape,
        code=_codebook(quant_type, A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset if compress_statistics else None,
        state2=state2,
    )
    if quant_storage != torch.uint8:
        packed = packed.view(-1).view(quant_storage).unsqueeze(1)
    if out is not None:
        packed = out.copy_(packed)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed, state


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def statistics(state: QuantState) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The statistics in the ops' order: absmax, nested_absmax, nested_code, offset."""
    if state.state2 is None:
        return state.absmax, None, None, None
    return state.absmax, state.state2.absmax, state.state2.code, state.offset


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Undoes `quantize_4bit`: each element is code · absmax in float32, rounded once.

    Args:
        A: the packed tensor.
        quant_state: what `quantize_4bit` returned with it. Without it, `absmax` and `out` are needed.
        absmax: float32 ``[blocks]``, if there is no `quant_state`.
        out: written with the result if given; without a `quant_state` it also gives shape and dtype.
        blocksize: 64 by default, if there is no `quant_state`.
        quant_type: if there is no `quant_state`.

    Returns:
        A tensor of the state's shape and dtype; transposed, as in bitsandbytes, if the packed tensor is ``[1, bytes]``.

    Raises:
        ValueError: an argument is missing or has an unsupported value.
        RuntimeError: lengths, dtypes or devices of packed tensor and statistics disagree.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or else both absmax and out")
        quant_state = QuantState(
            absmax=absmax.float(),
            shape=out.shape,
            blocksize=64 if blocksize is None else blocksize,
            quant_type=quant_type,
            dtype=out.dtype,
        )
    _check_blocksize(quant_state.blocksize)
    _check_quant_type(quant_state.quant_type)
    _check_float("quant_state.dtype", quant_state.dtype)
    result = torch.ops.pyquant.dequantize_4bit(
        A,
        *statistics(quant_state),
        quant_state.quant_type,
        quant_state.blocksize,
        quant_state.shape,
        quant_state.dtype,
    )
    if out is not None:
        result = out.copy_(result)
    return result.t() if A.shape[0] == 1 and result.dim() == 2 else result


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A · Wᵀ + bias`` for a 4-bit weight W, differentiable in `A` and `bias`.

    Args:
        A: ``[..., K]``, float32, float16 or bfloat16.
        B: the packed weight, or its transposed view: the shape is `quant_state`'s.
        quant_state: of a weight of shape ``[N, K]``.
        out: written with the result if given; not differentiable then.
        bias: ``[N]``, cast to the dtype of `A`.

    Returns:
        ``[..., N]`` in the dtype of `A`.

    Raises:
        ValueError: no quant_state, a weight that is not a matrix, an unsupported dtype, or A's last dimension is not K.
        RuntimeError: the tensors are on different devices, or the weight and its statistics disagree.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit needs the quant_state that quantize_4bit returned with B")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit needs a weight of shape [N, K], got {tuple(quant_state.shape)}")
    n, k = quant_state.shape
    _check_float("A", A.dtype)
    if A.dim() == 0 or A.shape[-1] != k:
        raise ValueError(f"A must end in the weight's {k} input features, got shape {tuple(A.shape)}")
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    result = linear_4bit(A, B, *statistics(quant_state), quant_state.quant_type, quant_state.blocksize, n, k, bias)
    return out.copy_(result) if out is not None else result


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """`matmul_4bit` under bitsandbytes' name for inference. `A` may have any number of rows; no gradient."""
    if state is None:
        raise ValueError("gemv_4bit needs the state that quantize_4bit returned with B")
    with torch.no_grad():
        return matmul_4bit(A, B, state, out=out)
