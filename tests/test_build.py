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
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    assert backend.get_requires_for_build_editable() == ["ninja", "torch>=2.10"]

    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    assert backend.get_requires_for_build_editable() == ["ninja"]
