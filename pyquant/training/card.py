"""The model card of a run: what it was made from, how, and what it scores."""

from pathlib import Path
from typing import Any

import yaml

from .config import Config, to_dict

__all__ = ["write_card"]

_SCORES = {
    "loss": "loss per target token (nats)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "ended": "answers that reach their end token (part)",
    "general_perplexity": "perplexity of general text",
}
_LOAD = {
    True: """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, "THIS FOLDER")""",
    False: """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")""",
}


def write_card(folder: Path, config: Config, method: str, metrics: dict[str, Any], adapter: bool) -> None:
    """Write README.md into an adapter's or a model's folder, with the metadata that the hub reads.

    Args:
        metrics: what metrics.json holds.
        adapter: whether the folder holds an adapter rather than a model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        # Hub names alone: a path on the trainer's machine tells the hub nothing.
        base_model=config.model.path if _is_hub_name(config.model.path) else None,
        datasets=[name] if _is_hub_name(name := config.data.train.partition(":")[0]) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["pyquant", "lora" if adapter else "fine-tuned", method],
    )
    quantization = config.quantization
    options = ""
    if method == "qlora" and adapter:
        options = f', quantization_config=pyquant.PyQuantConfig("{quantization.method}", {quantization.blocksize})'
    code = _LOAD[adapter].format(base=config.model.path, options=options) if adapter else _LOAD[False]
    code = "import pyquant\n" + code if options else code
    text = f"""---
{data.to_yaml()}
---

# {Path(config.model.path).name}, fine-tuned with pyquant ({method})

Trained for {metrics["steps"]:,} steps ({metrics["epochs"]:.3g} epochs) on {metrics["train_rows"]:,} rows of
`{Path(config.data.train).name}`, on {metrics["device"]} in {metrics["precision"]}; {metrics["trainable"]:,} of
{metrics["parameters"]:,} parameters were trained.

```python
{code}
```

## Results

{_results(metrics)}

## Configuration

```yaml
{yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).strip()}
```
"""
    ModelCard(text).save(folder / "README.md")


def _results(metrics: dict[str, Any]) -> str:
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    lines = ["| | before | after |", "|---|---|---|"]
    for key, title in _SCORES.items():
        if key in before or key in after:
            cells = [f"{scores[key]:.4g}" if key in scores else "" for scores in (before, after)]
            lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    if len(lines) == 2:
        return "No evaluation rows were given." + (
            f" The mean training loss was {metrics['train_loss']:.4g}." if metrics.get("train_loss") else ""
        )
    return "\n".join(lines)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
