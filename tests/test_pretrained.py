"""Checkpoints of whole models: bitsandbytes' read and written, and made without loading the model."""

import copy
import json
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter

import pyquant
import pyquant.pretrained
from pyquant import CheckpointError, PyQuantConfig
from pyquant.nn import Linear4bit

bitsandbytes = pytest.importorskip("bitsandbytes")

each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double"])


def raw(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def weights(folder):
    files = [safetensors.torch.load_file(file) for file in folder.glob("*.safetensors")]
    return {key: value for state in files for key, value in state.items()}


def assert_same_tensors(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert ours[key].shape == value.shape, key
        assert torch.equal(raw(ours[key]), raw(value)), key


def layers(model, kind=Linear4bit):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def load_strictly(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model, token_ids):
    # Without this, bitsandbytes repacks the weight for inference on some processors, and rounds the statistics.
    return model.train()(token_ids).logits.detach()


def make_dense(folder, kind="untied"):
    """A dense float32 checkpoint in several shards, whose layers' rows are whole blocks: bitsandbytes' CPU backend
    dequantizes others wrongly."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {"vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "experts":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes))
    else:
        model = MistralForCausalLM(MistralConfig(tie_word_embeddings=kind == "tied", **sizes))
    model.save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture
def dense(tmp_path):
    return make_dense(tmp_path / "dense")


def bitsandbytes_checkpoint(dense, folder, quant_type="nf4", nested=True, storage=torch.uint8, **options):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")
    expected = {name: layer.weight.data.clone() for name, layer in layers(model, bitsandbytes.nn.Linear4bit).items()}
    model.save_pretrained(folder, max_shard_size="300KB")
    return model, expected


@each_type
@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=["uint8", "bf16", "fp32"])
def test_bitsandbytes_checkpoints_are_read(dense, tmp_path, token_ids, quant_type, nested, storage):
    theirs, expected = bitsandbytes_checkpoint(dense, tmp_path / "bnb", quant_type, nested, storage)
    assert len(list((tmp_path / "bnb").glob("*.safetensors"))) > 1
    ours = pyquant.load_pretrained(tmp_path / "bnb")
    assert type(ours).__name__ == "MistralForCausalLM"
    assert set(layers(ours)) == set(expected)
    assert len(expected) == 14
    for name, layer in layers(ours).items():
        assert torch.equal(raw(layer.weight), raw(expected[name])), name
        assert (layer.weight.quant_type, layer.weight.compress_statistics) == (quant_type, nested)
        assert layer.weight.dtype == storage
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert_same_tensors(weights(tmp_path / "again"), weights(tmp_path / "bnb"))


def test_bitsandbytes_need_not_be_installed(dense, tmp_path):
    bitsandbytes_checkpoint(dense, tmp_path / "bnb", llm_int8_skip_modules=["lm_head", "v_proj"])
    script = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "bitsandbytes" else find(name, *args)
import pyquant
model = pyquant.load_pretrained({str(tmp_path / "bnb")!r})
assert "bitsandbytes" not in sys.modules
print(sum(isinstance(m, pyquant.nn.Linear4bit) for m in model.modules()), model.num_parameters())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert not result.returncode, result.stderr
    parameters = AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    assert result.stdout.split() == ["12", str(parameters)]


def test_a_checkpoint_of_another_kind_is_refused(dense, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not in 4 bits; load it with from_pretrained.*PyQuantConfig"):
        pyquant.load_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    for entry, named in (
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
    ):
        (dense / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        with pytest.raises(CheckpointError, match=f"was quantized by {named}; pyquant reads bitsandbytes' and its own"):
            pyquant.load_pretrained(dense)


def test_experts_in_4_bits_by_themselves_are_refused(tmp_path, monkeypatch):
    """As bitsandbytes and transformers before version 5 wrote them, when each expert's matrix was a linear layer."""
    source = make_dense(tmp_path / "moe", "experts")
    pyquant.quantize_pretrained(source, tmp_path / "packed", PyQuantConfig(), "bitsandbytes")
    file = tmp_path / "packed" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    for key in [key for key in state if ".experts." in key]:
        state |= pyquant.pretrained._entries(key, pyquant.pretrained._packed(state[key], PyQuantConfig()))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight.quant_state.bitsandbytes__nf4" in state
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", None)  # nothing is loaded
    message = (
        r"model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight is in 4 bits by itself.*"
        r"part of model\.layers\.0\.mlp\.experts\.gate_up_proj.*quantization_config=pyquant\.PyQuantConfig\(\)"
    )
    with pytest.raises(CheckpointError, match=message):
        pyquant.load_pretrained(tmp_path / "packed")


@each_type
@nested_or_not
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("how", ["loaded", "replaced"])
def test_bitsandbytes_loads_what_is_saved_for_it(dense, tmp_path, token_ids, quant_type, nested, blocksize, how):
    options = {"quant_type": quant_type, "double_quant": nested, "blocksize": blocksize, "verbose": False}
    if how == "loaded":
        ours = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=PyQuantConfig(skip=["lm_head", "layers.0.mlp"], **options)
        )
    else:
        ours = AutoModelForCausalLM.from_pretrained(dense)
        pyquant.replace_linear(ours, skip=("lm_head", "layers.0.mlp"), **options)
    before = copy.copy(ours.config.__dict__)
    pyquant.save_pretrained(ours, tmp_path / "bnb", format="bitsandbytes", max_shard_size="300KB")
    assert {k: v for k, v in ours.config.__dict__.items() if k == "quantization_config"} == {
        k: v for k, v in before.items() if k == "quantization_config"
    }
    theirs = load_strictly(tmp_path / "bnb", device_map="cpu")
    assert set(layers(theirs, bitsandbytes.nn.Linear4bit)) == set(layers(ours))
    assert len(layers(ours)) == 11
    for name, layer in layers(ours).items():
        assert torch.equal(theirs.get_submodule(name).weight.data, layer.weight.data), name
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=["uint8", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
@pytest.mark.parametrize("how", ["saved", "streamed"])
def test_bitsandbytes_loads_any_storage_tied_embeddings_and_experts(tmp_path, token_ids, kind, storage, dtype, how):
    source = make_dense(tmp_path / "dense", kind)
    config = PyQuantConfig(quant_storage=storage, verbose=False)
    ours = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
    if how == "saved":
        pyquant.save_pretrained(ours, tmp_path / "bnb", format="bitsandbytes")
    else:
        pyquant.quantize_pretrained(source, tmp_path / "bnb", config, "bitsandbytes", dtype)
    theirs = load_strictly(tmp_path / "bnb", device_map="cpu")
    assert set(layers(theirs, bitsandbytes.nn.Linear4bit)) == set(layers(ours))
    assert len(layers(ours)) == (8 if kind == "experts" else 14)
    for name, layer in layers(ours).items():
        weight = theirs.get_submodule(name).weight
        assert weight.dtype == storage
        assert torch.equal(raw(weight), raw(layer.weight)), name
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (kind == "tied")
    expected = logits(theirs, token_ids)
    difference = (logits(ours, token_ids) - expected).abs().max()
    assert difference <= expected.abs().max() * (2**-6 if dtype == torch.bfloat16 else 2**-16)


def test_the_compute_dtype_is_written_out_for_bitsandbytes(dense, tmp_path):
    """bitsandbytes computes in float32 where none is named; here it is the dtype of the inputs."""
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=PyQuantConfig(verbose=False), dtype=torch.bfloat16
    )
    pyquant.save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    theirs = load_strictly(tmp_path / "bnb", device_map="cpu")
    assert {m.compute_dtype for m in layers(theirs, bitsandbytes.nn.Linear4bit).values()} == {torch.bfloat16}


def test_a_replaced_model_is_saved_for_a_plain_from_pretrained(dense, tmp_path, token_ids):
    ours = AutoModelForCausalLM.from_pretrained(dense)
    pyquant.replace_linear(ours, targets=["q_proj", "down_proj"], compute_dtype=torch.bfloat16, verbose=False)
    pyquant.replace_linear(ours, targets=["up_proj"], quant_type="fp4", blocksize=32, verbose=False)
    pyquant.save_pretrained(ours, tmp_path / "packed")
    again = load_strictly(tmp_path / "packed")
    assert set(layers(again)) == set(layers(ours))
    assert again.model.layers[0].mlp.up_proj.weight.quant_type == "fp4"
    assert again.model.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16
    assert_same_tensors(again.state_dict(), ours.state_dict())
    assert not hasattr(ours.config, "quantization_config")


def test_what_cannot_be_saved_is_refused(dense, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(dense)
    with pytest.raises(ValueError, match="the model has no 4-bit layers; quantize it"):
        pyquant.save_pretrained(model, tmp_path / "x")
    pyquant.replace_linear(model, verbose=False)
    with pytest.raises(ValueError, match="format must be 'pyquant' or 'bitsandbytes', got 'gguf'"):
        pyquant.save_pretrained(model, tmp_path / "x", format="gguf")
    model.proj = torch.nn.Linear(64, 64)  # "…q_proj" ends so
    with pytest.raises(CheckpointError, match=r"bitsandbytes matches names by their ends and would leave .* dense"):
        pyquant.save_pretrained(model, tmp_path / "x", format="bitsandbytes")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="save the adapter by itself"):
        pyquant.save_pretrained(adapted, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def in_torch_file(folder, state, **options):
    """Stores a checkpoint's weights as torch.save does: tensors that share memory are one there."""
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin", **options)


def assert_streaming_is_loading_and_saving(source, folder, config, format, dtype, cls=AutoModelForCausalLM, **options):
    """The same tensors, configuration and report. Returns the model that was loaded and saved."""
    before, after, report = pyquant.quantize_pretrained(source, folder / "streamed", config, format, dtype, **options)
    model = cls.from_pretrained(source, quantization_config=config, dtype=dtype or torch.float32)
    pyquant.save_pretrained(model, folder / "saved", format)
    streamed = weights(folder / "streamed")
    assert_same_tensors(streamed, weights(folder / "saved"))
    assert after == sum(tensor.nbytes for tensor in streamed.values())
    assert before == 4 * model.num_parameters()
    ours, theirs = (json.loads((folder / name / "config.json").read_text()) for name in ("streamed", "saved"))
    assert ours == theirs
    assert list(report) == list(model.quantization_report)
    assert {entry.name for entry in report.quantized} == set(layers(model))
    again, info = cls.from_pretrained(folder / "streamed", output_loading_info=True, device_map="cpu")
    assert not any(info.values()), info
    kind = Linear4bit if format == "pyquant" else bitsandbytes.nn.Linear4bit
    assert set(layers(again, kind)) == set(layers(model))
    return model


each_format = pytest.mark.parametrize("format", ["pyquant", "bitsandbytes"])


@each_format
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stored", ["safetensors", "torch"])
def test_streaming_writes_what_loading_and_saving_writes(dense, tmp_path, token_ids, format, dtype, stored):
    if stored == "torch":
        in_torch_file(dense, weights(dense))
    (dense / "tokenizer_config.json").write_text("{}")
    config = PyQuantConfig("fp4", 128, False, skip=["lm_head", "layers.1.mlp"], verbose=False)
    model = assert_streaming_is_loading_and_saving(dense, tmp_path, config, format, dtype, max_shard_bytes=300_000)
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 1
    assert not list((tmp_path / "streamed").glob("part-*"))
    assert (tmp_path / "streamed" / "tokenizer_config.json").exists()
    assert (tmp_path / "streamed" / "generation_config.json").exists()
    again = load_strictly(tmp_path / "streamed", device_map="cpu")
    torch.testing.assert_close(
        logits(again, token_ids), logits(model, token_ids), rtol=2e-2, atol=2e-2 if dtype else 1e-5
    )


@each_format
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_streaming_keeps_in_float32_what_the_model_keeps(tmp_path, format, dtype):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=96, **sizes)).save_pretrained(tmp_path / "t5")
    config = PyQuantConfig(verbose=False)
    model = assert_streaming_is_loading_and_saving(
        tmp_path / "t5", tmp_path, config, format, dtype, T5ForConditionalGeneration
    )
    assert len(layers(model)) == 28
    reasons = {entry.name: entry.reason for entry in model.quantization_report.dense}
    assert reasons["encoder.block.0.layer.1.DenseReluDense.wo"] == "the model keeps it in float32"
    assert weights(tmp_path / "streamed")["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.float32


def test_streaming_casts_to_the_dtypes_of_loading(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(MistralForCausalLM, "_keep_in_fp32_modules_strict", ["norm", "v_proj"])
    config = PyQuantConfig(verbose=False)
    assert_streaming_is_loading_and_saving(dense, tmp_path, config, "pyquant", torch.bfloat16)
    streamed = weights(tmp_path / "streamed")
    assert streamed["model.norm.weight"].dtype == torch.float32
    assert streamed["lm_head.weight"].dtype == torch.bfloat16


@each_format
@pytest.mark.parametrize("skip", [None, []], ids=["default skip", "no skip"])
@pytest.mark.parametrize("stored", ["once", "twice", "torch", "different"])
def test_streaming_ties_what_loading_ties(tiny_mistral, tmp_path, format, skip, stored):
    tiny_mistral.config.tie_word_embeddings = True
    tiny_mistral.tie_weights()
    tiny_mistral.save_pretrained(tmp_path / "tied")
    state = tiny_mistral.state_dict()
    if stored == "torch":
        in_torch_file(tmp_path / "tied", state)
    elif stored != "once":
        state["lm_head.weight"] = state["lm_head.weight"] + (stored == "different")
        safetensors.torch.save_file(state, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    config = PyQuantConfig(skip=skip, verbose=False)
    model = assert_streaming_is_loading_and_saving(tmp_path / "tied", tmp_path, config, format, None)
    head = model.quantization_report[-1]
    if stored == "different":
        assert head.nbytes == 4 * 96 * 64
    else:
        assert (head.name, head.nbytes, head.reason) == ("lm_head", 0, "its weight is tied to model.embed_tokens")
        assert "lm_head.weight" not in weights(tmp_path / "streamed")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_streaming_gives_tensors_of_one_memory_their_own(dense, tmp_path, zipped):
    state = weights(dense)
    state["model.norm.weight"] = state["model.layers.0.input_layernorm.weight"]
    in_torch_file(dense, state, _use_new_zipfile_serialization=zipped)
    pyquant.quantize_pretrained(dense, tmp_path / "streamed", PyQuantConfig(), "pyquant")
    again = load_strictly(tmp_path / "streamed").state_dict()
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
        assert torch.equal(again[name], state[name])


def test_streaming_holds_one_tensor_and_one_file(dense, tmp_path, monkeypatch):
    pending, alive, references = [], [], []
    save, tensors = pyquant.pretrained.save_file, pyquant.pretrained._tensors

    def watched_save(state, *args, **kwargs):
        pending.append(sum(tensor.nbytes for tensor in state.values()))
        return save(state, *args, **kwargs)

    def watched_tensors(files):
        for key, read in tensors(files):

            def watched_read(key=key, read=read):
                alive.append(sum(reference() is not None for reference in references))
                tensor = read()
                if "_proj" in key:  # the others are written as they are
                    references.append(weakref.ref(tensor))
                return tensor

            yield key, watched_read

    monkeypatch.setattr(pyquant.pretrained, "save_file", watched_save)
    monkeypatch.setattr(pyquant.pretrained, "_tensors", watched_tensors)
    pyquant.quantize_pretrained(dense, tmp_path / "streamed", PyQuantConfig(), max_shard_bytes=300_000)
    assert max(pending) <= 300_000
    assert len(pending) > 2
    assert len(references) == 14
    assert max(alive) <= 1  # the one that the next replaces


def test_streaming_leaves_experts_and_says_so(tmp_path, token_ids):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "num_hidden_layers": 2}
    config = MixtralConfig(vocab_size=96, num_attention_heads=4, num_key_value_heads=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    assert any("experts.0.w1" in key for key in weights(tmp_path / "moe")), "stored one matrix per expert"
    *_, report = pyquant.quantize_pretrained(tmp_path / "moe", tmp_path / "packed", PyQuantConfig(), "pyquant")
    assert len(report.quantized) == 8
    assert [entry.parameters for entry in report.experts] == 2 * [4 * 192 * 64, 4 * 64 * 96]
    ours = load_strictly(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", quantization_config=PyQuantConfig(verbose=False))
    assert torch.equal(ours(token_ids).logits, loaded(token_ids).logits)


def test_streaming_leaves_weights_that_loading_splits_and_says_so(dense, tmp_path, monkeypatch):
    split = WeightConverter(r"mlp\.gate_up_proj\.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "MistralForCausalLM", [split])
    file, state = one_file(dense)
    for mlp in ("model.layers.0.mlp", "model.layers.1.mlp"):
        parts = [state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]
        state[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    *_, report = pyquant.quantize_pretrained(dense, tmp_path / "packed", PyQuantConfig(), "pyquant")
    ours = load_strictly(tmp_path / "packed")
    split_layers = {f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up")}
    assert {entry.name for entry in report.dense if "not stored by itself" in entry.reason} == split_layers
    assert len(layers(ours)) == 14 - 4
    assert torch.equal(ours.model.layers[1].mlp.up_proj.weight, parts[1])


def test_streaming_refuses_what_it_cannot_do(dense, tmp_path):
    config = PyQuantConfig()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists and is not empty; give a new folder"):
        pyquant.quantize_pretrained(dense, tmp_path / "full", config)
    with pytest.raises(ValueError, match="format must be 'pyquant' or 'bitsandbytes'"):
        pyquant.quantize_pretrained(dense, tmp_path / "new", config, "gguf")
    pyquant.quantize_pretrained(dense, tmp_path / "packed", config)
    with pytest.raises(CheckpointError, match="packed is stored quantized; give the 16-bit model"):
        pyquant.quantize_pretrained(tmp_path / "packed", tmp_path / "new", config)
    for file in dense.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and"):
        pyquant.quantize_pretrained(dense, tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


def one_file(dense):
    """Puts a checkpoint's weights into one file; returns it, and them."""
    state = weights(dense)
    for file in dense.glob("model*"):
        file.unlink()
    safetensors.torch.save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    return dense / "model.safetensors", state


def infinite(dense):
    file, state = one_file(dense)
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


def truncated(dense):
    file, _ = one_file(dense)
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_torch_file(dense):
    in_torch_file(dense, weights(dense))
    file = dense / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def missing(dense):
    min(dense.glob("model-*.safetensors")).unlink()


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "empty folder"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (infinite, r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or infinity"),
        (truncated, r"model\.safetensors cannot be read \(.*\); fetch the model again"),
        (truncated_torch_file, r"pytorch_model\.bin cannot be read \(.*\); fetch the model again"),
        (missing, r"model-00001-of-.*\.safetensors cannot be read \(No such file .*\); fetch the model again"),
    ],
    ids=["infinite", "truncated", "truncated torch file", "missing"],
)
def test_streaming_that_fails_leaves_nothing(dense, tmp_path, damage, message, there):
    damage(dense)
    new = tmp_path / "over" / "new"
    if there:
        new.mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        pyquant.quantize_pretrained(dense, new, PyQuantConfig(), max_shard_bytes=300_000)
    assert list(tmp_path.rglob("over*")) == ([tmp_path / "over"] if there else [])
    if there:
        assert list(new.iterdir()) == []


def test_a_full_disk_leaves_nothing(dense, tmp_path, monkeypatch):
    save, saved = pyquant.pretrained.save_file, []

    def save_two(*args, **kwargs):
        if len(saved) == 2:
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
        saved.append(save(*args, **kwargs))

    monkeypatch.setattr(pyquant.pretrained, "save_file", save_two)
    with pytest.raises(safetensors.SafetensorError, match="No space left"):
        pyquant.quantize_pretrained(dense, tmp_path / "new", PyQuantConfig(), max_shard_bytes=300_000)
    assert len(saved) == 2
    assert not (tmp_path / "new").exists()
