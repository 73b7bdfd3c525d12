"""What the format and the ops mean, written independently of pyquant: float32 where the format rounds, else float64.

Every formula is spelled out with torch and numpy; nothing here calls the package under test.
"""

from dataclasses import dataclass

import numpy as np
import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
CODES = {
    "nf4": torch.tensor(NF4),
    "fp4": torch.tensor(FP4_MAGNITUDES + tuple(0.0 - m if m else 0.0 for m in FP4_MAGNITUDES)) / 12.0,
}
# The codes by ascending value; a value just above zero takes FP4's second zero, code 8.
ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
MIN_ABSMAX = 1e-38
NESTED_BLOCKSIZE = 256


def thresholds(quant_type: str) -> torch.Tensor:
    """float32 ``[15]``: the midpoints of neighbouring codes."""
    ascending = CODES[quant_type][list(ORDER[quant_type])]
    return (ascending[:-1] + ascending[1:]) / 2


def nearest_code(values: torch.Tensor, quant_type: str) -> torch.Tensor:
    """The code of each normalised value: the number of thresholds below it says which."""
    above = (values.unsqueeze(-1) > thresholds(quant_type)).sum(-1)
    return torch.tensor(ORDER[quant_type])[above].to(torch.uint8)


def quantize(weight: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes ``[ceil(numel / 2), 1]`` and float32 absmax ``[blocks]``.

    Whole blocks multiply by a reciprocal and keep their true absmax; a partial last block divides and keeps the guarded
    one.
    """
    flat = weight.reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks = flat[:whole].reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    values = (blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]).reshape(-1)
    if whole < flat.numel():
        last = flat[whole:].abs().amax().clamp(min=MIN_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        values = torch.cat([values, flat[whole:] / last])
    codes = nearest_code(values.clamp(-1, 1), quant_type)
    if codes.numel() % 2:
        codes = torch.cat([codes, nearest_code(torch.zeros(1), quant_type)])
    return (codes[::2] * 16 + codes[1::2]).unsqueeze(1), absmax


def decoded_absmax(absmax, nested_absmax=None, nested_code=None, offset=None) -> torch.Tensor:
    """float32 absmax: code · nested absmax rounded, then the offset added and rounded."""
    if nested_absmax is None:
        return absmax
    scales = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return nested_code[absmax.long()] * scales + offset


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, blocksize: int, shape, dtype):
    """code · absmax in float32, rounded once to dtype. `absmax` is float32, see `decoded_absmax`."""
    packed = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: int(np.prod(shape))]
    scales = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return (CODES[quant_type][codes.long()] * scales).to(dtype).reshape(shape)


def philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): uint32 ``[len(counters), 4]``."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    counters = counters.astype(np.uint64)
    c = [counters & low, counters >> high, np.zeros_like(counters), np.zeros_like(counters)]
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(product1 >> high) ^ c[1] ^ key0, product1 & low, (product0 >> high) ^ c[3] ^ key1, product0 & low]
        key0 = (key0 + np.uint64(0x9E3779B9)) & low
        key1 = (key1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=1)


def dropout_mask(seed: int, p: float, rows: int, columns: int) -> torch.Tensor:
    """Float64 ``[rows, columns]``: 0 where dropped, 1 / (1 - p) where kept."""
    if p == 0:
        return torch.ones(rows, columns, dtype=torch.float64)
    numel = rows * columns
    draws = philox(seed, np.arange(-(-numel // 4))).reshape(-1)[:numel]
    kept = torch.from_numpy(draws.astype(np.int64) >= round(p * 2**32))
    return (kept.double() / (1 - p)).reshape(rows, columns)


@dataclass
class LoraProblem:
    """A 4-bit linear with an adapter, and the formula that both references evaluate.

    All tensors may have any float dtype; `evaluate` casts them, so that the same problem gives the float64 truth and
    the baseline that the error bound speaks of.
    """

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor  # float32, exactly dequantized
    bias: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    mask: torch.Tensor | None = None

    def evaluate(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """y and the gradients of sum(y · dy), computed in dtype by torch's autograd."""
        leaves = {
            name: tensor.detach().to(dtype).requires_grad_()
            for name, tensor in (("x", self.x), ("bias", self.bias), ("A", self.lora_A), ("B", self.lora_B))
            if tensor is not None
        }
        y = torch.nn.functional.linear(leaves["x"], self.weight.to(dtype), leaves.get("bias"))
        if "A" in leaves:
            dropped = leaves["x"] if self.mask is None else leaves["x"] * self.mask.to(dtype).reshape(self.x.shape)
            y = y + (dropped @ leaves["A"].T) @ leaves["B"].T * self.scaling
        y.backward(self.dy.to(dtype))
        return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to the truth's."""
    truth = truth.double().cpu()
    difference = (value.double().cpu() - truth).norm()
    return float(difference / truth.norm()) if truth.norm() > 0 else float(difference)


# In float32 the weight is exact and only the order of the sum differs, which moves tiny errors by more than a quarter;
# the floor is far below what a 16-bit or TF32 product gives. Few outputs in 16 bits: each one's rounding is luck.
_FLOAT32_FLOOR = 2.0**-20
_FEW = 256


def assert_within_bound(
    value: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor, what: str = "", inner: int | None = None
) -> None:
    """The house's error bound: at most 1.25 times the baseline's error, both against float64.

    `inner` is how many values of an intermediate product the result is made of: when there are few, one whose terms
    cancel carries its own rounding into every element.
    """
    assert value.shape == truth.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    error, reference = relative_error(value, truth), relative_error(baseline, truth)
    bound = 1.25 * reference
    if baseline.dtype == torch.float32:
        bound = max(bound, _FLOAT32_FLOOR if inner is None or inner >= _FEW else 16 * _FLOAT32_FLOOR)
    elif truth.numel() < _FEW:
        bound = max(bound, torch.finfo(baseline.dtype).eps / 2)
    assert error <= bound, f"{what}: relative error {error:.3e}, allowed {bound:.3e} (baseline {reference:.3e})"
