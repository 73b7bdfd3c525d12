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

# Small weights for tests: square, an odd k (a byte crosses rows), k that is no multiple of the block size (blocks cross
# rows and the last one is partial), more columns than rows.
ODD_WEIGHTS = ((64, 64), (123, 77), (96, 160), (130, 192))

# Rows of the activation: none, one (decoding), below, at and above the kernels' row tiles.
ODD_ROWS = (0, 1, 2, 5, 17, 64, 123)

LORA_RANKS = (1, 8, 16, 64)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
