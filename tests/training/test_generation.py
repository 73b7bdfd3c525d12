import pytest
import torch

from pyquant.generation import Conversation, generate_batch, generate_text, load_for_inference
from pyquant.training.config import QuantizationConfig
from pyquant.training.errors import ConfigError
from pyquant.training.quantize import quantize


def test_the_trained_adapter_answers(tiny_model, adapter):
    model, tokenizer = load_for_inference(str(tiny_model), str(adapter), precision="fp32")
    answers = {p: generate_text(model, tokenizer, p, 8, chat_template="never") for p in ("red red", "red blue")}
    assert answers == {"red red": "yes", "red blue": "no"} or set(answers.values()) <= {"yes", "no"}
    base, _ = load_for_inference(str(tiny_model), precision="fp32")
    assert generate_text(base, tokenizer, "red red", 8, chat_template="never") not in ("yes", "no")


def test_an_adapter_brings_its_quantization(tiny_model, adapter):
    def types(model):
        return {type(m).__name__ for m in model.modules()}

    four_bit, _ = load_for_inference(str(tiny_model), str(adapter))
    layers = [m for m in four_bit.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert {(m.weight.quant_state.quant_type, m.weight.quant_state.blocksize) for m in layers} == {("fp4", 128)}
    assert "LoraLinear4bit" in types(four_bit)
    assert "Linear4bit" not in types(load_for_inference(str(tiny_model), str(adapter), "none")[0])
    assert "Linear4bit" not in types(load_for_inference(str(tiny_model))[0])


@pytest.mark.parametrize("format", ["pyquant", "bitsandbytes"])
def test_a_model_stored_in_4_bits_is_used_as_it_is(tiny_model, adapter, tmp_path, format):
    stored = QuantizationConfig(method="fp4", blocksize=128)
    quantize(str(tiny_model), tmp_path / "packed", stored, "fp32", format)
    ours, tokenizer = load_for_inference(str(tmp_path / "packed"), str(adapter), precision="fp32")
    expected, _ = load_for_inference(str(tiny_model), str(adapter), precision="fp32")
    ids = tokenizer("red blue", return_tensors="pt")["input_ids"]
    assert torch.equal(ours(ids).logits, expected(ids).logits)
    with pytest.raises(ConfigError, match="is stored quantized already; leave --quant-type at auto"):
        load_for_inference(str(tmp_path / "packed"), quant_type="nf4")


def test_greedy_is_the_likeliest_token_and_sampling_is_seeded(tiny_model):
    model, tokenizer = load_for_inference(str(tiny_model), precision="fp32")
    ids = tokenizer("red", return_tensors="pt")["input_ids"].to(model.device)
    expected = []
    with torch.no_grad():
        for _ in range(5):
            token = model(ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            expected.append(int(token))
            ids = torch.cat([ids, token.view(1, 1)], 1)
    text = generate_text(model, tokenizer, "red", 5, chat_template="never")
    assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()

    def sample(seed):
        torch.manual_seed(seed)
        return generate_text(model, tokenizer, "red", 12, temperature=1.0, chat_template="never")

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


PROMPTS = ["red red", "red blue", "the cat sat on the mat", "green", "blue blue green red"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_answers_as_one_by_one(tiny_model, adapter, batch_size):
    model, tokenizer = load_for_inference(str(tiny_model), str(adapter), precision="fp32")
    for template in ("never", "always"):
        alone = [generate_text(model, tokenizer, prompt, 8, chat_template=template) for prompt in PROMPTS]
        answers = generate_batch(model, tokenizer, PROMPTS, 8, batch_size, template)
        assert [answer.text for answer in answers] == alone
    assert len(set(alone)) > 1


def test_an_answer_knows_whether_it_ended(tiny_model, adapter):
    model, tokenizer = load_for_inference(str(tiny_model), str(adapter), precision="fp32")
    (whole,) = generate_batch(model, tokenizer, ["red red"], 8, chat_template="never")
    assert whole.ended
    assert whole.tokens == len(tokenizer(" " + whole.text, add_special_tokens=False)["input_ids"]) + 1
    (cut,) = generate_batch(model, tokenizer, ["red red"], whole.tokens - 1, chat_template="never")
    assert (cut.text, cut.tokens, cut.ended) == (whole.text, whole.tokens - 1, False)


def test_a_compiled_batch_answers_the_same(tiny_model, adapter):
    model, tokenizer = load_for_inference(str(tiny_model), str(adapter), precision="fp32")
    expected = generate_batch(model, tokenizer, PROMPTS, 6, 2, "never")
    calls, base = [], model.get_base_model()
    compiled = base.get_compiled_call
    base.get_compiled_call = lambda config: calls.append(config) or compiled(config)
    assert generate_batch(model, tokenizer, PROMPTS, 6, 2, "never", compiled=True) == expected
    assert len(calls) == 3  # every batch of two


def test_a_conversation_is_the_template_of_all_its_messages(tiny_model):
    model, tokenizer = load_for_inference(str(tiny_model), precision="fp32")
    conversation = Conversation(model, tokenizer, system="blue", max_new_tokens=6)
    pieces = []
    first = conversation.reply("red", pieces.append)
    assert "".join(pieces).strip() == first.text
    messages = [{"role": "system", "content": "blue"}, {"role": "user", "content": "red"}]
    assert conversation.messages == [*messages, {"role": "assistant", "content": first.text}]
    second = conversation.reply("green")
    messages = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": "green"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert second.text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    conversation.reset()
    assert conversation.messages == messages[:1]
    assert conversation.reply("red").text == first.text


def test_a_conversation_beyond_the_context_loses_its_oldest_exchanges(tiny_model):
    model, tokenizer = load_for_inference(str(tiny_model), precision="fp32")
    room = model.config.max_position_embeddings
    conversation = Conversation(model, tokenizer, system="blue", max_new_tokens=4)
    conversation.messages += [
        {"role": role, "content": "red " * (room // 5)} for _ in range(4) for role in ("user", "assistant")
    ]
    ids = conversation._ids([*conversation.messages, {"role": "user", "content": "green"}])
    assert ids.shape[1] <= room - 4
    kept = tokenizer.decode(ids[0])
    assert "blue" in kept
    assert kept.rstrip().endswith(tokenizer.decode(conversation._ids([{"role": "user", "content": "green"}])[0])[-8:])
    with pytest.raises(ConfigError, match=f"has room for {room - 4}"):
        conversation.reply("red " * room)
    assert len(conversation.messages) == 9


def test_an_interrupted_answer_is_forgotten(tiny_model):
    model, tokenizer = load_for_inference(str(tiny_model), precision="fp32")
    conversation = Conversation(model, tokenizer, max_new_tokens=8)
    first = conversation.reply("red")

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.reply("blue", interrupt)
    assert [message["content"] for message in conversation.messages] == ["red", first.text]


def test_a_conversation_needs_a_chat_template(tiny_model):
    model, tokenizer = load_for_inference(str(tiny_model), precision="fp32")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template; pyquant generate"):
        Conversation(model, tokenizer)
