"""Training speed as a share of the machine's measured peak (MFU)."""

import time

import torch

# A timed product takes at least this long, and its matrices are at most this wide.
SHORTEST_SECONDS = 0.05
LARGEST_WIDTH = 8192
# Floating-point operations per parameter and token (see `model_flops`): of a training step, and of a reference forward.
STEP_OPERATIONS, REFERENCE_OPERATIONS = 4.0, 2.0
DPO_OPERATIONS = STEP_OPERATIONS + REFERENCE_OPERATIONS
# Shorter training is mostly warm-up, so that its share of the peak says nothing.
SHORTEST_TRAINING_SECONDS = 60.0


def matmul_rate(dtype: str, device: str) -> float:
    """Floating-point operations per second of a matrix product in `dtype` on `device`.

    The width doubles until one product takes long enough to be timed, so that formats which the processor emulates
    (float16 on most CPUs) do not take minutes. The best of four counts.
    """
    width = 256
    while True:
        a = torch.randn(width, width, device=device).to(getattr(torch, dtype))
        # The first product includes warm-up (threads, kernel selection), which the minimum leaves out.
        best = min(_seconds(a) for _ in range(4))
        if best >= SHORTEST_SECONDS or width >= LARGEST_WIDTH:
            # A product of two n x n matrices has n^3 multiplications and as many additions.
            return 2 * width**3 / best
        width *= 2


def slower_than_float32(dtype: str, device: str) -> str | None:
    """A warning where products in `dtype` are slower than in float32 (emulated formats), else None."""
    rate, float32_rate = matmul_rate(dtype, device), matmul_rate("float32", device)
    if rate >= float32_rate:
        return None
    return (
        f"matrix products in {dtype} run at {rate / 1e9:.0f} GFLOP/s here, in float32 at {float32_rate / 1e9:.0f}: this"
        f" processor emulates {dtype}; train in float32 (--bf16 false --fp16 false)"
    )


def _seconds(a) -> float:
    started = time.monotonic()
    a @ a
    synchronize(a.device)
    return time.monotonic() - started


def synchronize(device) -> None:
    """Wait for the kernels of a GPU, which run asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def model_flops_utilisation(flops: float, seconds: float, dtype: str, device: str, processes: int) -> float | None:
    """Model FLOPs utilisation: the share of the machine's measured matrix-product rate that training reached.

    Args:
        flops: floating-point operations of all processes.
        seconds: wall time of training.
        processes: each has its own device, whose rate is measured now.

    Returns:
        None where the training was too short to tell, or where other work slowed the measurement of the rate (the
        share would be above 1).
    """
    if seconds < SHORTEST_TRAINING_SECONDS:
        return None
    share = flops / seconds / (matmul_rate(dtype, device) * processes)
    return round(share, 4) if share <= 1 else None


def model_flops(parameters: int, tokens: int, operations: float = DPO_OPERATIONS) -> float:
    """Floating-point operations that training needs for `tokens`, without attention.

    Per parameter and token: 2 for the policy's forward, 2 for the gradients of its activations, and 2 for the
    reference's forward where training includes it (prompt, chosen and rejected counted once). The gradients of trained
    weights are left out, so that the MFU of LoRA and of full fine-tuning are comparable.
    """
    return operations * parameters * tokens
