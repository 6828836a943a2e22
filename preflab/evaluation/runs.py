"""Training runs on disk: which one finished last, and what state each is in.

Imports neither torch nor transformers, so that --list answers as fast as --help.
"""

import calendar
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from utils.artifacts import RowFile, read_json
from utils.errors import UserError, is_main_process
from utils.locks import is_held

# The last file of a complete checkpoint, with its step, its seconds of training, and size and hash of its files.
MANIFEST = "checkpoint_manifest.json"
# A folder with one of these holds weights: a LoRA adapter, or a complete model.
WEIGHTS = ("adapter_config.json", "config.json")
# The rows that a preference run held out of its train split (--test_rows), beside its weights.
HELD_OUT_ROWS = "held_out_rows.jsonl"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass
class Run:
    """A run, or another folder that evaluations write to, as its files describe it.

    Attributes:
        name: of its folders.
        results: the folder of its results.
        state: finished, interrupted at a step, ..., and what is missing or damaged.
        trains: loss and method, such as `DPO sigmoid, LoRA`; "" if it is not a training run.
        base: the model that it started from, without folder or owner.
        seconds: wall time of training, None if it is not known.
        time: when it ended or was last written to, in seconds since 1970.
        size: bytes on disk, weights and results together.
    """

    name: str
    results: Path
    state: str
    trains: str = ""
    base: str = ""
    seconds: float | None = None
    time: float = 0.0
    size: int = 0


def finished_at(manifest: Path) -> float | None:
    """When the run of this `run.json` finished, in seconds since 1970; None if it has not.

    Raises:
        UserError: the file is damaged.
    """
    content = read_json(manifest)
    if not content.get("finished"):
        return None
    if "finished_utc" in content:
        return float(calendar.timegm(time.strptime(content["finished_utc"], TIME_FORMAT)))
    # Runs of earlier versions: the mark `finished` is their last write to the file.
    return manifest.stat().st_mtime


def latest_run(folder: str | os.PathLike) -> str:
    """The name of the run in `folder` that finished last. Damaged ones are named on stderr and skipped.

    Raises:
        UserError: no run is finished.
    """
    finished, unfinished = [], []
    for manifest in sorted(Path(folder).glob("*/run.json")):
        if is_reward_model(manifest.parent):
            # It answers no prompt, so evaluations of answers do not choose it.
            continue
        try:
            ended = finished_at(manifest)
        except UserError as error:
            if is_main_process():
                print(f"note: {error}; this run is skipped", file=sys.stderr)
            continue
        if ended is None:
            unfinished.append(manifest.parent.name)
        else:
            # Of equal seconds, the file's own time decides.
            finished.append((ended, manifest.stat().st_mtime, manifest.parent.name))
    if not finished:
        also = f" ({', '.join(unfinished)}: not finished, the training command continues)" if unfinished else ""
        raise UserError(
            f"{folder} holds no finished run{also}: train one with `bash quickstart.sh`, or name a model with"
            " --base_model and --adapter_path"
        )
    return max(finished)[2]


def is_reward_model(folder: Path) -> bool:
    """Whether the weights in a folder give rewards instead of tokens: a sequence classifier, or an adapter of one."""
    try:
        if (folder / "adapter_config.json").exists():
            return read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS"
        kinds = read_json(folder / "config.json").get("architectures") if (folder / "config.json").exists() else []
    except (UserError, AttributeError):
        # Damaged files are named where they are read.
        return False
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds or [])


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, newest step first, complete or not."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=lambda p: -step_of(p))


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint has its manifest and every file of it has its full size."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"].items()
    except (UserError, KeyError, TypeError, AttributeError):
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == size for n, size in files)


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(filter(is_complete, checkpoints(folder)), None)


def run_folder_of(weights: Path) -> Path | None:
    """The folder of the run that wrote `weights`: itself, or of a checkpoint its parent; None without a run.json."""
    return next((folder for folder in (weights, weights.parent) if (folder / "run.json").exists()), None)


def read_manifest(folder: Path) -> dict:
    """The run.json of a run's folder, with its arguments under `args`. Raises UserError for another file."""
    manifest = read_json(folder / "run.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.setdefault("args", {}), dict):
        raise UserError(f"{folder / 'run.json'}: damaged: not as training writes it; restore it, or train again")
    return manifest


def data_of_run(args: dict):
    """A run's data (SFTArguments or DataArguments) from `args` in run.json, which has all dataclasses of its script."""
    # Not at the top: the list of runs needs neither, and they take 100 ms.
    from preflab.data.conversations import SFTArguments
    from preflab.data.preferences import DataArguments

    # Only SFT has loss_on.
    kind = SFTArguments if "loss_on" in args else DataArguments
    return kind(**{f.name: args[f.name] for f in fields(kind) if f.name in args})


def read_run(weights: Path, results: Path) -> Run:
    """The run of these two folders, of which one may be missing."""
    run = Run(weights.name, results, _state_without_manifest(weights, results))
    run.size = folder_size(weights) + folder_size(results)
    manifest = weights / "run.json"
    run.time = max((p.stat().st_mtime for p in (manifest, *results.glob("*.json*")) if p.is_file()), default=0.0)
    if not manifest.is_file():
        return run
    try:
        args, ended = dict(read_json(manifest).get("args", {})), finished_at(manifest)
    except (UserError, ValueError, AttributeError, TypeError):
        run.state = "damaged: run.json cannot be read"
        return run
    run.time = ended or run.time
    run.trains, run.base = _objective(args), _base(args)
    run.state = _finished_state(weights, results) if ended else _unfinished_state(weights, results)
    if args.get("limit"):
        run.state += f", trial of {args['limit']} rows"
    run.seconds = _training_seconds(weights, results)
    return run


def _state_without_manifest(weights: Path, results: Path) -> str:
    """What a folder without run.json is: `generate_preference_pairs.py`, `merge_adapter.py` and users write such."""
    if (weights / "merged_from.json").exists():
        return "merged model"
    if weights.exists():
        return "weights from elsewhere" if any((weights / f).exists() for f in WEIGHTS) else "no weights, no run.json"
    if (results / "manifest.json").exists():
        return "preference pairs"
    return "results without weights" if (results / "train_log.jsonl").exists() else "evaluations only"


def _finished_state(weights: Path, results: Path) -> str:
    """Finished, and which of the files that a finished run has are missing or damaged."""
    problems = [] if any((weights / f).exists() for f in WEIGHTS) else ["weights missing"]
    if not (results / "train.json").exists():
        problems.append("train.json missing")
    else:
        try:
            read_json(results / "train.json")
        except UserError:
            problems.append("train.json damaged")
    return ", ".join(["finished", *problems])


def _unfinished_state(weights: Path, results: Path) -> str:
    """At which step the run is: running, interrupted, or not begun."""
    verb = "running" if is_locked(weights) else "interrupted"
    checkpoint = newest_checkpoint(weights)
    saved = step_of(checkpoint) if checkpoint else None
    steps = planned = None
    try:
        steps = max((row["step"] for row in RowFile(results / "train_log.jsonl").read()), default=None)
        if (results / "preflight.json").exists():
            planned = read_json(results / "preflight.json")["plan"]["steps"]
    except (UserError, ValueError, KeyError, TypeError):
        return f"{verb}, its log or preflight.json is damaged"
    if steps is None and saved is None:
        if verb == "running":
            return "running, before its first step"
        return "preflight only" if planned is not None else "failed before its first step"
    reached = f"{verb} at step {max(steps or 0, saved or 0)} of {planned if planned is not None else '?'}"
    return reached + ("" if verb == "running" else f", saved at {saved}" if saved else ", nothing saved")


def lock_path(weights: Path) -> Path:
    """The file that a training process locks; beside the run's folder, so that --overwrite does not delete it."""
    return weights.parent / f".{weights.name}.lock"


def is_locked(weights: Path) -> bool:
    """Whether a process is training this run now."""
    return is_held(lock_path(weights))


def _training_seconds(weights: Path, results: Path) -> float | None:
    """Wall time of training over all calls: of a finished run, else up to the newest complete checkpoint."""
    try:
        return float(read_json(results / "train.json")["training"]["seconds"])
    except (UserError, KeyError, TypeError, ValueError):
        saved = newest_checkpoint(weights)
        return read_json(saved / MANIFEST).get("seconds") if saved else None


def _objective(args: dict) -> str:
    """Loss and method of a run's arguments: `DPO sigmoid, QLoRA`."""
    losses = args.get("loss_type") or []
    losses = [losses] if isinstance(losses, str) else losses
    # Losses with another name than DPO; only SFT has loss_on.
    named = {"simpo": "SimPO", "sppo": "SPPO", "sppo_hard": "SPPO hard"}
    loss = "SFT" if "loss_on" in args else " + ".join(named.get(name, f"DPO {name}") for name in losses)
    # Only the training of reward models has it.
    loss = "reward model" if "margin_per_point" in args else loss
    quantised = "Q" if args.get("load_in_4bit") else "8-bit " if args.get("load_in_8bit") else ""
    return f"{loss}, {quantised}LoRA" if args.get("use_peft") else f"{loss}, full"


def _base(args: dict) -> str:
    """The last part of the model's name, with the adapter that the run started from."""
    base = Path(str(args.get("model_name_or_path", "?")).removeprefix("builtin:")).name
    start = args.get("start_adapter")
    return f"{base} + {Path(start).name}" if start and args.get("start_adapter_use") == "continue" else base


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`, without following links; 0 if it does not exist."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                # Deleted since the folder was read, as a training run deletes its older checkpoints.
                continue
    return size
