"""How much memory training will take, roughly, and whether it is there."""

import os
from dataclasses import dataclass
from pathlib import Path

# The training scripts import this at their top, so this module imports torch inside its functions.
OUT_OF_MEMORY = (
    "lower --per_device_train_batch_size (raise --gradient_accumulation_steps to match) and"
    " --per_device_eval_batch_size, or set --gradient_checkpointing true, and run the same command again to continue;"
    " or start another run with a smaller --max_length or --load_in_4bit"
)


@dataclass
class Memory:
    """Bytes: `resident` stays throughout a step, `activations` live between a micro-batch's forward and backward."""

    resident: float
    activations: float

    def total(self, checkpointing: bool) -> float:
        """The sum; checkpointing keeps about a sixteenth of the activations and computes the others twice."""
        return self.resident + (self.activations / 16 if checkpointing else self.activations)


def needed(model, args, trained: int, longest: int, reference_beside: bool) -> Memory:
    """A rough estimate, to be read as an order of magnitude.

    Weights as loaded; 12 bytes a trained parameter (gradient and Adam in float32); of each layer and token about 16
    values of the model's width and 6 of its feed-forward's (after Korthikanti et al. 2022, arXiv 2205.05198, whose 34
    values of the width assume a feed-forward of 4 widths and no gate). Attention scores that are written out (eager
    attention of padded batches) are not counted.

    Args:
        trained: trained parameters.
        longest: tokens of the longest sequence.
        reference_beside: whether a second copy of the weights is kept.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) * (1 + reference_beside)
    config = model.config.get_text_config()
    # A step computes no more than its own rows together.
    row = args.sequences_a_row * longest
    step = row * args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens = max(row, min(args.token_budget(longest), step))
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    values = tokens * config.num_hidden_layers * (16 * config.hidden_size + 6 * wide)
    return Memory(weights + 12 * trained, values * (4 if args.precision == "fp32" else 2))


# A 2B model's step on an H200 waits for the launches of its kernels below some thousand tokens (benchmarks/README.md).
GPU_MICRO_BATCH_TOKENS = (8192, 4096)


def gpu_micro_batch_tokens(estimate, usual: int, card: float) -> int | None:
    """The first of GPU_MICRO_BATCH_TOKENS that fits into half of the card's memory; None keeps `usual`.

    Args:
        estimate: bytes of training with a number of tokens computed together.
        usual: tokens that would be computed together otherwise.
        card: memory of the GPU in bytes.
    """
    return next((tokens for tokens in GPU_MICRO_BATCH_TOKENS if tokens > usual and estimate(tokens) <= card / 2), None)


def card_bytes() -> float | None:
    """Memory of this process's GPU, used or not, so that the same card decides the same; None without one."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_bytes(model) -> float:
    """Memory that this process may fill where `model` will be trained, the model's own weights included."""
    import torch
    from accelerate import PartialState

    there = PartialState().device.type
    if there == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = min(psutil.virtual_memory().available, _container_limit())
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free + sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == there)


def _container_limit() -> float:
    """Bytes left below the memory limit of this container (cgroup v2), infinite where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        return float((group / "memory.max").read_text()) - float((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")


def asks_for_checkpointing(memory: Memory, free: float) -> str | None:
    """The sentence that says why, where activations do not fit beside the rest with a tenth to spare; else None."""
    if memory.total(False) <= 0.9 * free:
        return None
    return (
        f"gradient checkpointing is on: without it about {memory.total(False) / 2**30:.1f} GiB, and"
        f" {free / 2**30:.1f} GiB are free (--gradient_checkpointing false leaves it off)"
    )
