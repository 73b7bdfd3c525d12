"""The build backend: scikit-build-core's, with what a build needs of torch and CUDA asked for only where it is missing.

The library is built against torch's stable ABI, so any torch's headers do. Those of the environment being installed
into are there already, even when pip builds in isolation; only an environment without torch needs one fetched for the
build. In the same way nvcc comes from NVIDIA's wheels where there is a GPU's driver that runs what it builds, but no
CUDA toolkit.
"""

import ctypes
import os
import re
import shutil
import sysconfig
from pathlib import Path

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import (
    get_requires_for_build_editable as _requires_for_editable,
)
from scikit_build_core.build import (
    get_requires_for_build_wheel as _requires_for_wheel,
)

TORCH = "torch>=2.10"
# The first whose wheels have nvcc itself.
CUDA_MAJOR = 13
NVCC = [f"nvidia-cuda-{part}>={CUDA_MAJOR},<{CUDA_MAJOR + 1}" for part in ("nvcc", "runtime", "cccl")]


def _site_packages() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[key]) for key in ("purelib", "platlib")]


def _torch_if_missing() -> list[str]:
    found = any((folder / "torch/include/torch/csrc/stable/library.h").is_file() for folder in _site_packages())
    return [] if found else [TORCH]


def _nvcc_if_missing() -> list[str]:
    wanted = os.environ.get("PYQUANT_CUDA", "AUTO")
    if wanted in ("OFF", "0") or _has_nvcc():
        return []
    if wanted == "AUTO" and (_driver_cuda_version() < 1000 * CUDA_MAJOR or _torch_is_for_cpus()):
        return []
    return NVCC


def _has_nvcc() -> bool:
    """Where CMakeLists.txt looks for one."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = [folder / "nvidia" / name for folder in _site_packages() for name in ("cu13", "cuda_nvcc")]
    folders = [home / "bin" for home in [*homes, *wheels, Path("/usr/local/cuda")]]
    return shutil.which("nvcc") is not None or any((folder / "nvcc").is_file() for folder in folders)


def _driver_cuda_version() -> int:
    """The newest CUDA that the GPU's driver runs, as in 13000; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _torch_is_for_cpus() -> bool:
    """Whether the torch that is there has no CUDA: its tensors would never reach the kernels."""
    for folder in _site_packages():
        file = folder / "torch/version.py"
        if file.is_file():
            return re.search(r"^cuda\b.*=\s*None\s*$", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
    return False


def get_requires_for_build_wheel(config_settings=None):
    return _requires_for_wheel(config_settings) + _torch_if_missing() + _nvcc_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return _requires_for_editable(config_settings) + _torch_if_missing() + _nvcc_if_missing()
