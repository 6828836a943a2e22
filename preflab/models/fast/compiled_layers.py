"""Decoder layers compiled by torch.compile (TorchInductor): fewer kernels, each with fewer passes over memory.

Speed: norms, rotary embeddings, activations and casts are fused with their neighbours; on a GPU the host launches a few
kernels per layer instead of one per operator. Compiling takes a minute or more in the first step; later runs on the
same machine read the kernels from TorchInductor's cache.

Results: equal up to rounding. In 16 bits fused kernels round less often.

Switch: `--compile_layers`. All layers share the code of the first (regional compilation), and attention stays outside,
a graph break. On a CPU one kernel serves all lengths; on a GPU packed rows are padded to a multiple of ROW_MULTIPLE
tokens, so that few lengths are compiled, each for itself.
"""

import functools
import shutil

import torch
from transformers import AttentionInterface

from preflab.models.fast.shared_prompt import unsupported_reason
from preflab.models.logprobs import without_adapter_shell

BACKEND = "inductor"
# Tokens, on a GPU: at most eight lengths for the largest default of --micro_batch_tokens.
ROW_MULTIPLE = 1024


def missing_compiler(on_cpu: bool) -> str | None:
    """Why layers cannot be compiled on this machine, or None."""
    if on_cpu and not any(map(shutil.which, ("g++", "clang++"))):
        return "TorchInductor needs a C++ compiler, and neither g++ nor clang++ is installed"
    return None


def attach(model) -> str | None:
    """Compile the decoder layers of `model` at their first call. A second call has no effect.

    Call it after `shared_prompt.attach`, and without `fused_lora.attach` and `fused_norm.attach`: the compiler fuses
    the libraries' own layers.

    Args:
        model: a transformers model, with or without an adapter.

    Returns:
        Why it is not compiled, or None.
    """
    reason = unsupported_reason(model)
    if reason is not None:
        return reason
    backbone = without_adapter_shell(model).base_model
    on_cpu = backbone.device.type == "cpu"
    # Two modes (with gradients; without, the reference) for each length, and for layers with and without a window.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    _keep_outside(backbone.config._attn_implementation)
    for layer in backbone.layers:
        if layer._compiled_call_impl is None:
            compiled = torch.compile(layer._call_impl, backend=BACKEND, dynamic=on_cpu)
            layer._compiled_call_impl = functools.partial(_call, layer, compiled)
    backbone.row_multiple = 1 if on_cpu else ROW_MULTIPLE
    return None


def _call(layer, compiled, *args, **kwargs):
    """A layer's call: compiled for packed rows; generation, whose caches differ from layer to layer, is not."""
    return (layer._call_impl if kwargs.get("layout") is None else compiled)(*args, **kwargs)


def _keep_outside(attention: str) -> None:
    """Do not trace into an attention function of transformers' interface, which reads the lengths of a row."""
    # Eager attention belongs to the model's file, and is traced.
    function = AttentionInterface().get(attention)
    if function is not None and not getattr(function, "stays_outside", False):
        outside = torch.compiler.disable(function)
        outside.stays_outside = True
        AttentionInterface.register(attention, outside)
