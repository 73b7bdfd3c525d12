"""The shapes that tests and benchmarks share. A linear layer's weight is [n, k]: output features, input features."""

# The linear layers of Mistral-7B.
MISTRAL_7B = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}

# Its configuration, where that is not MistralConfig's default.
MISTRAL_7B_CONFIG = {"vocab_size": 32768, "num_key_value_heads": 8, "sliding_window": None}

# Small weights for tests: square, an odd k (a byte crosses rows), k that is no multiple of the block size (blocks cross
# rows and the last one is partial), more columns than rows.
ODD_WEIGHTS = ((64, 64), (123, 77), (96, 160), (130, 192))

# Rows of the activation: none, one (decoding), below, at and above the kernels' row tiles.
ODD_ROWS = (0, 1, 2, 5, 17, 64, 123)

LORA_RANKS = (1, 8, 16, 64)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def linear_shapes(model: str | None = None) -> dict[str, tuple[int, int]]:
    """The different shapes ``[n, k]`` of a model's linear layers, by the names of the layers that have them.

    Mistral-7B's are ``q/o``, ``k/v``, ``gate/up`` and ``down``. The output head, which stays dense, is left out.

    Args:
        model: a folder with a Hugging Face ``config.json``, or a model's hub name; by default Mistral-7B.

    Raises:
        OSError: there is no such configuration.
        ValueError: transformers does not know the model, or it has no linear layers.
    """
    layers = MISTRAL_7B if model is None else _layers_of(model)
    names: dict[tuple[int, int], list[str]] = {}
    for name, shape in layers.items():
        names.setdefault(shape, []).append(name.removesuffix("_proj"))
    return {"/".join(same): shape for shape, same in names.items()}


def _layers_of(model: str) -> dict[str, tuple[int, int]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):  # shapes without memory
        skeleton = AutoModelForCausalLM.from_config(config)
    head = skeleton.get_output_embeddings()
    layers: dict[str, tuple[int, int]] = {}
    for path, layer in skeleton.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            layers.setdefault(path.rpartition(".")[2], (layer.out_features, layer.in_features))
    if not layers:
        raise ValueError(f"{model} has no linear layers")
    return layers
