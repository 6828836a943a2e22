"""LoRA's addend in place: y = W x, then y += s B (A x), without a copy for each of product, scaling and sum.

The matrix products are those of PEFT's lora.Linear (Hu et al. 2021, arXiv 2106.09685, s = alpha / r). On a CPU a
product with r columns costs less than writing its result once more, and PEFT writes it three times.
"""

import functools

import torch


class AddLora(torch.autograd.Function):
    """`y` + s (x Aᵀ) Bᵀ, written into `y`. Shapes: y (..., out), x (..., in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, y, x, A, B, scaling):
        dtype = y.dtype
        flat, a, b = x.reshape(-1, x.shape[-1]).to(dtype), A.to(dtype), (B * scaling).to(dtype)
        low = flat @ a.t()
        y.view(-1, y.shape[-1]).addmm_(low, b.t())
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, B, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, A, B, low = ctx.saved_tensors
        dtype = low.dtype
        flat = grad.reshape(-1, grad.shape[-1]).to(dtype)
        low_grad = (flat @ B.to(dtype)) * ctx.scaling
        to_x = (low_grad @ A.to(dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        to_a = to_b = None
        if ctx.needs_input_grad[2]:
            to_a = (low_grad.t() @ x.reshape(-1, x.shape[-1]).to(dtype)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            to_b = (flat.t() @ low).mul_(ctx.scaling).to(B.dtype)
        return grad, to_x, to_a, to_b, None


def attach(model) -> None:
    """Let the plain LoRA layers of `model` add in place; whatever is more than y + s B A x stays PEFT's."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear and not hasattr(layer, "_adds_in_place"):
            layer.forward = functools.partial(_forward, layer, layer.forward)
            layer._adds_in_place = True


def _forward(layer, usual, x, *args, **kwargs):
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = (
        len(active) == 1
        and not (args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant)
        and (not layer.training or getattr(layer.lora_dropout[active[0]], "p", 0.0) == 0.0)
        and not (layer.lora_A[active[0]].bias is not None or layer.lora_B[active[0]].bias is not None)
    )
    if not plain:
        return usual(x, *args, **kwargs)
    A, B = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
        # PEFT computes the addend in A's precision then, and rounds the sum once.
        return usual(x, *args, **kwargs)
    return AddLora.apply(layer.base_layer(x), x, A, B, layer.scaling[active[0]])
