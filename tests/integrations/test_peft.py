"""LoRA through PEFT: the fused layer against plain PEFT on the dense model that the 4-bit weights stand for."""

import copy
import dataclasses
import subprocess
import sys
from collections import Counter

import peft
import pytest
import reference
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_replace import linears, replace, with_exact_weights
from test_torch import record_products

import pyquant
from pyquant.integrations.peft import LoraLinear4bit

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options}
    return LoraConfig(**options)


def randomize(model, seed=0):
    """Adapters as after training: B is not zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


@pytest.fixture
def models(odd_mistral):
    """(4-bit model, the dense model with the same rounded weights), both without adapters."""
    quantized = replace(copy.deepcopy(odd_mistral))
    return quantized, with_exact_weights(odd_mistral, quantized)


def adapted_pair(models, **options):
    """Both models with the same random adapters."""
    ours, dense = (randomize(get_peft_model(model, config(**options))) for model in models)
    copy_adapters(ours, dense)
    return ours, dense


def copy_adapters(source, target):
    own = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if "lora_" in name:
            parameter.data = own[name].data.clone().to(parameter.dtype)


def loss_of(model, token_ids):
    return model(token_ids, labels=token_ids, use_cache=False).loss


def adapter_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_close(ours, theirs, tolerance=1e-4):
    assert reference.relative_error(ours.detach(), theirs.detach()) < tolerance


@pytest.mark.parametrize("target_modules", [PROJECTIONS, "all-linear", r".*\.(q|v)_proj", ["q_proj"]])
def test_every_target_becomes_the_fused_layer(models, target_modules):
    ours, _ = models
    expected = {"all-linear": 14, r".*\.(q|v)_proj": 4}.get(str(target_modules), 2 * len(target_modules))
    model = get_peft_model(ours, config(target_modules=target_modules))
    fused = linears(model, LoraLinear4bit)
    assert len(fused) == expected
    others = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer) and type(m) is not LoraLinear4bit]
    assert not others
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("order", ["import pyquant, peft", "import peft, pyquant", "import pyquant"])
def test_the_order_of_imports_does_not_matter(order):
    script = f"""
{order}
import torch
from peft import LoraConfig, get_peft_model
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
pyquant.replace_linear(model, verbose=False)
model = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
print(type(model.base_model.model[0]).__name__, type(model.base_model.model[1]).__name__)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["LoraLinear4bit", "LoraLinear4bit"]


def test_pyquant_may_be_the_first_to_import_peft():
    script = "import pyquant; print(pyquant.lora_config().r, pyquant.PyQuantConfig().blocksize)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["16", "64"], result.stderr


def test_importing_pyquant_does_not_import_peft():
    script = "import sys, pyquant; print('peft' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_lora_config_has_the_usual_choices():
    built = pyquant.lora_config()
    assert isinstance(built, LoraConfig)
    assert (built.r, built.lora_alpha, built.target_modules, built.task_type) == (16, 32, "all-linear", "CAUSAL_LM")
    assert pyquant.lora_config(r=8, lora_dropout=0.1, task_type="SEQ_CLS").task_type == "SEQ_CLS"


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", [{}, {"r": 16, "use_rslora": True}, {"lora_bias": True}, {"r": 1}])
def test_outputs_and_gradients_are_plain_pefts(models, token_ids, options):
    # An adapter's bias needs one in the base layer for merging alone: Mistral's have none.
    ours, dense = adapted_pair(models, **options)
    assert_close(ours(token_ids).logits, dense(token_ids).logits)
    loss, expected = loss_of(ours.train(), token_ids), loss_of(dense.train(), token_ids)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = adapter_gradients(ours)
    assert set(gradients) == set(adapter_gradients(dense))
    assert len(gradients) >= 28
    for name, gradient in adapter_gradients(dense).items():
        assert_close(gradients[name], gradient, 1e-3)


@pytest.fixture
def models_with_biases():
    """(4-bit model, the dense model with the same rounded weights): a Qwen2, whose q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_hidden_layers=2, attn_implementation="eager", **sizes))
    for name, parameter in dense.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.1)
    quantized = replace(copy.deepcopy(dense))
    return quantized, with_exact_weights(dense, quantized)


@pytest.mark.parametrize(("bias", "count"), [("all", 6), ("lora_only", 2)])
def test_the_bases_biases_are_trained_and_saved_as_plain_pefts(models_with_biases, token_ids, tmp_path, bias, count):
    quantized, dense = models_with_biases
    blank = copy.deepcopy(quantized)
    before = {name: p.clone() for name, p in dense.named_parameters() if name.endswith(".bias")}
    options = {"target_modules": ["q_proj", "o_proj"], "bias": bias}
    ours, plain = (randomize(get_peft_model(model, config(**options))) for model in (quantized, dense))
    for model in (ours, plain):
        loss_of(model.train(), token_ids).backward()
    gradients, expected = adapter_gradients(ours), adapter_gradients(plain)
    assert list(gradients) == list(expected)
    assert sum(name.endswith(".bias") for name in gradients) == count
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[name], gradient, 1e-3)
    for model in (ours, plain):
        model.zero_grad()
    losses, expected = train(ours, token_ids), train(plain, token_ids)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    saved = peft.get_peft_model_state_dict(ours)
    assert list(saved) == list(peft.get_peft_model_state_dict(plain))
    biases = {name.removeprefix("base_model.model.").replace(".base_layer", ""): saved[name] for name in saved}
    changed = [name for name in before if name in biases and not torch.equal(biases[name], before[name])]
    assert len(changed) == count
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(blank, tmp_path)
    expected = ours.eval()(token_ids).logits
    assert torch.equal(again(token_ids).logits, expected)
    assert_close(pyquant.merge_and_unload(ours)(token_ids).logits, expected)


def test_float32_adapters_on_a_bfloat16_base(models, token_ids):
    ours, dense = adapted_pair(models)
    masters = {n: p.data for n, p in ours.named_parameters() if "lora_" in n}
    ours.bfloat16()
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data = masters[name]
    rough = copy.deepcopy(dense).bfloat16()
    truth = copy.deepcopy(dense).double()
    for model in (ours, rough, truth):
        loss_of(model.train(), token_ids).backward()
    for name, gradient in adapter_gradients(ours).items():
        assert gradient.dtype == torch.float32
        exact = adapter_gradients(truth)[name]
        # The whole network runs in bfloat16: the yardstick is plain PEFT there.
        limit = max(1.6 * reference.relative_error(adapter_gradients(rough)[name], exact), 0.02)
        assert reference.relative_error(gradient, exact) < limit, name


def test_a_model_trains_under_autocast_as_near_to_float64_as_plain_pefts(models, token_ids, device, monkeypatch):
    ours, dense = adapted_pair(models)
    truth = copy.deepcopy(dense).double()
    loss = loss_of(truth.train(), token_ids)
    loss.backward()
    token_ids = token_ids.to(device)
    ours.to(device)(token_ids)  # an evaluation in float32 first
    seen, losses = record_products(monkeypatch), []
    for model in (ours, dense.to(device)):
        with torch.autocast(device, torch.bfloat16):
            losses.append(loss_of(model.train(), token_ids))
        losses[-1].backward()
    assert seen == [torch.bfloat16] * 14
    for rough in losses:
        assert_close(rough, loss, 0.01)
    gradients, exact, rough = (adapter_gradients(model) for model in (ours, truth, dense))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        limit = max(2 * reference.relative_error(rough[name], exact[name]), 0.02)
        assert reference.relative_error(gradient, exact[name]) < limit, name


def test_dropout_is_for_training_alone(models, token_ids):
    ours, dense = adapted_pair(models, lora_dropout=0.5)
    expected = dense.eval()(token_ids).logits
    assert_close(ours.eval()(token_ids).logits, expected)
    ours.train()
    torch.manual_seed(1)
    first = ours(token_ids).logits
    torch.manual_seed(1)
    assert torch.equal(ours(token_ids).logits, first)
    assert not torch.equal(ours(token_ids).logits, first)
    # Unbiased: the mean over many masks of one layer's output comes near the output without dropout.
    layer = next(iter(linears(ours, LoraLinear4bit).values()))
    x = torch.randn(3, layer.in_features)
    mean = layer(x.expand(2000, 3, -1)).mean(0)
    assert_close(mean, layer.eval()(x), 0.05)


def test_dropout_follows_the_reference_mask(models):
    ours, _ = adapted_pair(models, lora_dropout=0.3)
    layer = next(iter(linears(ours, LoraLinear4bit).values())).train()
    x = torch.randn(2, 5, layer.in_features)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, (1,)).item()
    torch.manual_seed(11)
    y = layer(x)
    mask = reference.dropout_mask(seed, 0.3, 10, layer.in_features).reshape(x.shape)
    lora_A, lora_B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    weight = layer.base_layer.weight.dequantize().double()
    expected = x.double() @ weight.T + layer.scaling["default"] * (x.double() * mask) @ lora_A.T @ lora_B.T
    assert_close(y, expected, 1e-5)


def test_several_adapters_disabling_and_mixed_batches(models, token_ids):
    pair = adapted_pair(models)
    base = [model.get_base_model() for model in pair]
    for model in pair:
        model.add_adapter("second", config(r=8, lora_alpha=4))
        randomize(model, seed=5)
    ours, dense = pair
    copy_adapters(ours, dense)
    for active in ("default", "second"):
        for model in pair:
            model.set_adapter(active)
        assert_close(ours(token_ids).logits, dense(token_ids).logits)
    for model in pair:
        model.base_model.set_adapter(["default", "second"])
    assert_close(ours(token_ids).logits, dense(token_ids).logits)
    loss_of(ours, token_ids).backward()
    loss_of(dense, token_ids).backward()
    gradients = adapter_gradients(ours)
    for name, gradient in adapter_gradients(dense).items():
        if gradient is not None:
            assert_close(gradients[name], gradient, 1e-3)
    with ours.disable_adapter(), dense.disable_adapter():
        assert_close(ours(token_ids).logits, dense(token_ids).logits)
    names = ["second", "__base__"]
    mixed = ours.eval()(token_ids, adapter_names=names).logits
    assert_close(mixed, dense.eval()(token_ids, adapter_names=names).logits)
    ours.set_adapter("second")
    assert_close(mixed[0], ours(token_ids[:1]).logits[0])
    assert base[0] is ours.get_base_model()
    ours.delete_adapter("default")
    assert set(next(iter(linears(ours, LoraLinear4bit).values())).lora_A) == {"second"}


def packed_bytes(model):
    return {
        name: (layer.weight.data.clone(), copy.deepcopy(layer.weight.quant_state))
        for name, layer in linears(model, pyquant.nn.Linear4bit).items()
    }


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unmerging(models, token_ids, safe_merge):
    ours, _ = adapted_pair(models)
    ours.add_adapter("second", config(r=2))
    randomize(ours)
    before, expected = packed_bytes(ours), ours(token_ids).logits
    layer = next(iter(linears(ours, LoraLinear4bit).values()))
    original = layer.base_layer.weight.dequantize()
    ours.merge_adapter(adapter_names=["default"], safe_merge=safe_merge)
    assert layer.merged
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    packed, state = pyquant.functional.quantize_4bit(
        original + delta.detach(), quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(layer.base_layer.weight.data, packed)
    assert layer.base_layer.weight.quant_state == state
    merged = ours(token_ids).logits
    assert_close(merged, expected, 0.5)
    assert not torch.equal(merged, expected)
    ours.merge_adapter(adapter_names=["second"], safe_merge=safe_merge)
    delta = delta + layer.lora_B["second"].weight @ layer.lora_A["second"].weight * layer.scaling["second"]
    packed, _ = pyquant.functional.quantize_4bit(original + delta.detach(), quant_type="nf4", compress_statistics=True)
    same = (layer.base_layer.weight.data == packed).float().mean()
    assert same > 0.999, "the second merge starts from the unmerged weight"
    ours.unmerge_adapter()
    after = packed_bytes(ours)
    assert all(torch.equal(after[name][0], value) for name, (value, _) in before.items())
    assert all(after[name][1] == state for name, (_, state) in before.items())
    assert torch.equal(ours(token_ids).logits, expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_broken_adapter_is_not_merged_safely(models):
    ours, _ = adapted_pair(models)
    layer = next(iter(linears(ours, LoraLinear4bit).values()))
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = packed_bytes(ours)
    with pytest.raises(ValueError, match="merging default gives NaN or infinity; the adapter is broken"):
        ours.merge_adapter(safe_merge=True)
    name = next(iter(before))
    assert torch.equal(packed_bytes(ours)[name][0], before[name][0])
    assert not layer.merged


def test_merge_and_unload_gives_plain_4bit_layers(models, token_ids):
    ours, _ = adapted_pair(models)
    ours.merge_adapter()
    merged = ours(token_ids).logits
    ours.unmerge_adapter()
    unloaded = ours.merge_and_unload()
    assert not linears(unloaded, LoraLinear4bit)
    assert len(linears(unloaded)) == 14
    assert torch.equal(unloaded(token_ids).logits, merged)


def test_unload_gives_the_base_back(models, token_ids):
    quantized, _ = models
    expected = quantized(token_ids).logits
    ours = randomize(get_peft_model(quantized, config()))
    assert not torch.equal(ours(token_ids).logits, expected)
    assert torch.equal(ours.unload()(token_ids).logits, expected)


def test_adapters_saved_here_load_here_and_in_plain_peft(models, token_ids, tmp_path):
    quantized, dense = models
    blank = copy.deepcopy(quantized)
    ours = randomize(get_peft_model(quantized, config(lora_dropout=0.1)))
    expected = ours.eval()(token_ids).logits
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(blank), tmp_path / "adapter")
    assert len(linears(again, LoraLinear4bit)) == 14
    assert torch.equal(again(token_ids).logits, expected)
    second = get_peft_model(blank, config(r=2))
    second.load_adapter(tmp_path / "adapter", "loaded")
    second.set_adapter("loaded")
    assert torch.equal(second.eval()(token_ids).logits, expected)
    plain = PeftModel.from_pretrained(dense, tmp_path / "adapter")
    assert_close(plain(token_ids).logits, expected)
    saved = peft.get_peft_model_state_dict(ours)
    loaded = peft.get_peft_model_state_dict(plain)
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_adapters_saved_by_plain_peft_load_here(models, token_ids, tmp_path):
    quantized, dense = models
    plain = randomize(get_peft_model(dense, config(target_modules="all-linear")))
    plain.save_pretrained(tmp_path / "adapter")
    ours = PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    assert len(linears(ours, LoraLinear4bit)) == 14
    assert_close(ours(token_ids).logits, plain.eval()(token_ids).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_dropout(models, token_ids, reentrant):
    ours, _ = adapted_pair(models, lora_dropout=0.3)
    checkpointed = copy.deepcopy(ours)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    results = []
    for model, times in ((ours, 1), (checkpointed, 2)):
        runs = Counter()
        for name, layer in linears(model, LoraLinear4bit).items():
            layer.register_forward_pre_hook(lambda *_, runs=runs, name=name: runs.update([name]))
        torch.manual_seed(3)
        loss = loss_of(model.train(), token_ids)
        loss.backward()
        assert len(runs) == 14
        assert set(runs.values()) == {times}, "what is checkpointed runs again in the backward pass"
        results.append((loss.detach(), adapter_gradients(model)))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


LORA_OPTIONS = {field.name: field for field in dataclasses.fields(LoraConfig)}
# QALoRA is PEFT's for GPTQ layers alone and has no tag; of the variants, DoRA is supported.
VARIANTS = {"use_qalora"} | {name for name, field in LORA_OPTIONS.items() if field.metadata.get("is_lora_variant")}


def assert_refused(model, lora, named):
    with pytest.raises(ValueError, match=f"pyquant's 4-bit LoRA layer does not support {named}; leave it out"):
        get_peft_model(model, lora)
    assert not linears(model, LoraLinear4bit)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("option", sorted(VARIANTS - {"use_dora"}))
def test_unsupported_variants_are_refused(models, option, tagged, monkeypatch):
    quantized, _ = models
    lora = config()
    setattr(lora, option, True)  # whatever it holds
    if not tagged:  # as by a version of PEFT without tags
        monkeypatch.setattr(LORA_OPTIONS[option], "metadata", {})
    assert_refused(quantized, lora, option)


def test_a_variant_of_a_later_peft_is_refused(models, monkeypatch):
    quantized, _ = models
    monkeypatch.setattr(LORA_OPTIONS["layers_pattern"], "metadata", {"is_lora_variant": True})
    assert_refused(quantized, config(layers_to_transform=[0], layers_pattern="layers"), "layers_pattern")


def test_a_variant_beside_dora_is_refused(models):
    quantized, _ = models
    assert_refused(quantized, config(use_dora=True, alora_invocation_tokens=[1]), "alora_invocation_tokens")


def train(model, token_ids, steps=8):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train(), token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_follows_the_dense_models_loss_curve(models, token_ids):
    ours, dense = (get_peft_model(model, config()) for model in models)
    copy_adapters(ours, dense)
    packed = packed_bytes(ours)
    losses, expected = train(ours, token_ids), train(dense, token_ids)
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    assert all(torch.equal(value, packed_bytes(ours)[name][0]) for name, (value, _) in packed.items())


def test_prepare_model_for_kbit_training_leaves_the_bytes_and_the_dtype(models, token_ids, monkeypatch):
    """It makes embeddings and norms float32, and so every input: that chooses no dtype for products under autocast."""
    quantized, _ = models
    quantized.bfloat16()
    before = packed_bytes(quantized)
    prepared = peft.prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    assert all(torch.equal(value, packed_bytes(prepared)[name][0]) for name, (value, _) in before.items())
    seen = record_products(monkeypatch)
    assert prepared(token_ids).logits.isfinite().all()
    assert seen == [torch.float32] * 14
    model = randomize(get_peft_model(prepared, config()))
    seen.clear()
    model.generate(input_ids=token_ids, max_new_tokens=1, do_sample=False)
    assert seen == [torch.float32] * 14
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model.train(), token_ids)
    assert seen == [torch.bfloat16] * 14
    loss.backward()
    assert {gradient.dtype for gradient in adapter_gradients(model).values()} == {torch.float32}


def test_a_copy_of_an_adapted_model_is_independent(models, token_ids):
    ours, _ = adapted_pair(models)
    expected = ours(token_ids).logits
    other = copy.deepcopy(ours)
    assert torch.equal(other(token_ids).logits, expected)
    other.merge_adapter()
    assert torch.equal(ours(token_ids).logits, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_is_plain_pefts(models, token_ids, dropout):
    ours, dense = (get_peft_model(model, config(use_dora=True, lora_dropout=dropout)) for model in models)
    for name, layer in linears(ours, LoraLinear4bit).items():
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude.data, layer.base_layer.weight.dequantize().norm(dim=1))
        torch.testing.assert_close(magnitude, dense.get_submodule(name).lora_magnitude_vector["default"].weight)
    randomize(ours)  # the magnitudes too
    copy_adapters(ours, dense)
    results = []
    for model in (ours, dense):
        torch.manual_seed(3)
        loss = loss_of(model.train(), token_ids)
        loss.backward()
        results.append(loss)
    assert_close(results[0], results[1])
    gradients = adapter_gradients(ours)
    assert sum("magnitude" in name for name in gradients) == 14
    for name, gradient in adapter_gradients(dense).items():
        assert_close(gradients[name], gradient, 1e-3)
    assert_close(ours.eval()(token_ids).logits, dense.eval()(token_ids).logits)


def test_dora_merges_and_unmerges(models, token_ids):
    ours, dense = adapted_pair(models, use_dora=True)
    before = packed_bytes(ours)
    ours.merge_adapter()
    dense.merge_adapter()
    for name, layer in linears(ours, pyquant.nn.Linear4bit).items():
        merged = dense.get_submodule(name).weight
        packed, _ = pyquant.functional.quantize_4bit(merged.data, quant_type="nf4", compress_statistics=True)
        assert (packed == layer.weight.data).float().mean() > 0.99, name  # the two sums round differently
    ours.unmerge_adapter()
    assert all(torch.equal(packed_bytes(ours)[name][0], value) for name, (value, _) in before.items())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_an_initialization_from_the_base_weight_is_refused(models, start):
    quantized, _ = models
    before = packed_bytes(quantized)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' reads or rewrites the dense base weight"):
        get_peft_model(quantized, config(init_lora_weights=start))
    assert all(torch.equal(packed_bytes(quantized)[name][0], value) for name, (value, _) in before.items())


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_an_initialization_of_the_adapter_alone_works(models, token_ids, start):
    ours, dense = (get_peft_model(model, config(init_lora_weights=start)) for model in models)
    copy_adapters(ours, dense)
    assert_close(ours(token_ids).logits, dense(token_ids).logits)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_combinations_are_plain_pefts(models, token_ids, combination):
    pair = adapted_pair(models)
    for model in pair:
        model.add_adapter("second", config(r=4, lora_alpha=4))
        randomize(model, seed=5)
    ours, dense = pair
    copy_adapters(ours, dense)
    with ours.disable_adapter():
        without = ours(token_ids).logits
    single = ours(token_ids).logits
    for model in pair:
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type=combination)
        model.set_adapter("both")
    combined = ours(token_ids).logits
    assert_close(combined, dense(token_ids).logits, 1e-3)
    for other in (without, single):
        assert reference.relative_error(combined.detach(), other.detach()) > 0.05, "the combination is one of its own"
    for model in pair:
        model.delete_adapter("both")
        model.set_adapter("second")
    assert_close(ours(token_ids).logits, dense(token_ids).logits)


def test_modules_to_save_are_trained_and_saved(models, token_ids, tmp_path):
    quantized, dense = models
    blank = copy.deepcopy(quantized)
    options = {"modules_to_save": ["lm_head", "embed_tokens"]}
    ours, plain = get_peft_model(quantized, config(**options)), get_peft_model(dense, config(**options))
    copy_adapters(ours, plain)
    losses, expected = train(ours, token_ids), train(plain, token_ids)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    head = ours.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(blank, tmp_path / "adapter")
    assert torch.equal(again(token_ids).logits, ours.eval()(token_ids).logits)


@pytest.mark.parametrize(
    ("autocast", "compute_dtype", "expected"),
    [(True, None, torch.float32), (False, None, torch.bfloat16), (False, torch.float16, torch.float16)],
)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_the_adapters_dtype_is_the_one_chosen(tiny_mistral, token_ids, autocast, compute_dtype, expected, storage):
    model = replace(tiny_mistral.bfloat16(), compute_dtype=compute_dtype, quant_storage=storage)
    model = randomize(get_peft_model(model, config(), autocast_adapter_dtype=autocast))
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in adapters.values()} == {expected}
    loss_of(model.train(), token_ids).backward()
    assert {p.grad.dtype for p in adapters.values()} == {expected}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    # By hand, as TRL does after the fact.
    for parameter in adapters.values():
        parameter.data = parameter.data.bfloat16()
        parameter.grad = None
    loss_of(model, token_ids).backward()
    assert {p.grad.dtype for p in adapters.values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:merging into the dequantized", "ignore:Already following adapters were merged")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_an_adapters_bias_is_merged_with_its_scaling_and_unmerged_bit_by_bit(dtype, tolerance):
    model = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(dtype)
    pyquant.replace_linear(model, verbose=False)
    options = {"target_modules": ["0"], "lora_bias": True, "task_type": None, "lora_alpha": 12}
    ours = get_peft_model(model, config(**options))
    ours.add_adapter("second", config(**options))
    randomize(ours)
    ours.base_model.set_adapter(["default", "second"])
    layer = ours.base_model.model[0]
    bias = layer.base_layer.bias.clone()
    x = torch.zeros(1, 64, dtype=dtype)  # the weight drops out
    expected = ours(x)
    for name in ("default", "second"):
        ours.merge_adapter([name])
    assert_close(ours(x), expected, tolerance)
    ours.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)
    # The next merge starts from what is there then.
    layer.base_layer.bias.data += 1
    bias = layer.base_layer.bias.clone()
    ours.merge_adapter()
    assert not torch.equal(layer.base_layer.bias, bias)
    ours.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


def test_merging_says_into_what(models):
    ours, _ = adapted_pair(models)
    with pytest.warns(UserWarning, match="merging into the dequantized 4-bit weights that the adapter was trained on"):
        ours.merge_adapter()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"], "use_rslora": True}])
def test_merging_into_16_bit_weights_of_either_base(odd_mistral, token_ids, tmp_path, options):
    original = copy.deepcopy(odd_mistral)
    quantized = replace(odd_mistral)
    ours = randomize(get_peft_model(quantized, config(**options)))
    expected = ours.eval()(token_ids).logits
    ours.save_pretrained(tmp_path / "adapter")
    merged = pyquant.merge_and_unload(ours, base="16bit", original=original)
    assert merged.merged_into == "default merged into the original weights from before quantization"
    plain = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter").merge_and_unload()
    assert torch.equal(merged(token_ids).logits, plain(token_ids).logits)
    original.save_pretrained(tmp_path / "original")
    named = pyquant.merge_and_unload(ours, base="16bit", original=tmp_path / "original")
    assert_close(named(token_ids).logits, plain(token_ids).logits)  # another attention implementation
    assert named.merged_into == f"default merged into the original weights of {tmp_path / 'original'}"
    assert torch.equal(ours(token_ids).logits, expected), "the adapted model is left as it is"

    merged = pyquant.merge_and_unload(ours, base="4bit")
    assert merged.merged_into == "default merged into the dequantized 4-bit weights that they were trained on"
    assert not linears(merged)
    assert_close(merged(token_ids).logits, expected)


@pytest.mark.filterwarnings("ignore:merging into the dequantized")
def test_merging_several_adapters_into_16_bits(models, token_ids):
    ours, _ = adapted_pair(models)
    ours.add_adapter("second", config(r=2))
    randomize(ours)
    ours.base_model.set_adapter(["default", "second"])
    expected = ours(token_ids).logits
    ours.merge_adapter()  # is undone first
    merged = pyquant.merge_and_unload(ours)
    assert merged.merged_into.startswith("default, second merged into the dequantized")
    assert_close(merged(token_ids).logits, expected)


def test_merging_into_nothing_is_refused(models, odd_mistral):
    quantized, dense = models
    plain = get_peft_model(dense, config())
    with pytest.raises(TypeError, match="no adapters on 4-bit layers; PEFT's own merge_and_unload merges others"):
        pyquant.merge_and_unload(plain)
    ours = randomize(get_peft_model(quantized, config()))
    with pytest.raises(ValueError, match="base must be '4bit' or '16bit', got '8bit'"):
        pyquant.merge_and_unload(ours, base="8bit")
    with pytest.raises(ValueError, match='base="16bit" needs original'):
        pyquant.merge_and_unload(ours, base="16bit")
    with pytest.raises(ValueError, match='base="4bit" takes none'):
        pyquant.merge_and_unload(ours, base="4bit", original=odd_mistral)


def test_prepare_model_for_kbit_training_prepares_a_loaded_model(tiny_mistral, token_ids, tmp_path):
    """float32 norms, checkpointing with inputs that require gradients, and products still in 16 bits."""
    from transformers import AutoModelForCausalLM

    tiny_mistral.bfloat16().save_pretrained(tmp_path / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=pyquant.PyQuantConfig(verbose=False)
    )
    before = packed_bytes(quantized)
    prepared = peft.prepare_model_for_kbit_training(quantized, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert prepared.model.norm.weight.dtype == torch.float32
    assert prepared.is_gradient_checkpointing
    assert {layer.compute_dtype for layer in linears(prepared, pyquant.nn.Linear4bit).values()} == {torch.bfloat16}
    assert all(torch.equal(value, packed_bytes(prepared)[name][0]) for name, (value, _) in before.items())
    model = randomize(get_peft_model(prepared, config())).train()
    loss_of(model, token_ids).backward()
    gradients = adapter_gradients(model)
    assert len(gradients) == 28
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
