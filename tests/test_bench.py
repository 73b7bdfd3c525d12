"""The benchmark suite's logic on tiny CPU tensors: what it checks, records, compares and plots. No time is asserted."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from pyquant.bench import kernels, peers, shapes
from pyquant.bench.cli import app
from pyquant.bench.compare import compare
from pyquant.bench.provenance import provenance
from pyquant.bench.timing import Ceilings, Timing, copies_beyond_cache

CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=800.0, l2_bytes=4096, dtype="bfloat16")


class OnceTimer:
    """Makes every call once, by the clock."""

    def graph(self, calls):
        start = time.perf_counter()
        result = None
        for call in calls[:3]:
            result = call()
        return Timing((time.perf_counter() - start) * 1e6, result)

    eager = graph


def make_suite(names=("pyquant", "bitsandbytes", "cublas"), **options):
    setting = peers.Setting(device="cpu", rank=4, dtype=options.pop("dtype", torch.bfloat16))
    found, _ = peers.find_peers(list(names), setting)
    options = {"shapes": {"q/o": (128, 192)}, "rows": (1, 64), "operations": kernels.OPERATIONS} | options
    options.setdefault("peers", found)
    return kernels.Suite(setting, timer=OnceTimer(), ceilings=CEILINGS, **options)


def document(suite):
    source = {
        "environment": {"torch": torch.__version__},
        "gpu": {"name": "Test GPU", "driver": "1.0"},
        "commit": "0123456",
        "arguments": {},
    }
    return json.loads(json.dumps(kernels.results(suite, source, {})))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_operation_of_every_peer_is_checked_and_timed(dtype):
    pytest.importorskip("bitsandbytes")
    suite = make_suite(dtype=dtype)
    table = suite.run()
    assert [row.failure for row in table if row.failure] == []
    measured = {(row.operation, row.m, row.peer, row.timing) for row in table}
    for peer in suite.peers:
        for operation in peer.operations:
            ms = [None] if operation in kernels.OF_THE_WEIGHT else [64] if operation in kernels.BACKWARD else [1, 64]
            timing = "eager" if operation in peer.eager_only else "graph"
            assert all((operation, m, peer.name, timing) in measured for m in ms)
    assert ("quantize", None, "pyquant", "eager") in measured
    assert ("quantize", None, "bitsandbytes", "graph") not in measured
    for row in table:
        assert row.us > 0
        assert row.gbps == pytest.approx(row.nbytes / row.us / 1e3)
        if row.m:
            assert row.error <= peers.PyQuant.error_bound or row.peer != "pyquant"
            assert row.tflops == pytest.approx(row.flops / row.us / 1e6)
        if row.peer == "pyquant" and (row.operation, row.timing) != ("quantize", "graph"):
            assert row.vs_bitsandbytes > 0
    linear = next(row for row in table if (row.operation, row.m, row.peer) == ("linear", 64, "cublas"))
    assert linear.nbytes == (128 * 192 + 64 * (128 + 192)) * dtype.itemsize
    assert linear.flops == 2 * 64 * 128 * 192


class WrongPeer(peers.PyQuant):
    def linear(self, x, weight):
        return super().linear(x, weight) * 1.01

    def dequantize(self, weight):
        return super().dequantize(weight) + 1e-3

    def quantize(self, dense):
        packed, state = super().quantize(dense)
        if getattr(self, "loaded", False):
            packed[0] ^= 0x77
            packed[1:100] ^= 0x11
        self.loaded = True
        return packed, state

    def lora(self, x, weight, adapter):
        return super().lora(x, weight, peers.Adapter(adapter.A, adapter.B, adapter.scaling * 1.5))

    def linear_dx(self, dy, weight):
        raise RuntimeError("no such kernel")


def test_a_wrong_result_is_a_failure_and_not_a_time():
    setting = peers.Setting(device="cpu", rank=4)
    wrong = WrongPeer(setting)
    wrong.loaded = True
    operations = [name for name in kernels.OPERATIONS if name != "quantize"]
    wrong.loaded = False
    suite = make_suite(peers=[wrong], operations=operations, rows=(64,))
    assert all(row.failure and row.us is None for row in suite.run())
    assert len(suite.table) == len(operations)
    assert any("no such kernel" in row.failure for row in suite.table)
    suite = make_suite(peers=[wrong], operations=["quantize"])
    assert all("nearest codes" in row.failure for row in suite.run())


def test_a_spent_budget_leaves_cases_out():
    suite = make_suite(names=["pyquant"], deadline=0.0)
    assert suite.run() == []
    assert suite.not_measured > 0


def test_bitsandbytes_lora_is_pefts_layer():
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit as PeftLayer

    weight = torch.randn(96, 64).bfloat16()
    base = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    base.to("cpu")
    layer = PeftLayer(base, "default", config=LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    layer.lora_B["default"].weight.data.normal_()
    adapter = peers.Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
    peer = peers.Bitsandbytes(peers.Setting(device="cpu"))
    x = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    assert torch.equal(peer.lora(x, peer.load(weight), adapter), expected)


def test_an_absent_peer_is_skipped_with_a_reason():
    _, absent = peers.find_peers(["pyquant", "humming"], peers.Setting(device="cpu"))
    assert "humming" in absent["humming"]
    with pytest.raises(ValueError, match="no peer 'marlin'"):
        peers.find_peers(["marlin"], peers.Setting(device="cpu"))


def test_copies_leave_the_cache():
    assert copies_beyond_cache(10, 100) == 40
    assert copies_beyond_cache(10**9, 100) == 2
    assert copies_beyond_cache(1, 10**9) == 128


def test_shapes_of_a_model(tmp_path):
    from transformers import MistralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    MistralConfig(vocab_size=96, num_hidden_layers=2, **sizes).save_pretrained(tmp_path)
    expected = {"q/o": (64, 64), "k/v": (32, 64), "gate/up": (160, 64), "down": (64, 160)}
    assert shapes.linear_shapes(str(tmp_path)) == expected
    assert list(shapes.linear_shapes()) == list(expected)


@pytest.fixture
def written(tmp_path):
    """Two equal results files."""
    content = document_of_a_run()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / "a.json", tmp_path / "b.json"


def document_of_a_run():
    suite = make_suite(names=["pyquant", "cublas"])
    suite.run()
    return document(suite)


def run_app(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def change(path, edit):
    content = json.loads(path.read_text())
    for row in content["rows"]:
        if row["peer"] == "pyquant" and row["operation"] == "linear":
            edit(row)
    path.write_text(json.dumps(content))


def test_compare_flags_what_became_slower(written):
    a, b = written
    assert run_app("compare", a, b).exit_code == 0
    change(b, lambda row: row.update(us=row["us"] * 1.2))
    assert run_app("compare", a, b).exit_code == 1
    assert run_app("compare", b, a).exit_code == 0
    assert run_app("compare", a, b, "--tolerance", "0.3").exit_code == 0
    change(b, lambda row: row.update(us=None, failure="wrong"))
    assert run_app("compare", a, b).exit_code == 1


def test_compare_refuses_what_is_not_comparable(written, tmp_path):
    a, b = written
    content = json.loads(b.read_text())
    content["setting"]["quant_type"] = "fp4"
    with pytest.raises(ValueError, match="differ in quant_type: nf4 and fp4"):
        compare(json.loads(a.read_text()), content)
    assert run_app("compare", a, tmp_path / "none.json").exit_code == 2
    b.write_text("{}")
    assert run_app("compare", a, b).exit_code == 2


def test_plots_are_made_from_the_file(written):
    pytest.importorskip("matplotlib")
    a, _ = written
    content = json.loads(a.read_text())
    for row in content["rows"]:
        row["vs_bitsandbytes"] = 2.0
    a.write_text(json.dumps(content))
    result = run_app("plot", a)
    assert result.exit_code == 0, result.output
    for name in ("speedup", "roofline"):
        assert a.with_name(f"a-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_options_are_checked(monkeypatch):
    for words in (["--operations", "convolve"], ["--rows", "0"], ["--shapes", "q/x"], ["--dtype", "int8"], ["--plots"]):
        assert run_app("kernels", *words).exit_code == 2


def test_without_a_gpu_the_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytest.importorskip("bitsandbytes")
    from pyquant.bench import cpu

    seen = []
    monkeypatch.setattr(cpu, "main", lambda argv: seen.append(argv) or 0)
    assert run_app("kernels", "--shapes", "64x128", "-m", "1,2", "--quick", "-o", "x.json").exit_code == 0
    (words,) = seen
    assert " ".join(words).endswith("--shape 64 128 --rows 1 2 --repeats 3 --output x.json")
    assert run_app("kernels", "--peers", "cublas").exit_code == 2


def test_the_recorded_command_names_no_folder_of_this_machine(monkeypatch):
    words = ["--output", "/somewhere/x/memory.json", "--output=/abs/y.json", "-o/abs/z.json", "model.path=/models/m/"]
    kept = ["--random-weights", "runs/memory.json", "--shapes=1x512,4x2048", "--rate", "1/2", "/"]
    monkeypatch.setattr("sys.argv", ["/opt/tools/memory.py", *words, *kept])
    found = "memory.py --output memory.json --output=y.json -oz.json model.path=m"
    assert provenance({})["command"] == " ".join([found, *kept])
