"""The sequence log-probability against an independent slow loop, and its invariances."""

import pytest
import torch
from conftest import make_pairs, write_jsonl

from utils.logps import attach_head, pair_batches, sequence_logps
from utils.models import load_model, load_tokenizer
from utils.preferences import load_pairs, tokenize


def slow_logp(model, prompt: list[int], answer: list[int]) -> float:
    """log pi(answer | prompt), one row, no padding, token by token from the plain forward's logits in float64."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    total = 0.0
    for position, token in enumerate(answer, start=len(prompt)):
        row = logits[position - 1]
        total += float(row[token] - torch.logsumexp(row, 0))
    return total


@pytest.fixture(params=["tiny", "tiny_gemma2"])
def setup(request, tmp_path):
    folder = request.getfixturevalue(request.param)
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder)).eval()
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", make_pairs(6))), "split": "train"}])
    rows, _ = tokenize(data, tokenizer, None, None)
    return model, tokenizer, rows


def scored(model, tokenizer, rows, batch_size, pad_to=None) -> dict[int, list[float]]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=pad_to)
    found = {}
    with torch.no_grad():
        for take, batch in pair_batches(rows, collator, batch_size):
            logps = sequence_logps(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "completion_mask")})
            assert logps.dtype == torch.float32
            found.update({i: [c, r] for i, c, r in zip(take, *(t.tolist() for t in logps.chunk(2)), strict=True)})
    return found


def test_equals_the_slow_loop_whatever_padding_and_batch(setup):
    model, tokenizer, rows = setup
    with torch.no_grad():
        wanted = {
            i: [slow_logp(model, r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids")]
            for i, r in enumerate(rows)
        }
    attach_head(model)
    for batch_size, pad_to in ((1, None), (2, None), (6, None), (3, 64)):
        found = scored(model, tokenizer, rows, batch_size, pad_to)
        assert sorted(found) == list(range(6))
        for i, sides in wanted.items():
            assert found[i] == pytest.approx(sides, abs=1e-4), (batch_size, pad_to, i)


def test_softcap_is_applied(tiny_gemma2):
    """Without the final-logit softcap the figures would differ: the head must know it."""
    model = load_model(str(tiny_gemma2)).eval()
    assert model.config.final_logit_softcapping
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        model.lm_head.weight.mul_(200)  # tied; makes raw logits large enough for the cap to bite
        plain = slow_logp(model, ids[0, :5].tolist(), ids[0, 5:].tolist())
        attach_head(model)
        mask = (torch.arange(20) >= 5).long()[None]
        capped = sequence_logps(model, ids, torch.ones_like(ids), mask).item()
        cap, model.config.final_logit_softcapping = model.config.final_logit_softcapping, None
        uncapped = slow_logp(model, ids[0, :5].tolist(), ids[0, 5:].tolist())
    assert cap and capped == pytest.approx(plain, rel=1e-5) and abs(uncapped - plain) > 1


def test_prompt_positions_do_not_count(setup):
    """Skipping prompt positions (on every device) changes no value against TRL's own all-positions head."""
    import trl.trainer.utils
    from trl.trainer.utils import add_fused_lm_head

    model, tokenizer, rows = setup
    attach_head(model)
    ours = scored(model, tokenizer, rows, 3)
    compact = trl.trainer.utils._use_triton
    try:
        trl.trainer.utils._use_triton = lambda device: False
        again = load_model(model.name_or_path).eval()
        add_fused_lm_head(again)
        theirs = scored(again, tokenizer, rows, 3)
    finally:
        trl.trainer.utils._use_triton = compact
    for i in ours:
        assert ours[i] == pytest.approx(theirs[i], abs=1e-4)
