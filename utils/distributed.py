"""What accelerate's launch leaves open."""

import logging
import os
import warnings

from utils.errors import UserError


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


def on_main_process(call):
    """`call()`'s result on every process, run on rank 0 alone; its UserError is raised on every process too."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome, result = [None, None], None
    if PartialState().is_main_process:
        try:
            result = call()
            outcome[0] = result
        except UserError as error:
            outcome[1] = str(error)
    if PartialState().num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0] if result is None else result


def join_processes():
    """This process's place in the launch. A process may be hours ahead of another at a barrier before it gives up."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # Unless it is told of the CPU, PartialState takes the processes of a CPU launch for strangers.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=24))


def quiet_libraries() -> None:
    """Silence the libraries' informational chatter; errors and this project's own lines stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate|trl)\b")
    for name in ("bitsandbytes", "accelerate", "trl", "httpx", "torch.distributed", "torch.utils.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
