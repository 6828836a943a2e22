"""Compiled decoder layers: the same log-probabilities and gradients, and no new graph for a row of another length."""

import json
import shutil

import pytest
import torch
from conftest import assert_one_line, train_args
from peft import LoraConfig, get_peft_model
from test_shared_prompt import collated, logps, pairs
from test_shared_prompt import tiny as random_model
from torch._dynamo.utils import counters

from preflab.models.fast import compiled_layers, fused_head, shared_prompt
from preflab.models.logprobs import attach_head

needs_compiler = pytest.mark.skipif(
    compiled_layers.missing_compiler(on_cpu=True) is not None, reason="TorchInductor needs g++ or clang++ on a CPU"
)


def adapted(kind: str):
    """A tiny model with shared prompts and a LoRA whose term is not 0."""
    fused_head.install()
    model = random_model(kind).requires_grad_(False)
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    attach_head(model)
    shared_prompt.attach(model)
    return model


def results(model, batch) -> list:
    """Log-probabilities of policy and reference, and the policy's gradients."""
    model.zero_grad()
    policy = logps(model, batch, packed=True)
    policy.square().sum().backward()
    with torch.no_grad(), model.disable_adapter():
        reference = logps(model, batch, packed=True)
    return [policy.detach(), reference, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def errors(own: list, exact: list) -> list[float]:
    """Relative errors of the policy's log-probabilities, of the reference's, and of all gradients together."""
    flat = [[*values[:2], torch.cat([gradient.flatten() for gradient in values[2:]])] for values in (own, exact)]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(*flat, strict=True)]


def assert_compiled_equals(kind: str):
    """Against float64: the model's weights are exaggerated, so that float32 alone is off by up to 0.0006."""
    batches = [collated(pairs(count, seed=count)) for count in (2, 3, 4)]
    model = adapted(kind)
    plain = [results(model, batch) for batch in batches]
    double = adapted(kind).double()
    exact = [results(double, batch) for batch in batches]
    assert compiled_layers.attach(model) is None
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for batch, uncompiled, right in zip(batches, plain, exact, strict=True):
        for own, other in zip(errors(results(model, batch), right), errors(uncompiled, right), strict=True):
            assert own <= 2 * other + 1e-6
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[0]


# Gemma 3 has two kinds of layers, with a sliding window and without.
@pytest.mark.parametrize("kind", ["Llama", pytest.param("Gemma3Text", marks=pytest.mark.slow)])
def test_traced_layers_equal_transformers(kind, monkeypatch):
    """Tracing and its guards alone: the graphs are run by PyTorch, without a compiler."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    assert_compiled_equals(kind)


@pytest.mark.slow
@needs_compiler
def test_compiled_layers_equal_transformers():
    assert_compiled_equals("Llama")


def test_padded_rows_change_nothing():
    model, batch = adapted("Llama"), collated(pairs(3))
    expected = results(model, batch)
    lengths = []
    model.get_base_model().base_model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    model.get_base_model().base_model.row_multiple = 64
    for value, other in zip(results(model, batch), expected, strict=True):
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-5 * max(1.0, other.abs().max().item()))
    assert lengths and all(length % 64 == 0 for length in lengths)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing", "true"), ("--use_peft", "false")])
def test_training_equals_uncompiled_training(flags, train, tiny, prefs, tmp_path):
    runs = []
    for more in ((), ("--compile_layers",)):
        folder = tmp_path / str(len(more))
        args = train_args(tiny, prefs, folder, "--max_steps", 3, "--sample_prompts", 0, *flags, *more)
        code, _, err = train(*args)
        assert code == 0, err
        log = (folder / "out" / "r" / "train_log.jsonl").read_text().splitlines()
        runs.append([row for row in map(json.loads, log) if row["split"] == "train"])
    assert len(runs[0]) == len(runs[1]) == 3
    for plain, compiled in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-5), key


def test_refused_where_it_cannot_work(train, tiny, prefs, tmp_path, monkeypatch):
    quantised = train_args(tiny, prefs, tmp_path, "--compile_layers", "--load_in_4bit")
    code, _, err = train(*quantised)
    assert code == 2
    assert_one_line(err, "--compile_layers", "quantised")
    padded = train_args(tiny, prefs, tmp_path, "--compile_layers", "--no_shared_prompt")
    code, _, err = train(*padded)
    assert code == 2
    assert_one_line(err, "--compile_layers", "--no_shared_prompt")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--compile_layers"))
    assert code == 2
    assert_one_line(err, "--compile_layers", "g++")
