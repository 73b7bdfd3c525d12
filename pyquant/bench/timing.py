"""How long a GPU takes: CUDA-graph replays, single eager calls, and the ceilings that times are compared with."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Call", "Ceilings", "CudaTimer", "Timer", "Timing", "copies_beyond_cache", "measure_ceilings"]

Call = Callable[[], object]

# Copies of a weight that together exceed the L2 cache by this factor: a call then finds none of its weight there.
CACHE_FACTOR = 4
# More copies than this of a small weight would take longer to make than to measure.
MOST_COPIES = 128
COPY_BYTES = 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Timing:
    """Median microseconds a call, and what the last timed call returned."""

    microseconds: float
    result: object


class Timer(Protocol):
    """What the suite asks for times; a test hands in one that needs no GPU."""

    def graph(self, calls: Sequence[Call]) -> Timing:
        """The time of one of `calls`, which do the same to different data, without the host's share."""

    def eager(self, calls: Sequence[Call]) -> Timing:
        """The time of one of `calls`, made alone, with its launches."""


@dataclass(frozen=True)
class CudaTimer:
    """Times on the current GPU.

    Attributes:
        budget: seconds of replays for one measurement, approximately.
        graph_seconds: duration of a graph aimed at. Short kernels are repeated until they last as long, because the gap
            between two replays is a few microseconds.
        most_calls: in one graph.
    """

    budget: float = 0.12
    graph_seconds: float = 0.002
    most_calls: int = 400
    eager_repeats: int = 15

    def graph(self, calls: Sequence[Call]) -> Timing:
        """Median over replays of one CUDA graph of many calls, which go round `calls`.

        Replays are launched ahead of the GPU with an event after each, so that the host's time does not show.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Lazy initialisation and compilation must not meet the capture.
            for call in (calls[0], calls[-1], calls[0]):
                call()
            estimate = self._eager_seconds(calls, stream)
        count = min(len(calls), max(2, int(self.budget / 4 / estimate)))
        rounds = max(1, math.ceil(min(self.graph_seconds / (estimate * count), self.most_calls / count)))
        sequence = list(calls[:count]) * rounds
        graph = torch.cuda.CUDAGraph()
        result = None
        with torch.cuda.graph(graph, stream=stream):
            for call in sequence:
                result = None  # frees the last output, whose memory the next call takes
                result = call()
        replays = min(25, max(5, int(self.budget / (estimate * len(sequence)))))
        with torch.cuda.stream(stream):
            graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            events[0].record(stream)
            for event in events[1:]:
                graph.replay()
                event.record(stream)
            stream.synchronize()
        times = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
        if isinstance(result, tuple | list):
            kept = [value.clone() if isinstance(value, torch.Tensor) else value for value in result]
        else:
            kept = result.clone() if isinstance(result, torch.Tensor) else result
        torch.cuda.synchronize()
        result = None
        graph.reset()
        return Timing(statistics.median(times) * 1e3 / len(sequence), kept)

    def eager(self, calls: Sequence[Call]) -> Timing:
        """Median over single calls between two events on an idle GPU."""
        for call in calls[:3]:
            call()
        times, result = [], None
        for repeat in range(self.eager_repeats):
            call = calls[repeat % len(calls)]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return Timing(statistics.median(times) * 1e3, result)

    def _eager_seconds(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> float:
        """Seconds a call, launches included: an upper bound of the kernels' time."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        some = calls[:8]
        start.record(stream)
        for call in some:
            call()
        end.record(stream)
        stream.synchronize()
        return max(start.elapsed_time(end) / 1e3 / len(some), 1e-6)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best, measured.

    Attributes:
        copy_gbps: 10⁹ bytes a second, read and written, of a device-to-device copy of 1 GiB.
        matmul_tflops: 10¹² operations a second of a dense 8192³ product in `dtype`.
        l2_bytes: size of the L2 cache.
    """

    copy_gbps: float
    matmul_tflops: float
    l2_bytes: int
    dtype: str

    def microseconds(self, nbytes: int, flops: int) -> float:
        """The least time for that much traffic and arithmetic."""
        return max(nbytes / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)


def measure_ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Copies 1 GiB and multiplies two random 8192 × 8192 matrices on the current GPU."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    # A copy in a graph is a memcpy node, which an H200 ran at two thirds of the rate of a kernel that reads and writes.
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    copy = min(timer.graph([way] * 2).microseconds for way in ways)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype) for _ in range(2))
    product = timer.graph([lambda: a @ b.T] * 2).microseconds
    return Ceilings(
        copy_gbps=2 * COPY_BYTES / copy / 1e3,
        matmul_tflops=2 * MATMUL_SIZE**3 / product / 1e6,
        l2_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        dtype=str(dtype).removeprefix("torch."),
    )


def copies_beyond_cache(nbytes: int, l2_bytes: int) -> int:
    """How many copies of `nbytes` it takes to leave the L2 cache: at least 2, at most 128."""
    return max(2, min(MOST_COPIES, math.ceil(CACHE_FACTOR * l2_bytes / nbytes)))
