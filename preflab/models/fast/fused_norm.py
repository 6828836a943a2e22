"""Faster RMSNorm layers with frozen weights on a CPU: the backward as one formula instead of autograd's steps.

Speed: a norm does little arithmetic, so its time is passes over memory. Autograd keeps several float32 copies of the
hidden states and passes over them about twenty times; here the input and one number per token are stored, for eight
passes.

Results: the forward's operations are those of transformers' layers, so its values are equal bit by bit. Gradients are
computed in float32 and equal autograd's up to rounding.

Switch: no flag; without the call of `attach`, transformers' layers are unchanged. Layers whose weight is
trained, and layers on other devices, keep their forward.
"""

import functools

import torch

# Names of transformers' classes of the architectures in `shared_prompt.KNOWN`, by what they do with the weight w.
# (x / rms(x)).to(dtype) * w
ROUNDED_FIRST = {
    "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "SmolLM3RMSNorm",
}  # fmt: skip
# (x / rms(x) * w).to(dtype), and the same with 1 + w
FLOAT32, ONE_PLUS = {"Olmo2RMSNorm"}, {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, without a gradient of the weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Shapes: x (..., width), weight (width,). With `rounded_first` x / rms(x) is rounded to x's precision before the
    product, otherwise the weight is float32 and the product is rounded.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, rounded_first):
        scaled = x.float()
        inverse = torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        # Without a copy `scaled` is x itself in float32, which must not change.
        scaled = scaled.mul_(inverse) if x.dtype != torch.float32 else scaled * inverse
        ctx.save_for_backward(x, weight, inverse)
        return scaled.to(x.dtype).mul_(weight) if rounded_first else scaled.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, inverse = ctx.saved_tensors
        # With n = x / rms(x) and h = gradient x weight: dL/dx = (h - n mean(h n)) / rms(x).
        h = gradient.float() * weight
        n = x.float() * inverse
        mean = torch.mul(h, n).mean(-1, keepdim=True)
        return h.addcmul_(n, mean, value=-1).mul_(inverse).to(x.dtype), None, None, None


def attach(model) -> None:
    """Give the frozen RMSNorm layers of `model` the faster backward. A second call has no effect."""
    for layer in model.modules():
        name = type(layer).__name__
        known = name in ROUNDED_FIRST | FLOAT32 | ONE_PLUS and type(layer).__module__.startswith("transformers.")
        if known and not hasattr(layer, "_short_backward"):
            layer.forward = functools.partial(_forward, layer, layer.forward)
            layer._short_backward = True


def _forward(layer, original, x):
    """The layer's forward; the original one where it does not need a gradient of x alone."""
    if x.device.type != "cpu" or layer.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
        return original(x)
    name = type(layer).__name__
    weight = layer.weight
    if name in ONE_PLUS:
        weight = 1.0 + weight.float()
    eps = layer.eps if name in ONE_PLUS else layer.variance_epsilon
    return RMSNorm.apply(x, weight, eps, name in ROUNDED_FIRST)
