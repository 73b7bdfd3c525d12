"""Conversion of the demo's GGUF checkpoint to a Hugging Face Mistral folder (safetensors and tokenizer)."""

import os
import shutil
from pathlib import Path

import torch

from ..training.models import quiet

# llama.cpp names the parts of a block differently; the norms and the embedding keep their float values.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Convert a Llama-architecture GGUF file to a `MistralForCausalLM` folder and return the folder.

    Llama without a sliding window is the same mathematics as Mistral. The folder appears complete or not at all.

    Raises:
        ValueError: the file holds another architecture than ``llama`` or a tensor of an unknown name.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{gguf_file.name} holds a {fields['general.architecture']} model; only llama can be converted."
        )
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]

    state = {}
    for tensor in reader.tensors:
        name = _parameter_name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            weight = _unpermute_rope(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _unpermute_rope(weight, kv_heads)
        state[name] = weight.to(dtype)

    tied = "lm_head.weight" not in state
    special = {f"{kind}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for kind, key in _SPECIAL_TOKENS.items()}
    config = MistralConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        sliding_window=None,
        tie_word_embeddings=tied,
        dtype=dtype,
        **{name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - ({"lm_head.weight"} if tied else set()):
        raise ValueError(f"{gguf_file.name} does not match its own header: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)

    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet():
        model.save_pretrained(partial)
    _tokenizer(fields).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _parameter_name(gguf_name: str) -> str:
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if part not in _BLOCK_NAMES:
        raise ValueError(f"tensor {gguf_name} has no place in a Mistral model.")
    return f"model.layers.{block}.{_BLOCK_NAMES[part]}.{suffix}"


def _unpermute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order: it interleaves the two halves of each head, Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that never come from text


def _tokenizer(fields: dict):
    """The byte-level BPE tokenizer in the GGUF header, as a Hugging Face fast tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.model"] != "gpt2" or fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError("only the smollm byte-level BPE tokenizer can be converted.")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The "smollm" scheme: digits one by one, then GPT-2's byte-level split.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{kind}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for kind, key in _SPECIAL_TOKENS.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
