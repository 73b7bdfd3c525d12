"""The command line."""

import contextlib
import enum
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bench.cli import app as bench_app
from .training.config import describe_keys
from .training.errors import ConfigError, UserError

__all__ = ["app", "main", "run"]

app = typer.Typer(
    help="Fast, trustworthy QLoRA: fine-tune, evaluate and run Mistral models on 4-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class QuantType(str, enum.Enum):
    """How a base model is loaded."""

    auto = "auto"
    nf4 = "nf4"
    fp4 = "fp4"
    none = "none"


class FourBit(str, enum.Enum):
    """A 4-bit type."""

    nf4 = "nf4"
    fp4 = "fp4"


class Precision(str, enum.Enum):
    """A floating-point type."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Format(str, enum.Enum):
    """Whose 4-bit layers a checkpoint is for."""

    bitsandbytes = "bitsandbytes"
    pyquant = "pyquant"


class Base(str, enum.Enum):
    """What an adapter is merged into."""

    sixteen = "16bit"
    four = "4bit"


class Template(str, enum.Enum):
    """Whether prompts go into the chat template."""

    auto = "auto"
    always = "always"
    never = "never"


Model = Annotated[str, typer.Argument(help="Folder or hub name of the model.", show_default=False)]
Adapter = Annotated[Optional[str], typer.Option("--adapter", "-a", help="Folder of a LoRA adapter.")]  # noqa: UP045
Quant = Annotated[
    QuantType,
    typer.Option(
        "--quant-type", "-q", help="Load in 4 bits (nf4, fp4) or 16 (none); auto: as the adapter was trained."
    ),
]
Dtype = Annotated[Precision, typer.Option("--precision", help="Dtype of weights and arithmetic.")]
Chat = Annotated[Template, typer.Option("--chat-template", help="Put prompts into the tokenizer's chat template.")]

_TRAIN_HELP = (
    "Fine-tune a model as a YAML file says.\n\n"
    "Values on the command line, written section.key=value, replace the file's. First a plan is printed: parameters, "
    "memory by part, tokens and expected time; --dry-run stops there. The output folder receives the "
    "adapter, metrics.json, loss.png, a model card, TensorBoard logs and checkpoints; started again after a kill, the "
    "run goes on from its last checkpoint. With --config, accelerate starts the processes that its file asks for; "
    "batch_size is that of each.\n\n"
    "[bold]Configuration keys, with their defaults[/bold]\n\n\b\n" + escape(describe_keys())
)


@app.command(help=_TRAIN_HELP)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.max_steps=100.", show_default=False),
    ] = None,
    engine: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", "-c", help="accelerate's configuration of a run on several GPUs or machines."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")] = False,
) -> None:
    from .training.config import load_config

    settings = load_config(config, overrides or [])
    if engine is not None:
        from .training.launch import launch

        words = ["train", str(config), *(overrides or []), *(["--dry-run"] if dry_run else [])]
        sys.exit(launch(engine, words))
    from .training.launch import is_main_process, leave
    from .training.train import plan_run
    from .training.train import train as run

    if dry_run:
        plan_run(settings, _console)
        return
    result = run(settings, _console)
    leave()
    if not is_main_process():
        return
    hidden = ("log", "data", "before", "after")
    _print_table({key: value for key, value in result.metrics.items() if key not in hidden})
    _print_table(_before_and_after(result.metrics))
    _console.print(f"{result.folder.name.capitalize()}: {result.folder}", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet file, or hub dataset.", show_default=False)],
    adapter: Adapter = None,
    quant_type: Quant = QuantType.auto,
    precision: Dtype = Precision.auto,
    classify: Annotated[
        bool, typer.Option("--classify", help="Also rank the labels; by default, those that the file holds.")
    ] = False,
    labels: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--labels", help="The labels to rank, separated by commas; implies --classify."),
    ] = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", help="Template of the prompt with {column} fields."),
    ] = None,
    completion: Annotated[Optional[str], typer.Option("--completion", help="Column of the completion.")] = None,  # noqa: UP045
    text: Annotated[Optional[str], typer.Option("--text", help="Column of plain text.")] = None,  # noqa: UP045
    chat_template: Chat = Template.auto,
    limit: Annotated[Optional[int], typer.Option("--limit", min=1, help="Only the first rows.")] = None,  # noqa: UP045
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens a row is cut to.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Rows in a forward pass.")] = 8,
    generate: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--generate", min=1, help="Answer this many prompts and compare with the completions."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest of these answers.")
    ] = 64,
    confusion: Annotated[Optional[Path], typer.Option("--confusion", help="Also draw the confusion matrix.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,  # noqa: UP045
) -> None:
    """Perplexity and token accuracy of a model on a data file; with --classify accuracy, macro F1 and confusion matrix.

    Both are those of the completions after their prompts, of the assistant's messages, or of the whole text when the
    file has no prompts. A label's score is its mean log-probability per token. With --generate, BLEU and ROUGE-L of
    answers.
    """
    from .generation import load_for_inference
    from .training.config import parse_config
    from .training.measure import Measurements
    from .training.models import adapter_record, adapter_tokenizer, check_adapter, check_model
    from .training.prepare import prepare_evaluation

    end = (adapter_record(adapter) or {}).get("end_token") if adapter else None
    columns = {"prompt": prompt, "completion": completion, "text": text, "end_token": end, "max_length": max_length}
    names = [name.strip() for name in labels.split(",") if name.strip()] if labels else None
    config = parse_config(
        {
            "data": columns | {"eval": data, "chat_template": chat_template.value, "special_tokens": []},
            "training": {"eval_batch_size": batch_size},
            "evaluation": {
                "classify": classify or names is not None,
                "labels": names,
                "generate": generate,
                "max_new_tokens": max_new_tokens,
            },
        }
    )
    check_model(model)
    if adapter is not None:
        check_adapter(adapter)
    tokenizer = adapter_tokenizer(model, adapter)
    prepared = prepare_evaluation(config, tokenizer, limit)
    measurements = Measurements(config, prepared, tokenizer)
    loaded, _ = load_for_inference(model, adapter, quant_type.value, precision.value)
    result: dict[str, object] = {"model": model, "adapter": adapter, "rows": len(prepared.eval)}
    result |= measurements.run(loaded)
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if confusion is not None and "confusion_matrix" in result:
        from .training.plots import plot_confusion

        plot_confusion(result["confusion_matrix"], result["labels"], confusion)
    _print_table({key: value for key, value in result.items() if key != "confusion_matrix"})


@app.command()
def generate(
    model: Model,
    prompt: Annotated[Optional[str], typer.Argument(help="The prompt; read from standard input when left out.")] = None,  # noqa: UP045
    adapter: Adapter = None,
    quant_type: Quant = QuantType.auto,
    precision: Dtype = Precision.auto,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
    chat_template: Chat = Template.auto,
) -> None:
    """Continue a prompt, with or without an adapter, in 16 or 4 bits; the answer alone goes to standard output."""
    from .generation import generate_text, load_for_inference

    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give it as an argument or on standard input.")
    loaded, tokenizer = load_for_inference(model, adapter, quant_type.value, precision.value)
    from transformers import set_seed

    set_seed(seed)
    typer.echo(generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, chat_template.value))


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    quant_type: Quant = QuantType.auto,
    precision: Dtype = Precision.auto,
    system: Annotated[Optional[str], typer.Option("--system", "-s", help="What the model is told first.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
) -> None:
    """Talk with a model, with or without an adapter, in 16 or 4 bits.

    A line is a message. /reset begins anew, /exit or the end of the input leaves; Ctrl-C stops an answer, which is then
    forgotten. The tokenizer needs a chat template.
    """
    from .generation import Conversation, load_for_inference

    loaded, tokenizer = load_for_inference(model, adapter, quant_type.value, precision.value)
    from transformers import set_seed

    set_seed(seed)
    conversation = Conversation(loaded, tokenizer, system, max_new_tokens, temperature, top_p)
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            typer.echo("> ", nl=False)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        message = line.strip()
        if not line or message == "/exit":
            break
        if message == "/reset":
            conversation.reset()
        elif message.startswith("/"):
            typer.echo(f"{message.split()[0]} is no command; there are /reset and /exit.", err=True)
        elif message:
            with contextlib.suppress(KeyboardInterrupt):
                conversation.reply(message, lambda text: (sys.stdout.write(text), sys.stdout.flush()))
            typer.echo()


@app.command()
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Folder of the LoRA adapter.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.", show_default=False)],
    base: Annotated[
        Base,
        typer.Option(
            help="Merge into the original weights, or into the dequantized 4-bit ones that it was trained on."
        ),
    ] = Base.sixteen,
    quant_type: Annotated[
        Optional[FourBit],  # noqa: UP045
        typer.Option(
            "--quant-type", "-q", help="4-bit type for --base 4bit; by default what the adapter was trained on."
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Dtype of the saved weights.")] = Precision.auto,
) -> None:
    """Merge an adapter into its base and save the result as a 16-bit model, saying which base that was."""
    from .training.merge import merge as run

    sentence = run(model, adapter, output, base.value, quant_type.value if quant_type else None, precision.value)
    _console.print(sentence, highlight=False, soft_wrap=True)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(help="New folder for the 4-bit model.", show_default=False)],
    quant_type: Annotated[FourBit, typer.Option("--quant-type", "-q", help="4-bit type.")] = FourBit.nf4,
    blocksize: Annotated[int, typer.Option(help="Values that share one absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax values too.")] = True,
    skip: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--skip", help="Name pattern of layers to leave dense; may be repeated. [default: lm_head]"),
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Dtype of what stays dense; auto: as it is stored.")
    ] = Precision.auto,
    format: Annotated[
        Format, typer.Option("--format", help="Who from_pretrained loads it with; pyquant reads both.")
    ] = Format.bitsandbytes,
    max_shard: Annotated[float, typer.Option("--max-shard-gb", min=0.001, help="Largest file, in GB.")] = 2.0,
) -> None:
    """Quantize a model to a 4-bit checkpoint, tensor by tensor: it needs memory for one and for one file of the result.

    Says what was left dense, and why.
    """
    from .training.config import parse_config
    from .training.quantize import quantize as run

    section = {"method": quant_type.value, "blocksize": blocksize, "double_quant": double_quant}
    section |= {"skip": skip} if skip else {}
    before, after, report = run(
        model,
        output,
        parse_config({"quantization": section}).quantization,
        precision.value,
        format.value,
        int(max_shard * 1e9),
    )
    for line in report.left_dense():
        _console.print(escape(line), highlight=False, soft_wrap=True)
    _console.print(
        f"Saved {output}: {len(report.quantized)} layers in 4 bits, {before:,} bytes of weights became {after:,}.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def info(
    model: Annotated[Optional[str], typer.Argument(help="Folder or hub name of a model.", show_default=False)] = None,  # noqa: UP045
) -> None:
    """What was built and what the machine has; with a model, its parameters and its memory in 16 and 4 bits."""
    if model is None:
        import pyquant

        pyquant.show_config()
        return
    from .training.config import QuantizationConfig
    from .training.memory import estimate_bytes, format_bytes
    from .training.models import check_model

    config = check_model(model)
    plain = estimate_bytes(config, QuantizationConfig(double_quant=False))
    nested = estimate_bytes(config, QuantizationConfig())
    _print_table(
        {
            "model": f"{model} ({', '.join(config.architectures or [config.model_type])})",
            "parameters": f"{nested['parameters']:,}",
            "of them in 4-bit layers": f"{nested['linear_parameters']:,}",
            "16-bit weights": f"{nested['bytes_16bit']:,} B ({format_bytes(nested['bytes_16bit'])})",
            "4-bit weights": f"{plain['bytes_4bit']:,} B ({format_bytes(plain['bytes_4bit'])})",
            "4-bit, double quantization": f"{nested['bytes_4bit']:,} B ({format_bytes(nested['bytes_4bit'])})",
        }
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("runs/demo"),
    assets: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            envvar="PYQUANT_ASSETS",
            help="Folder with the model's and the data's packages, for machines that cannot fetch them.",
        ),
    ] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, help="Training steps instead of the usual.")] = None,  # noqa: UP045
    rows: Annotated[Optional[int], typer.Option(min=1, help="Held-out rows instead of 200.")] = None,  # noqa: UP045
    small: Annotated[bool, typer.Option("--small", help="A few steps and rows: shows that all works.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only fetch and convert the model and the data.")] = False,
) -> None:
    """The main job on a small real model: quantize to NF4, fine-tune on sentiment, compare before and after.

    Fetches a 135M model and its data once, checks them by hash, and keeps them in $PYQUANT_CACHE or ~/.cache/pyquant.
    """
    from .demo.run import Sizes
    from .demo.run import demo as run
    from .demo.run import prepare as fetch

    if assets is not None and not assets.is_dir():
        raise ConfigError(f"the assets folder {assets} does not exist; give a folder with the packages.")
    sizes = Sizes.small() if small else Sizes()
    sizes.steps = steps or sizes.steps
    sizes.held_out = rows or sizes.held_out
    if prepare:
        config = fetch(output, sizes, assets)
        _print_table({"model": config.model.path, "data": config.data.train})
        return
    run(output, sizes, assets, _console)


app.add_typer(bench_app, name="bench")

_console = Console()


def main() -> None:
    """Run the command line; a user's mistake ends it with one sentence and exit code 1 or 2."""
    _run(app)


def run(function: Callable[..., None]) -> None:
    """Make a command line of a function, as typer does, that ends a user's mistake as `main` does."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    command.command()(function)
    _run(command)


def _run(command: typer.Typer) -> None:
    # The libraries below warn of their own deprecations, about which a user of this command can do nothing.
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a dozen bars before the run's own
    try:
        command()
    except UserError as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _before_and_after(metrics: dict) -> dict[str, object]:
    """The measurements that are single numbers, each before and after training where it was taken twice."""
    before, after = metrics["before"] or {}, metrics["after"] or {}
    rows: dict[str, object] = {}
    for key, value in after.items():
        if isinstance(value, float):
            rows[key] = f"{before[key]:.4g} → {value:.4g}" if key in before else value
    return rows


def _print_table(values: dict[str, object]) -> None:
    table = Table(show_header=False, box=None)
    for key, value in values.items():
        if value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(escape(key.replace("_", " ")), escape(text))
    _console.print(table, highlight=False)


if __name__ == "__main__":
    main()
