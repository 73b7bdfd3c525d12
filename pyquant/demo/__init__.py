"""The demonstration: a small real Mistral, fine-tuned on real data, in one command."""

from .run import demo

__all__ = ["demo"]
