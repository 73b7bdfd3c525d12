"""Bytes that a training step of a Mistral holds beside weights, gradients and optimizer: the formula behind the plan.

Every term names the tensor that it counts. T is the tokens of a forward pass, padding included; e the bytes of an
activation (2, or 4 in float32); h, i the hidden and intermediate sizes; q, kv the widths of queries and of keys.

Checked by tests/training/test_plan.py against measured peaks of Mistral-7B (bfloat16, r = 16, one H200, 1 × 512 to
4 × 2048 tokens): of PEFT on 4-bit and on 16-bit weights within 2% with checkpointing, on 4-bit weights without it too;
with Liger's kernels, whose norms and SwiGLU save less than is counted here, within 8%. What a layer saves is checked
there to the byte, and in the steps that examples/chat_assistant/memory.py measures by tests/examples/test_memory.py.
The 16-bit terms assume autocast, as the trainer has it: without it PEFT's layers save their inputs in float32.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Shape", "layer_saved", "layer_temporaries", "loss_bytes", "step_activations"]

# TRL projects to the vocabulary in tiles of at most this many tokens and vocabulary entries.
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that the formula needs."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "Shape":
        """The sizes in a model's configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * head_dim,
            (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
            config.num_attention_heads,
            config.vocab_size,
        )


def layer_saved(shape: Shape, element: int, fused: bool, rank: int = 0) -> int:
    """Bytes a token that one decoder layer saves for its backward pass.

    Args:
        element: e.
        fused: pyquant's 4-bit LoRA layer, which saves its input and x·Aᵀ; else PEFT's layer on a frozen nn.Linear,
            which in 16 bits saves its own copy of the input.
        rank: of the adapter; 0 for none, where a trained nn.Linear saves its input.
    """
    h, i, q, kv = shape.hidden, shape.intermediate, shape.queries, shape.keys
    # RMSNorm, twice: the float32 input of the square and of the product with its inverse root, and that root. In
    # float32 the input is the residual stream itself. The weight is frozen, so the normalized value is not saved.
    norms = 2 * 4 * (h + 1)
    # Attention: rotated queries and keys, values, output; and the log-sum-exp of each head in float32.
    attention = element * (2 * q + 2 * kv) + 4 * shape.heads
    # SwiGLU: the gate for silu; silu(gate) and up for their product.
    mlp = element * 3 * i
    # The inputs of q, k, v (one tensor), of gate and up (one) and of down. That of o is the attention's output.
    inputs = element * (2 * h + i)
    if rank and not fused and element < 4:
        # PEFT casts each layer's input to the adapter's float32 and autocast casts it back: seven own copies.
        inputs = element * (3 * h + 2 * h + q + i)
    adapters = element * 7 * rank  # x·Aᵀ of the seven layers
    return norms + attention + mlp + inputs + adapters


def layer_temporaries(shape: Shape, element: int, fused: bool) -> int:
    """Bytes a token of gradients at the peak of one layer's backward pass, which is in the MLP.

    Down's backward makes the gradient of its input; the product's those of silu(gate) and up, while down's input is
    freed; the gradient of the residual stream lives throughout, and again as the layer's own.
    """
    h, i = shape.hidden, shape.intermediate
    peak = element * (3 * i - i + 2 * h)
    if not fused:
        # PEFT's input gradient comes back in the activation's dtype and is cast to float32 and back: one i of float32
        # more, before the product's two gradients exist; the larger of the two moments counts.
        peak = max(peak, (2 * element + 4) * i + 2 * element * h)
    return peak


def loss_bytes(tokens: int, shape: Shape, element: int, loss: Literal["fused", "full"]) -> int:
    """Bytes of the loss at its peak.

    Args:
        tokens: target tokens.
        loss: ``fused`` for TRL's, which holds one tile of logits; ``full`` for transformers' own: the float32
            log-probabilities, their gradient and that of the logits (the 16-bit logits are freed by then).
    """
    last_hidden = element * tokens * shape.hidden
    if loss == "full":
        return last_hidden + 3 * 4 * tokens * shape.vocabulary
    tile = min(tokens, _TILE_TOKENS) * min(shape.vocabulary, _TILE_VOCABULARY)
    # The gradient of the last hidden states is summed in float32.
    return last_hidden + 4 * tokens * shape.hidden + element * tile


def step_activations(
    shape: Shape,
    tokens: int,
    element: int,
    *,
    fused: bool,
    rank: int,
    checkpointing: bool,
    loss: Literal["fused", "full"] = "fused",
    targets: int | None = None,
) -> tuple[int, int]:
    """Bytes of activations at the two moments where a step can peak: in the loss, and in a layer's backward pass.

    Gradients of parameters exist at the second alone, unless steps are accumulated.

    Args:
        tokens: of a forward pass (T).
        targets: those among them that the loss counts; None: all.
    """
    saved = tokens * layer_saved(shape, element, fused, rank)
    # With checkpointing only the input of each layer is kept, and one layer is computed again.
    kept = shape.layers * (tokens * element * shape.hidden if checkpointing else saved)
    backward = kept + (saved if checkpointing else 0) + tokens * layer_temporaries(shape, element, fused)
    return kept + loss_bytes(tokens if targets is None else targets, shape, element, loss), backward
