"""The memory of training: by hand, against a real step's live tensors, and where it leads to checkpointing."""

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import train_args
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import deepspeed

from benchmarks.plan_check import Case, measure
from preflab.training import traced_memory
from preflab.training.memory import (
    HOLES,
    KERNEL_BYTES,
    MOST_KERNELS,
    needed,
    optimizer_bytes,
    reason_for_checkpointing,
)
from preflab.training.memory_parts import QUANTISED_BYTES, Batch, Counts, Memory, Weights, packed_rows
from preflab.training.sharding import Shards
from preflab.training.traced_memory import Live, Step, _run, counts_of, skeleton, traced

NOTHING = Memory(0, 0, 0, 0, 0, 0, 0, 0, False)


def llama(**keys):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    return transformers.LlamaConfig(**(shape | {"num_key_value_heads": 2, "vocab_size": 100} | keys))


def test_live_tensors_by_hand():
    x = torch.zeros(1000)
    with Live([x]) as live:
        y = x * 2  # 4,000 bytes
        view = y[:10]
        z = y.double()  # 8,000
        assert (live.now, live.peak) == (12000, 12000)
        del z
        assert (live.now, live.peak) == (4000, 12000)
        x.add_(1)
        del y
        assert live.now == 4000
        del view
    assert (live.now, live.peak) == (0, 12000)


def test_heap_and_compiled_products_by_hand():
    with FakeTensorMode(), Live() as live:
        large, small = torch.zeros(40 * 2**18), torch.zeros(2**18)  # 40 MiB, 1 MiB
        assert (live.peak, live.heap_at_peak) == (41 * 2**20, 2**20)
        x = small.view(512, 512).bfloat16()
        for _ in range(3):
            x @ x, x @ x.t(), small[:8, None] @ small[None, :8]
        # Equal shapes count once, a transposed factor is another shape, float32 does not count.
        assert len(live.products) == 2
        del large
        assert live.heap == live.now


def test_heap_and_compiled_products_count_on_a_cpu_only():
    args, batch = SimpleNamespace(precision="bf16", optim="adamw_torch"), packed_rows((20, 30, 30), 200, 4)
    weights = Weights(llama(), "float32", LoraConfig(r=2, target_modules=["q_proj"]))
    memory = needed(weights, args, batch, False, checkpointing=False, alike=True)
    varied = needed(weights, args, batch, False, checkpointing=False)
    on_gpu = needed(weights, args, batch, False, checkpointing=False, cuda=True)
    assert memory.holes == pytest.approx(HOLES * memory.activations) and 0 < memory.kernels < 60 * KERNEL_BYTES
    assert varied.kernels == MOST_KERNELS * KERNEL_BYTES and on_gpu.holes == on_gpu.kernels == 0
    args.precision = "fp32"
    assert needed(weights, args, batch, False, checkpointing=False).kernels == 0


def test_packed_rows_by_hand():
    # A step of 3 pairs of 100 tokens under a budget of 250: two pairs and a half; without a limit all three.
    batch = packed_rows((50, 30, 20), 250, 3)
    assert batch == Batch(((50, 30, 20), (50, 30, 20), (25, 15, 10)), 0, 80, 125) and batch.tokens == 250
    assert packed_rows((50, 30, 20), 9999, 3).tokens == 300
    # A list of three answers.
    assert packed_rows((5, 10, 20, 30), 100, 2).pairs == ((5, 10, 20, 30), (4, 5, 10, 16))
    # At least one pair, whatever the budget.
    assert packed_rows((50, 30, 20), 10, 3).pairs == ((50, 30, 20),)


def test_model_on_meta_is_made_without_zero3():
    """transformers shards every model that is made while a ZeRO-3 launch is active."""
    launch = Mock(is_zero3=lambda: True, config={})
    deepspeed.set_hf_deepspeed_config(launch)
    try:
        model = skeleton(llama(), "float32", LoraConfig(target_modules=["q_proj"]))
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert all(p.is_meta and p.numel() for p in model.parameters())


def test_peak_is_where_the_backward_begins_or_ends():
    memory = replace(NOTHING, weights=100.0, reference=100.0, optimizer=50.0, gradients=40.0, activations=70.0)
    assert memory.total == 250 + 70
    assert replace(memory, after_layers=60.0).total == 250 + 40 + 60
    assert replace(memory, accumulates=True).total == 250 + 70 + 40
    assert replace(memory, holes=9.0, kernels=5.0).total == 250 + 70 + 14


def test_counts_by_hand():
    # Per layer: q and o 32 x 32, k and v 32 x 16, three of 32 x 64, two norms; tied embedding and a last norm outside.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    counts = counts_of(Weights(llama(tie_word_embeddings=True), "float32", None))
    assert (counts.largest_layer, counts.outside_layers) == (layer, 3200 + 32)
    assert counts.total == counts.trained == 6 * layer + 3232 and counts.trained_bytes == 4 * counts.total
    # LoRA of rank 2 on q (32 x 32) and v (32 x 16) of six layers, in float32 on a bfloat16 base.
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = counts_of(Weights(llama(tie_word_embeddings=True), "bfloat16", lora))
    assert adapted.trained == 6 * 2 * (32 + 32 + 32 + 16) and adapted.adapter_bytes == 4 * adapted.trained
    half = counts_of(Weights(llama(tie_word_embeddings=True), "bfloat16", None))
    quantised = counts_of(Weights(llama(tie_word_embeddings=True), "bfloat16", lora, bits=4, nested=True))
    assert quantised.base_bytes - half.base_bytes == pytest.approx(6 * (layer - 64) * (0.51587 - 2), rel=1e-4)
    # Double quantisation saves 0.373 bits per weight (Dettmers et al. 2023, section 3).
    assert 8 * (QUANTISED_BYTES[4, False] - QUANTISED_BYTES[4, True]) == pytest.approx(0.373, abs=5e-4)


def test_optimizer_state_by_name():
    counts = SimpleNamespace(trained=10, trained_bytes=20)
    sizes = {"adamw_torch_fused": 40, "sgd": 0, "adamw_bnb_8bit": 20, "paged_adamw_32bit": 80, "no_such": 40}
    assert {name: optimizer_bytes(counts, SimpleNamespace(optim=name)) for name in sizes} == sizes


def test_zero_stages_of_the_paper():
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters, Adam in mixed precision, 64 GPUs.
    n = 7.5e9
    counts = Counts(int(n), int(n), 2 * n, 2 * n, 0, 0, 0, 0)
    memory = replace(NOTHING, weights=2 * n, gradients=2 * n, optimizer=8 * n)
    args = SimpleNamespace(precision="bf16")

    def gigabytes(kind):
        shared = Shards(kind, 64).of(memory, counts, SimpleNamespace(bits=None), args)
        return sum((shared.weights, shared.gradients, shared.optimizer)) / 1e9

    assert gigabytes("zero2") == pytest.approx(16.6, abs=0.05)
    assert gigabytes("zero3") == pytest.approx(1.9, abs=0.05)


def test_division_of_a_launch(monkeypatch):
    def of(processes=2, **keys):
        none = {"deepspeed_plugin": None, "sharding": None, "fsdp_plugin_args": None}
        return Shards.of_run(SimpleNamespace(world_size=processes, **(none | keys)))

    assert of(1) is None and of(1, sharding="FSDP") is None and of() == Shards("ddp", 2)
    assert of(4, sharding="FSDP") == Shards("fsdp2", 4)
    assert of(sharding="FSDP", fsdp_plugin_args={"cpu_offload": True}) == Shards("fsdp2", 2, True)
    plugin = SimpleNamespace(zero_stage=3, offload_optimizer_device="cpu")
    assert of(8, deepspeed_plugin=plugin, sharding="DeepSpeed ZeRO-3") == Shards("zero3", 8, True)
    plugin = SimpleNamespace(zero_stage=2, offload_optimizer_device="none")
    assert of(8, deepspeed_plugin=plugin, sharding="DeepSpeed ZeRO-2") == Shards("zero2", 8)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert of(sharding="FSDP") == Shards("fsdp2", 2, True)
    assert of(sharding="FSDP", fsdp_plugin_args={"fsdp_version": 2}) == Shards("fsdp2", 2, True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_layers_give_all_layers(checkpointing):
    batch = packed_rows((20, 30, 30), 200, 4)
    for config, lora in ((llama(), LoraConfig(r=2, target_modules=["q_proj"])), (llama(), None)):
        step = Step("float32", True, lora, checkpointing)
        exact, quick = _run(config, step, batch, 6), traced(config, step, batch)
        assert (quick.peak, quick.last) == pytest.approx((exact.peak, exact.last), rel=0.01)


def test_model_that_needs_data_is_an_order_of_magnitude(capfd):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**shape, num_key_value_heads=2, vocab_size=100)
    step = Step("float32", False, None)
    memory = traced(config, step, Batch((), 2, 50, 60))
    # 100 tokens, 3 layers, 16 x 32 + 6 x 64 values of 4 bytes.
    assert not memory.exact and memory.peak == 100 * 3 * (16 * 32 + 6 * 64) * 4
    assert traced(llama(), step, Batch((), 2, 50, 60)).exact
    assert "Traceback" not in capfd.readouterr().err


SMALL = Case("Llama", 128, 384, 5, 4, 2, 49152, (40, 60, 70), 2)


@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, vocabulary=50000),
        replace(SMALL, kind="Qwen3", pair=(150, 100), batch=3, lora=0, bf16=True, checkpointing=True),
    ],
    ids=["pairs-lora", "sft-full-bf16-checkpointing"],
)
def test_planned_equals_live_tensors_of_real_steps(case):
    result = measure(case, "tensors")
    planned = result["planned"]
    assert planned["total"] - planned["holes"] - planned["kernels"] == pytest.approx(result["measured"], rel=0.1)


def test_token_budget(tmp_path):
    from preflab.training.dpo_config import DPORunConfig

    args = DPORunConfig(str(tmp_path), per_device_train_batch_size=3, max_length=40)
    assert args.token_budget(25) == 2 * 3 * 40
    args.max_length = None
    assert args.token_budget(25) == 2 * 3 * 25
    args.micro_batch_tokens = 77
    assert args.token_budget(25) == 77


def test_largest_batch_of_pairs(tmp_path):
    from preflab.training.dpo_config import DPORunConfig

    args = DPORunConfig(str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_length=40)
    pair = (10, 20, 30)
    # A budget of 2 x 3 x 40 tokens holds four of the step's six pairs.
    assert args.largest_batch(pair, 40, llama()) == (packed_rows(pair, 240, 6), True)
    assert args.largest_batch(pair, 40, transformers.GPT2Config()) == (Batch((), 6, 40, 150), True)
    args.loss_type = ["bco_pair"]
    assert args.largest_batch(pair, 40, llama())[0].pairs == (pair,) * 3


def test_micro_batch_tokens_depend_on_gpu_memory(tmp_path, monkeypatch):
    from preflab.training.dpo_config import DPORunConfig

    # A token takes 10 bytes, the weights 4,000.
    monkeypatch.setattr(
        DPORunConfig, "memory", lambda self, *args, **keys: SimpleNamespace(total=4000 + 10 * self.micro_batch_tokens)
    )
    enough = {tokens: 4000 + tokens * 10 for tokens in (4096, 8192)}
    for card, expected in [
        (None, None),
        (2 * enough[8192], 8192),
        (2 * enough[8192] - 2, 4096),
        (2 * enough[4096] - 2, None),
    ]:
        args = DPORunConfig(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=64, max_length=50, bf16=False
        )
        args.choose_micro_batch_tokens(None, None, 50, card)
        assert args.micro_batch_tokens == expected
        args.micro_batch_tokens = 77
        args.choose_micro_batch_tokens(None, None, 50, card)
        assert args.micro_batch_tokens == 77


def test_checkpointing_keeps_a_tenth_free():
    assert reason_for_checkpointing(90.0, 100.0) is None
    assert "gradient checkpointing is on" in reason_for_checkpointing(90.0, 99.0)


def checkpointing(train, tiny, prefs, folder, *flags):
    base = train_args(tiny, prefs, folder, "--preflight_only")
    at = base.index("--gradient_checkpointing")
    code, out, err = train(*base[:at], *base[at + 2 :], *flags)
    assert code == 0, err
    return out, json.loads((folder / "out" / "r" / "preflight.json").read_text())


def test_preflight_traces_a_batch_once(train, tiny, prefs, tmp_path, monkeypatch):
    traces = []

    def run(config, step, batch, layers):
        traces.append((step, batch, layers))
        return _run(config, step, batch, layers)

    monkeypatch.setattr(traced_memory, "_results", {})
    monkeypatch.setattr(traced_memory, "_run", run)
    # The choice of checkpointing and the preflight's estimate need the same figures.
    _, flight = checkpointing(train, tiny, prefs, tmp_path)
    assert len(traces) == 1 and not flight["gradient_checkpointing"] and not flight["estimate"]["memory_is_rough"]


def test_trace_depends_on_the_attention():
    config, step, batch = llama(num_hidden_layers=1), Step("float32", False, None), Batch((), 2, 200, 60)
    peaks = {}
    for name in ("sdpa", "eager", "packed_eager"):
        config._attn_implementation = name
        peaks[name] = traced(config, step, batch).peak
    # Eager attention keeps its weights, 2 x 4 x 200 x 200 values of 4 bytes, at least.
    assert peaks["eager"] - peaks["sdpa"] >= 2 * 4 * 200 * 200 * 4 and peaks["packed_eager"] == peaks["eager"]


def test_checkpointing_default_and_flag(train, tiny, prefs, tmp_path, monkeypatch):
    out, plenty = checkpointing(train, tiny, prefs, tmp_path / "plenty")
    assert "gradient checkpointing" not in out
    monkeypatch.setattr("preflab.training.run.free_bytes", lambda model: 1e6)
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
