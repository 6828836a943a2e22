"""Start a run from a base model with an adapter. `--start_adapter_use` is required, since there are two ways:

merge: the adapter is merged into the base, and a new adapter is trained on the result. The merged model is written to
disk, so that training, evaluation and every user of the new adapter load the same base.

continue: the adapter itself is trained further, with a frozen copy of it as the reference.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock
from trl.trainer.utils import use_adapter

from preflab.models.adapter_files import ADAPTER_FILES, adapter_sha256
from preflab.models.loading import (
    identify,
    load_model,
    load_tokenizer,
    locate_adapter,
    tokenizer_home,
)
from preflab.models.merging import MARK, ensure_same_model, probe_logps, write_merged
from utils.artifacts import read_json
from utils.distributed import on_main_process
from utils.errors import is_main_process
from utils.provenance import sha256_of

# TRL's name for the frozen copy of an adapter that is trained further, and its folder in a checkpoint.
FROZEN = "ref"


@dataclass
class StartAdapter:
    """A base model with an adapter, and how a run uses the adapter.

    Attributes:
        base, revision: the base model.
        adapter: the adapter's folder.
        use: merge or continue.
        merged: the folder of the merged model, for merge.
        note: which LoRA settings of the run have no effect, for continue.
    """

    base: str
    revision: str | None
    adapter: str
    use: str
    merged: str | None = None
    note: str = ""

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """(name, revision) of the tokenizer."""
        return tokenizer_home(self.base, self.revision, self.adapter)

    def summary(self) -> str:
        """How the adapter is used, in one sentence."""
        if self.merged:
            return f"{self.adapter} is merged into {self.base} ({self.merged}); a new adapter is trained on that"
        return f"{self.adapter} on {self.base} is trained further; a frozen copy of it is the reference{self.note}"

    def describe(self) -> dict:
        """The `start` section of an artifact."""
        return {**self.__dict__, **self.identity()}

    def identity(self) -> dict:
        """The hash of the weights: a resumed run must start from the same ones, not only from the same name."""
        return {"adapter_sha256": adapter_sha256(self.adapter)}


def resolve_start_adapter(args, model_args) -> StartAdapter | None:
    """The StartAdapter of `--start_adapter`, or None. Reads no weights; `merge_start_adapter` does the merge.

    Sets `model_args.model_name_or_path` to the model that training loads (merge), or the LoRA settings to the
    adapter's own (continue).
    """
    if args.start_adapter is None:
        return None
    base = model_args.model_name_or_path
    revision = model_args.model_revision if model_args.model_revision != "main" else None
    start = StartAdapter(base, revision, locate_adapter(args.start_adapter), args.start_adapter_use)
    if start.use == "merge":
        # Loaded for the hash of its chat template, which `identify` includes.
        tokenizer = load_tokenizer(*start.tokenizer, trust_remote_code=args.trust_remote_code)
        # The name depends on all that the merged weights depend on, so runs with the same start share the folder.
        model = {k: v for k, v in identify(base, tokenizer, revision).items() if k != "template_date"}
        parts = (str(model), adapter_sha256(start.adapter), str(model_args.dtype))
        name = f"{Path(args.start_adapter).name}-merged-{sha256_of(*parts)[:8]}"
        start.merged = str(Path(args.output_dir) / name)
        # "main" is ModelConfig's default and stands for no revision.
        model_args.model_name_or_path, model_args.model_revision = start.merged, "main"
    else:
        start.note = _use_adapter_settings(model_args, read_json(Path(start.adapter) / "adapter_config.json"))
    return start


def _use_adapter_settings(model_args, adapter: dict) -> str:
    """Set rank, alpha, dropout and modules in `model_args` to the adapter's; name the requested ones that differ."""
    changed = []
    for key, value in (
        ("lora_r", adapter.get("r")),
        ("lora_alpha", adapter.get("lora_alpha")),
        ("lora_dropout", adapter.get("lora_dropout")),
        ("lora_target_modules", adapter.get("target_modules")),
    ):
        requested = getattr(model_args, key)
        if isinstance(value, list):
            # TRL turns a list of one module into its name.
            value, requested = sorted(value), sorted([requested] if isinstance(requested, str) else requested or [])
        if value != requested:
            changed.append(f"{key} {value} (requested {requested})")
            setattr(model_args, key, value)
    return f"; the adapter's own LoRA settings are kept: {'; '.join(changed)}" if changed else ""


def merge_start_adapter(
    start: StartAdapter, dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> None:
    """Write the merged model to `start.merged`, unless another process or run has; it appears by a rename."""
    folder, staging = Path(start.merged), Path(f"{start.merged}.part")

    def write() -> None:
        # Not quantised, even if the run quantises its base: the adapter is merged into full-precision weights.
        options = (start.revision, dtype, attn_implementation, None, start.adapter, trust_remote_code)
        model = load_model(start.base, *options).eval()
        tokenizer = load_tokenizer(*start.tokenizer, trust_remote_code=trust_remote_code)
        precision = str(model.dtype).removeprefix("torch.")
        before = probe_logps(model, tokenizer)
        write_merged(staging, model, tokenizer, start.describe())
        # Frees its memory before the merged model is loaded.
        del model
        merged = load_model(str(staging), None, dtype, attn_implementation, None, None, trust_remote_code)
        after = probe_logps(merged.to(PartialState().device).eval(), tokenizer)
        ensure_same_model(before, after, staging, precision)
        os.replace(staging, folder)

    def write_once() -> None:
        # Two runs on this machine may start from the same adapter at the same time.
        lock = Path(f"{folder}.lock")
        with FileLock(lock):
            try:
                if not (folder / MARK).exists():
                    write()
            finally:
                # While it is held. A process that waits for it finds the merged model.
                lock.unlink(missing_ok=True)

    on_main_process(write_once)


def keep_reference(start: StartAdapter | None, folder: str) -> None:
    """Copy an adapter that is trained further to `<folder>/ref`, where evaluations look for the reference.

    For trainers that save no frozen copy, unlike TRL's DPOTrainer. Rank 0 only.
    """
    if start is None or start.use != "continue" or not is_main_process():
        return
    reference, staging = Path(folder) / FROZEN, Path(folder) / f"{FROZEN}.part"
    # The copy gets its name by a rename, so `ref` is never a partial copy.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (Path(start.adapter) / name).exists():
            shutil.copy2(Path(start.adapter) / name, staging / name)
    shutil.rmtree(reference, ignore_errors=True)
    os.replace(staging, reference)


@contextlib.contextmanager
def as_reference(policy, reference=None):
    """The reference of a trained model: `reference` if given, else its frozen adapter, else the base without adapter.

    Yields:
        The model to score with, or None after full fine-tuning without a reference model.
    """
    if reference is not None:
        yield reference
    elif hasattr(policy, "peft_config"):
        # None switches all adapters off, which gives the base model.
        with use_adapter(policy, adapter_name=FROZEN if FROZEN in policy.peft_config else None):
            yield policy
    else:
        yield None
