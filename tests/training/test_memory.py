"""The memory estimate by hand, and gradient checkpointing only where memory requires it."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import train_args

from preflab.training.memory import Memory, needed, reason_for_checkpointing


class Model(torch.nn.Module):
    """1,000 float32 weights, and the shape of 3 layers of width 10 with a feed-forward of 20."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        shape = SimpleNamespace(num_hidden_layers=3, hidden_size=10, intermediate_size=20)
        self.config = SimpleNamespace(get_text_config=lambda: shape)


def config_of(tokens=None, precision="fp32", accumulation=1):
    return SimpleNamespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        sequences_a_row=2,
        token_budget=lambda longest: tokens or 4 * 100,
    )


def test_memory_estimate_by_hand():
    memory = needed(Model(), config_of(), trained=100, longest=50, reference_beside=True)
    # Two copies of 4,000 bytes, 12 a trained weight; a step has 2 x 2 x 50 tokens, a token 16 x 10 + 6 x 20 values.
    assert memory.resident == 2 * 4000 + 1200
    assert memory.activations == 200 * 3 * 280 * 4
    # The token budget of 400 limits a larger step; a micro-batch holds at least one pair of 100 tokens.
    assert needed(Model(), config_of(accumulation=9), 0, 50, False).activations == 400 * 3 * 280 * 4
    memory = needed(Model(), config_of(tokens=32, precision="bf16"), trained=0, longest=50, reference_beside=False)
    assert (memory.resident, memory.activations) == (4000, 100 * 3 * 280 * 2)
    assert memory.total(True) == 4000 + 100 * 3 * 280 * 2 / 16


def test_token_budget(tmp_path):
    from preflab.training.dpo_config import DPORunConfig

    args = DPORunConfig(str(tmp_path), per_device_train_batch_size=3, max_length=40)
    assert args.token_budget(25) == 2 * 3 * 40
    args.max_length = None
    assert args.token_budget(25) == 2 * 3 * 25
    args.micro_batch_tokens = 77
    assert args.token_budget(25) == 77


def test_micro_batch_tokens_depend_on_gpu_memory(tmp_path, monkeypatch):
    from preflab.training.dpo_config import DPORunConfig

    # 4,000 bytes of weights; a token of 3 layers takes 3 x 280 values of 4 bytes; a step has 2 x 2 x 64 x 50 tokens.
    enough = {tokens: 4000 + tokens * 3 * 280 * 4 for tokens in (4096, 8192)}
    for card, expected in [
        (None, None),
        (2 * enough[8192], 8192),
        (2 * enough[8192] - 2, 4096),
        (2 * enough[4096] - 2, None),
    ]:
        monkeypatch.setattr("preflab.training.pair_config.card_bytes", lambda card=card: card)
        args = DPORunConfig(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=64, max_length=50, bf16=False
        )
        args.choose_micro_batch_tokens(Model(), 0, 50, False)
        assert args.micro_batch_tokens == expected
        args.micro_batch_tokens = 77
        args.choose_micro_batch_tokens(Model(), 0, 50, False)
        assert args.micro_batch_tokens == 77


def test_checkpointing_keeps_a_tenth_free():
    memory = Memory(resident=50.0, activations=40.0)
    assert reason_for_checkpointing(memory, 100.0) is None
    assert "gradient checkpointing is on" in reason_for_checkpointing(memory, 99.0)


def checkpointing(train, tiny, prefs, folder, *flags):
    base = train_args(tiny, prefs, folder, "--preflight_only")
    at = base.index("--gradient_checkpointing")
    code, out, err = train(*base[:at], *base[at + 2 :], *flags)
    assert code == 0, err
    return out, json.loads((folder / "out" / "r" / "preflight.json").read_text())


def test_checkpointing_default_and_flag(train, tiny, prefs, tmp_path, monkeypatch):
    out, plenty = checkpointing(train, tiny, prefs, tmp_path / "plenty")
    assert "gradient checkpointing" not in out
    monkeypatch.setattr("preflab.training.run_config.free_bytes", lambda model: 1e6)
    out, scarce = checkpointing(train, tiny, prefs, tmp_path / "scarce")
    assert "gradient checkpointing is on" in out
    assert scarce["estimate"]["memory_gib"] <= plenty["estimate"]["memory_gib"]
    assert scarce["gradient_checkpointing"] and not plenty["gradient_checkpointing"]
    out, _ = checkpointing(train, tiny, prefs, tmp_path / "refused", "--gradient_checkpointing", "false")
    assert "gradient checkpointing is on" not in out


@pytest.mark.parametrize(("rates", "noted"), [((400.0, 190.0), False), ((3.0, 190.0), True)])
def test_slow_16_bit_arithmetic_is_noted(rates, noted, train, tiny, prefs, tmp_path, monkeypatch):
    rate_of = dict(zip(("bfloat16", "float32"), rates, strict=True))
    monkeypatch.setattr("preflab.training.throughput.matmul_rate", lambda dtype, device: 1e9 * rate_of[dtype])
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--preflight_only", "--bf16", "true"))
    assert code == 0, err
    assert (re.search(r"bfloat16.*\b3 GFLOP/s.*float32.*\b190\b", out) is not None) == noted


def test_profile_by_kind_of_work():
    from benchmarks.operation_times import kind_of, time_by_kind

    assert kind_of("triton_tem_fused_flex_attention_0") == kind_of("aten::_scaled_dot_product_flash") == "attention"
    assert kind_of("nvjet_tst_128x256_64x4") == kind_of("aten::addmm_") == "matrix products"
    assert kind_of("aten::tanh") == "other"
    x = torch.randn(600, 600)
    started = time.monotonic()
    with torch.profiler.profile() as seen:
        for _ in range(20):
            x = x @ x / x.norm()
    shares = time_by_kind(seen, "cpu", time.monotonic() - started)
    assert set(shares) == {"attention", "matrix products", "other"} and sum(shares.values()) <= 1.05
    assert shares["attention"] == 0 and shares["matrix products"] > shares["other"] > 0
