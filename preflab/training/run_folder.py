"""A run's two folders (weights and results), what identifies the run, and its checkpoints."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from utils.artifacts import all_arguments, check_writable, read_json, write_json
from utils.errors import UserError, is_main_process
from utils.provenance import sha256_of_files

MANIFEST = "checkpoint_manifest.json"
# Arguments that move no weight may differ between a run's first call and the one that resumes it. The batch's three
# factors may differ too, as long as their product, which stands in the identity, stays.
ARGUMENTS_NOT_IN_IDENTITY = {
    "output_dir", "eval_out", "run_name", "resume", "overwrite", "preflight_only", "sample_prompts", "report_to",
    "disable_tqdm", "dataloader_num_workers", "dataset_num_proc", "save_total_limit", "resume_from_checkpoint",
    "logging_dir", "local_rank", "accelerator_config", "parallelism_config", "deepspeed", "fsdp", "fsdp_config",
    "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "use_cpu",
    "shared_prompt", "micro_batch_tokens", "reference_cache", "published",
    "save_strategy", "save_steps", "eval_strategy", "eval_steps", "logging_strategy", "logging_steps",
}  # fmt: skip


# Keys that runs of earlier versions do not name, and what they trained with.
DEFAULTS_OF_OLD_RUNS = {"gamma_beta_ratio": 0.5}


@dataclasses.dataclass
class Run:
    """Where a run keeps its weights (`folder`) and its results (`out`), and whether it is finished already."""

    name: str
    folder: Path
    out: Path
    finished: bool = False
    lock: FileLock | None = None

    def __getstate__(self):
        return {**self.__dict__, "lock": None}

    def record_data_hash(self, data_sha256: str) -> None:
        """Tie the run to its data: a resumed run whose data changed is refused. Call on every rank, data in hand."""
        manifest = read_json(self.folder / "run.json")
        if manifest.setdefault("data_sha256", data_sha256) != data_sha256:
            raise UserError(f"{self.folder}: the data changed since this run began; choose another --run_name")
        write_json(self.folder / "run.json", manifest)

    def ensure_data_unchanged(self, data: dict) -> None:
        """Raise UserError where local files that this finished run read hold something else by now.

        Args:
            data: summaries by split (or None) from the run's train.json, whose `sources` say name, files and sha256.
        """
        for source in (s for summary in data.values() if summary for s in summary["sources"] if "files" in s):
            path = Path(source["name"])
            files = [path / name for name in source["files"]] if path.is_dir() else [path]
            if all(f.is_file() for f in files) and sha256_of_files(files) != source["sha256"]:
                raise UserError(
                    f"{self.folder} is finished, but {path} holds other rows than it was trained on: choose another"
                    " --run_name, or --overwrite it"
                )

    def finish(self) -> None:
        """Record that the run is complete, so that the same command prints its results instead of training again."""
        write_json(self.folder / "run.json", {**read_json(self.folder / "run.json"), "finished": True})


def identity(parts: list, batch: int) -> dict:
    """The arguments that define a run: every one that can move a weight, and the global batch."""
    return {"batch": batch, **{k: v for k, v in all_arguments(parts).items() if k not in ARGUMENTS_NOT_IN_IDENTITY}}


RESULTS = ("train.json", "train_log.jsonl", "preflight.json")


def claim_run(name: str, output_dir: str, eval_out: str, wanted: dict, resume: str, overwrite: bool) -> Run:
    """The folders of run `name`, made or taken up again, and locked against a second process. For rank 0 alone.

    Args:
        wanted: the run's `identity`.

    Raises:
        UserError: where another run, or anything that is no run of ours, stands there; where this run is being trained
            by another process; where `resume` is "never" and there is something to resume; each without `overwrite`.
    """
    run = Run(name, Path(output_dir) / name, Path(eval_out) / name)
    check_writable(output_dir, "--output_dir")
    check_writable(eval_out, "--eval_out")
    if overwrite and resume not in ("auto", "never"):
        raise UserError(f"--overwrite would delete the checkpoint that --resume {resume} names: give one of the two")
    run.lock = FileLock(run.folder.parent / f".{name}.lock", timeout=0)
    try:
        run.lock.acquire()
    except Timeout:
        raise UserError(
            f"{run.folder}: another process is training this run; wait for it, or choose another --run_name"
        ) from None
    manifest = run.folder / "run.json"
    if _holds_files(run.folder) and not manifest.exists():
        raise UserError(f"{run.folder} holds files but no run.json, so no run of ours: choose another --run_name")
    if _holds_files(run.out) and not any((run.out / f).exists() for f in RESULTS):
        raise UserError(f"{run.out} holds files that are no run's results: choose another --run_name, or move them")
    if overwrite:
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.rmtree(run.out, ignore_errors=True)
    if manifest.exists():
        before = read_json(manifest)
        # Nothing trained yet (the first try stopped at its data, say): the name is still free to take.
        if before["finished"] or checkpoints(run.folder) or (run.out / "train_log.jsonl").exists():
            _ensure_same_run(run.folder, before["args"], wanted)
            if resume == "never":
                raise UserError(
                    f"{run.folder} holds this run already: --overwrite starts afresh, --resume auto goes on"
                )
            run.finished = before["finished"]
            return run
    elif _holds_files(run.out):
        # Results without weights (a clone brings those of eval_out/quickstart): the same run makes them anew.
        before = read_json(run.out / "train.json") if (run.out / "train.json").exists() else {}
        started = {"adapter_sha256": (before.get("start") or {}).get("adapter_sha256")}
        _ensure_same_run(run.out, {**before.get("args", {}), **started, "batch": wanted["batch"]}, wanted)
        shutil.rmtree(run.out)
    write_json(manifest, {"args": wanted, "finished": False})
    run.out.mkdir(parents=True, exist_ok=True)
    return run


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _ensure_same_run(folder: Path, before: dict, wanted: dict) -> None:
    changed = sorted(k for k in wanted if wanted[k] != before.get(k, DEFAULTS_OF_OLD_RUNS.get(k)))
    if changed:
        what = ", ".join(f"{k} {before.get(k)!r} -> {wanted[k]!r}" for k in changed[:4])
        raise UserError(f"{folder} holds another run ({what}): choose another --run_name, or --overwrite it")


# ------------------------------------------------------------------------------------------------------ checkpoints


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, newest step first, whole or not."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: -int(p.name.rpartition("-")[2]))


def write_manifest(checkpoint: Path, **state) -> None:
    """Declare a checkpoint whole: write the manifest of its files and sizes, with `state`, as its last file."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    write_json(checkpoint / MANIFEST, {**state, "files": files})


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint is sealed and every file of its manifest is there at its full size."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
    except (UserError, KeyError):
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == size for n, size in files.items())


def checkpoint_to_resume(run: Run, resume: str) -> Path | None:
    """The checkpoint that `resume` (auto, never, or a path) stands for; half-written ones are skipped by name."""
    if resume == "never":
        return None
    if resume != "auto":
        if Path(resume).resolve().parent != run.folder.resolve() or not is_complete(Path(resume)):
            raise UserError(
                f"--resume {resume}: no whole checkpoint there; there are {checkpoints(run.folder) or 'none'}"
            )
        return Path(resume)
    for checkpoint in checkpoints(run.folder):
        if is_complete(checkpoint):
            return checkpoint
        if is_main_process():
            print(f"skipping half-written checkpoint {checkpoint}", file=sys.stderr)
    return None
