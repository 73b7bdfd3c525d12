import pytest
import torch

from pyquant.demo.convert import convert_gguf

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS = 6, 2
CORPUS = ["the cat sat on the mat in 1984", "the best of 20 cats"]


def permute(weight, heads):
    """llama.cpp's own row order for RoPE, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


@pytest.fixture
def gguf_file(tmp_path, llama, tokenizer):
    import json

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    config = llama.config
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(160)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") and len(t) > 2 else 1 for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem = next(new for old, new in names.items() if old in name)
        prefix = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permute(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(f"{prefix}{stem}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_converted_model_computes_the_same(tmp_path, gguf_file, llama, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert_gguf(gguf_file, tmp_path / "converted", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.sliding_window is None
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)

    converted = AutoTokenizer.from_pretrained(folder)
    for text in (*CORPUS, "cat's  42\n\nhat é", "<start>the cat<end>"):
        ids = converted(text)["input_ids"]
        if "<" not in text:
            assert ids == tokenizer.encode(text).ids
        assert converted.decode(ids) == text
    assert converted("<start>the<end>")["input_ids"][0] == converted.bos_token_id == 1
    assert converted.pad_token_id == converted.eos_token_id == 2
    assert not list(tmp_path.glob("*.partial*"))


def test_another_architecture_is_refused(tmp_path):
    file = tmp_path / "g.gguf"
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a gpt2 model"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
