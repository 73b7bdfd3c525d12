"""pyquant.functional: bitsandbytes' names, arguments, defaults and results."""

import copy
import inspect

import bitsandbytes
import pytest
import reference
import torch

import pyquant
import pyquant.functional as F

bnb = bitsandbytes.functional
PAIRS = [
    *((getattr(F, name), getattr(bnb, name)) for name in (
        "quantize_4bit", "quantize_nf4", "quantize_fp4", "dequantize_4bit", "dequantize_nf4", "dequantize_fp4",
        "gemv_4bit", "get_4bit_type", "create_dynamic_map",
    )),
    (pyquant.matmul_4bit, bitsandbytes.matmul_4bit),
    (F.QuantState.__init__, bnb.QuantState.__init__),
    (F.QuantState.as_dict, bnb.QuantState.as_dict),
    (F.QuantState.from_dict, bnb.QuantState.from_dict),
    (pyquant.nn.Linear4bit.__init__, bitsandbytes.nn.Linear4bit.__init__),
    (pyquant.nn.LinearNF4.__init__, bitsandbytes.nn.LinearNF4.__init__),
    (pyquant.nn.LinearFP4.__init__, bitsandbytes.nn.LinearFP4.__init__),
    (pyquant.nn.Params4bit.__new__, bitsandbytes.nn.Params4bit.__new__),
    (pyquant.nn.Params4bit.from_prequantized, bitsandbytes.nn.Params4bit.from_prequantized),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[ours.__qualname__ for ours, _ in PAIRS])
def test_parameters_and_defaults_are_bitsandbytes(ours, theirs):
    mine, expected = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    # Ours may take more, at the end.
    for parameter, other in zip(mine, expected, strict=False):
        assert (parameter.name, parameter.default, parameter.kind) == (other.name, other.default, other.kind)
    assert len(mine) >= len(expected)
    assert all(parameter.default is not inspect.Parameter.empty for parameter in mine[len(expected) :])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codebooks_are_bitsandbytes(quant_type):
    code = F.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(code, bnb.get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(code, reference.CODES[quant_type])
    code.zero_()
    assert F.get_4bit_type(quant_type, device="cpu").any(), "the caller's copy is the cache"


def test_codebooks_first_needed_in_a_mode_serve_outside_of_it():
    F._codebook.cache_clear()
    F._dynamic_codebook.cache_clear()
    weight = torch.randn(64, 64)
    with torch.inference_mode(), torch.device("meta"):
        F.quantize_4bit(weight, compress_statistics=True)
    packed, state = F.quantize_4bit(weight, compress_statistics=True)
    assert not state.code.is_inference()
    assert not state.state2.code.is_inference()
    x = torch.randn(3, 64, requires_grad=True)
    pyquant.matmul_4bit(x, packed, state).sum().backward()
    assert x.grad.isfinite().all()


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        F.get_4bit_type("int4")


@pytest.mark.parametrize(
    ("signed", "exponent_bits", "total_bits"),
    [(True, 7, 8), (False, 7, 8), (True, 6, 8), (True, 4, 8), (True, 5, 7), (True, 3, 6), (True, 3, 4), (False, 5, 6)],
)
def test_dynamic_maps_are_bitsandbytes(signed, exponent_bits, total_bits):
    ours = F.create_dynamic_map(signed, exponent_bits, total_bits)
    assert torch.equal(ours, bnb.create_dynamic_map(signed, exponent_bits, total_bits).to(ours.dtype))
    assert ours.dtype == torch.float32


def states(nested, quant_type="nf4"):
    weight = torch.randn(96, 160).bfloat16()
    options = {"quant_type": quant_type, "compress_statistics": nested}
    return F.quantize_4bit(weight, **options)[1], bnb.quantize_4bit(weight, **options)[1]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dictionaries_are_bitsandbytes(nested, quant_type):
    ours, theirs = states(nested, quant_type)
    for packed in (False, True):
        mine, expected = ours.as_dict(packed=packed), theirs.as_dict(packed=packed)
        assert list(mine) == list(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert mine[key].dtype == value.dtype, key
                assert torch.equal(mine[key], value), key
            else:
                assert mine[key] == value, key


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_state_survives_its_dictionary(nested, packed):
    state, _ = states(nested)
    entries = {f"model.layers.0.weight.{key}": value for key, value in state.as_dict(packed=packed).items()}
    keys = set(entries)
    assert F.QuantState.from_dict(entries, device="cpu") == state
    assert set(entries) == keys, "from_dict changed its argument"


@pytest.mark.parametrize("nested", [False, True])
def test_list_indices_are_bitsandbytes(nested):
    ours, theirs = states(nested)
    for index in (1, 2, 3, 5):
        assert ours[index] == theirs[index]
    assert torch.equal(ours[0], theirs[0])
    if nested:
        assert torch.equal(ours[4][0], theirs[4][0])
        assert torch.equal(ours[4][1].absmax, theirs[4][1].absmax)
    else:
        assert ours[4] is None


def test_states_are_equal_when_every_part_is():
    state, _ = states(True)
    same = copy.deepcopy(state)
    assert state == same
    assert state != "a state"
    changes = {
        "absmax": lambda s: s.absmax.add_(1),
        "offset": lambda s: s.offset.add_(1),
        "code": lambda s: s.code.add_(1),
        "shape": lambda s: setattr(s, "shape", torch.Size([160, 96])),
        "dtype": lambda s: setattr(s, "dtype", torch.float16),
        "blocksize": lambda s: setattr(s, "blocksize", 128),
        "quant_type": lambda s: setattr(s, "quant_type", "fp4"),
        "state2": lambda s: s.state2.absmax.add_(1),
        "nested": lambda s: setattr(s, "state2", None),
    }
    for name, change in changes.items():
        other = copy.deepcopy(state)
        change(other)
        assert state != other, name


def test_to_moves_every_tensor():
    state, _ = states(True)
    assert state.to("meta") is state
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_nbytes_counts_the_statistics():
    ours, _ = states(True)
    blocks = 96 * 160 // 64
    assert ours.nbytes() == blocks + 4 + 4
    assert states(False)[0].nbytes() == 4 * blocks


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_named_variants_are_the_same_functions(quant_type):
    weight = torch.randn(64, 96)
    packed, state = getattr(F, f"quantize_{quant_type}")(weight, compress_statistics=True)
    expected, expected_state = F.quantize_4bit(weight, compress_statistics=True, quant_type=quant_type)
    assert torch.equal(packed, expected)
    assert state == expected_state
    assert torch.equal(getattr(F, f"dequantize_{quant_type}")(packed, state), F.dequantize_4bit(packed, state))


def test_out_and_absmax_are_written():
    weight = torch.randn(64, 96)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    out, absmax = torch.zeros_like(packed), torch.zeros_like(state.absmax)
    returned, other = F.quantize_4bit(weight, absmax=absmax, out=out, quant_type="nf4")
    assert returned is out
    assert other.absmax is absmax
    assert torch.equal(out, packed)
    assert torch.equal(absmax, state.absmax)
    dense = torch.empty(64, 96)
    assert F.dequantize_4bit(packed, state, out=dense) is dense
    assert torch.equal(dense, F.dequantize_4bit(packed, state))


def test_dequantize_from_absmax_and_out_alone():
    weight = torch.randn(64, 96)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", blocksize=128)
    out = torch.empty(64, 96)
    F.dequantize_4bit(packed, absmax=state.absmax, out=out, blocksize=128, quant_type="nf4")
    assert torch.equal(out, F.dequantize_4bit(packed, state))
    with pytest.raises(ValueError, match="needs quant_state, or else both absmax and out"):
        F.dequantize_4bit(packed, absmax=state.absmax)


def test_a_transposed_packed_weight_gives_the_transpose():
    packed, state = F.quantize_4bit(torch.randn(64, 128), quant_type="nf4")
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())
    assert torch.equal(bnb.dequantize_4bit(packed.t(), states_of(state)), F.dequantize_4bit(packed.t(), state))


def states_of(state):
    """The same state as bitsandbytes' class."""
    return bnb.QuantState.from_dict(state.as_dict(packed=True), device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_is_bitsandbytes_within_rounding(dtype):
    weight = torch.randn(96, 192) * 0.1
    packed, state = F.quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    x, bias = torch.randn(2, 5, 192).to(dtype), torch.randn(96).to(dtype)
    expected = bitsandbytes.matmul_4bit(x, packed, states_of(state), bias=bias)
    tolerance = 4 * torch.finfo(dtype).eps
    for B in (packed, packed.t()):
        ours = pyquant.matmul_4bit(x, B, state, bias=bias)
        assert ours.dtype == dtype
        assert reference.relative_error(ours, expected) < tolerance
    assert torch.equal(F.gemv_4bit(x, packed, state=state), pyquant.matmul_4bit(x, packed, state))
    out = torch.empty(2, 5, 96, dtype=dtype)
    assert pyquant.matmul_4bit(x, packed, state, out=out, bias=bias) is out
    assert torch.equal(out, ours)


def test_matmul_casts_the_bias_and_passes_gradients():
    packed, state = F.quantize_4bit(torch.randn(96, 64), quant_type="nf4")
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(96, requires_grad=True)
    y = pyquant.matmul_4bit(x, packed, state, bias=bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert torch.equal(bias.grad, torch.full((96,), 4.0))
    assert not F.gemv_4bit(x, packed, state=state).requires_grad


def test_bad_arguments_get_a_sentence():
    weight = torch.randn(64, 96)
    packed, state = F.quantize_4bit(weight)
    x = torch.randn(2, 96)
    for call, message in (
        (lambda: F.quantize_4bit(weight, blocksize=63), "blocksize must be one of 32, 64, .*, 4096, got 63"),
        (lambda: F.quantize_4bit(weight, quant_type="int4"), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        (lambda: F.quantize_4bit(weight.double()), "A must be float32, float16 or bfloat16, got float64"),
        (lambda: F.quantize_4bit(torch.empty(0, 64)), r"A of shape \(0, 64\) has no elements to quantize"),
        (
            lambda: F.quantize_4bit(torch.randn(3, 3), quant_storage=torch.float32),
            "9 elements pack into 5 bytes, which float32 does not divide; use quant_storage=torch.uint8",
        ),
        (lambda: pyquant.matmul_4bit(x, packed, None), "needs the quant_state that quantize_4bit returned with B"),
        (lambda: pyquant.matmul_4bit(x[:, 1:], packed, state), r"96 input features, got shape \(2, 95\)"),
        (lambda: pyquant.matmul_4bit(x.double(), packed, state), "A must be float32, float16 or bfloat16, got float64"),
        (lambda: F.gemv_4bit(x, packed), "gemv_4bit needs the state"),
        (lambda: pyquant.matmul_4bit(x, *F.quantize_4bit(torch.randn(64))), r"weight of shape \[N, K\], got \(64,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_packed_entries_share_no_storage_with_the_codebooks():
    # Layers may share their codebooks, and safetensors refuses tensors that share storage.
    state, _ = states(True)
    entries = state.as_dict(packed=True)
    assert entries["quant_map"].data_ptr() != state.code.data_ptr()
    assert entries["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()
