"""Fixes and helpers for multi-process launches, and quiet library logging."""

import logging
import os
import warnings

from utils.errors import UserError
from utils.hub import report_retries_once

# What accelerate's launcher passes on from its config file although the run decides it: {variable: (the key there, the
# value that leaves the decision to the run or saves its weights as one file, None to remove it)}.
DECIDED_BY_THE_RUN = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", None),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", None),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": ("zero3_save_16bit_model", "true"),
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),
}
# Set in each of several processes, by torch's launcher or by MPI.
NUMBER_OF_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def settle_launch() -> list[str]:
    """Let the run decide what belongs to it, whatever a file of `accelerate config` says. Call before parsing.

    Returns:
        Notes about the values that are not used.
    """
    notes = []
    # accelerate's launcher sets a port for more than one process, also where it then starts the script only once.
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if launched and not os.environ.keys() & set(NUMBER_OF_PROCESSES):
        notes.append(
            "num_processes of accelerate's config file is not used; this is a single process: accelerate starts several"
            " for MULTI_GPU, FSDP and DEEPSPEED (configs/accelerate/cpu_2proc.yaml), and for MULTI_CPU with MPI only"
        )
    for variable, (key, value) in DECIDED_BY_THE_RUN.items():
        before = os.environ.get(variable)
        if before is None or before.lower() == str(value).lower():
            continue
        if value is None:
            del os.environ[variable]
        else:
            os.environ[variable] = value
        instead = "the run's own is" if value in (None, "no") else f"{value} is"
        notes.append(f"{key} {before} of accelerate's config file is not used; {instead}")
    return notes


def keep_fsdp_on_cpu() -> None:
    """Shard an FSDP launch on CPU processes too, where accelerate silently falls back to DDP.

    accelerate enables FSDP only if its state is MULTI_GPU or another accelerator. With this, two CPU processes run
    the same code as eight GPUs. Call it after the training arguments are created (they reset the state) and before
    the trainer is.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
        # All instances share this dictionary; the trainer reads the type from it when it creates its Accelerator.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def on_main_process(call):
    """Run `call()` on rank 0 only; return its result, or raise its UserError, on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # outcome: [result, error text]. The error travels in the same broadcast as a result, so that no process waits in a
    # collective that rank 0 never reaches. After any other exception, the launcher ends the waiting processes.
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
    # Rank 0 returns the object itself: a broadcast copy loses what is not pickled (a run's file lock).
    return outcome[0] if result is None else result


def join_processes():
    """Join the launch and return accelerate's PartialState.

    Ranks may reach a barrier hours apart, so the timeout is 24 hours.
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # Without cpu=True, PartialState treats each CPU process as a separate single-process run.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=24))


def quiet_libraries() -> None:
    """Silence library logging below ERROR, library warnings and library progress bars."""
    # Unset, tokenizers warn and switch to one thread in every forked worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate|trl)\b")
    for name in ("bitsandbytes", "accelerate", "trl", "httpx", "torch.distributed", "torch.utils.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
    report_retries_once()
    # Imported after the filters, which then cover the libraries' import-time warnings too.
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
