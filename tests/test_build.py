"""What the package's build asks for, from the environment that it installs into."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

BACKEND = Path(__file__).parents[1] / "build_backend/pyquant_build.py"


@pytest.fixture
def backend(monkeypatch):
    """The build backend, over a stand-in for scikit-build-core that asks for ninja."""
    build = types.ModuleType("scikit_build_core.build")
    build.get_requires_for_build_wheel = lambda config_settings=None: ["ninja"]
    build.get_requires_for_build_editable = lambda config_settings=None: ["ninja"]
    monkeypatch.setitem(sys.modules, "scikit_build_core", types.ModuleType("scikit_build_core"))
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", build)
    spec = importlib.util.spec_from_file_location("pyquant_build", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_site_packages(monkeypatch, backend, folder):
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: {"purelib": str(folder), "platlib": str(folder)})


def test_torch_is_a_build_requirement_only_where_there_is_none(backend, monkeypatch, tmp_path):
    use_site_packages(monkeypatch, backend, tmp_path)
    monkeypatch.setenv("PYQUANT_CUDA", "OFF")
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    assert backend.get_requires_for_build_editable() == ["ninja", "torch>=2.10"]

    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    assert backend.get_requires_for_build_editable() == ["ninja"]


@pytest.fixture
def machine(backend, monkeypatch, tmp_path):
    """One with a driver for CUDA 13.0, a torch for it, and no toolkit."""
    use_site_packages(monkeypatch, backend, tmp_path)
    for name, content in (("include/torch/csrc/stable/library.h", ""), ("version.py", "cuda: Optional[str] = '13.0'")):
        file = tmp_path / "torch" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    for name in ("CUDA_HOME", "CUDA_PATH", "PYQUANT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(backend, "_driver_cuda_version", lambda: 13000)
    is_file = backend.Path.is_file  # a toolkit where the tests run is not the machine's
    monkeypatch.setattr(backend.Path, "is_file", lambda self: "/usr/local/cuda" not in str(self) and is_file(self))
    return tmp_path


def test_nvcc_is_a_build_requirement_where_a_driver_has_no_toolkit(backend, machine):
    wheels = [f"nvidia-cuda-{part}>=13,<14" for part in ("nvcc", "runtime", "cccl")]
    assert backend.get_requires_for_build_wheel() == ["ninja", *wheels]
    assert backend.get_requires_for_build_editable() == ["ninja", *wheels]


@pytest.mark.parametrize(
    "why", ["OFF", "no driver", "an older driver", "a torch for CPUs", "PATH", "CUDA_HOME", "wheels"]
)
def test_nvcc_is_no_build_requirement_otherwise(backend, machine, monkeypatch, why):
    if why == "OFF":
        monkeypatch.setenv("PYQUANT_CUDA", "OFF")
    elif why == "no driver":
        monkeypatch.setattr(backend, "_driver_cuda_version", lambda: 0)
    elif why == "an older driver":
        monkeypatch.setattr(backend, "_driver_cuda_version", lambda: 12080)
    elif why == "a torch for CPUs":
        (machine / "torch/version.py").write_text("debug = False\ncuda: Optional[str] = None\nhip = None\n")
    elif why == "PATH":
        monkeypatch.setattr(backend.shutil, "which", lambda name: "/opt/bin/nvcc")
    else:
        home = machine / ("nvidia/cu13" if why == "wheels" else "toolkit")
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").touch()
        if why == "CUDA_HOME":
            monkeypatch.setenv("CUDA_HOME", str(home))
    assert backend.get_requires_for_build_wheel() == ["ninja"]


def test_cuda_can_be_asked_for_without_a_driver(backend, machine, monkeypatch):
    monkeypatch.setattr(backend, "_driver_cuda_version", lambda: 0)
    monkeypatch.setenv("PYQUANT_CUDA", "ON")
    assert "nvidia-cuda-nvcc>=13,<14" in backend.get_requires_for_build_wheel()


def test_a_machine_without_a_driver_says_so(backend, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert backend._driver_cuda_version() == 0
