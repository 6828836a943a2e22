"""Checkpoints of DeepSpeed ZeRO-3 for another number of processes, in DeepSpeed's universal format."""

import os
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

# DeepSpeed reads the name of the converted folder from it, and its converter writes it last.
LATEST = "latest_universal"


def convert(checkpoint: Path) -> None:
    """Write the optimizer state of all processes, one file per parameter, beside DeepSpeed's own files. Rank 0 only.

    Args:
        checkpoint: a checkpoint of a run under ZeRO-3, with a folder `global_stepN`.
    """
    from deepspeed.checkpoint import ds_to_universal

    if (checkpoint / LATEST).exists():
        return
    (source,) = (path for path in checkpoint.glob("global_step*") if path.name.removeprefix("global_step").isdigit())
    target = checkpoint / f"{source.name}_universal"
    # Left by an interrupted conversion.
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process: the others wait.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with open(os.devnull, "w", encoding="utf-8") as silence, redirect_stdout(silence):
        ds_to_universal.main(arguments)


def load_converted(config) -> None:
    """Let DeepSpeed resume from the converted files. Every rank, before the trainer is made. `config`: a RunConfig."""
    config.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
