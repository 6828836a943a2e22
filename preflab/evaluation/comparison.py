"""What every evaluation compares: the base model, and the tuned one (a LoRA adapter on it, or a model of its own)."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import DEFAULT_RUN, ULTRAFEEDBACK, ComparisonArguments
from preflab.models.loading import default_batch_tokens, locate_adapter
from preflab.models.start_adapter import FROZEN
from utils.artifacts import (
    all_arguments,
    changed_arguments,
    check_writable,
    describe_changes,
    read_json,
    with_limit_suffix,
)
from utils.errors import UserError, is_main_process

# What changes neither a figure nor the question may differ between two calls that write the same files.
ARGUMENTS_NOT_IN_IDENTITY = {
    "batch_size", "batch_tokens", "overwrite", "checkpoints", "eval_out", "output_dir", "output_json", "run_name",
    "expected", "expected_batch_size", "expected_processes", "length_bias_splits", "published", "judge_attempts",
    "judge_timeout", "judge_concurrency", "trust_remote_code", "allow_other_base", "processes", "tensor_parallel",
    "skip_missing", "shared_prompt",
}  # fmt: skip


@dataclass
class Comparison:
    """Two models by name, the run behind the tuned one, where results go, a checkpoint's step. See `resolve`."""

    args: ComparisonArguments
    name: str
    base: str
    adapter: str | None
    tuned: str | None
    trained: dict
    out: Path
    step: int | None = None
    base_adapter: str | None = None

    def weights(self, side: str) -> tuple[str, str | None, str | None]:
        """(model, revision, adapter) of "base" or "tuned"."""
        if side == "tuned" and self.tuned:
            return self.tuned, self.args.tuned_revision, None
        return self.base, self.args.base_revision, self.adapter if side == "tuned" else self.base_adapter

    @property
    def names(self) -> dict[str, str]:
        """What base and tuned are called in titles."""
        base = f"{self.base} with {self.base_adapter}" if self.base_adapter else self.base
        return {"base": base, "tuned": self.adapter or self.tuned}

    @property
    def title(self) -> str:
        """The heading of tables and pictures."""
        return f"{self.name}: {self.names['tuned']} against {self.names['base']}"

    @property
    def run_fields(self) -> dict:
        """What this comparison adds to the `run` section of an artifact."""
        return {"run_name": self.name, "limit": self.args.limit}

    def ensure_same_evaluation(self, stem: str, arguments: list, folder: Path | None = None) -> None:
        """Raise UserError if `<stem>.json` holds the results of another evaluation, unless --overwrite is given.

        Args:
            arguments: the argument dataclasses of this call.
            folder: the folder of `<stem>.json`, for stages that have their own.
        """
        path = folder / f"{stem}.json" if folder else self.path(stem, ".json")
        if self.args.overwrite or not path.exists():
            return
        before, now = read_json(path).get("args", {}), all_arguments(arguments)
        changed = changed_arguments(before, now, ARGUMENTS_NOT_IN_IDENTITY, defaults=now)
        if changed:
            raise UserError(
                f"{path} holds another evaluation ({describe_changes(before, now, changed)}): choose another folder"
                " with --output_dir, or --overwrite it"
            )

    def path(self, stem: str, suffix: str, rows: bool = False) -> Path:
        """Where an artifact goes: `<out>/<stem>.json`, or beside --output_json; marked where --limit is on."""
        folder = self.out
        if self.args.output_json:
            folder, stem = Path(self.args.output_json).parent, Path(self.args.output_json).stem
        return folder / f"{with_limit_suffix(stem, self.args.limit)}{'_rows' if rows else ''}{suffix}"


def resolve(args: ComparisonArguments) -> Comparison:
    """Fill what the command line left out from the run that trained the tuned model, and check it.

    A run's folder below --checkpoints holds `run.json`: its base model, data, lengths and precision are the defaults,
    for the run's name as for the path of its adapter or of one of its checkpoints.

    Raises:
        UserError: nothing to compare, two tuned models at once, a missing run, folder or base model.
    """
    for key in ("base_model", "adapter_path", "tuned_model", "base_adapter"):
        if (getattr(args, key) or "").startswith("~"):
            setattr(args, key, str(Path(getattr(args, key)).expanduser()))
    if args.adapter_path and args.tuned_model:
        raise UserError("--adapter_path and --tuned_model: give one of the two")
    if args.limit is not None and args.limit <= 0:
        raise UserError(f"--limit {args.limit}: must be above 0")
    if args.output_json and args.output_dir:
        raise UserError("--output_json and --output_dir: give one of the two")
    for key in ("batch_size", "batch_tokens", "max_length", "max_prompt_length"):
        if getattr(args, key) is not None and getattr(args, key) <= 0:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    folder = _tuned_folder(args)
    trained = _run_of(folder) if folder else {}
    unfinished = folder and (folder / "run.json").exists() and not read_json(folder / "run.json").get("finished")
    if unfinished and is_main_process():
        print(f"note: the training of {folder} has not finished; the same command goes on with it", file=sys.stderr)
    adapter = str(folder) if folder and (folder / "adapter_config.json").exists() else None
    tuned = None if adapter else str(folder) if folder else args.tuned_model
    base = args.base_model or trained.get("model_name_or_path") or (base_of(adapter) if adapter else None)
    if base is None:
        raise UserError("--base_model is missing: the model that the tuned one is compared with")
    # Beside the weights, or beside the checkpoints of a run that keeps one for all.
    homes = [folder, *([folder.parent] if is_checkpoint(folder) else [])] if folder else []
    frozen = next((h / FROZEN for h in homes if (h / FROZEN / "adapter_config.json").exists()), None)
    if (args.base_adapter or "").lower() == "none":
        args.base_adapter, frozen = None, None
    if args.base_adapter is not None and adapter is None:
        raise UserError("--base_adapter: the tuned model is one of its own; name the base with --base_model")
    args.base_adapter = locate_adapter(args.base_adapter) if args.base_adapter else str(frozen) if frozen else None
    for one in (adapter, args.base_adapter):
        if one and not args.allow_other_base:
            _ensure_same_base(one, base)
    _fill(args, trained)
    name = args.run_name or _name_of(folder or Path(args.tuned_model))
    out = Path(args.output_dir) if args.output_dir else Path(args.eval_out) / name
    flag = "--output_json" if args.output_json else "--output_dir" if args.output_dir else "--eval_out"
    check_writable(Path(args.output_json).parent if args.output_json else out, flag)
    step = int(folder.name.rpartition("-")[2]) if folder and is_checkpoint(folder) else None
    return Comparison(args, name, base, adapter, tuned, trained, out, step, args.base_adapter)


def _tuned_folder(args) -> Path | None:
    """The folder of the tuned model, None where --tuned_model is a hub id."""
    if args.adapter_path:
        folder = Path(args.adapter_path).expanduser()
        if not (folder / "adapter_config.json").exists():
            why = "holds no adapter_config.json" if folder.is_dir() else "is no folder"
            raise UserError(f"--adapter_path {args.adapter_path} {why}: give the folder that training wrote")
        return folder
    if args.tuned_model:
        folder = Path(args.tuned_model).expanduser()
        return folder if folder.is_dir() else None
    name = args.run_name or DEFAULT_RUN
    folder = Path(args.checkpoints) / name
    if not any((folder / f).exists() for f in ("adapter_config.json", "config.json")):
        mend = "bash quickstart.sh trains it" if name == DEFAULT_RUN else "train it first"
        trials = sorted(p.name for p in Path(args.checkpoints).glob(f"{name}_LIMIT*"))
        mend = f"--run_name {trials[0]} is a trial of it" if trials else mend
        raise UserError(f"{folder} holds no trained model: {mend}, or give --base_model and --adapter_path")
    return folder


def _run_of(folder: Path) -> dict:
    """The arguments of the run that wrote `folder` (its weights, or one of its checkpoints); empty for a stranger's.

    What an instruction run trained on are no pairs: those keys are left out.
    """
    from preflab.data.sources import SourceArguments

    for place in (folder, folder.parent):
        if (place / "run.json").exists():
            found = read_json(place / "run.json").get("args", {})
            instructions = SourceArguments.__dataclass_fields__ if "loss_on" in found else ()
            return {key: value for key, value in found.items() if key not in instructions}
    return {}


def _name_of(folder: Path) -> str:
    folder = folder.resolve() if folder.exists() else folder
    parent = folder.parent.name
    # checkpoint-7000 of one run is not that of another.
    stranger = is_checkpoint(folder) and parent != "checkpoints"
    own = (folder.parent / "run.json").exists() or stranger
    return re.sub(r"[^\w.\-]", "-", "-".join([*([parent] if own and parent else []), folder.name]))


def base_of(adapter: str) -> str | None:
    return read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")


def ensure_models_differ(identical: bool, results: str) -> None:
    """Raise UserError if base and tuned gave identical results, which means that the adapter was not applied.

    Args:
        results: what was identical, e.g. "the same answer to all 8 prompts".
    """
    if identical:
        raise UserError(
            f"base and tuned gave {results}: the adapter was not applied, or training hardly changed the model; check"
            " --adapter_path, or --tuned_model"
        )


def held_out_sources(args: ComparisonArguments, trained: dict) -> tuple[list[dict], bool]:
    """What to evaluate on, as sources for `load_pairs`, and whether the run held them out.

    Raises UserError where the run held nothing out and no data are named.
    """
    from dataclasses import fields

    from preflab.data.preferences import DataArguments

    if args.dataset_name is not None:
        named = {"name": args.dataset_name, "config": args.dataset_config, "revision": args.dataset_revision}
        return [{**named, "split": args.split}], False
    known = {f.name for f in fields(DataArguments)}
    sources = DataArguments(**{k: v for k, v in trained.items() if k in known}).sources()[1]
    if not sources:
        raise UserError("the run held no pairs out: name data that it did not see with --dataset_name and --split")
    return [{**source, **({"split": args.split} if args.split else {})} for source in sources], not args.split


def was_trained_on(args: ComparisonArguments, trained: dict) -> bool:
    """Whether the rows to evaluate on are those that the run trained on."""
    name = args.dataset_name or trained.get("dataset_name")
    if (
        not trained
        or name != trained.get("dataset_name")
        or (trained.get("test_dataset_name") and not args.dataset_name)
    ):
        return False
    return Path(str(name)).is_file() or args.split == trained.get("dataset_train_split")


def _ensure_same_base(adapter: str, base: str) -> None:
    """Refuse an adapter whose config names another base: its shapes may fit, and every figure would be wrong."""
    trained_on = base_of(adapter)
    if not trained_on:
        return
    folders = Path(trained_on).expanduser(), Path(base).expanduser()
    if all(folder.is_dir() for folder in folders):
        other = folders[0].resolve() != folders[1].resolve()
    else:
        other = folders[0].name.lower() != folders[1].name.lower()
    if other:
        raise UserError(
            f"adapter {adapter} was trained on {trained_on}, not on {base}: give --base_model {trained_on}, or"
            " --allow_other_base where the two are the same weights"
        )


def _fill(args: ComparisonArguments, trained: dict) -> None:
    """The run's values where the command line gave none, then the field's."""
    if args.dataset_name is None and not (trained.get("dataset_name") or trained.get("datasets")):
        args.dataset_name = ULTRAFEEDBACK
    if args.dataset_name is not None:
        args.split = args.split or ("test_prefs" if args.dataset_name == ULTRAFEEDBACK else "test")
    args.prompt_format = args.prompt_format or trained.get("prompt_format") or "auto"
    args.chat_template_path = args.chat_template_path or trained.get("chat_template_path")
    args.attn_implementation = args.attn_implementation or trained.get("attn_implementation")
    if args.max_length in (None, trained.get("max_length")):
        args.max_length = trained.get("max_length") or 1024
        args.max_prompt_length = args.max_prompt_length or trained.get("max_prompt_length")
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if not args.max_prompt_length < args.max_length:
        raise UserError(
            f"--max_prompt_length {args.max_prompt_length} must be below --max_length {args.max_length}, so that an"
            " answer always keeps a token"
        )
    if args.batch_tokens is None:
        args.batch_tokens = default_batch_tokens()


def is_checkpoint(folder: Path) -> bool:
    """Whether it is named as a trainer names the state of a step."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def latest_run(folder: str | os.PathLike) -> str:
    """The name of the run below `folder` that finished last. Raises UserError where none did."""
    found = [path for path in Path(folder).glob("*/run.json") if read_json(path).get("finished")]
    if not found:
        raise UserError(f"{folder}: no finished run yet; bash quickstart.sh trains one, or name a model")
    return max(found, key=lambda path: path.stat().st_mtime).parent.name
