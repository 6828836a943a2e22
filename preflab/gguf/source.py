"""The plain transformers folder that is exported: a complete model, or an adapter merged into its base."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from preflab.evaluation.comparison import Comparison
from preflab.evaluation.two_models import TwoModels
from preflab.models.loading import locate, locate_adapter
from preflab.models.merging import MARK, ensure_same_model, is_merge_of, probe_logps, write_merged
from preflab.models.public_names import PublicName, public_name
from utils.artifacts import read_json


def base_of_merged(folder: str) -> str | None:
    """The base of a folder that merge_adapter.py wrote, None for others."""
    mark = Path(folder).expanduser() / MARK
    return read_json(mark).get("base") if mark.exists() else None


def exported_name(comparison: Comparison, base: PublicName | None) -> str:
    """The exported model in words, without paths of this machine."""
    tuned = public_name(comparison.adapter or comparison.tuned).shown
    return f"{base.shown} with the LoRA adapter {tuned} merged into it" if comparison.adapter else tuned


def source_folder(models: TwoModels, staged) -> Path:
    """The folder of the model to export.

    An adapter is merged as merge_adapter.py does it, unless that script has written the same merge already.

    Args:
        staged: (name, function that writes the path) to a path that is made once (`GgufFolder.intermediate`).
    """
    comparison = models.comparison
    if comparison.adapter is None:
        location = locate(comparison.tuned, comparison.args.tuned_revision)
        return Path(location if os.path.isdir(location) else downloaded(location, comparison.args.tuned_revision))
    about = {"base": comparison.base, "adapter": models.identity("tuned")}
    merged = Path(comparison.args.checkpoints) / f"{comparison.name}-merged"
    if is_merge_of(merged, about):
        return merged
    return staged("merged", lambda path: merge(models, path, about))


def base_folder(models: TwoModels) -> Path:
    """The folder of the base model, for the conversion of an adapter."""
    comparison = models.comparison
    location = locate(comparison.base, comparison.args.base_revision)
    return Path(location if os.path.isdir(location) else downloaded(location, comparison.args.base_revision))


def downloaded(name: str, revision: str | None) -> str:
    """A hub model's folder on this machine."""
    return snapshot_download(name, revision=revision, ignore_patterns=["*.gguf", "*.bin.index.json", "original/*"])


def merge(models: TwoModels, folder: Path, about: dict) -> None:
    """Merge the adapter into full-precision weights, and check that the written folder is the same model."""
    comparison = models.comparison
    adapter = locate_adapter(comparison.adapter)
    model = models.load_one(comparison.base, comparison.args.base_revision, adapter, quantized=False)
    before = probe_logps(model, models.tokenizer)
    write_merged(folder, model, models.tokenizer, about)
    # Frees its memory before the merged model is loaded.
    del model
    merged = models.load_one(str(folder), quantized=False)
    ensure_same_model(before, probe_logps(merged, models.tokenizer), folder, models.dtype)
