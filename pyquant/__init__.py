"""Fast, trustworthy QLoRA: 4-bit weights, their linear layer and its LoRA adapter, in bitsandbytes' format."""

import importlib

import torch  # noqa: F401  the op library needs libtorch to be loaded

try:
    from pyquant import _C
except ImportError as error:
    raise ImportError(
        f"pyquant's compiled library cannot be loaded ({error}). Install the package with 'pip install .' from its "
        f"source, with torch 2.10 or later in the same environment"
    ) from error

from pyquant import autograd, fake, functional, nn  # noqa: F401  the first two complete the ops
from pyquant.environment import explain_plan, show_config
from pyquant.errors import CheckpointError
from pyquant.functional import matmul_4bit
from pyquant.integrations import when_imported
from pyquant.pretrained import load_pretrained, quantize_pretrained, save_pretrained
from pyquant.replace import dequantize_linear, replace_linear
from pyquant.report import QuantizationReport

__version__ = _C.version()

__all__ = [
    "BitsAndBytesConfig",
    "CheckpointError",
    "PyQuantConfig",
    "QuantizationReport",
    "dequantize_linear",
    "explain_plan",
    "functional",
    "load_pretrained",
    "lora_config",
    "matmul_4bit",
    "merge_and_unload",
    "nn",
    "quantize_pretrained",
    "replace_linear",
    "save_pretrained",
    "show_config",
]


# Names whose modules import transformers or peft, which takes seconds: looked up when they are first used.
_LAZY = {
    "BitsAndBytesConfig": ("pyquant.integrations.transformers", "bits_and_bytes_config"),
    "PyQuantConfig": ("pyquant.integrations.transformers", "PyQuantConfig"),
    "lora_config": ("pyquant.integrations.peft", "lora_config"),
    "merge_and_unload": ("pyquant.integrations.peft", "merge_and_unload"),
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'pyquant' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    globals()[name] = getattr(importlib.import_module(module), attribute)
    return globals()[name]


# Each of these modules registers itself with its library at its end: it may be the first to import the library, so that
# the call comes while it is being imported.
when_imported("peft", lambda: importlib.import_module("pyquant.integrations.peft"))
when_imported("transformers.quantizers.auto", lambda: importlib.import_module("pyquant.integrations.transformers"))
