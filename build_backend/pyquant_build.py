"""The build backend: scikit-build-core's, with torch asked for only where it is missing.

The library is built against torch's stable ABI, so any torch's headers do. Those of the environment being installed
into are there already, even when pip builds in isolation; only an environment without torch needs one fetched for the
build.
"""

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


def _torch_if_missing() -> list[str]:
    paths = sysconfig.get_paths()
    found = any(
        (Path(paths[key]) / "torch/include/torch/csrc/stable/library.h").is_file() for key in ("purelib", "platlib")
    )
    return [] if found else [TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requires_for_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return _requires_for_editable(config_settings) + _torch_if_missing()
