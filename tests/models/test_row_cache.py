"""Rows decoded together without padding: tokens equal those of transformers' `generate`, row by row."""

import random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_shared_prompt import ARCHITECTURES, tiny

from preflab.models import generation
from preflab.models.fast import row_cache
from preflab.models.fast.row_cache import RowCache, Spans, Step, next_logits, rounded, supports
from preflab.models.generation import Request, answers_by_batch, answers_by_row
from preflab.models.sampling import Sampler

# Many, so that tiny models end some answers early.
STOPS = {2, *range(6, 26)}
LENGTHS = (5, 40, 17, 3, 60, 8, 9, 10, 33, 12)


def prompts_of(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 120, (n,), generator=generator).tolist() for n in lengths]


def answered(model, prompts, budget, size=None, way=answers_by_row, sampler=None, room=16, show=None):
    """The tokens of each prompt's answer."""
    requests = [Request(i, ids, room, torch.Generator().manual_seed(i)) for i, ids in enumerate(prompts)]
    names = SimpleNamespace(pad_token_id=0, bos_token_id=1)
    done = {r.index: r.tokens for r in way(model, names, requests, STOPS, sampler, budget, size, show)}
    assert sorted(done) == list(range(len(prompts)))
    return [done[i] for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_equal_transformers(kind):
    """In every architecture, with windows and softcaps, for any budget and number of rows."""
    model, prompts = tiny(kind), prompts_of()
    assert supports(model)
    alone = answered(model, prompts, 1, way=answers_by_batch)
    assert len({len(answer) for answer in alone}) > 1, "no answer ends early"
    for budget, size in ((200, None), (5000, 3)):
        assert answered(model, prompts, budget, size) == alone, (budget, size)


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3Text", "Llama"])
def test_the_way_of_a_gpu_gives_the_same_tokens(kind, monkeypatch):
    """Rows copied together by index, and tokens read once in several steps."""
    model, prompts = tiny(kind), prompts_of()
    expected = answered(model, prompts, 400)
    by_index = []
    monkeypatch.setattr(row_cache, "strided", lambda device: by_index.append(1) and False)
    monkeypatch.setattr(generation, "steps_per_read", lambda device: 8)
    assert answered(model, prompts, 400) == expected and by_index


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("state", ["active", "disabled", "dora"])
def test_adapters(kind, state):
    """Active, disabled and of a kind that is not merged; the model's weights are the same objects and values after."""
    torch.manual_seed(3)
    model = get_peft_model(tiny(kind), LoraConfig(r=4, target_modules="all-linear", use_dora=state == "dora")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = {name: (p, p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    prompts = prompts_of()
    plain = answered(model.get_base_model(), prompts, 1, way=answers_by_batch) if state != "active" else None
    if state == "disabled":
        with model.disable_adapter():
            expected = answered(model, prompts, 1, way=answers_by_batch)
            assert answered(model, prompts, 5000) == expected != plain
    else:
        assert answered(model, prompts, 5000) == answered(model, prompts, 1, way=answers_by_batch)
    for name, parameter in model.named_parameters():
        same, values, place = before[name]
        assert parameter is same and parameter.data_ptr() == place and torch.equal(parameter, values)
    assert forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def test_forwards_are_restored_where_a_caller_stops_early():
    model = tiny("Llama")
    requests = [Request(i, ids, 20, None) for i, ids in enumerate(prompts_of())]
    answers = answers_by_row(model, None, requests, STOPS, None, 5000, None, None)
    next(answers)
    assert "forward" in model.lm_head.__dict__
    answers.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_do_not_depend_on_the_rows_beside_them(top_p):
    model, prompts, sampler = tiny("Llama"), prompts_of(), Sampler(1.0, top_p)
    alone = answered(model, prompts, 1, sampler=sampler)
    assert answered(model, prompts, 5000, sampler=sampler) == alone
    assert answered(model, prompts, 300, 4, sampler=sampler) == alone
    assert answered(model, prompts, 1, way=answers_by_batch, sampler=sampler) == alone != answered(model, prompts, 1)


@pytest.mark.parametrize("budget", [100, 300, 1000])
def test_memory_is_bounded_by_the_budget(budget, monkeypatch):
    """Prompt and longest answer of all rows together, and the tensors of the cache."""
    caches, most = [], []

    class Watched(RowCache):
        def __init__(self, tokens):
            super().__init__(tokens)
            caches.append(self)

    def join(*args):
        joined = original(*args)
        most.append(caches[-1].tokens - sum(size for _, size in caches[-1].spans.free))
        return joined

    original = generation._join
    monkeypatch.setattr(generation, "RowCache", Watched)
    monkeypatch.setattr(generation, "_join", join)
    model, prompts = tiny("Llama"), prompts_of()
    answered(model, prompts, budget)
    longest = rounded(60 + 16)
    assert max(most) <= max(budget, longest) and caches[0].tokens <= max(budget, longest)
    # It is used, too: more than half of the budget, or all prompts.
    assert max(most) > min(budget, sum(rounded(n + 16) for n in LENGTHS)) / 2
    stored = sum(x.numel() for layer in caches[0].layers.values() for x in layer)
    assert stored == caches[0].tokens * 2 * 4 * 2 * 8, "layers × keys and values × key heads × width"


def test_rows_that_end_make_room_at_once(monkeypatch):
    """Answers end after 1 to 20 tokens: far fewer steps than batches that wait for their longest answer would take."""
    model, sizes = tiny("Llama"), []
    ends = [1 + 19 * (k % 2) for k in range(40)]

    class Ends:
        def __call__(self, scores, rows):
            sizes.append(len(rows))
            tokens = torch.full((len(rows),), 50)
            for k, row in enumerate(rows):
                row[0] -= 1
                tokens[k] = 2 if row[0] == 0 else 50
            return tokens

    requests = [Request(i, ids, 20, [ends[i]]) for i, ids in enumerate(prompts_of([9] * 40))]
    done = list(answers_by_row(model, None, requests, STOPS, Ends(), 8 * rounded(29), None, None))
    assert sorted(len(r.tokens) for r in done) == sorted(ends) and max(sizes) == 8
    # 20 answers of 20 tokens over 8 rows: at least 50 steps; 5 batches of 8 take 100.
    assert len(sizes) <= 65


def test_spans_never_overlap():
    """Random requests and returns; at the end everything is one free part."""
    rng, spans, taken = random.Random(0), Spans(500), []
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            spans.give_back(*taken.pop(rng.randrange(len(taken))))
        else:
            size = rng.randint(1, 90)
            start = spans.take(size)
            if start is None:
                assert all(free < size for _, free in spans.free)
                continue
            assert 0 <= start <= 500 - size
            assert all(start + size <= s or s + n <= start for s, n in taken)
            taken.append((start, size))
        assert sum(n for _, n in spans.free) + sum(n for _, n in taken) == 500
    for span in taken:
        spans.give_back(*span)
    assert spans.free == [(0, 500)]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 1034, 40_000])
def test_rounding_adds_little(tokens):
    assert tokens <= rounded(tokens) <= max(tokens * 1.26, tokens + 15)


def test_damaged_memory_of_other_rows_does_not_matter():
    """Values left by rows that ended are masked: the logits do not change."""
    model, (ids,) = tiny("Llama"), prompts_of([30])
    logits = []
    for left in (0.0, 1e4):
        cache = RowCache(128)
        with torch.inference_mode():
            next_logits(model, torch.tensor(ids), Step(cache, [], [(32, 30)], model.device))
            for layer in cache.layers.values():
                for stored in layer:
                    stored[:, :32], stored[:, 62:] = left, left
            step = Step(cache, [(32, 31)], [], model.device)
            logits.append(next_logits(model, torch.tensor([9]), step))
    assert torch.equal(*logits)


def test_architectures_outside_the_list_are_answered_in_batches():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=120, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    assert not supports(model)
    prompts = prompts_of()
    assert answered(model, prompts, 5000, way=answers_by_batch) == answered(model, prompts, 1, way=answers_by_batch)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_longest_row_are_not_mixed(rope):
    model = tiny("Llama")
    model.config.rope_parameters = {"rope_type": rope, "factor": 2.0}
    assert not supports(model)
