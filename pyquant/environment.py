"""What was built, what the machine has, and what will be used."""

import importlib.metadata
import platform
from pathlib import Path

import torch

from pyquant import _C

__all__ = ["describe", "explain_plan", "show_config"]


_PACKAGES = {
    "transformers": "pip install transformers for its models",
    "peft": "pip install peft for adapters",
    "accelerate": "pip install 'pyquant[train]' for pyquant train",
    "datasets": "pip install 'pyquant[train]' for pyquant train",
    "trl": "pip install 'pyquant[train]' for pyquant train",
    "bitsandbytes": "pip install bitsandbytes for comparisons and its optimizers alone",
    "deepspeed": "pip install deepspeed for ZeRO-2 alone",
}


def show_config() -> None:
    """Prints the versions, the instruction set of the CPU kernels, the CUDA build, and each GPU with what runs on it.

    Where something is missing, the line says what it is and how to get it.
    """
    for name, text in describe().items():
        print(f"{name + ':':<14} {text}")


def describe() -> dict[str, str]:
    """What `show_config` prints: each line's name and text."""
    return dict(_lines())


def explain_plan(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    blocksize: int = 64,
    direction: str = "forward",
    arch: int | None = None,
    sm_count: int | None = None,
    dropout: bool = False,
) -> str:
    """Which kernel and tiles a 4-bit linear runs with on a GPU, and the cost model's estimate, in one line.

    ``PYQUANT_LOG=plan`` in the environment prints the same for every product that a program makes, once each. The
    kernel ``dense``, for thousands of rows on Hopper, multiplies by a weight that it has dequantized for the call, 2
    bytes a weight; ``PYQUANT_DENSE=0``, set before the first plan, does without it and its memory.

    Args:
        m: rows of the input (tokens).
        n: output features.
        k: input features.
        dtype: of the input.
        rank: of the LoRA adapter, 0 without one.
        blocksize: of the weight.
        direction: ``"forward"`` or ``"dx"``, the gradient of the input.
        arch: compute capability as in 90; by default that of the current GPU, or 90 without one.
        sm_count: multiprocessors, at least 1; by default those of the current GPU, or 132 without one.
        dropout: whether the adapter has any.

    Raises:
        ValueError: an argument has an unsupported value.
    """
    if arch is None or sm_count is None:
        devices = _C.cuda_devices()
        current = devices[torch.cuda.current_device()] if devices and torch.cuda.is_available() else None
        if arch is None:
            arch = 10 * current.major + current.minor if current else 90
        if sm_count is None:
            sm_count = current.multiprocessors if current else 132
    name = str(dtype).removeprefix("torch.")
    return _C.explain_plan(m, n, k, name, rank, dropout, blocksize, direction, arch, sm_count)


def _lines():
    yield "pyquant", _C.version()
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "CPU", _cpu_name()
    yield "torch", torch.__version__
    for package, purpose in _PACKAGES.items():
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, f"not installed: {purpose}"
    yield "CPU kernels", f"{_C.cpu_isa()}, {torch.get_num_threads()} threads"
    if not _C.cuda_version():
        yield (
            "CUDA kernels",
            "not built: no nvcc was found, or PYQUANT_CUDA=OFF. Install pyquant again with nvcc on PATH or CUDA_HOME "
            "set, or after: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl",
        )
        return
    yield "CUDA kernels", f"built with CUDA {_C.cuda_version()} for {_C.cuda_archs()}"
    if not torch.cuda.is_available():
        yield "GPU", _why_no_gpu()
        return
    for index, device in enumerate(_C.cuda_devices()):
        memory = f"{device.memory_bytes / 2**30:.0f} GiB"
        yield f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}, {_gpu_support(device)}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "not usable: this torch was built without CUDA. Install a CUDA build of torch"
    return "none found by torch; is the NVIDIA driver installed and CUDA_VISIBLE_DEVICES not empty?"


def _gpu_support(device) -> str:
    capability = 10 * device.major + device.minor
    for arch in _C.cuda_archs().split():
        name, _, ptx = arch.partition("+")
        number = int(name.rstrip("af"))
        same_family = number // 10 == device.major and number <= capability
        # Machine code runs on later minor versions; an "a" build on its own version alone; PTX on anything later.
        if number == capability or (same_family and name.isdigit()) or (ptx and number <= capability):
            return "supported"
    return f"not supported by this build ({_C.cuda_archs()}); set PYQUANT_CUDA_ARCHS={capability} and install again"
