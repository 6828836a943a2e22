"""Speed as a share of what the machine can do."""

import time

ENOUGH_SECONDS = 0.05
LARGEST = 8192


def matmul_rate(dtype: str, device: str) -> float:
    """Floating-point operations a second of a matrix product in `dtype` on `device`.

    The product is doubled in size until one takes long enough to be timed, so that arithmetic which the processor has
    to emulate (float16 on most CPUs) costs no minutes; the best of four counts.
    """
    import torch

    size = 256
    while True:
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        best = min(_seconds(a) for _ in range(4))
        if best >= ENOUGH_SECONDS or size >= LARGEST:
            return 2 * size**3 / best
        size *= 2


def slower_than_float32(dtype: str, device: str) -> str | None:
    """The sentence that says so where products in `dtype` are slower than in float32, as where they are emulated."""
    mine, plain = matmul_rate(dtype, device), matmul_rate("float32", device)
    if mine >= plain:
        return None
    return (
        f"matrix products in {dtype} run at {mine / 1e9:.0f} GFLOP/s here, in float32 at {plain / 1e9:.0f}: this"
        " processor has no such arithmetic, train in float32 (--bf16 false --fp16 false)"
    )


def _seconds(a) -> float:
    import torch

    started = time.monotonic()
    a @ a
    if a.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic() - started


DPO_OPERATIONS, SFT_OPERATIONS = 6.0, 4.0


def model_flops(parameters: int, tokens: int, operations: float = DPO_OPERATIONS) -> float:
    """Operations that training needs for `tokens`, attention left out.

    A parameter and token cost 2 for the policy's forward, 2 for the gradients of its activations, and in preference
    training (prompt, chosen and rejected stored once) 2 for the reference's forward. The gradients of trained weights
    come on top where all of them are trained; they are not counted, so that the share (MFU) is comparable between LoRA
    and full fine-tuning.
    """
    return operations * parameters * tokens
