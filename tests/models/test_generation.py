"""Generation: greedy answers equal transformers', in any batch; samples follow the seed; finish reasons."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from preflab.data.chat_template import ChatRenderer
from preflab.data.preferences import load_pairs
from preflab.evaluation.held_out import SHIPPED_PAIRS
from preflab.models.fast import fused_lora
from preflab.models.generation import generate
from preflab.models.loading import BUILTIN, load_model, load_tokenizer
from utils.provenance import ROOT

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


def one_row(model, ids: list[int], limit: int, stops: set[int]) -> list[int]:
    """The greedy answer to one prompt, token by token."""
    tokens, cache, inputs = [], None, torch.tensor([ids])
    with torch.inference_mode():
        while len(tokens) < limit:
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = int(out.logits[0, -1].argmax()), out.past_key_values
            if token in stops:
                break
            tokens.append(token)
            inputs = torch.tensor([[token]])
    return tokens


@pytest.mark.parametrize(
    ("count", "adapter"),
    [(3, True), *(pytest.param(200, adapter, marks=pytest.mark.slow) for adapter in (False, True))],
)
def test_greedy_texts_equal_a_loop_over_rows(count, adapter, builtin):
    """Real weights, prompts of the shipped pairs and of up to four of them in a row, in float32."""
    model, tokenizer = builtin
    if adapter:
        model = with_adapter(load_model(BUILTIN))
    texts, limit = list(dict.fromkeys(pair.messages[-1]["content"] for pair in shipped_pairs())), 16
    contents = [" ".join(texts[i : i + 1 + i % 4]) for i in range(count)]
    assert len(contents) == len(set(contents)) == count
    prompts = [[{"role": "user", "content": content}] for content in contents]
    chat = ChatRenderer(tokenizer)
    stops = {tokenizer.eos_token_id, *chat.end_ids()}
    expected = [
        tokenizer.decode(one_row(model, ids, limit, stops), skip_special_tokens=True).strip()
        for ids in chat.ids([chat.prompt_text(messages) for messages in prompts])
    ]
    generated = sorted(generate(model, tokenizer, prompts, limit), key=lambda a: a["index"])
    assert [a["text"] for a in generated] == expected


def with_adapter(model):
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    fused_lora.attach(tuned)
    return tuned.eval()


def shipped_pairs() -> list:
    source = {"name": str(ROOT / SHIPPED_PAIRS), "split": "train", "config": None, "revision": None}
    return load_pairs([source], keep_duplicate_prompts=True).pairs
