"""The files of a LoRA folder, and their hash. Imports no libraries, so that a status of many runs is instant."""

from pathlib import Path

from utils.provenance import sha256_of_files

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def adapter_sha256(folder: str) -> str:
    """SHA-256 of the config and weights of a LoRA folder."""
    # The folder may also contain a README and checkpoints, which do not affect the model.
    return sha256_of_files([p for p in Path(folder).iterdir() if p.name in ADAPTER_FILES])
