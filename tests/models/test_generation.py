"""Generation: greedy answers equal transformers', in any batch; samples follow the seed; finish reasons."""

import pytest
import torch

from preflab.data.chat_template import ChatRenderer
from preflab.models.generation import generate
from preflab.models.loading import BUILTIN, load_model, load_tokenizer

PROMPTS = [
    [{"role": "user", "content": "Name a colour."}],
    [{"role": "user", "content": "Write one short sentence about the sea, please."}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Capital of France?"}],
]


@pytest.fixture(scope="module")
def builtin():
    return load_model(BUILTIN).eval(), load_tokenizer(BUILTIN)


def answers(model, tokenizer, **kwargs) -> list[dict]:
    return sorted(generate(model, tokenizer, PROMPTS, **kwargs), key=lambda a: a["index"])


def test_greedy_answers_equal_transformers(builtin):
    model, tokenizer = builtin
    generated = answers(model, tokenizer, max_new_tokens=8)
    assert [a["index"] for a in generated] == [0, 1, 2]
    for messages, answer in zip(PROMPTS, generated, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer["text"] == tokenizer.decode(out, skip_special_tokens=True).strip()
        stopped = tokenizer.eos_token_id in out.tolist()
        assert answer["finish_reason"] == ("stop" if stopped else "length")
        assert answer["tokens"] == (out.tolist().index(tokenizer.eos_token_id) if stopped else 8)
    assert answers(model, tokenizer, max_new_tokens=8, batch_tokens=1) == generated


def test_samples_follow_the_seed_only(tiny):
    model, tokenizer = load_model(str(tiny)).eval(), load_tokenizer(str(tiny))
    state = torch.get_rng_state()
    first = answers(model, tokenizer, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first == answers(model, tokenizer, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != answers(model, tokenizer, max_new_tokens=8, temperature=1.0, seed=2)


def test_prompt_ends_where_the_answer_starts(smol_tokenizer):
    assert ChatRenderer(smol_tokenizer).prompt_text(PROMPTS[0]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 1.0, "top_k": 40, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_streamed_text_is_the_answer(kwargs, builtin):
    """Of a batch: the answers are unchanged, each grows token by token, and the last report is the complete text."""
    model, tokenizer = builtin
    seen = {}
    streamed = answers(
        model, tokenizer, max_new_tokens=8, on_text=lambda i, t: seen.setdefault(i, []).append(t), **kwargs
    )
    assert streamed == answers(model, tokenizer, max_new_tokens=8, **kwargs)
    for answer in streamed:
        texts = seen[answer["index"]]
        assert texts[-1] == answer["text"] and len(set(texts)) > 1
        assert len(texts) == answer["tokens"] + (answer["finish_reason"] == "stop")
        assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
