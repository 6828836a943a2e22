"""Sampled answers: correctly distributed, and independent of the other rows of the batch."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare

from preflab.models.generation import generate
from preflab.models.loading import load_model, load_tokenizer
from preflab.models.sampling import Sampled, Sampler

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])


def drawn(seeds, steps=1, temperature=1.0, top_p=1.0, logits=LOGITS, top_k=0) -> np.ndarray:
    """Sampled tokens, shape (steps, rows)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampling = Sampled(Sampler(temperature, top_p, top_k), generators)
    scores = torch.tensor(logits, dtype=torch.float32).expand(len(seeds), -1)
    return np.stack([sampling(None, scores.clone()).argmax(-1).numpy() for _ in range(steps)])


def p_value(tokens, probabilities) -> float:
    return chisquare(np.bincount(tokens.ravel(), minlength=len(probabilities)), tokens.size * probabilities).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sample_frequencies_equal_softmax(temperature):
    expected = softmax(LOGITS / temperature)
    for tokens in (drawn(range(4000), temperature=temperature), drawn([7], 4000, temperature)):
        assert p_value(tokens, expected) > 1e-3
    # The test can fail: it rejects another temperature.
    assert p_value(drawn(range(4000), temperature=temperature), softmax(LOGITS / temperature / 1.25)) < 1e-3


def test_draws_are_independent_between_steps():
    tokens = drawn([3], 6001).ravel()
    p = softmax(LOGITS)
    after_top = tokens[1:][tokens[:-1] == 0]
    assert len(after_top) > 2000 and p_value(after_top, p) > 1e-3


def test_rows_depend_on_their_own_seed_only():
    tokens = drawn([5, 9, 5], 200)
    assert (tokens[:, 0] == tokens[:, 2]).all() and (tokens[:, 0] != tokens[:, 1]).any()
    assert (drawn([9], 200)[:, 0] == tokens[:, 1]).all(), "a row's draws depend on the rows beside it"


def test_top_p_removes_the_tail_only():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    tokens = drawn(range(3000), top_p=0.7, logits=np.log(p))
    assert set(tokens.ravel()) == {0, 1} and p_value(tokens[tokens < 2], np.array([0.5, 0.3]) / 0.8) > 1e-3
    assert set(drawn(range(3000), top_p=0.9, logits=np.log(p)).ravel()) == {0, 1, 2}
    assert set(drawn(range(300), top_p=0.01, logits=np.log(p)).ravel()) == {0}


@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["peaked", "flat"])
def test_nucleus_equals_transformers(spread):
    """Peaked: the nucleus is within the 256 most likely tokens that are searched first. Flat: it is larger."""
    from transformers import TopPLogitsWarper

    logits = spread * np.random.default_rng(1).standard_normal(1000)
    warped = TopPLogitsWarper(0.8)(None, torch.tensor(logits)[None])
    nucleus = set(warped[0].isfinite().nonzero()[:, 0].tolist())
    assert (len(nucleus) > 256) == (spread < 1)
    tokens = drawn(range(3000), top_p=0.8, logits=logits).ravel()
    p = softmax(logits)
    likely = [k for k in nucleus if 3000 * p[k] / 0.8 > 12]
    assert set(likely) <= set(tokens) <= nucleus and (len(set(tokens)) > 256) == (spread < 1)
    if likely:
        inside = np.array([likely.index(t) for t in tokens if t in likely])
        assert p_value(inside, p[likely] / p[likely].sum()) > 1e-3


def test_top_p_applies_after_temperature():
    # At temperature 0.5 the first of 0.5, 0.3, 0.2 has 0.25 / 0.38 = 0.66 of the mass, above 0.6.
    logits = np.log([0.5, 0.3, 0.2])
    assert set(drawn(range(500), temperature=0.5, top_p=0.6, logits=logits).ravel()) == {0}
    assert set(drawn(range(500), temperature=1.0, top_p=0.6, logits=logits).ravel()) == {0, 1}


PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "Why?",
        "Tell me of the sea, at some length, please. " * 3,
        "Name a colour.",
        "Who are you " * 9,
        "2+2",
    )
]


@pytest.mark.parametrize("kind", ["tiny", "tiny_gemma2"])
def test_sampled_answer_is_independent_of_its_batch(kind, request):
    folder = str(request.getfixturevalue(kind))
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    with torch.no_grad():
        # A randomly initialised model hardly uses its context: larger weights make unmasked padding visible.
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix.mul_(8)

    def answers(prompts, **extra) -> dict:
        generated = list(generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, **extra))
        assert sorted(a["index"] for a in generated) == list(range(len(prompts)))
        return {prompts[a.pop("index")][0]["content"]: a for a in generated}

    alone = answers(PROMPTS, batch_tokens=1)
    assert len({a["text"] for a in alone.values()}) == len(PROMPTS)
    assert answers(PROMPTS, batch_tokens=100_000) == alone
    assert answers(PROMPTS[::-1], batch_tokens=100_000) == alone
    assert answers(PROMPTS[1:3], batch_tokens=300) == {k: alone[k] for k in (p[0]["content"] for p in PROMPTS[1:3])}
    assert answers(PROMPTS, top_p=0.2) != alone


def test_generation_config_of_the_model_is_ignored(tiny):
    model, tokenizer = load_model(str(tiny)).eval(), load_tokenizer(str(tiny))
    expected = [list(generate(model, tokenizer, PROMPTS[:2], max_new_tokens=12, temperature=t)) for t in (0.0, 1.0)]
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    generated = [list(generate(model, tokenizer, PROMPTS[:2], max_new_tokens=12, temperature=t)) for t in (0.0, 1.0)]
    assert generated == expected and model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (3, 0.7), (0, 0.7)])
def test_top_k_equals_transformers(top_k, top_p):
    """Top-k, then top-p of what is left, as transformers applies its warpers."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    warped = torch.tensor(LOGITS)[None]
    for warper in ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else []):
        warped = warper(None, warped)
    expected = warped[0].softmax(0).numpy()
    tokens = drawn(range(3000), top_p=top_p, top_k=top_k).ravel()
    left = np.flatnonzero(expected)
    assert set(tokens) == set(left)
    assert p_value(np.searchsorted(left, tokens), expected[left]) > 1e-3
