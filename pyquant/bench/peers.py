"""What is measured: pyquant and its peers behind one interface, each skipped with a reason where it cannot run."""

import abc
import copy
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

import pyquant

__all__ = ["PEERS", "Adapter", "Peer", "Setting", "decode", "dense_lora", "find_peers"]


@dataclass(frozen=True)
class Setting:
    """What all peers share: the device, the dtype of activations and dense weights, the 4-bit type, the LoRA rank."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    quant_type: str = "nf4"
    blocksize: int = 64
    rank: int = 16
    scaling: float = 2.0


@dataclass
class Adapter:
    """LoRA factors in float32, as PEFT keeps them: A ``[r, k]`` and B ``[n, r]``."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def decode(packed: torch.Tensor, state) -> torch.Tensor:
    """The exact weight, float32 of ``state.shape``, by table look-ups in torch: code · absmax, rounded once.

    Independent of the kernels under test. `state` is pyquant's or bitsandbytes' QuantState.
    """
    absmax = state.absmax
    if state.state2 is not None:
        nested = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * nested
        absmax += state.offset
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: state.shape.numel()]
    values = state.code[codes.int()]
    del codes
    values *= absmax.repeat_interleave(state.blocksize)[: values.numel()]
    return values.reshape(state.shape)


def dense_lora(x, weight, lora_A, lora_B, scaling):
    """``x·Wᵀ + s·(x·Aᵀ)·Bᵀ`` on a dense weight, all in the dtype of x."""
    return linear(x, weight) + linear(linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * scaling


class Peer(abc.ABC):
    """One implementation. A weight is an opaque object that `load` makes and the operations take.

    A peer defines the methods of those operations that it names in `operations`, and no others are called. They run on
    the current stream and, but for what `eager_only` names, in a CUDA graph:

    - ``quantize(dense)``: the packed bytes and their state, of a dense weight ``[n, k]``.
    - ``dequantize(weight)``: dense again, ``[n, k]``.
    - ``linear(x, weight)`` and ``linear_dx(dy, weight)``: ``x·Wᵀ`` and ``dy·W``.
    - ``lora(x, weight, adapter)``, for ``lora`` and ``lora_backward``: differentiable in x and the adapter's factors.
    """

    name: str
    package: str | None = None  # the distribution it comes from
    operations: frozenset[str] = frozenset()
    eager_only: frozenset[str] = frozenset()
    # How many times the error of the dense product the error of a product may be, before the result counts as wrong.
    error_bound: float = 4.0

    def __init__(self, setting: Setting):
        self.setting = setting

    @classmethod
    def why_absent(cls, setting: Setting) -> str | None:
        """Why this peer cannot run here, None if it can."""
        if cls.package and importlib.util.find_spec(cls.package.replace("-", "_")) is None:
            return f"{cls.package} is not installed"
        return None

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown version"

    @abc.abstractmethod
    def load(self, weight: torch.Tensor) -> object:
        """The peer's form of a dense weight ``[n, k]``."""

    @abc.abstractmethod
    def clone(self, weight: object) -> object:
        """The same weight at other addresses."""

    @abc.abstractmethod
    def nbytes(self, weight: object) -> int:
        """Bytes that a call reads of it."""

    @abc.abstractmethod
    def exact(self, weight: object) -> torch.Tensor:
        """The weight that is multiplied with, float32 ``[n, k]``."""


class _BitsandbytesFormat(Peer):
    """Weights as the packed bytes and the QuantState."""

    def clone(self, weight):
        packed, state = weight
        state = copy.copy(state)
        state.absmax = state.absmax.clone()
        if state.state2 is not None:
            state.offset = state.offset.clone()
            state.state2 = copy.copy(state.state2)
            state.state2.absmax = state.state2.absmax.clone()
        return packed.clone(), state

    def nbytes(self, weight):
        packed, state = weight
        nested = state.state2.absmax.nbytes + state.offset.nbytes if state.state2 is not None else 0
        return packed.nbytes + state.absmax.nbytes + nested

    def exact(self, weight):
        return decode(*weight)

    @property
    def _options(self) -> dict:
        setting = self.setting
        return {"blocksize": setting.blocksize, "quant_type": setting.quant_type, "compress_statistics": True}


class PyQuant(_BitsandbytesFormat):
    name = "pyquant"
    operations = frozenset({"quantize", "dequantize", "linear", "linear_dx", "lora", "lora_backward"})
    error_bound = 1.25

    @property
    def version(self):
        return pyquant.__version__

    def load(self, weight):
        return self.quantize(weight)

    def quantize(self, dense):
        return pyquant.functional.quantize_4bit(dense, **self._options)

    def dequantize(self, weight):
        return pyquant.functional.dequantize_4bit(*weight)

    def linear(self, x, weight):
        return pyquant.matmul_4bit(x, *weight)

    def _arguments(self, weight):
        packed, state = weight
        statistics = pyquant.functional.statistics(state)
        return packed, *statistics, state.quant_type, state.blocksize, *state.shape

    def linear_dx(self, dy, weight):
        return torch.ops.pyquant.linear_4bit_dx(dy, *self._arguments(weight))

    def lora(self, x, weight, adapter):
        y, _ = torch.ops.pyquant.lora_linear_4bit(
            x, *self._arguments(weight), None, adapter.A, adapter.B, adapter.scaling, 0.0, None
        )
        return y


class Bitsandbytes(_BitsandbytesFormat):
    """bitsandbytes, and for LoRA the operations of PEFT's layer over it, under autocast with float32 factors as the
    Hugging Face trainer runs it with ``bf16=True``."""

    name = "bitsandbytes"
    package = "bitsandbytes"
    operations = PyQuant.operations
    # Its quantization kernels ignore the current stream, so a capture would miss them and time the rest alone.
    eager_only = frozenset({"quantize"})

    def __init__(self, setting):
        super().__init__(setting)
        import bitsandbytes

        self.bnb = bitsandbytes

    def load(self, weight):
        return self.quantize(weight)

    def quantize(self, dense):
        return self.bnb.functional.quantize_4bit(dense, **self._options)

    def dequantize(self, weight):
        return self.bnb.functional.dequantize_4bit(*weight)

    def linear(self, x, weight):
        return self.bnb.matmul_4bit(x, weight[0], weight[1])

    def linear_dx(self, dy, weight):
        # What the backward of its matmul_4bit does.
        return torch.matmul(dy, self.bnb.functional.dequantize_4bit(*weight).to(dy.dtype))

    def lora(self, x, weight, adapter):
        # peft.tuners.lora.bnb.Linear4bit.forward, copy included, without dropout.
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            result = self.linear(x, weight).clone()
            return result + linear(linear(x, adapter.A), adapter.B) * adapter.scaling


class Dense(Peer):
    """torch's dense products, cuBLAS on a GPU, with the dequantized weight in the dtype of the activations."""

    name = "cublas"
    operations = frozenset({"linear", "linear_dx", "lora", "lora_backward"})

    @property
    def version(self):
        return f"torch {torch.__version__}"

    def load(self, weight):
        packed, state = pyquant.functional.quantize_4bit(
            weight, blocksize=self.setting.blocksize, quant_type=self.setting.quant_type, compress_statistics=True
        )
        exact = decode(packed, state)
        return exact.to(weight.dtype), exact

    def clone(self, weight):
        return weight[0].clone(), weight[1]

    def nbytes(self, weight):
        return weight[0].nbytes

    def exact(self, weight):
        return weight[1]

    def linear(self, x, weight):
        return linear(x, weight[0])

    def linear_dx(self, dy, weight):
        return dy @ weight[0]

    def lora(self, x, weight, adapter):
        return dense_lora(x, weight[0], adapter.A, adapter.B, adapter.scaling)


class Humming(Peer):
    """Humming's INT4 product with symmetric groups of 64, which compiles its kernels as they are needed."""

    name = "humming"
    package = "humming-kernels"
    operations = frozenset({"linear"})

    @classmethod
    def why_absent(cls, setting):
        if importlib.util.find_spec("humming") is None:
            return "humming-kernels is not installed"
        if setting.device != "cuda":
            return "humming runs on GPUs alone"
        if setting.dtype == torch.float32:
            return "humming has no float32 activations"
        return None

    def load(self, weight):
        from humming.layer import HummingLayer
        from humming.schema import HummingWeightSchema

        n, k = weight.shape
        layer = HummingLayer(
            shape_n=n, shape_k=k, weight_config={"dtype": "int4", "group_size": 64}, torch_dtype=self.setting.dtype
        ).to(weight.device)
        tensors = HummingWeightSchema.quant_tensor(weight, layer.weight_schema, self.setting.dtype)
        exact = layer.weight_schema.dequant_tensors(tensors).float().reshape(n, k)
        layer.load_from_tensors(tensors)
        layer.transform()
        return layer, exact

    def clone(self, weight):
        return copy.deepcopy(weight[0]), weight[1]

    def nbytes(self, weight):
        return sum(parameter.nbytes for parameter in weight[0].parameters())

    def exact(self, weight):
        return weight[1]

    def linear(self, x, weight):
        return weight[0](x)


# In the order of the table's columns. A further peer is one more class here.
PEERS: tuple[type[Peer], ...] = (PyQuant, Bitsandbytes, Dense, Humming)


def find_peers(names: list[str] | None, setting: Setting) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, of those named or of all, and the reason for each that cannot.

    Raises:
        ValueError: there is no peer of that name.
    """
    known = {peer.name: peer for peer in PEERS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"there is no peer {unknown[0]!r}; the peers are {', '.join(known)}")
    found, absent = [], {}
    for name, peer in known.items():
        if names and name not in names:
            continue
        reason = peer.why_absent(setting)
        if reason is None:
            try:
                found.append(peer(setting))
                continue
            except Exception as error:  # an import that fails for want of a library, whichever it is
                reason = f"{name} cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]
        absent[name] = reason
    return found, absent
