"""Checks of a checkpoint before training resumes from it: hashes of its files, and state files that can be read.

Nothing in a checkpoint is executed: pickled states are read with `weights_only=True`, which builds tensors and plain
Python values only.
"""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from preflab.evaluation.runs import MANIFEST, step_of
from utils.artifacts import read_json
from utils.errors import explain, first_line
from utils.machine import usable_cores
from utils.provenance import sha256_of_file

# What transformers reads on resume, by pattern. Its training_args.bin is never read.
PICKLED = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "*model*.bin")
RNG_KEYS = {"python", "numpy", "cpu"}


def file_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its manifest, by path relative to it."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    # Threads: hashlib releases the interpreter's lock, so several files are hashed at a time.
    with ThreadPoolExecutor(usable_cores()) as pool:
        hashes = pool.map(sha256_of_file, files)
        return {str(path.relative_to(checkpoint)): sha256 for path, sha256 in zip(files, hashes, strict=True)}


def damage(checkpoint: Path) -> str | None:
    """Why training cannot resume from a complete checkpoint: which file is damaged; None if it can.

    Args:
        checkpoint: a folder for which `preflab.evaluation.runs.is_complete` is true.
    """
    # Manifests of earlier versions hold sizes only.
    saved = read_json(checkpoint / MANIFEST).get("sha256")
    if isinstance(saved, dict):
        hashes = file_hashes(checkpoint)
        changed = sorted(name for name in saved if hashes.get(name) != saved[name])
        if changed:
            return f"{changed[0]} does not hold what was saved"
    return _trainer_state(checkpoint) or next(filter(None, map(_unreadable, _state_files(checkpoint))), None)


def _trainer_state(checkpoint: Path) -> str | None:
    # Not at the top: finished runs print their results without it.
    from transformers.trainer_callback import TrainerState

    try:
        step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    # TypeError: keys that TrainerState does not have, or no object at all.
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"trainer_state.json cannot be read ({first_line(error)})"
    return None if step == step_of(checkpoint) else f"trainer_state.json is of step {step}"


def _state_files(checkpoint: Path) -> list[Path]:
    patterns = (*PICKLED, "*.safetensors")
    return sorted({path for pattern in patterns for path in checkpoint.glob(pattern)})


def _unreadable(path: Path) -> str | None:
    """Why a file of states or weights cannot be read. Tensors are not loaded into memory, but those of rng_state."""
    import torch
    from safetensors import safe_open
    from transformers.trainer_pt_utils import safe_globals

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        is_rng = path.name.startswith("rng_state")
        with safe_globals():
            state = torch.load(path, map_location="cpu" if is_rng else "meta", weights_only=True)
    # Unpickling damaged bytes raises whatever they happen to spell.
    except Exception as error:
        # A lack of memory or permissions is not the file's.
        if explain(error):
            raise
        refused = isinstance(error, pickle.UnpicklingError)
        return f"{path.name} cannot be read" + (" as tensors and plain values alone" if refused else "")
    if is_rng and not (isinstance(state, dict) and RNG_KEYS <= state.keys()):
        return f"{path.name} holds no random state"
    return None
