"""``python -m benchmarks.loading``: the time in which a model loads, and the GPU memory that it takes meanwhile.

Three ways, each from files that the system has just read: reading every tensor of the checkpoint to the device, one
after the other; ``from_pretrained`` in 16 bits, which on a CPU only maps the files into memory; and ``from_pretrained``
with a PyQuantConfig, which quantizes while it loads.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pyquant import PyQuantConfig
from pyquant.bench.provenance import provenance
from pyquant.bench.shapes import MISTRAL_7B_CONFIG
from pyquant.training.memory import format_bytes

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 512}


def write_model(folder: Path, layers: int, small: bool, device: torch.device) -> None:
    """A bfloat16 checkpoint of Mistral-7B's shape, but for the number of layers, with random weights."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(num_hidden_layers=layers, dtype="bfloat16", **MISTRAL_7B_CONFIG | (SMALL if small else {}))
    with torch.device(device):
        model = MistralForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="2GB")


def read(folder: Path, device: torch.device) -> int:
    """Reads every tensor to the device and lets it go; their bytes."""
    from safetensors import safe_open

    nbytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.is_cpu:
                    tensor = tensor.clone()  # until then it is a map of the file
                nbytes += tensor.nbytes
    return nbytes


def load(folder: Path, device: torch.device, quantized: bool) -> torch.nn.Module:
    """The checkpoint as a model on the device."""
    from transformers import AutoModelForCausalLM

    config = PyQuantConfig(verbose=False) if quantized else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=config
    )


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict:
    """Median seconds of `call`, and on a GPU bytes: the most that torch had allocated meanwhile, and what the result
    holds. Called once more before."""
    call()
    seconds, peaks, held = [], [], []
    on_gpu = device.type == "cuda"
    for _ in range(repeats):
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if on_gpu:
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
            held.append(torch.cuda.memory_allocated(device) - before)
        del result
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": max(peaks, default=None),
        "held_bytes": max(held, default=None),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint in safetensors, instead of one that is written")
    parser.add_argument("--layers", type=int, default=8, help="of Mistral-7B's shape with random weights (default 8)")
    parser.add_argument("--small", action="store_true", help="narrow layers, which load on a CPU in a moment")
    parser.add_argument("--device", help="default: the current GPU, or the CPU without one")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts (default 3)")
    parser.add_argument("--output", metavar="FILE", help="the numbers with their provenance, as JSON")
    options = parser.parse_args(arguments)
    if options.model and not list(Path(options.model).glob("*.safetensors")):
        parser.error(f"{options.model} holds no .safetensors files")
    if options.layers < 1 or options.repeats < 1:
        parser.error("--layers and --repeats are at least 1")
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.model or temporary)
        if not options.model:
            write_model(folder, options.layers, options.small, device)
        nbytes = read(folder, device)
        calls = {
            "read": lambda: read(folder, device),
            "16-bit": lambda: load(folder, device, quantized=False),
            "4-bit": lambda: load(folder, device, quantized=True),
        }
        rows = {name: measure(call, device, options.repeats) for name, call in calls.items()}

    reading = rows["read"]["seconds"]
    print(f"{format_bytes(nbytes)} of weights, {device}")
    for name, row in rows.items():
        row["times_reading"] = row["seconds"] / reading
        line = f"{name:7} {row['seconds']:8.2f} s, {row['times_reading']:.2f} times reading"
        if row["peak_bytes"] is not None:
            line += f", peak {format_bytes(row['peak_bytes'])}, held {format_bytes(row['held_bytes'])}"
        print(line)
    if options.output:
        document = {"provenance": provenance(vars(options)), "bytes": nbytes, "rows": rows}
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
