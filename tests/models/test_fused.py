"""The CPU output layer equals TRL's kernel and float64 autograd; LoRA in place equals PEFT's layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.kernels import ChunkedLogProbFunction

from preflab.models.fast import fused_head, fused_lora
from preflab.models.fast.fused_head import EXTRA, TargetLogps

CASES = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "softcap, scale and temperature": {"softcap": 3.0, "scale": 2.0, "temperature": 0.7},
    "bias": {"bias": True},
}


def problem(tokens=50, width=24, vocabulary=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.3 * torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def settings(case):
    return {"temperature": 1.0, "softcap": None, "scale": 1.0, **{k: v for k, v in case.items() if k != "bias"}}


def by_float64(hidden, weight, bias, targets, temperature, softcap, scale):
    """Every result and the gradient of sum(weights * logps) with respect to hidden, by plain autograd."""
    hidden = hidden.double().requires_grad_()
    z = hidden @ weight.double().t() + (0 if bias is None else bias.double())
    z = z * scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logps = z.log_softmax(-1)
    p = logps.exp()
    target = logps.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((target * torch.arange(len(targets))).sum(), hidden)
    extra = {
        "entropy": -(p * logps).sum(1),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == targets,
    }
    return target.detach(), extra, gradient


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tiles", [(7, 64), (2048, 2048), (50, 300)])
def test_head_equals_float64_autograd(case, tiles, monkeypatch):
    monkeypatch.setattr(fused_head, "TOKENS", tiles[0])
    monkeypatch.setattr(fused_head, "VOCABULARY", tiles[1])
    hidden, weight, targets = problem()
    targets[::3] = (hidden @ weight.t()).argmax(1)[::3]
    bias = torch.linspace(-1, 1, len(weight)) if "bias" in CASES[case] else None
    s = settings(CASES[case])
    expected, extra, gradient = by_float64(hidden, weight, bias, targets, **s)
    hidden.requires_grad_()
    results = TargetLogps.apply(hidden, weight, bias, targets, s["temperature"], s["softcap"], s["scale"], EXTRA)
    (results[0] * torch.arange(len(targets))).sum().backward()
    assert torch.allclose(results[0].double(), expected, atol=2e-5)
    assert torch.allclose(hidden.grad.double(), gradient, atol=1e-3 * gradient.abs().max().item())
    assert extra["is_top1"].any() and not extra["is_top1"].all()
    for name, values in zip(EXTRA, results[1:], strict=True):
        assert torch.allclose(values.double(), extra[name].detach().double(), atol=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_head_equals_trl_kernel(case):
    hidden, weight, targets = problem(seed=3)
    bias = torch.linspace(-1, 1, len(weight)) if "bias" in CASES[case] else None
    s = settings(CASES[case])
    results = TargetLogps.apply(hidden, weight, bias, targets, s["temperature"], s["softcap"], s["scale"], EXTRA)
    reference = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, s["temperature"], 64, s["softcap"], s["scale"], EXTRA
    )
    for result, other in zip(results, reference, strict=True):
        assert torch.allclose(result.float(), other.float(), atol=1e-4)


def test_top1_of_equal_logits_is_the_first():
    hidden, weight = torch.ones(3, 2), torch.ones(6, 2)
    results = TargetLogps.apply(hidden, weight, None, torch.tensor([0, 1, 5]), 1.0, None, 1.0, ("is_top1",))
    assert results[4].tolist() == [True, False, False] and results[1] is None


def test_head_without_tokens_has_a_gradient():
    hidden = torch.zeros(0, 4, requires_grad=True)
    results = TargetLogps.apply(hidden, torch.ones(9, 4), None, torch.zeros(0, dtype=torch.long), 1.0, None, 1.0, EXTRA)
    results[0].sum().backward()
    assert results[0].shape == (0,) and hidden.grad.shape == (0, 4)
    assert [x.dtype for x in results] == [torch.float32] * 4 + [torch.bool]


def test_logits_of_bfloat16_weights_are_float32():
    """Closer to float64 on the same bfloat16 weights and states than TRL's kernel, whose logits are bfloat16."""
    hidden, weight, targets = problem(200, 64, 1000)
    hidden, weight = (12 * hidden).bfloat16(), weight.bfloat16()
    expected, _, _ = by_float64(hidden, weight, None, targets, 1.0, None, 1.0)
    result = TargetLogps.apply(hidden, weight, None, targets, 1.0, None, 1.0, ())[0]
    reference = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 512, None, 1.0, ())[0]
    assert (result - expected).abs().max() < 1e-3 < 0.1 * (reference - expected).abs().max()


@pytest.mark.parametrize("confident", [1.0, 4.0, 8.0])
def test_bfloat16_gradient_is_no_worse_than_trl(confident):
    """Computed naively, the gradient of a likely target is a difference of nearly equal vectors."""
    _, weight, targets = problem(64, 128, 3000, seed=5)
    runner_up = (targets + 7) % 3000
    hidden = (confident * weight[targets] + 0.8 * confident * weight[runner_up]) / 128**0.5
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = hidden.double().requires_grad_()
    (exact @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    errors = []
    for head in (TargetLogps.apply, None):
        h = hidden.clone().requires_grad_()
        if head:
            head(h, weight, None, targets, 1.0, None, 1.0, ())[0].sum().backward()
        else:
            ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 32768, None, 1.0, ())[0].sum().backward()
        errors.append(((h.grad.double() - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[0] <= max(1.1 * errors[1], 0.01)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_trained_layer(case, monkeypatch):
    monkeypatch.setattr(fused_head, "VOCABULARY", 64)
    monkeypatch.setattr(fused_head, "TOKENS", 20)
    hidden, weight, targets = problem()
    s = settings(CASES[case])
    bias = torch.linspace(-1, 1, len(weight)) if "bias" in CASES[case] else None
    _, _, to_hidden = by_float64(hidden, weight, bias, targets, **s)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    results = TargetLogps.apply(hidden, weight, bias, targets, s["temperature"], s["softcap"], s["scale"], ())[0]
    (results * torch.arange(len(targets))).sum().backward()
    result = [x.grad for x in leaves]
    z = (hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())) * s["scale"]
    z = (s["softcap"] * torch.tanh(z / s["softcap"]) if s["softcap"] else z) / s["temperature"]
    logps = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((logps * torch.arange(len(targets))).sum(), leaves)
    assert torch.allclose(result[0].double(), to_hidden, atol=1e-3 * to_hidden.abs().max().item())
    for gradient, other in zip(result, expected, strict=True):
        assert torch.allclose(gradient, other, atol=1e-3 * other.abs().max().item())


def test_install_replaces_trl_head_on_cpu():
    import trl.trainer.utils

    fused_head.install()
    hidden, weight, targets = problem()
    results = trl.trainer.utils._ChunkedLogProbFunction.apply(
        hidden.requires_grad_(), weight, None, targets, 1.0, 64, None, 1.0, ()
    )
    assert type(results[0].grad_fn).__name__ == "TargetLogpsBackward"


# ----------------------------------------------------------------------------------------------------------------- LoRA


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(**extra):
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers(), LoraConfig(r=4, lora_alpha=12, target_modules=["up", "down"], **extra))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "extra", [{}, {"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_lora_equals_peft(extra):
    x, results = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)), []
    for fused in (False, True):
        model = adapted(**extra)
        if fused:
            fused_lora.attach(model)
        torch.manual_seed(5)
        results.append(output_and_gradients(model.train(), x))
    for result, reference in zip(*results, strict=True):
        assert torch.allclose(result, reference, atol=1e-5 * reference.abs().max().item())


def test_lora_disabled_merged_and_in_eval_mode():
    model, x = adapted(), torch.randn(3, 12)
    plain = model(x)
    fused_lora.attach(model)
    fused_lora.attach(model)
    with model.disable_adapter():
        off = model(x)
    assert torch.allclose(off, base_alone(model, x), atol=1e-6) and not torch.allclose(off, plain, atol=1e-2)
    assert torch.allclose(model.eval()(x), plain, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(x), plain, atol=1e-5)


def base_alone(model, x):
    up, down = model.base_model.model.up.base_layer, model.base_model.model.down.base_layer
    return down(torch.tanh(up(x)))


def test_plain_adapters_add_in_place(monkeypatch):
    called = []
    original = fused_lora.AddLora.apply
    monkeypatch.setattr(fused_lora.AddLora, "apply", lambda *a: called.append(1) or original(*a))
    for extra, times in (({}, 2), ({"lora_dropout": 0.5}, 0), ({"use_dora": True}, 0)):
        model = adapted(**extra)
        fused_lora.attach(model)
        called.clear()
        model.train()(torch.randn(3, 12))
        assert len(called) == times, extra


def test_bfloat16_weights_without_autocast_use_peft():
    """PEFT then computes the LoRA term in float32 and rounds the sum once."""
    x, results = torch.randn(9, 12, generator=torch.Generator().manual_seed(1)).bfloat16(), []
    for fused in (False, True):
        model = adapted()
        for name, p in model.named_parameters():
            p.data = p.data if "lora_" in name else p.data.bfloat16()
        if fused:
            fused_lora.attach(model)
        results.append(output_and_gradients(model, x))
    for result, reference in zip(*results, strict=True):
        assert torch.equal(result, reference)


def test_frozen_lora_weights_get_no_gradient():
    model, x = adapted(), torch.randn(3, 12)
    fused_lora.attach(model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    model(x).square().sum().backward()
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None} == {"lora_B"}


def test_bfloat16_error_is_at_most_pefts():
    x, errors = torch.randn(400, 12, generator=torch.Generator().manual_seed(1)), {}
    expected = adapted()(x)
    for fused in (False, True):
        model = adapted()
        if fused:
            fused_lora.attach(model)
        with torch.autocast("cpu", torch.bfloat16):
            errors[fused] = (model(x).float() - expected).square().mean().sqrt().item()
    assert errors[True] <= 1.05 * errors[False]
