"""Faster linear layers on a CPU: weights in oneDNN's own layout while answers are generated.

Speed: for the few tokens of a decoding step, MKL's product reads a weight matrix at a fraction of the memory's rate;
oneDNN with a weight that is laid out beforehand takes a half to a quarter of the time, and a tenth less for many
tokens. LoRA adapters are added to the copies, so their two small products per layer are saved too.

Results: the same sums in another order, so equal up to float32 rounding. The model's own weights are never changed.

Switch: the context `packed`; layers that it does not know compute as before.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

# The layout is chosen for about this number of tokens.
TYPICAL_TOKENS = 16
# Copies take as much memory as the weights: a larger model is computed as before.
MOST_BYTES = 4 * 2**30


def plain_adapters(layer: LoraLinear) -> list[str] | None:
    """The active adapters of a LoRA layer whose sum with its weight is one matrix; None if there is more to it."""
    if layer.disable_adapters:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    more = any(name in layer.lora_variant or layer.lora_bias.get(name) for name in active)
    return None if more or layer.merged else active


def layers_to_pack(model) -> list[tuple[nn.Module, nn.Linear, list[str]]]:
    """(layer whose forward is replaced, linear layer with the weight, LoRA adapters to add) of a float32 model."""
    layers, inside = [], set()
    for module in model.modules():
        # Exactly these classes: a subclass may compute something else.
        if type(module) is LoraLinear:
            linear, adapters = module.get_base_layer(), plain_adapters(module)
            if adapters is None:
                continue
            inside.update(module.modules())
        elif type(module) is nn.Linear and module not in inside:
            linear, adapters = module, []
        else:
            continue
        # A replaced forward (CPU offload, for example) and sharded weights are left alone.
        if type(linear) is nn.Linear and "forward" not in linear.__dict__ and linear.weight.dim() == 2:
            if linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu":
                layers.append((module, linear, adapters))
    return layers


@contextmanager
def packed(model):
    """Compute the linear layers of `model` from packed copies of their weights, if they are float32 on a CPU.

    The weights must not change meanwhile. Gradients are not available.
    """
    layers = layers_to_pack(model)
    size = sum(linear.weight.nbytes for _, linear, _ in layers)
    # Under autocast the layers compute in 16 bits.
    if size > MOST_BYTES or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        layers = []
    replaced = []
    try:
        for layer, linear, adapters in layers:
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = _PackedForward(layer.forward, linear, merged_weight(layer, linear, adapters))
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def merged_weight(layer, linear: nn.Linear, adapters: list[str]) -> torch.Tensor:
    """The weight with its adapters added, shape (out, in)."""
    with torch.no_grad():
        weight = linear.weight.detach()
        for name in adapters:
            # Not in place: the layer's own weight must not change.
            weight = weight + layer.get_delta_weight(name)
        return weight


class _PackedForward:
    """The forward of one layer with a packed weight."""

    def __init__(self, forward, linear: nn.Linear, weight: torch.Tensor):
        self.own, self.bias = forward, linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_TOKENS)

    def __call__(self, x, *args, **kwargs):
        if x.dtype != torch.float32 or args or kwargs:
            return self.own(x, *args, **kwargs)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
