"""Rough estimate of the memory that training needs, and of the memory that is free."""

# The training scripts import OUT_OF_MEMORY at their top, so this module imports torch inside its functions.

import os
from dataclasses import dataclass

from utils.machine import free_memory

OUT_OF_MEMORY = (
    "lower --per_device_train_batch_size (raise --gradient_accumulation_steps to match) and"
    " --per_device_eval_batch_size, or set --gradient_checkpointing true, and run the same command again to continue;"
    " or start another run with a smaller --max_length or --load_in_4bit"
)
# A 2B model's step on an H200 is limited by kernel launches below a few thousand tokens (measured, benchmarks/).
GPU_MICRO_BATCH_TOKENS = (8192, 4096)


@dataclass
class Memory:
    """Bytes: `resident` stays throughout a step, `activations` live between a micro-batch's forward and backward."""

    resident: float
    activations: float

    def total(self, checkpointing: bool) -> float:
        """The sum; checkpointing stores about a sixteenth of the activations and recomputes the others."""
        return self.resident + (self.activations / 16 if checkpointing else self.activations)


def needed(model, args, trained: int, longest: int, reference_beside: bool) -> Memory:
    """Estimate the memory of training, as an order of magnitude.

    Weights as loaded; 12 bytes per trained parameter (gradient and two Adam moments in float32); per layer and token
    about 16 values of the model's width and 6 of its feed-forward's (after Korthikanti et al. 2022, arXiv 2205.05198,
    whose 34 values of the width assume a feed-forward of 4 widths and no gate). Materialised attention scores (eager
    attention on padded batches) are not counted.

    Args:
        args: a RunConfig with `sequences_a_row` and `token_budget`.
        trained: trained parameters.
        longest: tokens of the longest sequence.
        reference_beside: whether a second copy of the weights is loaded.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) * (1 + reference_beside)
    # Multimodal configs keep these sizes in a nested config; for others this is the config itself.
    config = model.config.get_text_config()
    row = args.sequences_a_row * longest
    # Tokens of one optimizer step on this process.
    step = row * args.per_device_train_batch_size * args.gradient_accumulation_steps
    # A micro-batch holds at least one row and never more than one optimizer step.
    tokens = max(row, min(args.token_budget(longest), step))
    # GPT-2's config, for example, has no intermediate_size; its feed-forward has 4 widths.
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    values = tokens * config.num_hidden_layers * (16 * config.hidden_size + 6 * feed_forward)
    # Bytes per activation value: 4 in float32, 2 in 16 bits.
    return Memory(weights + 12 * trained, values * (4 if args.precision == "fp32" else 2))


def gpu_micro_batch_tokens(estimate, usual: int, card: float) -> int | None:
    """The first of GPU_MICRO_BATCH_TOKENS whose estimate is at most half of the card's memory; None keeps `usual`.

    Args:
        estimate: function from tokens per forward to bytes of training.
        usual: tokens per forward otherwise.
        card: memory of the GPU in bytes.
    """
    return next((tokens for tokens in GPU_MICRO_BATCH_TOKENS if tokens > usual and estimate(tokens) <= card / 2), None)


def card_bytes() -> float | None:
    """Total memory of this process's GPU, or None without one.

    Total rather than free memory, so that the same card always leads to the same choice.
    """
    import torch
    from accelerate import PartialState

    device = PartialState().device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_bytes(model) -> float:
    """Memory that this process may use on the training device, the bytes of `model` itself included."""
    import torch
    from accelerate import PartialState

    kind = PartialState().device.type
    if kind == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        # The processes of one machine share its memory.
        free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # `needed` counts the weights, which are already loaded, so their bytes count as free here.
    return free + sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == kind)


def reason_for_checkpointing(memory: Memory, free: float) -> str | None:
    """Why gradient checkpointing is needed, as a sentence; None where a tenth of the memory stays free without it."""
    if memory.total(False) <= 0.9 * free:
        return None
    return (
        f"gradient checkpointing is on: without it about {memory.total(False) / 2**30:.1f} GiB are needed, and"
        f" {free / 2**30:.1f} GiB are free (--gradient_checkpointing false turns it off)"
    )
