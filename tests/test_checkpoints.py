"""Checkpoints of 4-bit layers: strict round trips, exchange with bitsandbytes, and what is refused."""

import json

import bitsandbytes
import pytest
import safetensors.torch
import torch

import pyquant
from pyquant.nn import Linear4bit, Params4bit

each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double"])
N, K = 96, 77
JSON_KEY = "weight.quant_state.bitsandbytes__nf4"


def layer(quant_type="nf4", nested=True, storage=torch.uint8, bias=True, n=N, k=K, seed=0, **kwargs):
    torch.manual_seed(seed)
    built = Linear4bit(
        k, n, bias=bias, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, **kwargs
    )
    return built.bfloat16().to("cpu")


def bnb_layer(quant_type="nf4", nested=True, storage=torch.uint8, bias=True, n=N, k=K, seed=0):
    torch.manual_seed(seed)
    dense = torch.nn.Linear(k, n, bias=bias).bfloat16()
    built = bitsandbytes.nn.Linear4bit(
        k, n, bias=bias, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    built.load_state_dict(dense.state_dict(), strict=False)
    built.weight = bitsandbytes.nn.Params4bit(
        dense.weight.data, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, module=built
    )
    built.bias = dense.bias
    return built.to("cpu")


def assert_same_entries(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert ours[key].shape == value.shape, key
        assert torch.equal(
            ours[key].detach().contiguous().view(-1).view(torch.uint8),
            value.detach().contiguous().view(-1).view(torch.uint8),
        ), key


def without_bias(state):
    return {key: value for key, value in state.items() if not key.endswith("bias")}


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@each_type
@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_bitsandbytes(quant_type, nested, storage, bias):
    options = {"quant_type": quant_type, "nested": nested, "storage": storage, "bias": bias, "k": 80}
    ours, theirs = layer(**options), bnb_layer(**options)
    assert_same_entries(ours.state_dict(), theirs.state_dict())
    assert_same_entries(ours.state_dict(prefix="model.q_proj."), theirs.state_dict(prefix="model.q_proj."))


def test_keys_dtypes_and_json_are_the_written_ones():
    state = layer(n=96, k=77).state_dict()
    blocks = -(-96 * 77 // 64)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "weight": (torch.uint8, (96 * 77 // 2, 1)),
        "bias": (torch.bfloat16, (96,)),
        "weight.absmax": (torch.uint8, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (1,)),
        "weight.nested_quant_map": (torch.float32, (256,)),
        JSON_KEY: (torch.uint8, tuple(state[JSON_KEY].shape)),
    }
    text = bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
    offset = layer(n=96, k=77).weight.offset.item()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 77], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    plain = layer(nested=False, quant_type="fp4").state_dict()
    text = bytes(plain["weight.quant_state.bitsandbytes__fp4"].tolist()).decode()
    assert text == '{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 77]}'
    assert plain["weight.absmax"].dtype == torch.float32


@each_type
@nested_or_not
@pytest.mark.parametrize("fresh", ["cpu", "meta", "quantized"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_strict_round_trip_through_safetensors(tmp_path, quant_type, nested, fresh, assign):
    source = torch.nn.Sequential(layer(quant_type, nested), torch.nn.ReLU(), layer(quant_type, nested, n=40, k=N))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    # The opposite settings: everything that matters comes from the file.
    other = {"quant_type": "fp4", "nested": not nested}
    if fresh == "quantized":
        target = torch.nn.Sequential(layer(seed=1, **other), torch.nn.ReLU(), layer(seed=2, n=40, k=N, **other))
    else:
        target = torch.nn.Sequential(Linear4bit(K, N, device=fresh), torch.nn.ReLU(), Linear4bit(N, 40, device=fresh))
        if fresh == "meta" and not assign:
            target[0].bias = target[2].bias = None  # torch cannot copy into a bias on meta
            state = {key: value for key, value in state.items() if not key.endswith("bias")}
            source[0].bias = source[2].bias = None
    result = target.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_entries(
        {k: v.to(torch.bfloat16) if k.endswith("bias") else v for k, v in target.state_dict().items()},
        source.state_dict(),
    )
    x = torch.randn(3, K).bfloat16()
    torch.testing.assert_close(target.bfloat16()(x), source(x), rtol=0, atol=0)
    assert target[0].weight.quant_state == source[0].weight.quant_state
    assert target[0].quant_state is target[0].weight.quant_state


@each_type
@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_checkpoints_load_strictly(quant_type, nested, storage):
    theirs = bnb_layer(quant_type, nested, storage, k=80)
    ours = Linear4bit(80, N)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_entries(without_bias(ours.state_dict()), without_bias(theirs.state_dict()))
    assert ours.weight.quant_type == quant_type
    assert ours.weight.compress_statistics == nested
    assert ours.weight.quant_storage == storage


@each_type
@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_loads_our_checkpoints(quant_type, nested, storage):
    ours = layer(quant_type, nested, storage, k=128)
    state = ours.state_dict()
    statistics = {key: value for key, value in state.items() if key.startswith("weight.")}
    theirs = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    dense = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, ours.weight.dequantize())


def test_other_block_sizes_survive_a_checkpoint():
    source = layer(blocksize=256)
    target = Linear4bit(K, N)
    target.load_state_dict(source.state_dict())
    assert target.weight.blocksize == 256
    assert torch.equal(target.weight.dequantize(), source.weight.dequantize())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_dense_checkpoint_is_quantized_when_the_layer_is(quantized):
    torch.manual_seed(3)
    dense = torch.nn.Linear(K, N).bfloat16()
    target = Linear4bit(K, N, quant_type="nf4").bfloat16()
    if quantized:
        target.to("cpu")
    target.load_state_dict(dense.state_dict(), strict=True)
    assert target.weight.bnb_quantized is quantized
    if not quantized:
        assert torch.equal(target.weight.data, dense.weight)
        assert target.weight.quant_state is None
    packed, state = pyquant.functional.quantize_4bit(dense.weight.data, quant_type="nf4", compress_statistics=True)
    target.to("cpu")
    assert torch.equal(target.weight.data, packed)
    assert target.weight.quant_state == state
    assert torch.equal(target.bias, dense.bias)


def test_the_offset_stays_float32_under_another_default_dtype():
    source = layer()
    state = source.state_dict()
    target = Linear4bit(K, N)
    torch.set_default_dtype(torch.bfloat16)
    try:
        target.load_state_dict(state)
        parameter = Params4bit.from_prequantized(
            state["weight"], {k: v for k, v in state.items() if k.startswith("weight.")}, device="cpu"
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for weight in (target.weight, parameter):
        assert weight.offset.dtype == torch.float32
        assert weight.quant_state == source.weight.quant_state
        assert torch.equal(weight.dequantize(), source.weight.dequantize())


def edit_json(state, **changes):
    entries = json.loads(bytes(state[JSON_KEY].tolist()))
    entries.update({key: value for key, value in changes.items() if value is not None})
    for key in [key for key, value in changes.items() if value is None]:
        del entries[key]
    state[JSON_KEY] = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


BAD_CHECKPOINTS = {
    "no statistics": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("weight.")],
        r"expected a dense weight of shape \(96, 77\), or packed bytes with the entries weight.absmax.*got uint8",
    ),
    "no absmax": (lambda s: s.pop("weight.absmax"), "entry 'absmax' is missing; the checkpoint is incomplete"),
    "no quant_map": (lambda s: s.pop("weight.quant_map"), "entry 'quant_map' is missing"),
    "no nested_absmax": (lambda s: s.pop("weight.nested_absmax"), "entry 'nested_absmax' is missing"),
    "no nested_quant_map": (lambda s: s.pop("weight.nested_quant_map"), "entry 'nested_quant_map' is missing"),
    "no JSON": (lambda s: s.pop(JSON_KEY), "has no quant_state.bitsandbytes__nf4"),
    "two JSONs": (
        lambda s: s.update({"weight.quant_state.bitsandbytes__fp4": s[JSON_KEY]}),
        "expected one quant_state entry that ends in",
    ),
    "JSON under the wrong type": (
        lambda s: s.update({"weight.quant_state.bitsandbytes__fp4": s.pop(JSON_KEY)}),
        "says quant_type 'nf4'; the two disagree",
    ),
    "JSON cut off": (lambda s: s.update({JSON_KEY: s[JSON_KEY][:-5]}), "is not JSON"),
    "JSON that is no text": (
        lambda s: s.update({JSON_KEY: torch.full((9,), 255, dtype=torch.uint8)}),
        "is not JSON",
    ),
    "JSON that is a list": (
        lambda s: s.update({JSON_KEY: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}),
        r"holds \[1, 2\], expected a JSON object",
    ),
    "no shape in the JSON": (lambda s: edit_json(s, shape=None), "entry 'shape' is missing"),
    "no dtype in the JSON": (lambda s: edit_json(s, dtype=None), "entry 'dtype' is missing"),
    "no offset in the JSON": (lambda s: edit_json(s, nested_offset=None), "entry 'nested_offset' is missing"),
    "offset NaN": (lambda s: edit_json(s, nested_offset=float("nan")), "nested_offset in the checkpoint is nan"),
    "offset text": (lambda s: edit_json(s, nested_offset="1"), "nested_offset in the checkpoint is '1'"),
    "blocksize 63": (lambda s: edit_json(s, blocksize=63), "blocksize in the checkpoint is 63"),
    "blocksize 128": (lambda s: edit_json(s, blocksize=128), "absmax must be uint8 with 58 values"),
    "nested blocksize 128": (lambda s: edit_json(s, nested_blocksize=128), "nested_blocksize in the checkpoint is 128"),
    "dtype int8": (lambda s: edit_json(s, dtype="int8"), "dtype in the checkpoint is 'int8'"),
    "dtype nonsense": (lambda s: edit_json(s, dtype="nonsense"), "dtype in the checkpoint is 'nonsense'"),
    "shape transposed": (
        lambda s: edit_json(s, shape=[77, 96]),
        r"the checkpoint's weight has shape \(77, 96\), the layer \(96, 77\)",
    ),
    "shape larger": (lambda s: edit_json(s, shape=[96, 78]), "absmax must be uint8 with 117 values"),
    "shape a little smaller": (
        lambda s: edit_json(s, shape=[1, 7391]),
        "the packed weight has 3696 bytes|shape",
    ),
    "shape negative": (lambda s: edit_json(s, shape=[-96, 77]), r"shape in the checkpoint is \[-96, 77\]"),
    "shape text": (lambda s: edit_json(s, shape="96"), "shape in the checkpoint is '96'"),
    "an unknown entry": (lambda s: edit_json(s, surprise=1), "unknown entries beside a 4-bit weight: surprise"),
    "an unknown tensor": (
        lambda s: s.update({"weight.SCB": torch.ones(1)}),
        "unknown entries beside a 4-bit weight: SCB",
    ),
    "weight cut off": (
        lambda s: s.update(weight=s["weight"][:-1]),
        "the packed weight has 3695 bytes, its shape .* needs 3696; the checkpoint is truncated",
    ),
    "absmax cut off": (
        lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}),
        "absmax must be uint8 with 116 values for this weight's shape and blocksize, the checkpoint has uint8 with 115",
    ),
    "absmax as floats": (
        lambda s: s.update({"weight.absmax": s["weight.absmax"].float()}),
        "absmax must be uint8 with 116 values .*, the checkpoint has float32 with 116",
    ),
    "nested_absmax too long": (
        lambda s: s.update({"weight.nested_absmax": torch.ones(2)}),
        "nested_absmax must be float32 with 1 values",
    ),
    "nested_quant_map cut off": (
        lambda s: s.update({"weight.nested_quant_map": torch.ones(16)}),
        "nested_quant_map must be float32 with 256 values",
    ),
    "the other type's quant_map": (
        lambda s: s.update({"weight.quant_map": pyquant.functional.get_4bit_type("fp4", "cpu")}),
        "quant_map in the checkpoint is not the nf4 codebook",
    ),
    "quant_map in 16 bits": (
        lambda s: s.update({"weight.quant_map": s["weight.quant_map"].bfloat16()}),
        "quant_map must be float32 with 16 values",
    ),
}


@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "dense"])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(name, quantized):
    damage, message = BAD_CHECKPOINTS[name]
    state = dict(layer().state_dict())
    damage(state)
    torch.manual_seed(9)
    target = Linear4bit(K, N, quant_type="nf4")
    if quantized:
        target.to("cpu")
    before, parameter, quant_state = snapshot(target), target.weight, target.quant_state
    with pytest.raises(RuntimeError, match=message) as error:
        target.load_state_dict(state)
    assert "weight" in str(error.value)
    assert target.weight is parameter
    assert target.quant_state is quant_state
    assert_same_entries(without_bias(target.state_dict()), without_bias(before))


def test_a_missing_weight_is_named():
    state = layer().state_dict()
    rest = {key: value for key, value in state.items() if not key.startswith("weight")}
    with pytest.raises(RuntimeError, match='Missing key\\(s\\) in state_dict: "weight"'):
        Linear4bit(K, N).load_state_dict(rest)
    result = Linear4bit(K, N).load_state_dict(rest, strict=False)
    assert result.missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match='Missing key\\(s\\) in state_dict: "bias"'):
        Linear4bit(K, N).load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "stranger"'):
        Linear4bit(K, N).load_state_dict({**state, "stranger": torch.ones(1)})


def test_loading_does_not_tie_the_layer_to_the_checkpoint():
    state = layer().state_dict()
    target = Linear4bit(K, N)
    target.load_state_dict(state)
    before = target.weight.dequantize()
    for value in state.values():
        value.zero_()
    assert torch.equal(target.weight.dequantize(), before)


def test_packed_statistics_without_tensors_are_refused_by_from_prequantized():
    state = layer().state_dict()
    with pytest.raises(pyquant.CheckpointError, match="has no quant_state"):
        Params4bit.from_prequantized(state["weight"], {}, device="cpu")
