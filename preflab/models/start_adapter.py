"""What a run starts from where that is no plain model: a base with an adapter on it.

Which of two things is meant must be said. merge: the adapter becomes part of the base, which a new adapter is trained
on; the merged model is written to disk, so that training, evaluation and whoever loads the new adapter see the same
base. continue: the adapter itself is trained further, and a frozen copy of it is the reference.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from preflab.models.loading import (
    ADAPTER_FILES,
    adapter_sha256,
    identify,
    load_model,
    load_tokenizer,
    locate_adapter,
    tokenizer_home,
)
from preflab.models.merging import MARK, write_merged
from utils.artifacts import read_json
from utils.distributed import on_main_process
from utils.errors import is_main_process
from utils.provenance import sha256_of

# The name under which TRL keeps the frozen copy of an adapter that is trained further; its folder in a checkpoint.
FROZEN = "ref"


@dataclass
class StartAdapter:
    """A base model and the adapter folder on it, how the adapter is used, and the merged folder where it is merged."""

    base: str
    revision: str | None
    adapter: str
    use: str
    merged: str | None = None
    note: str = ""

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """(name, revision) of where the tokenizer is."""
        return tokenizer_home(self.base, self.revision, self.adapter)

    def summary(self) -> str:
        """What is done with the adapter, in one line."""
        if self.merged:
            return f"{self.adapter} is merged into {self.base} ({self.merged}); a new adapter is trained on that"
        return f"{self.adapter} on {self.base} is trained further; a frozen copy of it is the reference{self.note}"

    def describe(self) -> dict:
        """For an artifact."""
        return {**self.__dict__, **self.identity()}

    def identity(self) -> dict:
        """What tells this start from another of the same name: a run that goes on must find the same weights."""
        return {"adapter_sha256": adapter_sha256(self.adapter)}


def resolve_start_adapter(args, model_args) -> StartAdapter | None:
    """The start that `--start_adapter` names, or None; `model_args` then names the model that training loads.

    Nothing large is read here: what is merged is merged by `merge`, once the run has its folders.
    """
    if args.start_adapter is None:
        return None
    base = model_args.model_name_or_path
    revision = model_args.model_revision if model_args.model_revision != "main" else None
    start = StartAdapter(base, revision, locate_adapter(args.start_adapter), args.start_adapter_use)
    if start.use == "merge":
        tokenizer = load_tokenizer(*start.tokenizer)
        about = (str(identify(base, tokenizer, revision)), adapter_sha256(start.adapter), str(model_args.dtype))
        name = f"{Path(args.start_adapter).name}-merged-{sha256_of(*about)[:8]}"
        start.merged = str(Path(args.output_dir) / name)
        model_args.model_name_or_path, model_args.model_revision = start.merged, "main"
    else:
        start.note = _take_shape(model_args, read_json(Path(start.adapter) / "adapter_config.json"))
    return start


def _take_shape(model_args, adapter: dict) -> str:
    """Put the adapter's own rank, alpha, dropout and modules into `model_args`; says which keys had no effect."""
    idle = []
    for key, own in (
        ("lora_r", adapter.get("r")),
        ("lora_alpha", adapter.get("lora_alpha")),
        ("lora_dropout", adapter.get("lora_dropout")),
        ("lora_target_modules", adapter.get("target_modules")),
    ):
        asked = getattr(model_args, key)
        if isinstance(own, list):
            # TRL makes a plain text of a single module.
            own, asked = sorted(own), sorted([asked] if isinstance(asked, str) else asked or [])
        if own != asked:
            idle.append(f"{key} {own}, not {asked}")
            setattr(model_args, key, own)
    return f"; its own shape stays ({'; '.join(idle)})" if idle else ""


def merge_start_adapter(
    start: StartAdapter, dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> None:
    """Write the merged model to `start.merged`, once for all processes and runs; it appears by a rename."""
    folder, staging = Path(start.merged), Path(f"{start.merged}.part")

    def write() -> None:
        from filelock import FileLock

        with FileLock(f"{folder}.lock"):
            if not (folder / MARK).exists():
                # Also where the run quantises its base: the adapter goes into the full-precision weights.
                options = (start.revision, dtype, attn_implementation, None, start.adapter, trust_remote_code)
                model = load_model(start.base, *options)
                write_merged(staging, model, load_tokenizer(*start.tokenizer), start.describe())
                os.replace(staging, folder)

    on_main_process(write)


def keep_reference(start: StartAdapter | None, folder: str) -> None:
    """Copy an adapter that is trained further to `<folder>/ref`, where evaluations look for what it is compared with.

    For trainers that keep no frozen copy themselves.
    """
    if start is None or start.use != "continue" or not is_main_process():
        return
    kept, staging = Path(folder) / FROZEN, Path(folder) / f"{FROZEN}.part"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (Path(start.adapter) / name).exists():
            shutil.copy2(Path(start.adapter) / name, staging / name)
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(staging, kept)


@contextlib.contextmanager
def as_reference(policy, reference=None):
    """The reference of a trained model: `reference` itself, the frozen copy of its adapter, or no adapter at all."""
    from trl.trainer.utils import use_adapter

    if reference is not None:
        yield reference
    elif hasattr(policy, "peft_config"):
        with use_adapter(policy, adapter_name=FROZEN if FROZEN in policy.peft_config else None):
            yield policy
    else:
        yield None
