import math

import pytest
import torch

from pyquant.training.config import ModelConfig
from pyquant.training.errors import DataError
from pyquant.training.evaluate import accuracy, perplexity, rank_labels
from pyquant.training.models import load_base, load_tokenizer


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_base(ModelConfig(path=str(tiny_model), precision="fp32")).eval(), load_tokenizer(str(tiny_model))


def log_probs(model, ids):
    """Log-probability of each token after the first, one sequence at a time: the plain definition."""
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:], device=model.device)[:, None])[:, 0]


PROMPTS = ["red", "the cat sat on the mat", "red blue", "red green green blue", "red x"]


@pytest.mark.parametrize("labels", [["yes", "no"], [" yes", " nono no", " z", " yes yes"]])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_labels_rank_as_by_definition(loaded, labels, batch_size):
    model, tokenizer = loaded
    # The first prompts share a beginning, the last case does not; both paths must agree with the definition.
    for prompts in (PROMPTS, [p for p in PROMPTS if p.startswith("red")]):
        expected = []
        for prompt in prompts:
            alone = tokenizer(prompt)["input_ids"]
            whole = [tokenizer(prompt + label)["input_ids"] for label in labels]
            # Tokens may merge across the boundary; all labels are then scored from the first token that changed.
            start = next(
                (i for i, column in enumerate(zip(alone, *whole, strict=False)) if len(set(column)) > 1), len(alone)
            )
            means = [log_probs(model, ids)[start - 1 :].mean().item() for ids in whole]
            expected.append(max(range(len(labels)), key=means.__getitem__))
        assert rank_labels(model, tokenizer, prompts, labels, batch_size) == expected


def test_length_is_normalised(loaded):
    """A long label made of likely tokens beats a short unlikely one, which a sum of log-probabilities would prefer."""
    model, tokenizer = loaded
    prompt = "red"
    start = len(tokenizer(prompt)["input_ids"])
    words = [" yes", " no", " blue", " green", " cat", " mat"]
    score = {w: log_probs(model, tokenizer(prompt + w)["input_ids"])[start - 1 :] for w in words}
    labels = sorted(words, key=lambda w: score[w].mean())
    assert rank_labels(model, tokenizer, [prompt], labels) == [len(labels) - 1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_definition(loaded, batch_size):
    model, tokenizer = loaded
    every = torch.cat([log_probs(model, tokenizer(p)["input_ids"]) for p in PROMPTS])
    found = perplexity(model, tokenizer, PROMPTS, batch_size=batch_size)
    assert found == pytest.approx(math.exp(-every.mean()), rel=1e-4)

    answers = [" yes", " no", " blue", " yes", " no"]
    kept = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        kept.append(log_probs(model, ids)[len(tokenizer(prompt)["input_ids"]) - 1 :])
    found = perplexity(model, tokenizer, answers, PROMPTS, batch_size=batch_size)
    assert found == pytest.approx(math.exp(-torch.cat(kept).mean()), rel=1e-4)


def test_perplexity_of_nothing_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(model, tokenizer, [""])


def test_accuracy():
    assert accuracy([1, 2, 0, 0], [1, 0, 0, 3]) == 0.5
