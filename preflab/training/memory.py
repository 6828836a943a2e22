"""The memory that training needs, computed from the model's config, and the memory that is free."""

# The training scripts import OUT_OF_MEMORY at their top, so this module imports torch inside its functions.

import os

from preflab.training.memory_parts import Batch, Counts, Memory, Weights
from utils.machine import free_memory

OUT_OF_MEMORY = (
    "lower --per_device_train_batch_size (raise --gradient_accumulation_steps to match) and"
    " --per_device_eval_batch_size, or set --gradient_checkpointing true, and run the same command again to continue;"
    " or start another run with a smaller --max_length or --load_in_4bit"
)
# A 2B model's step on an H200 is limited by kernel launches below a few thousand tokens (measured, benchmarks/).
GPU_MICRO_BATCH_TOKENS = (8192, 4096)


# Share of the memory that training may use: the rest is for fragmentation, which differs between allocators.
USABLE_SHARE = 0.9
# Values that an optimizer stores per trained weight, and bytes of each; None: the bytes of the weight.
OPTIMIZER_STATES = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adamw_anyprecision": (2, None), "sgd": (0, None),
    "adagrad": (1, None), "rmsprop": (1, None), "lion_32bit": (1, 4), "lion_8bit": (1, 1), "paged_lion_8bit": (1, 1),
    "adamw_bnb_8bit": (2, 1), "adamw_8bit": (2, 1), "paged_adamw_8bit": (2, 1), "paged_adamw_32bit": (2, 4),
    "paged_adamw": (2, 4), "adafactor": (0, None),
}  # fmt: skip
# On a CPU, measured once with a Llama of 10 layers in plain torch (docs/planning.md): free pieces in glibc's heap at
# the peak of a training step, as a share of the tensors in it; 28% in float32, 18% in bfloat16.
HOLES = 0.23
# oneDNN and torch each keep the code of 1,024 products in 16 bits; bytes of one in both.
KERNEL_BYTES, MOST_KERNELS = 0.53 * 2**20, 1024


def needed(weights: Weights, args, batch: Batch, accumulates: bool, *, checkpointing: bool, reference_in_step=False,
           cuda: bool = False, shards=None, alike: bool = False) -> Memory:  # fmt: skip
    """The memory of training, from the model's config alone (`preflab.training.traced_memory`).

    Args:
        args: a RunConfig.
        batch: the largest batch (`RunConfig.largest_batch`).
        accumulates: whether a step has several forwards.
        reference_in_step: whether the reference is computed in every step.
        shards: how training is divided over processes (`preflab.training.sharding.Shards`); None for one process.
        alike: whether all batches have the lengths of the largest.
    """
    # Its import takes seconds, and the scripts import this module for --help.
    from preflab.training.traced_memory import Step, counts_of, traced

    counts = counts_of(weights)
    half = args.precision != "fp32"
    # Engines that shard store or gather 16-bit copies of the weights themselves; autocast then makes none.
    dtype = "bfloat16" if half and shards is not None and shards.kind != "ddp" else weights.dtype
    step = Step(
        dtype, half, weights.lora, checkpointing, reference_in_step, cuda,
        fused_lora=shards is None or not shards.parameters,
    )  # fmt: skip
    run = traced(weights.config, step, batch)
    # bitsandbytes dequantises one linear layer at a time.
    dequantised = counts.largest_linear * (4 if args.precision == "fp32" else 2) if weights.bits else 0
    memory = Memory(
        weights=counts.base_bytes + counts.adapter_bytes,
        reference=counts.base_bytes if weights.reference_beside else 0.0,
        gradients=counts.trained_bytes,
        buckets=0.0,
        optimizer=optimizer_bytes(counts, args),
        gathered=0.0,
        activations=run.peak + dequantised,
        # Where gradients are summed over forwards, the embedding has one already.
        after_layers=run.last if accumulates else max(0.0, run.last - run.embedding),
        accumulates=accumulates,
        exact=run.exact,
        holes=0.0 if cuda else HOLES * run.heap,
        # Other lengths are other shapes, and any run has more lengths than are kept.
        kernels=0.0 if cuda or not run.products else KERNEL_BYTES * (run.products if alike else MOST_KERNELS),
    )
    return shards.of(memory, counts, weights, args) if shards else memory


def optimizer_bytes(counts: Counts, args) -> float:
    """Bytes of the optimizer's state; of an unknown optimizer as for Adam. `args`: a RunConfig."""
    values, size = OPTIMIZER_STATES.get(str(getattr(args.optim, "value", args.optim)), (2, None))
    return values * (counts.trained_bytes if size is None else counts.trained * size)


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


def reason_for_checkpointing(without: float, free: float) -> str | None:
    """Why gradient checkpointing is needed, as a sentence; None where a tenth of the memory stays free without it.

    Args:
        without: bytes needed without it. free: bytes that the process may use.
    """
    if without <= USABLE_SHARE * free:
        return None
    return (
        f"gradient checkpointing is on: without it about {without / 2**30:.1f} GiB are needed, and"
        f" {free / 2**30:.1f} GiB are free (--gradient_checkpointing false turns it off)"
    )
