"""How the time of a training step divides into kinds of operations.

Not called profile.py: a script in this folder would then shadow the standard library's `profile`.
"""

# Names in a torch profile: operators on a CPU; on a GPU the kernels of SDPA, FlexAttention and cuBLAS.
KINDS = {
    "attention": ("scaled_dot_product", "flash", "fmha", "sdpa", "flex_attention", "triton_tem"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "nvjet", "cutlass", "xmma", "splitK"),
}


def kind_of(name: str) -> str:
    """The kind of an operator or kernel: one of KINDS, or "other"."""
    return next((kind for kind, names in KINDS.items() if any(n in name for n in names)), "other")


def time_by_kind(profiler, device: str, wall: float) -> dict[str, float]:
    """Shares of `wall` seconds by kind of operation; on a GPU also the share without any kernel ("idle")."""
    on_gpu, seconds = device == "cuda", dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if on_gpu != (event.device_type.name == "CUDA") or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += microseconds / 1e6
    shares = {kind: s / wall for kind, s in seconds.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))} if on_gpu else shares
