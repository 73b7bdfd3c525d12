"""show_config: what it prints with and without a GPU and a CUDA build."""

import os
import subprocess
import sys
import types

import peft
import pytest
import torch
import transformers

import pyquant
from pyquant import _C, environment


def printed(capsys) -> dict[str, str]:
    """The printed lines, by label."""
    pyquant.show_config()
    lines = capsys.readouterr().out.splitlines()
    return {label: text.strip() for label, _, text in (line.partition(":") for line in lines)}


def built_with_cuda(monkeypatch, archs="80 90a 90+PTX", devices=()):
    monkeypatch.setattr(
        environment,
        "_C",
        types.SimpleNamespace(
            version=_C.version,
            cpu_isa=_C.cpu_isa,
            cuda_version=lambda: "13.0",
            cuda_archs=lambda: archs,
            cuda_devices=lambda: devices,
        ),
    )


def test_versions_and_the_cpu_are_printed(capsys):
    lines = printed(capsys)
    assert lines["pyquant"] == pyquant.__version__
    assert lines["torch"] == torch.__version__
    assert lines["transformers"] == transformers.__version__
    assert lines["peft"] == peft.__version__
    assert lines["CPU kernels"] == f"{_C.cpu_isa()}, {torch.get_num_threads()} threads"
    assert "CUDA kernels" in lines


@pytest.mark.parametrize(
    "package", ["transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "deepspeed"]
)
def test_a_missing_library_is_named_with_its_purpose(capsys, monkeypatch, package):
    version = environment.importlib.metadata.version

    def version_without(name):
        if name == package:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version_without)
    assert printed(capsys)[package].startswith("not installed: pip install ")


def test_the_forced_instruction_set_is_the_one_printed(capsys, each_isa):
    for name in each_isa():
        assert printed(capsys)["CPU kernels"].startswith(f"{name}, ")


def test_a_build_without_cuda_says_how_to_get_it(capsys, monkeypatch):
    built_with_cuda(monkeypatch)
    monkeypatch.setattr(environment._C, "cuda_version", lambda: "")
    lines = printed(capsys)
    assert lines["CUDA kernels"].startswith("not built: no nvcc was found, or PYQUANT_CUDA=OFF. Install pyquant again")
    assert lines["CUDA kernels"].endswith("pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl")
    assert not any(label.startswith("GPU") for label in lines)


def test_no_gpu_is_explained(capsys, monkeypatch):
    built_with_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    lines = printed(capsys)
    assert lines["CUDA kernels"] == "built with CUDA 13.0 for 80 90a 90+PTX"
    assert "this torch was built without CUDA" in lines["GPU"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "is the NVIDIA driver installed" in printed(capsys)["GPU"]


@pytest.mark.parametrize(
    ("archs", "major", "minor", "supported"),
    [
        ("80 90a", 8, 0, True),
        ("80 90a", 8, 9, True),  # machine code runs on later minor versions
        ("86", 8, 0, False),  # and not on earlier ones
        ("80 90a", 9, 0, True),
        ("80 90a", 10, 0, False),
        ("90a", 9, 1, False),  # an "a" build on its own version alone
        ("80+PTX", 12, 0, True),
        ("90+PTX", 8, 0, False),
        ("80 90a 120f", 12, 0, True),
    ],
)
def test_every_gpu_is_listed_with_what_runs_on_it(capsys, monkeypatch, archs, major, minor, supported):
    device = types.SimpleNamespace(name="A GPU", major=major, minor=minor, memory_bytes=80 * 2**30)
    built_with_cuda(monkeypatch, archs, [device])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = printed(capsys)["GPU 0"]
    assert line.startswith(f"A GPU, sm_{major}{minor}, 80 GiB, ")
    if supported:
        assert line.endswith(", supported")
    else:
        assert f"not supported by this build ({archs}); set PYQUANT_CUDA_ARCHS={10 * major + minor}" in line


def test_an_unknown_instruction_set_is_refused():
    chosen = _C.cpu_isa()
    with pytest.raises(ValueError, match="sse9"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == chosen


@pytest.mark.gpu
def test_the_gpu_is_printed(capsys):
    line = printed(capsys)["GPU 0"]
    assert line.startswith(torch.cuda.get_device_name(0))
    assert line.endswith(", supported")


@pytest.mark.parametrize(("rows", "kernel"), [(1, "stream"), (16, "stream"), (17, "wgmma"), (4096, "wgmma")])
def test_explain_plan_names_the_kernel_and_its_tiles(rows, kernel):
    plan = pyquant.explain_plan(rows, 4096, 4096, rank=16, arch=90, sm_count=132)
    assert plan.startswith(f"linear_4bit m={rows} n=4096 k=4096 rank=16 blocksize=64 bfloat16 sm_90: {kernel} tile ")


def test_a_kernel_its_tile_and_its_split_can_be_forced(monkeypatch):
    for forced, described in (("wgmma:64", "wgmma tile 64x"), ("wgmma:128:3", "wgmma tile 128x128x64 split 3,")):
        monkeypatch.setenv("PYQUANT_KERNEL", forced)
        assert described in pyquant.explain_plan(100, 4096, 4096, arch=90, sm_count=132)
    # Three steps cannot be split in seven: the choice is the one without a demand.
    monkeypatch.delenv("PYQUANT_KERNEL")
    chosen = pyquant.explain_plan(100, 64, 192, arch=90, sm_count=132)
    monkeypatch.setenv("PYQUANT_KERNEL", "wgmma:128:7")
    assert pyquant.explain_plan(100, 64, 192, arch=90, sm_count=132) == chosen
    monkeypatch.setenv("PYQUANT_KERNEL", "wgmma:128:3")
    assert "wgmma tile 128x128x64 split 3," in pyquant.explain_plan(100, 64, 192, arch=90, sm_count=132)


def test_very_many_rows_take_a_dequantized_weight_where_its_memory_may_be_had():
    script = "import pyquant; print(pyquant.explain_plan(16384, 14336, 4096, direction='dx', arch=90, sm_count=132))"
    chosen = {}
    for value in ("1", "0"):
        environment = {**os.environ, "PYQUANT_DENSE": value}
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert not result.returncode, result.stderr
        chosen[value] = result.stdout
    assert ": dense tile 256x128x64 split 1," in chosen["1"]
    assert ": wgmma tile 256x128x64 split " in chosen["0"]
    for rows in (1, 64, 1000):
        for direction in ("forward", "dx"):
            assert "dense" not in pyquant.explain_plan(rows, 4096, 4096, direction=direction, arch=90, sm_count=132)
    for arch in (80, 100):
        assert "dense" not in pyquant.explain_plan(16384, 14336, 4096, arch=arch, sm_count=132)


def test_an_adapters_first_product_runs_beside_the_linear_where_that_leaves_room(monkeypatch):
    # 128 tiles, two pairs of multiprocessors to spare, and four blocks of 256 rows; without an adapter nothing of that.
    assert " split 1 beside 4 blocks" in pyquant.explain_plan(1024, 4096, 4096, rank=16, arch=90, sm_count=132)
    assert "beside" not in pyquant.explain_plan(1024, 4096, 4096, arch=90, sm_count=132)
    # Dropout of the input is another kernel's.
    plan = pyquant.explain_plan(1024, 4096, 4096, rank=16, dropout=True, arch=90, sm_count=132)
    assert " rank=16 dropout blocksize=64 " in plan
    assert "beside" not in plan
    # They would take as long as the linear that is to wait for them.
    assert "beside" not in pyquant.explain_plan(64, 1024, 4096, rank=16, arch=90, sm_count=132)
    # By force: with blocks of 64 rows or with none, and on a GPU with too few multiprocessors for so many not at all.
    monkeypatch.setenv("PYQUANT_KERNEL", "wgmma:256:1:64")
    assert " beside 16 blocks" in pyquant.explain_plan(1024, 4096, 4096, rank=16, arch=90, sm_count=132)
    assert "beside 16" not in pyquant.explain_plan(1024, 4096, 4096, rank=16, arch=90, sm_count=32)
    monkeypatch.setenv("PYQUANT_KERNEL", "wgmma:256:1:0")
    assert "beside" not in pyquant.explain_plan(1024, 4096, 4096, rank=16, arch=90, sm_count=132)


def test_explain_plan_before_hopper_and_for_odd_shapes():
    assert ": few_rows tile " in pyquant.explain_plan(4, 4096, 4096, arch=80, sm_count=108)
    assert ": few_rows tile " in pyquant.explain_plan(4, 4095, 4096, arch=90, sm_count=132)


def test_explain_plan_of_gradients_and_of_float32():
    plan = pyquant.explain_plan(8, 64, 96, torch.float32, direction="dx", arch=80, sm_count=108)
    assert "linear_4bit_dx m=8" in plan
    assert "float32 sm_80: simt tile" in plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "sideways"}, "direction must be 'forward' or 'dx', got 'sideways'"),
        ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, got 'int8'"),
        ({"rank": -1}, "m and rank must be >= 0, n and k >= 1"),
    ],
)
def test_explain_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pyquant.explain_plan(1, 64, 64, **arguments)
