"""Sequence log-probabilities: equal to a slow loop over tokens, in any batch and with any padding."""

import pytest
import torch
from conftest import make_pairs, write_jsonl
from helpers import slow_logp

from preflab.data.preferences import load_pairs, tokenize
from preflab.models.loading import load_model, load_tokenizer
from preflab.models.logprobs import (
    attach_head,
    captured_hidden,
    head_logits,
    kl_divergence,
    pair_batches,
    sequence_logps,
)


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
    scores = {}
    with torch.no_grad():
        for rows_of_batch, batch in pair_batches(rows, collator, batch_size):
            logps = sequence_logps(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "completion_mask")})
            assert logps.dtype == torch.float32
            scores.update(
                {i: [c, r] for i, c, r in zip(rows_of_batch, *(t.tolist() for t in logps.chunk(2)), strict=True)}
            )
    return scores


def test_log_probs_equal_the_slow_loop(setup):
    model, tokenizer, rows = setup
    with torch.no_grad():
        expected = {
            i: [slow_logp(model, r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids")]
            for i, r in enumerate(rows)
        }
    attach_head(model)
    for batch_size, pad_to in ((1, None), (2, None), (6, None), (3, 64)):
        result = scored(model, tokenizer, rows, batch_size, pad_to)
        assert sorted(result) == list(range(6))
        for i, sides in expected.items():
            assert result[i] == pytest.approx(sides, abs=1e-4), (batch_size, pad_to, i)


def test_softcap_is_applied(tiny_gemma2):
    """The head applies the final-logit softcap; without it the log-probability would differ by more than 1 nat."""
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


def test_log_probs_equal_trl_on_all_positions(setup):
    """Skipping prompt positions and the CPU head change no value against TRL's head on all positions."""
    import trl.kernels
    import trl.trainer.utils
    from trl.trainer.utils import add_fused_lm_head

    model, tokenizer, rows = setup
    attach_head(model)
    result = scored(model, tokenizer, rows, 3)
    compact, head = trl.trainer.utils._use_triton, trl.trainer.utils._ChunkedLogProbFunction
    try:
        trl.trainer.utils._use_triton = lambda device: False
        trl.trainer.utils._ChunkedLogProbFunction = trl.kernels.ChunkedLogProbFunction
        again = load_model(model.name_or_path).eval()
        add_fused_lm_head(again)
        all_positions = scored(again, tokenizer, rows, 3)
    finally:
        trl.trainer.utils._use_triton, trl.trainer.utils._ChunkedLogProbFunction = compact, head
    for i in result:
        assert result[i] == pytest.approx(all_positions[i], abs=1e-4)


def test_head_logits_equal_the_models(setup):
    """On hidden states of a padded batch, with the softcap, with and without the fused head."""
    model, tokenizer, rows = setup
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
        attach_head(model)
        with captured_hidden(model) as hidden:
            model(input_ids=ids, attention_mask=mask)
        result = head_logits(model, hidden[0][mask.bool()])
    assert result.dtype == torch.float32 and torch.allclose(result, expected, atol=1e-5)


def test_kl_is_exact_over_the_vocabulary(setup):
    from contextlib import contextmanager

    model, tokenizer, rows = setup
    ids = torch.arange(5, 25)[None]
    other = load_model(model.name_or_path).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))

        def opened(m):
            return contextmanager(lambda: (yield m))

        states = []
        for m in (model, other):
            with captured_hidden(m) as hidden:
                m(input_ids=ids)
            states.append(hidden[0][0])
        result = kl_divergence(opened(model), opened(other), *states, chunk=7)
        p, q = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (model, other))
        expected = (p * (p / q).log()).sum(-1)
        same = kl_divergence(opened(model), opened(model), states[0], states[0])
    assert result.shape == (20,) and expected.min() > 1e-5
    assert torch.allclose(result.double(), expected, rtol=1e-3, atol=1e-6)
    assert same.abs().max() < 1e-6
