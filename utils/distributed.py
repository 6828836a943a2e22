"""What accelerate's launch leaves open."""

import os


def keep_fsdp_on_cpu() -> None:
    """Let an FSDP launch shard on CPU processes too, where accelerate would fall back to DDP without a word.

    accelerate makes FSDP of a launch only where its state says MULTI_GPU or another accelerator. Two CPU processes
    then run the very code that eight GPUs run. Call once the training arguments are made (they reset
    the state) and before the trainer is.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
