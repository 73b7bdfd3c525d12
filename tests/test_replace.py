"""replace_linear and dequantize_linear: what is replaced, what is left, and what is never changed by an error."""

import copy
import gc
import re
import weakref

import bitsandbytes
import peft
import pytest
import reference
import safetensors.torch
import torch

import pyquant
from pyquant.nn import Linear4bit

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def linears(model, kind=Linear4bit):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def replace(model, **kwargs):
    return pyquant.replace_linear(model, verbose=False, **kwargs)


def with_exact_weights(model, quantized):
    """A copy of the dense model whose weights are what `quantized`'s 4-bit layers stand for."""
    copied = copy.deepcopy(model)
    for name, layer in linears(quantized).items():
        state = layer.weight.quant_state
        absmax = reference.decoded_absmax(*pyquant.functional.statistics(state))
        exact = reference.dequantize(
            layer.weight.data, absmax, state.quant_type, state.blocksize, state.shape, torch.float32
        )
        copied.get_submodule(name).weight.data = exact
    return copied


def everything(model):
    """Identity and bits of every module and tensor, to see that nothing changed."""
    modules = {name: id(module) for name, module in model.named_modules()}
    tensors = {name: (id(p), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, tensors


def assert_unchanged(model, before):
    modules, tensors = before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert list(dict(model.named_parameters())) == list(tensors)
    for name, parameter in model.named_parameters():
        identity, _, value = tensors[name]
        assert id(parameter) == identity, name
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize("fixture", ["tiny_mistral", "odd_mistral"])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "blocksize": 32, "double_quant": False}])
def test_a_mistral_computes_as_with_dense_rounded_weights(request, fixture, options, token_ids):
    model = request.getfixturevalue(fixture)
    dense = copy.deepcopy(model)
    assert replace(model, **options) is model
    assert {name.rpartition(".")[2] for name in linears(model)} == PROJECTIONS
    assert len(linears(model)) == 14
    assert type(model.lm_head) is torch.nn.Linear
    for layer in linears(model).values():
        assert layer.weight.quant_type == options.get("quant_type", "nf4")
        assert layer.weight.blocksize == options.get("blocksize", 64)
        assert layer.weight.compress_statistics == options.get("double_quant", True)
        assert layer.weight.bnb_quantized
        assert not layer.training
    expected = with_exact_weights(dense, model)(token_ids).logits
    ours = model(token_ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - dense(token_ids).logits).abs().max() > 1e-4, "quantization cannot be free"


def test_bytes_are_those_of_the_dense_weight(tiny_mistral):
    weight = tiny_mistral.model.layers[1].mlp.down_proj.weight.detach().clone()
    replace(tiny_mistral)
    packed, state = pyquant.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer = tiny_mistral.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight.data, packed)
    assert layer.weight.quant_state == state


def test_calling_it_again_changes_nothing(tiny_mistral):
    replace(tiny_mistral)
    before = everything(tiny_mistral)
    replace(tiny_mistral, quant_type="fp4")
    assert_unchanged(tiny_mistral, before)
    replace(tiny_mistral, skip=())
    assert isinstance(tiny_mistral.lm_head, Linear4bit)


@pytest.mark.parametrize(
    ("skip", "targets", "count"),
    [
        ((), None, 15),
        ("lm_head", None, 14),
        (("lm_head", "q_proj"), None, 12),
        (None, ["q_proj", "v_proj"], 4),
        (("layers.0.*",), ["*_proj"], 7),
        (("*.mlp.*", "lm_head"), None, 8),
        ((), ["model.layers.1.self_attn.k_proj"], 1),
        ((), "down_proj", 2),
        (("proj",), ["q_proj"], 2),  # a pattern is a whole name or its end, never a part
        (("*[qk]_proj", "lm_head"), None, 10),
        (("lm_head", "layers.0"), None, 7),  # a module's name stands for all that it holds
        (("lm_head", "layer"), ["mlp"], 6),
    ],
)
def test_patterns_choose_the_layers(tiny_mistral, skip, targets, count):
    replace(tiny_mistral, skip=skip, targets=targets)
    assert len(linears(tiny_mistral)) == count
    assert len(linears(tiny_mistral, torch.nn.Linear)) == 15


def test_compute_dtype_bias_training_and_storage_carry_over():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 96), "b": torch.nn.Linear(96, 64, bias=False)})
    model["b"].eval()
    bias = model["a"].bias
    replace(model, compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)
    assert model["a"].bias is bias
    assert model["b"].bias is None
    assert model["a"].training
    assert not model["b"].training
    assert model["a"].compute_dtype == torch.bfloat16
    assert model["a"].weight.dtype == torch.bfloat16
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias", "b.weight"]


def test_subclasses_of_linear_are_left_alone():
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Special(64, 64), torch.nn.Linear(64, 64), torch.nn.MultiheadAttention(64, 2))
    replace(model)
    assert type(model[0]) is Special
    assert isinstance(model[1], Linear4bit)
    assert not isinstance(model[2].out_proj, Linear4bit)


def test_layers_that_share_a_weight_or_are_one_still_do():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in "abc"})
    model["b"].weight = model["a"].weight
    replace(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight is not model["c"].weight
    x = torch.randn(2, 64)
    assert torch.equal(model["a"](x), model["b"](x))
    assert len(list(model.parameters())) == 2
    pyquant.dequantize_linear(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.shape == (64, 64)


def test_one_module_under_two_names_stays_one():
    linear = torch.nn.Linear(64, 64)
    model = torch.nn.ModuleDict({"a": linear, "b": linear})
    replace(model)
    assert isinstance(model["a"], Linear4bit)
    assert model["a"] is model["b"]
    pyquant.dequantize_linear(model)
    assert type(model["a"]) is torch.nn.Linear
    assert model["a"] is model["b"]


def test_a_head_tied_to_the_embedding_is_skipped_by_default(tiny_mistral):
    tiny_mistral.lm_head.weight = tiny_mistral.model.embed_tokens.weight
    replace(tiny_mistral)
    assert tiny_mistral.lm_head.weight is tiny_mistral.model.embed_tokens.weight
    assert tiny_mistral.lm_head.weight.dtype == torch.float32


def test_a_model_on_meta_takes_a_quantized_checkpoint(tiny_mistral, token_ids):
    blank = copy.deepcopy(tiny_mistral).to("meta")
    replace(tiny_mistral)
    replace(blank)
    layer = blank.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.device.type == "meta"
    assert not layer.weight.bnb_quantized
    blank.load_state_dict(tiny_mistral.state_dict(), assign=True)
    blank.model.rotary_emb = tiny_mistral.model.rotary_emb
    assert torch.equal(blank(token_ids).logits, tiny_mistral(token_ids).logits)


class Refusals:
    """name → (prepare the model, arguments, exception, message)."""

    @staticmethod
    def nothing(model):
        return model

    @staticmethod
    def poison(value):
        def apply(model):
            model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
            return model

        return apply

    @staticmethod
    def double(model):
        model.model.layers[1].mlp.down_proj.double()
        return model

    @staticmethod
    def adapted(model):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


REFUSALS = {
    "quant_type": (Refusals.nothing, {"quant_type": "int4"}, ValueError, "quant_type must be 'nf4' or 'fp4', got"),
    "blocksize": (Refusals.nothing, {"blocksize": 63}, ValueError, "blocksize must be one of 32, 64, .* got 63"),
    "compute_dtype": (
        Refusals.nothing,
        {"compute_dtype": torch.float64},
        ValueError,
        "compute_dtype must be torch.float32, float16 or bfloat16, got torch.float64",
    ),
    "targets that match nothing": (
        Refusals.nothing,
        {"targets": ["qq_proj"]},
        ValueError,
        r"targets \['qq_proj'\] matches none of the model's linear layers that skip \['lm_head'\] leaves; "
        "there are: down_proj, gate_proj, k_proj, lm_head",
    ),
    "targets that are no strings": (Refusals.nothing, {"targets": [3]}, ValueError, "targets must be name patterns"),
    "skip that is no strings": (Refusals.nothing, {"skip": [None]}, ValueError, "skip must be name patterns"),
    "NaN in the last layer": (
        Refusals.poison(float("nan")),
        {},
        ValueError,
        r"model.layers.1.mlp.down_proj.weight holds NaN or infinity.*add 'model.layers.1.mlp.down_proj' to skip",
    ),
    "infinity in the last layer": (Refusals.poison(float("-inf")), {}, ValueError, "down_proj.weight holds NaN or inf"),
    "float64": (
        Refusals.double,
        {},
        TypeError,
        "model.layers.1.mlp.down_proj.weight is torch.float64; only float32, float16 and bfloat16 can be quantized",
    ),
    "adapters": (Refusals.adapted, {}, TypeError, "the model has adapters already .*quantize first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_an_error_leaves_the_model_as_it_was(tiny_mistral, name):
    prepare, arguments, exception, message = REFUSALS[name]
    model = prepare(tiny_mistral)
    before = everything(model)
    with pytest.raises(exception, match=message):
        replace(model, **arguments)
    assert_unchanged(model, before)


def test_a_storage_dtype_that_does_not_divide_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(3, 3))
    before = everything(model)
    with pytest.raises(ValueError, match=r"1\.weight packs into 5 bytes, which torch.float32 does not divide"):
        replace(model, quant_storage=torch.float32)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(0, 3))
    with pytest.raises(ValueError, match=r"1\.weight of shape \(3, 0\) has no elements; add '1' to skip"):
        replace(model)
    assert type(model[0]) is torch.nn.Linear


def test_a_linear_itself_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match="the model is a linear layer itself"):
        replace(torch.nn.Linear(64, 64))


def test_scales_that_overflow_are_refused_before_anything_changes():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[1].weight.data.fill_(3e38)
    before = everything(model)
    with pytest.raises(
        ValueError, match="too large for double quantization; use double_quant=False or add '1' to skip"
    ):
        replace(model)
    assert_unchanged(model, before)
    replace(model, double_quant=False)


def test_each_dense_layer_is_freed_before_the_next_is_replaced(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    references = [weakref.ref(module.weight) for module in model]
    alive = []
    quantize = torch.ops.pyquant.quantize_4bit

    def counting(*args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        return quantize(*args)

    monkeypatch.setattr(torch.ops.pyquant, "quantize_4bit", counting, raising=False)
    replace(model)
    # When layer i is quantized, the i layers before it are gone.
    assert alive == [6, 5, 4, 3, 2, 1]
    assert not any(reference() is not None for reference in references)


def test_the_report_says_what_was_done(tiny_mistral, capsys):
    pyquant.replace_linear(tiny_mistral, targets=["*.self_attn.*"])
    text = capsys.readouterr().out
    before = 2 * (2 * 64 * 64 + 2 * 32 * 64) * 4 / 2**20
    assert text.startswith("pyquant: 8 linear layers replaced by 4-bit, weights ")
    assert f"weights {before:,.1f} MiB -> 0.0 MiB" in text
    assert "\n  left dense: model.layers.*.mlp.down_proj (2 × Linear, 0.1 MiB): targets does not name it\n" in text
    assert "\n  left dense: lm_head (Linear, 0.0 MiB): skip names it ('lm_head')\n" in text
    pyquant.replace_linear(tiny_mistral)
    first, *left = capsys.readouterr().out.splitlines()
    assert re.match(r"pyquant: 6 linear layers .*; 8 were 4-bit already$", first)
    assert [line.split()[2] for line in left] == ["model.embed_tokens", "lm_head"]
    pyquant.replace_linear(tiny_mistral, verbose=False)
    assert not capsys.readouterr().out


def test_the_report_holds_every_module_with_weights(tiny_mistral):
    total = sum(p.numel() for p in tiny_mistral.parameters())
    replace(tiny_mistral, skip=("lm_head", "layers.1"))
    report = tiny_mistral.quantization_report
    with_weights = {name for name, m in tiny_mistral.named_modules() if list(m.parameters(recurse=False))}
    assert {entry.name for entry in report} == with_weights
    assert {entry.name for entry in report.quantized} == set(linears(tiny_mistral))
    assert sum(entry.parameters for entry in report) == total
    reasons = {entry.name: entry.reason for entry in report}
    assert reasons["model.layers.1.mlp.up_proj"] == "skip names it ('layers.1')"
    assert reasons["model.layers.0.mlp.up_proj"] == "nf4, blocks of 64, double quantization"
    assert reasons["model.norm"] == "no matrix"
    assert "model.layers.*.mlp.up_proj (Linear4bit" not in str(report)  # one of each: no folding
    assert "model.layers.*.input_layernorm (2 × MistralRMSNorm" in str(report)
    weight = tiny_mistral.model.layers[0].mlp.up_proj.weight
    entry = next(entry for entry in report if entry.name == "model.layers.0.mlp.up_proj")
    assert entry.nbytes == weight.nbytes + weight.quant_state.nbytes()
    assert not hasattr(pyquant.dequantize_linear(tiny_mistral), "quantization_report")


def test_the_report_holds_what_is_tied_to_another(tiny_mistral, capsys):
    tiny_mistral.config.tie_word_embeddings = True
    tiny_mistral.tie_weights()
    total = sum(p.numel() for p in tiny_mistral.parameters())
    report = pyquant.replace_linear(tiny_mistral).quantization_report
    line = "left dense: lm_head (Linear, 0.0 MiB): its weight is tied to model.embed_tokens\n"
    assert line in capsys.readouterr().out
    assert sum(entry.parameters for entry in report) == total
    head = report[-1]
    assert (head.name, head.kind, head.parameters, head.nbytes, head.quantized) == ("lm_head", "Linear", 0, 0, False)


def test_the_report_counts_shared_parts_once():
    packed, dense = ([torch.nn.Linear(64, 64) for _ in range(2)] for _ in range(2))
    norms = [torch.nn.LayerNorm(64) for _ in range(2)]
    packed[1].weight, dense[1].weight = packed[0].weight, dense[0].weight
    norms[1].weight, norms[1].bias = norms[0].weight, norms[0].bias
    model = torch.nn.ModuleList([*packed, *dense, *norms])
    total = sum(p.numel() for p in model.parameters())
    report = replace(model, skip=("2", "3")).quantization_report
    assert [entry.name for entry in report] == ["0", "1", "2", "3", "4", "5"]
    assert [entry.parameters for entry in report] == [64 * 65, 64, 64 * 65, 64, 128, 0]
    assert sum(entry.parameters for entry in report) == total
    state = model[0].weight.quant_state
    assert [entry.nbytes for entry in report][:2] == [model[0].weight.nbytes + state.nbytes() + 4 * 64, 4 * 64]
    assert report[1].quantized
    assert report[1].reason == "nf4, blocks of 64, double quantization; its weight is tied to 0"
    assert [report[i].reason for i in (3, 5)] == ["its weight is tied to 2", "no matrix"]


def test_what_cannot_be_quantized_is_named_with_its_size(capsys):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 128, 64, dtype=torch.bfloat16))

    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        Experts(),
        Special(64, 64),
        torch.nn.Conv1d(64, 64, 3),
        torch.nn.MultiheadAttention(64, 2),
        torch.nn.Linear(64, 64),
    )
    pyquant.replace_linear(model, skip=())
    text = capsys.readouterr().out
    assert "0.gate_up_proj (Experts 4×128×64, 0.1 MiB): expert matrices in one parameter" in text
    assert "1 (Special, 0.0 MiB): a subclass of Linear with a forward of its own" in text
    assert "2 (Conv1d, 0.0 MiB): Conv1d is not a linear layer" in text
    assert "3 (MultiheadAttention, 0.0 MiB): MultiheadAttention is not a linear layer" in text
    (experts,) = model.quantization_report.experts
    assert (experts.parameters, experts.nbytes) == (4 * 128 * 64, 2 * 4 * 128 * 64)


def bitsandbytes_model(**options):
    """Three bitsandbytes layers, the last one not quantized yet, and a dense one."""
    options = {"quant_type": "nf4", "compute_dtype": torch.bfloat16, **options}
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        bitsandbytes.nn.Linear4bit(64, 128, **options), bitsandbytes.nn.LinearFP4(128, 64, bias=False)
    ).to("cpu")
    model.append(bitsandbytes.nn.Linear4bit(64, 32, **options))
    model.append(torch.nn.Linear(32, 32))
    return model


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_layers_are_taken_over_with_their_storage(nested):
    model = bitsandbytes_model(compress_statistics=nested).train()
    x = torch.randn(5, 64)
    expected = model[1](model[0](x)).detach()
    pointers = [(m.weight.data_ptr(), m.weight.quant_state.absmax.data_ptr()) for m in model[:2]]
    entries = model[0].state_dict()
    dense = model[2].weight.data.clone()
    bias = model[0].bias
    replace(model, quant_type="fp4", blocksize=128)
    assert all(type(module) is Linear4bit for module in model)
    assert [(m.weight.data_ptr(), m.weight.quant_state.absmax.data_ptr()) for m in model[:2]] == pointers
    assert model[0].bias is bias
    # Their own settings, not the arguments.
    assert [m.weight.quant_type for m in model] == ["nf4", "fp4", "nf4", "fp4"]
    assert [m.weight.blocksize for m in model] == [64, 64, 64, 128]
    assert [m.compute_dtype for m in model] == [torch.bfloat16, torch.float32, torch.bfloat16, None]
    assert list(model[0].state_dict()) == list(entries)
    assert all(torch.equal(a, b) for a, b in zip(model[0].state_dict().values(), entries.values(), strict=True))
    safetensors.torch.save(model.state_dict())
    packed, state = pyquant.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
    assert torch.equal(model[2].weight.data, packed)
    assert model[2].weight.quant_state == state
    assert reference.relative_error(model[1](model[0](x)).detach(), expected) < 2**-7


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_that_bitsandbytes_has_repacked_is_taken_over(nested, dtype):
    layer = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=nested).to(dtype)
    layer.weight.data *= torch.logspace(-2, 0, 64, dtype=dtype)[:, None]  # scales that differ from row to row
    model = torch.nn.Sequential(layer.to("cpu")).eval()
    before = copy.deepcopy(model[0].state_dict())
    with torch.no_grad():
        model(torch.randn(2, 128).bfloat16())
    replace(model)
    layer = model[0]
    assert layer.weight.quant_state.dtype == dtype
    assert torch.equal(layer.weight.data, before["weight"])
    assert layer.weight.shape == before["weight"].shape
    # bitsandbytes keeps only a bfloat16 copy of absmax while a weight is repacked.
    statistics = pyquant.functional.QuantState.from_dict(
        {key: value for key, value in before.items() if key.startswith("weight.")}, device="cpu"
    )
    exact = pyquant.functional.dequantize_4bit(before["weight"], statistics)
    assert reference.relative_error(layer.weight.dequantize().float(), exact.float()) < 2**-6
    x = torch.randn(3, 128)
    truth = x.double() @ exact.double().T + layer.bias.detach().double()
    assert reference.relative_error(layer(x).detach(), truth) < 2**-6


def test_dequantize_linear_gives_dense_layers_back(odd_mistral, token_ids):
    replace(odd_mistral)
    exact = {name: layer.weight.dequantize() for name, layer in linears(odd_mistral).items()}
    expected = odd_mistral(token_ids).logits
    assert pyquant.dequantize_linear(odd_mistral) is odd_mistral
    assert not linears(odd_mistral)
    for name, weight in exact.items():
        layer = odd_mistral.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, weight)
        assert not layer.training
    torch.testing.assert_close(odd_mistral(token_ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_dequantize_linear_casts_and_refuses_adapters(tiny_mistral):
    replace(tiny_mistral)
    adapted = peft.get_peft_model(copy.deepcopy(tiny_mistral), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="the model has adapters already"):
        pyquant.dequantize_linear(adapted)
    pyquant.dequantize_linear(tiny_mistral, dtype=torch.bfloat16)
    assert tiny_mistral.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
