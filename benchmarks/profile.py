"""Where a training step spends its time, by kind of operation."""

# What a profiler calls them: operators on a CPU; on a GPU kernels of SDPA, FlexAttention and cuBLAS.
KINDS = {
    "attention": ("scaled_dot_product", "flash", "fmha", "sdpa", "flex_attention", "triton_tem"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "nvjet", "cutlass", "xmma", "splitK"),
}


def kind_of(name: str) -> str:
    """The kind of work that an operator or kernel does: one of KINDS, or "other"."""
    return next((kind for kind, names in KINDS.items() if any(n in name for n in names)), "other")


def time_by_kind(profiler, device: str, wall: float) -> dict[str, float]:
    """Shares of `wall` seconds by kind of work; on a GPU with the share in which no kernel ran ("idle")."""
    on_gpu, seconds = device == "cuda", dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if on_gpu != (event.device_type.name == "CUDA") or getattr(event, "is_user_annotation", False):
            continue
        time_of_it = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += time_of_it / 1e6
    shares = {kind: s / wall for kind, s in seconds.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))} if on_gpu else shares
