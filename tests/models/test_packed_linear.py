"""Packed weights: the same products up to float32 rounding, and a model that is as before afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from test_shared_prompt import tiny
from torch import nn

from preflab.models.fast import fused_lora, packed_linear
from preflab.models.fast.packed_linear import packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_products_equal_the_layers(tokens, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias))
    x = torch.randn(1, tokens, 48)
    expected = x.double() @ model[0].weight.double().t() + (model[0].bias.double() if bias else 0)
    with torch.inference_mode(), packed(model):
        assert isinstance(model[0].forward, packed_linear._PackedForward)
        y = model(x)
    assert y.shape == (1, tokens, 80)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("attached", [True, False])
def test_adapters_are_added(attached):
    model = get_peft_model(tiny("Llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if attached:
        fused_lora.attach(model)
    ids = torch.arange(8, 20)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
        with packed(model):
            replaced = [
                m for m in model.modules() if isinstance(m.__dict__.get("forward"), packed_linear._PackedForward)
            ]
            got = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
            with packed(model):
                torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
    # 4 layers with 7 projections each, and the output layer.
    assert len(replaced) == 29 and sum(type(m) is LoraLinear for m in replaced) == 8
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}


def test_what_is_not_packed():
    with torch.autocast("cpu", torch.bfloat16), packed(model := tiny("Llama")):
        assert "forward" not in model.lm_head.__dict__
    with packed(half := tiny("Llama").to(torch.bfloat16)):
        assert "forward" not in half.lm_head.__dict__
    model.lm_head.forward = own = lambda x: x
    with packed(model):
        assert model.lm_head.forward is own and "forward" in model.model.layers[0].mlp.up_proj.__dict__
    assert model.lm_head.forward is own


def test_large_models_are_not_copied(monkeypatch):
    monkeypatch.setattr(packed_linear, "MOST_BYTES", 1000)
    with packed(model := tiny("Llama")):
        assert "forward" not in model.lm_head.__dict__


def test_layers_are_restored_after_an_error():
    model = tiny("Llama")
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())
