"""Faster LoRA layers: y = W x, then y += s B (A x) in place.

Speed: a product with r columns costs less on a CPU than writing its result once, and PEFT's lora.Linear writes
it three times (product, scaling, sum). Here it is added to y directly.

Results: the matrix products are PEFT's (Hu et al. 2021, arXiv 2106.09685, s = alpha / r), so values and gradients are
equal up to float32 rounding. Layers with more than y + s B A x (dropout in training, DoRA, bias, several adapters) keep
PEFT's forward.

Switch: there is no flag; without the call of `attach`, PEFT's layers are unchanged.
"""

import functools

import torch


class AddLora(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, written into `y`.

    Shapes: y (..., out), x (..., in), A (r, in), B (out, r); scaling s is a number.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scaling):
        dtype = y.dtype
        # Scaling B costs out × r multiplications, scaling the result tokens × out.
        flat, a, b = x.reshape(-1, x.shape[-1]).to(dtype), A.to(dtype), (B * scaling).to(dtype)
        low = flat @ a.t()  # (tokens, r)
        # Safe in place: y is the base layer's new output, and the backward of a linear layer does not read its output.
        y.view(-1, y.shape[-1]).addmm_(low, b.t())
        ctx.mark_dirty(y)
        # `low` is small (r columns) and needed for the gradient of B.
        ctx.save_for_backward(x, A, B, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, A, B, low = ctx.saved_tensors
        dtype = low.dtype
        flat = grad.reshape(-1, grad.shape[-1]).to(dtype)  # dL/dy, (tokens, out); also the gradient of the incoming y
        low_grad = (flat @ B.to(dtype)) * ctx.scaling  # dL/d(x Aᵀ), (tokens, r)
        to_x = (low_grad @ A.to(dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        to_a = to_b = None
        if ctx.needs_input_grad[2]:
            to_a = (low_grad.t() @ x.reshape(-1, x.shape[-1]).to(dtype)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            # Transposed, since a product with many rows and r columns is slower on a CPU.
            to_b = (low.t() @ flat).t().mul(ctx.scaling).to(B.dtype)
        return grad, to_x, to_a, to_b, None


def attach(model) -> None:
    """Make the plain LoRA layers of `model` add in place. A second call has no effect."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        # Exactly PEFT's class: a subclass may compute something else.
        if type(layer) is Linear and not hasattr(layer, "_adds_in_place"):
            layer.forward = functools.partial(_forward, layer, layer.forward)
            layer._adds_in_place = True


def _forward(layer, peft_forward, x, *args, **kwargs):
    """The layer's forward: in place for a single plain adapter, PEFT's otherwise."""
    # An active adapter has no weights here if its target_modules leave this layer out.
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = (
        len(active) == 1
        and not (args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant)
        # Without dropout the entry is an Identity, which has no p.
        and (not layer.training or getattr(layer.lora_dropout[active[0]], "p", 0.0) == 0.0)
        and not (layer.lora_A[active[0]].bias is not None or layer.lora_B[active[0]].bias is not None)
    )
    if not plain:
        return peft_forward(x, *args, **kwargs)
    A, B = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
        # Here PEFT computes the LoRA term in A's precision and rounds the sum once, which is more precise.
        return peft_forward(x, *args, **kwargs)
    return AddLora.apply(layer.base_layer(x), x, A, B, layer.scaling[active[0]])
