"""Shared prompts: packed log-probabilities, losses and gradients equal TRL's padded computation."""

import copy
import json
import re

import pytest
import torch
from conftest import assert_one_line, train_args

from benchmarks.shared_prompt_check import ARCHITECTURES, collated, errors_of, is_exact, logps, pairs, tiny
from preflab.models.fast.shared_prompt import (
    KEYS,
    PackingCollator,
    attach,
    mask_rule,
    pack,
    rebatch,
    split,
    unsupported_reason,
)
from preflab.models.logprobs import attach_head, sequence_logps


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probs_equal_padded(kind):
    model, batch = tiny(kind), collated(pairs())
    attach_head(model)
    with torch.no_grad():
        stock = sequence_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        attach(model)
        result = logps(model, batch, packed=True)
        again = sequence_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert torch.allclose(result.sum(1), stock, atol=1e-4, rtol=0) and stock.abs().min() > 1
    assert torch.equal(again, stock), "a batch without a packed layout is computed as before"


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_padded(kind, checkpointing):
    model, batch = tiny(kind), collated(pairs())
    attach_head(model)
    other = copy.deepcopy(model)
    attach_head(other)
    gradients = {}
    for name, policy, packed in (("stock", model, False), ("packed", other, True)):
        if packed:
            attach(policy)
        policy.train()
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        chosen, rejected = logps(policy, batch, packed).sum(1).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        gradients[name] = {n: p.grad for n, p in policy.named_parameters()}
    for name, gradient in gradients["stock"].items():
        difference = (gradients["packed"][name] - gradient).abs().max()
        assert difference <= 1e-4 * max(1.0, gradient.abs().max().item()), name


def test_errors_on_the_cpu_are_rounding():
    errors = errors_of("Gemma2", "cpu")
    assert 0 < errors["shared"]["log_probs"] < 1e-4 and is_exact(errors)
    assert not is_exact({**errors, "shared": {"log_probs": 0.01, "gradients": 0.0}})


def test_window_and_softcap_change_results():
    """Otherwise the tests above would pass although window and softcap were ignored."""
    batch = collated(pairs())
    for kind, change in (("Mistral", {"sliding_window": 4096}), ("Gemma2", {"attn_logit_softcapping": None})):
        results = []
        for model in (tiny(kind), tiny(kind, **change)):
            attach_head(model)
            attach(model)
            with torch.no_grad():
                results.append(logps(model, batch, packed=True).sum(1))
        assert not torch.allclose(*results, atol=1e-2), kind


def test_pair_is_independent_of_its_batch():
    model, rows = tiny("Llama"), pairs(5)
    attach_head(model)
    attach(model)

    def summed(pairs):
        with torch.no_grad():
            chosen, rejected = logps(model, collated(pairs), packed=True).sum(1).chunk(2)
        return torch.stack([chosen, rejected], 1)

    together = summed(rows)
    assert torch.allclose(torch.cat([summed([row]) for row in rows]), together, atol=1e-5)
    assert torch.allclose(summed(rows[::-1]).flip(0), together, atol=1e-5)


def test_packed_layout():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
        {"prompt_ids": [10], "chosen_ids": [11], "rejected_ids": [12, 13]},
    ]
    batch = collated(rows)
    packed = pack(batch)
    assert packed["packed_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert packed["packed_positions"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert packed["packed_lengths"] == ((2, 2, 1), (1, 1, 2))
    assert packed["unpack"].tolist() == [[0, 1, 2, 3], [5, 6, 0, 0], [0, 1, 4, 0], [5, 7, 8, 0]]
    assert set(packed) == set(KEYS)
    ids = packed["packed_ids"][0][packed["unpack"]]
    assert torch.equal(ids * batch["attention_mask"], batch["input_ids"] * batch["attention_mask"])


def test_flex_mask_equals_padded_visibility():
    lengths, window = ((3, 2, 2), (1, 1, 3)), 3
    rule, windowed = mask_rule(lengths, "cpu"), mask_rule(lengths, "cpu", window)
    tokens, start = [], 0
    for p, c, r in lengths:
        tokens += [(start, "prompt", k) for k in range(p)] + [(start, "chosen", p + k) for k in range(c)]
        tokens += [(start, "rejected", p + k) for k in range(r)]
        start += p + c + r
    for q, (pair, part, position) in enumerate(tokens):
        for k, (key_pair, key_part, key_position) in enumerate(tokens):
            visible = pair == key_pair and key_part in ("prompt", part) and key_position <= position
            assert bool(rule(0, 0, q, k)) == visible
            assert bool(windowed(0, 0, q, k)) == (visible and position - key_position < window)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_flex_attention_equals_cpu_attention(window, softcap, key_heads, monkeypatch):
    """FlexAttention, uncompiled (on a CPU it has no backward), equals SDPA and the softcap written out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from preflab.models.fast import shared_prompt

    lengths = ((30, 12, 17), (5, 40, 9), (64, 1, 33))
    tokens, generator = sum(map(sum, lengths)), torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (4, key_heads, key_heads))
    masks = {
        w: create_block_mask(mask_rule(lengths, "cpu", w), None, None, tokens, tokens, device="cpu")
        for w in {None, window}
    }
    monkeypatch.setattr(shared_prompt, "_compiled_flex", lambda: flex_attention)
    settings = {"scaling": 0.8, "softcap": softcap, "sliding_window": window}
    result = shared_prompt._flex(query, key, value, masks, **settings)
    layout = shared_prompt.Layout(lengths, {})
    expected, _ = shared_prompt._attention("sdpa", None, query, key, value, None, layout=layout, **settings)
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gpu_error_is_at_most_that_of_padding(kind, checkpointing):
    errors = errors_of(kind, "cuda", checkpointing)
    assert is_exact(errors), errors


# --------------------------------------------------------------------------------------------------------- token budget

ONE_PROCESS = type("Accelerator", (), {"num_processes": 1, "device": "cpu"})()


def micro_batches(rows, size=2) -> list[dict]:
    return [collated(rows[k : k + size]) for k in range(0, len(rows), size)]


def ids(batches) -> list[tuple]:
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tuple(tuple(e[key]) for key in keys) for b in batches if b["input_ids"].numel() for e in split(b)]


def test_rebatch_keeps_pairs_in_order():
    rows = pairs(8)
    sizes = [sum(len(part) for part in row.values()) for row in rows]
    before = micro_batches(rows)
    for budget in (max(sizes) * 2, sum(sizes)):
        result = rebatch(before, budget, PackingCollator(collated), ONE_PROCESS)
        assert len(result) == len(before) and ids(result) == ids(before)
        full = [batch for batch in result if batch["input_ids"].numel()]
        assert result[-len(full) :] == full, "empty micro-batches come first"
        assert all(batch["packed_ids"].shape[1] <= budget for batch in full)
        assert sum(batch["loss_weight"] for batch in full) == pytest.approx(len(before))
    assert len(full) == 1 and full[0]["loss_weight"] == 4


def test_rebatch_with_too_small_budget():
    before = micro_batches(pairs(8))
    assert rebatch(before, 1, PackingCollator(collated), ONE_PROCESS) is before


def test_split_keeps_reference_log_probs():
    rows = [{**row, "ref_chosen_logps": -1.5 * k, "ref_rejected_logps": 0.25 - k} for k, row in enumerate(pairs(6))]
    for row, again in zip(rows, split(collated(rows)), strict=True):
        assert again == row


def losses(out) -> list[float]:
    rows = [json.loads(line) for line in (out / "out" / "r" / "train_log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["split"] == "train" for key in ("loss", "grad_norm", "rewards/margins")]


def test_training_equals_padded_training(train, tiny, prefs, tmp_path):
    ways = {
        "padded": ("--no_shared_prompt", "--no_reference_cache"),
        "packed": ("--no_reference_cache",),
        "cut small": ("--no_reference_cache", "--micro_batch_tokens", "80"),
        "cached": (),
    }
    result = {}
    for name, flags in ways.items():
        code, out, err = train(*train_args(tiny, prefs, tmp_path / name, *flags))
        assert code == 0, err
        assert ("each prompt once" in out) == (name != "padded")
        assert (re.search(r"reference\b.*\b16\b.*\b0\b", out) is not None) == (name == "cached")
        result[name] = losses(tmp_path / name)
    for name in ways:
        assert result[name] == pytest.approx(result["padded"], abs=1e-4), name


@pytest.mark.parametrize(
    "flags",
    [
        ("--load_in_4bit", "true"),
        ("--gradient_checkpointing", "true"),
        ("--use_peft", "false", "--learning_rate", "1e-3"),
        ("--use_peft", "false", "--learning_rate", "1e-3", "--gradient_checkpointing", "true"),
    ],
)
def test_qlora_checkpointing_and_full_fine_tuning(flags, train, tiny, prefs, tmp_path):
    result = []
    for name, more in (("padded", ("--no_shared_prompt",)), ("packed", ())):
        code, out, err = train(*train_args(tiny, prefs, tmp_path / name, "--no_reference_cache", *flags, *more))
        assert code == 0 and ("each prompt once" in out) == (name == "packed"), err
        result.append(losses(tmp_path / name))
    assert result[1] == pytest.approx(result[0], abs=1e-4, rel=1e-4)


def test_reference_cache_is_shared_and_verified(train, tiny, prefs, tmp_path):
    shared = ("--eval_out", tmp_path / "out")
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *shared))
    assert code == 0 and re.search(r"reference\b.*\b16\b.*\b0\b", out), err
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *shared, "--run_name", "ipo", "--loss_type", "ipo"))
    assert code == 0 and re.search(r"reference\b.*\b0\b.*\b16\b", out), err
    summary = json.loads((tmp_path / "out" / "ipo" / "train.json").read_text())
    assert summary["training"]["reference"]["read"] == 24
    # This training takes a second or two, too short for a share of the peak.
    assert summary["training"]["mfu"] is None
    # Other token ids or another precision need another reference.
    for flags in (("--max_length", "24"), ("--bf16", "true")):
        code, out, err = train(*train_args(tiny, prefs, tmp_path, *shared, "--run_name", flags[0][2:], *flags))
        assert code == 0 and re.search(r"reference\b.*\b16\b.*\b0\b", out), err
    for path in (tmp_path / "out" / ".cache").glob("reference-*/rows-0.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "chosen": row["chosen"] - 3}) + "\n" for row in rows))
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *shared, "--run_name", "again"))
    assert code == 2
    assert_one_line(err, "reference-", "--no_reference_cache")


def test_unsupported_architecture_has_a_reason():
    model = tiny("Llama")
    assert unsupported_reason(model) is None
    assert "auxiliary loss" in unsupported_reason(model, aux_loss=True)
    model.config.model_type = "mamba"
    assert "mamba" in unsupported_reason(model)
