"""The suite: quantize, dequantize, the linear layer and its LoRA adapter, for a model's shapes, against the peers.

Each case is checked against float64 before it is timed. Weights rotate through enough copies to be out of the L2 cache,
activations are random, and a time is the median over replays of a CUDA graph (timing.py).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from pyquant.bench.peers import Adapter, Peer, Setting, decode, dense_lora
from pyquant.bench.timing import Ceilings, Timer, copies_beyond_cache

__all__ = ["DEFAULT_ROWS", "OPERATIONS", "QUICK_ROWS", "TRAINING_ROWS", "Row", "Suite", "Wrong", "results"]

# Name → what it is. The time of `quantize` is taken in a graph and, launches included, eagerly.
OPERATIONS = {
    "quantize": "quantize, double quantization",
    "dequantize": "dequantize",
    "linear": "linear, y = x·Wᵀ",
    "linear_dx": "linear, dx = dy·W",
    "lora": "LoRA linear, forward",
    "lora_backward": "LoRA linear, forward and backward",
}
OF_THE_WEIGHT = ("quantize", "dequantize")
BACKWARD = ("linear_dx", "lora_backward")
DEFAULT_ROWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
QUICK_ROWS = (1, 16, 256, 2048)
# Fewer rows than this are decoding, which has no backward.
TRAINING_ROWS = 64

# Relative Frobenius error that any right result stays below: several roundings of the dtype.
WORST_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# A dense product's error counts as at least this much: with few terms and a lucky order it can be next to none.
LEAST_ERROR = {torch.float32: 2.0**-20, torch.float16: 0.0, torch.bfloat16: 0.0}
# A quantized weight is at most this much farther from the original than rounding to the nearest code in float64 is;
# the 8-bit statistics account for the difference.
QUANTIZE_BOUND = 1.02
# Bytes of different random inputs per case.
INPUT_BYTES = 2**28


class Wrong(Exception):
    """A result that is not what float64 says."""


@dataclass
class Row:
    """One peer's measurement of one case.

    Attributes:
        shape: the layers' names.
        n, k: the weight's shape.
        m: rows of the activation; None for operations on the weight alone.
        timing: ``"graph"`` or ``"eager"``.
        us: microseconds a call.
        nbytes, flops: the least traffic (each operand once in each pass, in the peer's own format) and arithmetic.
        error: relative to that of the same product with the dequantized weight in the dtype; None where exact.
        failure: what went wrong, with no times then.
    """

    operation: str
    shape: str
    n: int
    k: int
    m: int | None
    peer: str
    timing: str
    nbytes: int = 0
    flops: int = 0
    us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    share: float | None = None  # of the ceiling: least time / time
    vs_bitsandbytes: float | None = None  # times as fast
    vs_cublas: float | None = None
    error: float | None = None
    failure: str | None = None

    @property
    def case(self) -> tuple:
        """What rows of different peers have in common."""
        return self.operation, self.n, self.k, self.m, self.timing


@dataclass
class _Copies:
    """A peer's copies of one weight."""

    peer: Peer
    weights: list
    exact: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.peer.nbytes(self.weights[0])


class Suite:
    """Measures operations × shapes × rows × peers.

    Args:
        shapes: names → ``(n, k)``.
        rows: numbers of rows of the activation. Those below `training_rows` are not measured backward.
        timer: takes the times.
        report: called with each finished row.
        deadline: `time.monotonic` after which no case is started; what is left is counted in `not_measured`.
    """

    def __init__(
        self,
        setting: Setting,
        shapes: dict[str, tuple[int, int]],
        rows: Iterable[int],
        operations: Iterable[str],
        peers: list[Peer],
        timer: Timer,
        ceilings: Ceilings,
        training_rows: int = TRAINING_ROWS,
        report: Callable[[Row], None] = lambda row: None,
        deadline: float = float("inf"),
    ):
        self.setting = setting
        self.shapes = shapes
        self.rows = sorted(set(rows))
        self.operations = [name for name in OPERATIONS if name in set(operations)]
        self.peers = peers
        self.timer = timer
        self.ceilings = ceilings
        self.training_rows = training_rows
        self.report = report
        self.deadline = deadline
        self.not_measured = 0
        self.table: list[Row] = []

    def run(self) -> list[Row]:
        """Measures everything, and returns the rows with their ratios."""
        for shape, (n, k) in self.shapes.items():
            generator = torch.Generator(self.setting.device).manual_seed(0)
            weight = torch.randn(n, k, generator=generator, device=self.setting.device) * 0.02
            weight = weight.to(self.setting.dtype)
            if "quantize" in self.operations:
                self._quantize(shape, weight)
            rest = [name for name in self.operations if name != "quantize"]
            copies = [
                c for peer in self.peers if peer.operations & set(rest) and (c := self._copies(shape, peer, weight))
            ]
            if "dequantize" in rest:
                for mine in copies:
                    self._dequantize(shape, mine)
            _share_exact(copies)
            for m in self.rows:
                self._products(shape, m, copies)
            del copies, weight
        _add_ratios(self.table)
        return self.table

    # ---- operations on the weight ----

    def _quantize(self, shape: str, weight: torch.Tensor) -> None:
        dense = [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes, self.ceilings.l2_bytes))]
        nbytes = weight.nbytes
        for peer in self._peers_with("quantize"):

            def check(peer=peer) -> None:
                _check_quantized(peer.quantize(weight), weight, self.setting)

            for timing in ("eager",) if "quantize" in peer.eager_only else ("graph", "eager"):
                calls = [lambda w=w, peer=peer: peer.quantize(w) for w in dense]
                row = Row("quantize", shape, *weight.shape, None, peer.name, timing)
                # Bytes written: half a byte a weight, a byte a block, four a block of blocks.
                blocks = -(-weight.numel() // self.setting.blocksize)
                row.nbytes = nbytes + (weight.numel() + 1) // 2 + blocks + 4 * -(-blocks // 256)
                self._measure(row, calls, check)

    def _dequantize(self, shape: str, mine: _Copies) -> None:
        if "dequantize" not in mine.peer.operations:
            return
        calls = [lambda w=w: mine.peer.dequantize(w) for w in mine.weights]
        expected = mine.exact.to(self.setting.dtype)
        row = Row("dequantize", shape, *expected.shape, None, mine.peer.name, "graph")
        row.nbytes = mine.nbytes + expected.nbytes

        def check() -> None:
            value = mine.peer.dequantize(mine.weights[0])
            if mine.peer.name == "pyquant" and not torch.equal(value, expected):
                raise Wrong("dequantized values differ from code · absmax, rounded once")
            _check_close(value, expected, WORST_ERROR[self.setting.dtype], "dequantized weight")

        self._measure(row, calls, check)

    # ---- products ----

    def _products(self, shape: str, m: int, copies: list[_Copies]) -> None:
        setting = self.setting
        n, k = self.shapes[shape]
        wanted = [name for name in self.operations if name not in OF_THE_WEIGHT]
        wanted = [name for name in wanted if name not in BACKWARD or m >= self.training_rows]
        if not wanted or not copies:
            return
        generator = torch.Generator(setting.device).manual_seed(m)

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=generator, device=setting.device) * scale).to(setting.dtype)

        # Different random inputs in turn, as many as fit; few and large ones are not found in the cache either.
        count = max(2, min(8, INPUT_BYTES // max(1, m * (n + k) * setting.dtype.itemsize)))
        xs = [random(m, k) for _ in range(count)]
        dys = [random(m, n) for _ in range(count)]
        # Values of the dtype in float32, so that rounding the factors is no error.
        adapter = Adapter(
            random(setting.rank, k, scale=k**-0.5).float(), random(n, setting.rank, scale=0.02).float(), setting.scaling
        )
        truth = _Truth(xs[0], dys[0], adapter)
        for name in wanted:
            for mine in copies:
                if name not in mine.peer.operations:
                    continue
                calls = self._calls(name, mine, xs, dys, adapter)
                row = Row(name, shape, n, k, m, mine.peer.name, "graph")
                row.nbytes, row.flops = _work(name, m, n, k, setting, mine.nbytes)

                def check(name=name, mine=mine, call=calls[0], row=row) -> None:
                    row.error = _check_product(name, call(), truth, mine, setting)

                self._measure(row, calls, check)

    def _calls(self, name: str, mine: _Copies, xs: list, dys: list, adapter: Adapter) -> list[Callable]:
        peer = mine.peer

        def step(weight, x, dy):
            leaves = [t.detach().requires_grad_() for t in (x, adapter.A, adapter.B)]
            y = peer.lora(leaves[0], weight, Adapter(leaves[1], leaves[2], adapter.scaling))
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        forms = {
            "linear": lambda w, x, dy: peer.linear(x, w),
            "linear_dx": lambda w, x, dy: peer.linear_dx(dy, w),
            "lora": lambda w, x, dy: peer.lora(x, w, adapter),
            "lora_backward": step,
        }
        form = forms[name]
        return [lambda w=w, x=xs[i % len(xs)], dy=dys[i % len(dys)]: form(w, x, dy) for i, w in enumerate(mine.weights)]

    # ---- common ----

    def _peers_with(self, operation: str) -> list[Peer]:
        return [peer for peer in self.peers if operation in peer.operations]

    def _copies(self, shape: str, peer: Peer, weight: torch.Tensor) -> _Copies | None:
        """None, with a row that says why, for a peer that cannot take the weight."""
        try:
            first = peer.load(weight)
            count = copies_beyond_cache(peer.nbytes(first), self.ceilings.l2_bytes)
            return _Copies(peer, [first] + [peer.clone(first) for _ in range(count - 1)], peer.exact(first))
        except Exception as error:
            row = Row("load", shape, *weight.shape, None, peer.name, "eager", failure=_describe(error))
            self._finish(row)
            return None

    def _measure(self, row: Row, calls: list[Callable], check: Callable[[], None]) -> None:
        if time.monotonic() > self.deadline:
            self.not_measured += 1
            return
        try:
            with torch.set_grad_enabled(row.operation == "lora_backward"):
                check()
                timing = getattr(self.timer, row.timing)(calls)
                _check_finite(timing.result)
        except Exception as error:  # whatever a peer raises is its row's, and the others go on
            row.failure = _describe(error)
        else:
            row.us = timing.microseconds
            row.gbps = row.nbytes / row.us / 1e3
            row.tflops = row.flops / row.us / 1e6 if row.flops else None
            row.share = self.ceilings.microseconds(row.nbytes, row.flops) / row.us
        self._finish(row)

    def _finish(self, row: Row) -> None:
        self.table.append(row)
        self.report(row)


class _Truth:
    """Float64 results for one input, made when asked for and kept: the peers mostly share one weight."""

    def __init__(self, x: torch.Tensor, dy: torch.Tensor, adapter: Adapter):
        self.x, self.dy, self.adapter = x, dy, adapter
        self._kept: dict[tuple, tuple] = {}

    def __call__(self, name: str, exact: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        """The outputs of an operation in float64, and the relative errors of the dense operation in the dtype."""
        key = name, exact.data_ptr()
        if key not in self._kept:
            values = self._exact(name, exact)
            dense = self._dense(name, exact)
            self._kept = {key: (values, [relative_error(d, v) for d, v in zip(dense, values, strict=True)])}
        return self._kept[key]

    def _exact(self, name: str, exact: torch.Tensor) -> list[torch.Tensor]:
        weight = exact.double()
        x, dy = self.x.double(), self.dy.double()
        if name == "linear":
            return [x @ weight.T]
        if name == "linear_dx":
            return [dy @ weight]
        A, B, s = self.adapter.A.double(), self.adapter.B.double(), self.adapter.scaling
        xa = s * (x @ A.T)
        y = torch.addmm(x @ weight.T, xa, B.T)
        if name == "lora":
            return [y]
        dya = s * (dy @ B)
        return [y, torch.addmm(dy @ weight, dya, A), dya.T @ x, dy.T @ xa]

    def _dense(self, name: str, exact: torch.Tensor) -> list[torch.Tensor]:
        weight = exact.to(self.x.dtype)
        if name == "linear":
            return [self.x @ weight.T]
        if name == "linear_dx":
            return [self.dy @ weight]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (self.x, self.adapter.A, self.adapter.B)]
            y = dense_lora(leaves[0], weight, leaves[1], leaves[2], self.adapter.scaling)
        return [y.detach()] if name == "lora" else [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def _check_product(name: str, value, truth: _Truth, mine: _Copies, setting: Setting) -> float:
    """The error relative to the dense product's, the largest over the outputs."""
    values = value if isinstance(value, tuple) else (value,)
    expected, dense_errors = truth(name, mine.exact)
    worst = 0.0
    for what, got, right, dense in zip(("y", "dx", "dA", "dB"), values, expected, dense_errors, strict=False):
        what = "dx" if name == "linear_dx" else what
        if got.shape != right.shape:
            raise Wrong(f"{what} has shape {list(got.shape)}, expected {list(right.shape)}")
        error = relative_error(got, right)
        dense = max(dense, LEAST_ERROR[setting.dtype])
        if not error <= min(WORST_ERROR[setting.dtype], mine.peer.error_bound * dense):
            raise Wrong(f"{what} has relative error {error:.2e}, the dense product {dense:.2e}")
        worst = max(worst, error / dense)
    return worst


def _check_close(value: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> None:
    error = ((value.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= bound:
        raise Wrong(f"{what} has relative error {error:.2e}, expected at most {bound:.0e}")


def _check_quantized(quantized, weight: torch.Tensor, setting: Setting) -> None:
    """The bytes decode to about the nearest codes of the weight, which float64 finds."""
    packed, state = quantized
    error = relative_error(decode(packed, state), weight.double())
    flat = weight.double().reshape(-1)
    partial = -flat.numel() % setting.blocksize
    blocks = torch.nn.functional.pad(flat, (0, partial)).reshape(-1, setting.blocksize)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    ascending = state.code.double().sort().values
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    normal = blocks / absmax
    nearest = ascending[torch.bucketize(normal, thresholds, out_int32=True)]
    best = (((nearest - normal) * absmax).norm() / flat.norm()).item()
    if not error <= QUANTIZE_BOUND * best:
        raise Wrong(f"the quantized weight is {error:.4f} from the original, the nearest codes {best:.4f}")


def _check_finite(result) -> None:
    """What the timed calls left behind: a replay that wrote nothing or nonsense is no measurement."""
    for value in result if isinstance(result, tuple | list) else (result,):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise Wrong("the timed calls gave NaN or infinity")


def _share_exact(copies: list[_Copies]) -> None:
    """Peers that quantize to the same values share one exact weight, so that float64 products are made once."""
    for i, mine in enumerate(copies):
        for other in copies[:i]:
            if mine.exact is not other.exact and torch.equal(mine.exact, other.exact):
                mine.exact = other.exact
                break


def _work(name: str, m: int, n: int, k: int, setting: Setting, weight_bytes: int) -> tuple[int, int]:
    """The least bytes moved and the operations of a product: each operand once in each pass."""
    size, r = setting.dtype.itemsize, setting.rank
    activations = m * (n + k) * size
    product, low_rank = 2 * m * n * k, 2 * m * r * (n + k)
    factors = 4 * r * (n + k)
    if name in ("linear", "linear_dx"):
        return weight_bytes + activations, product
    if name == "lora":
        return weight_bytes + activations + factors, product + low_rank
    # Backward reads dy, x, the weight and the factors, writes dx and the factors' gradients; it has dx's product, and
    # of low rank those of dy·B, of dx, dA and dB.
    backward = weight_bytes + activations + m * k * size + 2 * factors
    return weight_bytes + activations + factors + backward, 2 * product + 3 * low_rank


def _add_ratios(table: list[Row]) -> None:
    times = {(*row.case, row.peer): row.us for row in table if row.us}
    for row in table:
        if row.us:
            bitsandbytes, cublas = (times.get((*row.case, peer)) for peer in ("bitsandbytes", "cublas"))
            row.vs_bitsandbytes = bitsandbytes / row.us if bitsandbytes else None
            row.vs_cublas = cublas / row.us if cublas else None


def _describe(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (
        (text[0] if text else "")[:300]
        if isinstance(error, Wrong)
        else f"{type(error).__name__}: {' '.join(text)[:300]}"
    )


def results(suite: Suite, source: dict, absent: dict[str, str]) -> dict:
    """What a results file holds: provenance, setting, ceilings, peers and rows."""
    setting = asdict(suite.setting)
    return {
        "format": 1,
        "kind": "kernels",
        "provenance": source,
        "setting": setting | {"dtype": str(suite.setting.dtype).removeprefix("torch.")},
        "ceilings": asdict(suite.ceilings),
        "peers": {peer.name: peer.version for peer in suite.peers},
        "absent": absent,
        "not_measured": suite.not_measured,
        "rows": [asdict(row) for row in suite.table],
    }
