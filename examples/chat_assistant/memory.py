"""Memory and speed of a training step, measured: full fine-tuning, LoRA and QLoRA, with and without checkpointing."""

import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console

from pyquant.bench.provenance import provenance
from pyquant.bench.shapes import MISTRAL_7B_CONFIG
from pyquant.cli import run
from pyquant.demo.assets import model_folder
from pyquant.demo.examples import Small, markdown_table
from pyquant.training import Config, ConfigError, parse_config
from pyquant.training.memory import peak_bytes, reset_peak

METHODS = ("full", "lora", "qlora")
MARK = "ROW "  # begins the lines by which a process hands its rows over
OUT_OF_MEMORY = "out of memory"


def main(
    small: Small = False,
    model: Annotated[Optional[str], typer.Option(help="Folder or hub name of a model.")] = None,  # noqa: UP045
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Only the model's shape, with random weights; alone, Mistral-7B's.")
    ] = False,
    methods: Annotated[str, typer.Option(help="Which to measure, separated by commas.")] = ",".join(METHODS),
    shapes: Annotated[Optional[str], typer.Option(help="Rows × tokens of a step, such as 1x512,4x2048.")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each, after one that is not.")] = 2,
    output: Annotated[Path, typer.Option("--output", "-o", help="The result as JSON.")] = Path("runs/memory.json"),
    worker: Annotated[Optional[str], typer.Option(hidden=True)] = None,  # noqa: UP045
) -> None:
    """Train a few steps of random tokens with every method, and write peak memory and tokens a second.

    On a GPU the peak is what torch allocated during the steps. On a CPU each row is a process of its own, and the peak
    its resident memory, interpreter and libraries included. What runs out of memory gets a row that says so.
    """
    if worker is not None:
        measure(**json.loads(worker))
        return
    if small:
        model, shapes = model or str(model_folder()), shapes or "4x256"
    if model is None and not random_weights:
        raise ConfigError("no model is named; give --model, --random-weights or --small.")
    shapes = shapes or "1x512,1x2048,4x2048"
    sizes = [parse_shape(shape) for shape in shapes.split(",")]
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"{name} is none of the methods {', '.join(METHODS)}; correct --methods.")
    console = Console()
    rows: list[dict[str, Any]] = []
    for method in names:
        cases = [[checkpointing, *size] for checkpointing in (False, True) for size in sizes]
        # Of a process's resident memory the system gives back what it likes, so that on a CPU every case has its own.
        for part in [cases] if torch.cuda.is_available() else [[case] for case in cases]:
            words = {"model": model, "random_weights": random_weights, "method": method, "cases": part, "steps": steps}
            rows += measure_apart(words, console)

    columns = ("method", "checkpointing", "rows", "tokens", "peak_gib", "planned_gib", "tokens_per_second", "note")
    table = [["yes" if row.get(key) is True else row.get(key) or "" for key in columns] for row in rows]
    titles = [key.replace("_gib", ", GiB").replace("_per_", "/").replace("_", " ") for key in columns]
    console.print(markdown_table(titles, table), soft_wrap=True, highlight=False)
    arguments = {"model": model, "random_weights": random_weights, "methods": names, "shapes": shapes, "steps": steps}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance(arguments) | {"rows": rows}, indent=2)
    output.write_text(text.replace(f'"{Path.home()}/', '"~/') + "\n", encoding="utf-8")
    console.print(f"Results: {output}", highlight=False, soft_wrap=True)


def parse_shape(text: str) -> list[int]:
    """Rows and tokens out of, for example, 4x2048."""
    parts = text.strip().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{text} is no shape; write rows x tokens, such as 4x2048.")
    return [int(part) for part in parts]


def measure_apart(words: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Run `measure` in a process of its own, and return its rows; those that it did not come to say why."""
    command = [sys.executable, __file__, "--worker", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    killed = done.returncode == -9  # how Linux ends what takes the machine's last memory
    reason = OUT_OF_MEMORY if killed or "OutOfMemoryError" in done.stderr else last_line(done.stderr)
    for checkpointing, batch, tokens in words["cases"][len(rows) :]:
        row = {"method": words["method"], "checkpointing": checkpointing, "rows": batch, "tokens": tokens}
        rows.append(row | {"note": reason})
    for row in rows:
        what = f"{row['method']}{', checkpointing' if row['checkpointing'] else ''}, {row['rows']} × {row['tokens']}"
        result = row.get("note") or f"{row['peak_gib']:.2f} GiB, {row['tokens_per_second']:,.0f} tokens/s"
        console.print(f"{what}: {result}", highlight=False, soft_wrap=True)
    return rows


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "the process ended early")


def measure(model: str | None, random_weights: bool, method: str, cases: list[list[int]], steps: int) -> None:
    """Load the model once, and print a row for each case: checkpointing, rows and tokens of a step.

    Random tokens need no tokenizer; every token is a target.
    """
    from pyquant.training.methods import choose_trainable
    from pyquant.training.models import choose_device

    device = choose_device()
    config = parse_config(
        {
            "model": {"path": model or "mistral-7b"},
            "quantization": {"method": "nf4" if method == "qlora" else "none"},
            "training": {"method": method, "tensorboard": False, "learning_rate": 1e-5, "log_every": 1000},
        }
    )
    dense = load(config, random_weights, device)
    dtype, model_config = dense.dtype, dense.config
    trained = choose_trainable(dense, config, method)
    trained.train()
    for checkpointing, batch, tokens in cases:
        config.training.gradient_checkpointing = bool(checkpointing)
        row: dict[str, Any] = {"method": method, "checkpointing": bool(checkpointing), "rows": batch, "tokens": tokens}
        row["planned_gib"] = planned(config, model_config, batch, tokens, device) / 2**30
        try:
            row |= measure_case(config, trained, dtype, batch, tokens, steps)
        except torch.OutOfMemoryError:
            row["note"] = OUT_OF_MEMORY
        # Out here, where the exception no longer holds the tensors of the step.
        trained.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # so that the next case does not run out for the holes that this one left
        print(MARK + json.dumps(row), flush=True)


def load(config: Config, random_weights: bool, device: torch.device):
    """The base model: the driver's own way of loading, or random weights of its shape."""
    from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

    from pyquant.training.models import choose_dtype, load_quantized, quantize

    if not random_weights:
        return load_quantized(config.model, config.quantization, device)
    named = config.model.path != "mistral-7b"
    shape = AutoConfig.from_pretrained(config.model.path) if named else MistralConfig(**MISTRAL_7B_CONFIG)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=choose_dtype(config.model.precision, device))
    return quantize(model, config.quantization)


def measure_case(
    config: Config, model: torch.nn.Module, dtype: torch.dtype, batch: int, tokens: int, steps: int
) -> dict[str, Any]:
    """Peak memory and speed of the driver's own steps, optimizer included; the first one is not timed."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from pyquant.training.train import build_trainer

    device = model.device

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if state.global_step == 1:
                self.start = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds = (time.perf_counter() - self.start) / (state.global_step - 1)

    ids = torch.randint(3, model.config.vocab_size, (batch * (steps + 1), tokens)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        config.training.output_dir, config.training.max_steps, config.training.save_every = folder, steps + 1, 1000
        config.data.max_length = tokens
        trainer = build_trainer(
            config, model, tokenizer(), data, None, Console(quiet=True), dtype=dtype, batch_size=batch
        )
        trainer.args.save_strategy = "no"
        clock = Clock()
        trainer.add_callback(clock)
        reset_peak(device)
        try:
            trainer.train()
            peak = peak_bytes(device)
        finally:
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            # accelerate takes autocast off the model but leaves its mark of a prepared one, for which the next case's
            # trainer would not put it on again: PEFT's layers would save float32 inputs, and full multiply in float32.
            vars(model).pop("_is_accelerate_prepared", None)
            model.gradient_checkpointing_disable()
            trainer.optimizer = None
    speed = {"seconds_per_step": clock.seconds, "tokens_per_second": batch * tokens / clock.seconds}
    if peak is None:
        return speed | {"note": "this system does not tell the memory of a process"}
    return speed | {"peak_gib": peak / 2**30}


def planned(config: Config, model_config, batch: int, tokens: int, device: torch.device) -> int:
    """Bytes that `pyquant train` would plan for the step."""
    from pyquant.training.plan import make_plan
    from pyquant.training.prepare import LengthReport

    counts = {"rows": batch, "tokens": batch * tokens, "targets": batch * tokens, "longest_kept": tokens}
    method = config.training.method
    return make_plan(
        config,
        method,
        model_config,
        tokenizer(),
        [],
        LengthReport(**counts),
        rows=batch,
        batch_size=batch,
        gradient_accumulation=1,
        device=device,
    ).memory


def tokenizer():
    """What the trainer pads with; random tokens need no vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    run(main)
