"""A run's two folders (weights and results), what identifies the run, and its checkpoints."""

import dataclasses
import sys
import time
import weakref
from datetime import date
from pathlib import Path

from filelock import FileLock

from preflab.evaluation.runs import MANIFEST, TIME_FORMAT, checkpoints, is_complete, lock_path
from preflab.training.checkpoint_check import damage, file_hashes
from utils.artifacts import (
    all_arguments,
    changed_arguments,
    check_writable,
    describe_changes,
    holds_files,
    read_json,
    remove_folder,
    write_json,
)
from utils.errors import UserError, undo_on_failure
from utils.locks import hold
from utils.provenance import local_path, sha256_of_files

# Arguments that do not affect the weights: they may differ between a run's first call and the one that resumes it. The
# factors of the global batch may differ too; their product is part of the identity.
ARGUMENTS_NOT_IN_IDENTITY = {
    # The hash of the start adapter's weights is part of the identity, its path is not: the adapter may be moved.
    "start_adapter",
    "output_dir", "eval_out", "run_name", "resume", "overwrite", "preflight_only", "plan", "plan_tflops", "allow_fatal",
    "sample_prompts",
    "report_to", "disable_tqdm", "dataloader_num_workers", "dataset_num_proc", "save_total_limit",
    "resume_from_checkpoint",
    "logging_dir", "local_rank", "accelerator_config", "parallelism_config", "deepspeed", "fsdp", "fsdp_config",
    "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "use_cpu",
    "shared_prompt", "padding_free", "compile_layers", "micro_batch_tokens", "reference_cache", "published",
    "base_hub_id",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push",
    "save_strategy", "save_steps", "eval_strategy", "eval_steps", "logging_strategy", "logging_steps",
}  # fmt: skip
# Keys that earlier versions did not record, with the value that their runs used.
DEFAULTS_OF_OLD_RUNS = {
    "on_bad_row": "refuse",
    "gamma_beta_ratio": 0.5,
    "cpo_alpha": 1.0,
    "lists": False,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "template_date": None,
    "test_rows": 0,
    "prompt_format": "auto",
}
# What of a model's identity must stay as it was for a run to be resumed, in words.
MODEL_PARTS = {
    "weights_sha256": "the weights of its model",
    "settings_sha256": "the configuration or tokenizer of its model",
    "revision": "the revision of its model on the hub (--model_revision names one)",
    "chat_template_sha256": "the chat template",
}
# A results folder has at least one of these.
RESULTS = ("train.json", "train_log.jsonl", "preflight.json")


@dataclasses.dataclass
class Launch:
    """How a call is launched, as far as its checkpoints depend on it.

    Attributes:
        sharding: of `preflab.training.run_config.RunConfig.sharding`.
        processes: their number.
    """

    sharding: str | None = None
    processes: int = 1

    def __str__(self) -> str:
        count = f"{self.processes} process{'' if self.processes == 1 else 'es'}"
        return f"{self.sharding or 'no sharding'} on {count}"

    def reads(self, saved: "Launch") -> bool:
        """Whether a checkpoint of the launch `saved` can be resumed in this one.

        FSDP stores the optimizer state in one file, unsharded runs in another, so the number of processes may differ,
        but not the kind. DeepSpeed stores a part per process, which ZeRO-3 can convert.
        """
        fixed_count = "DeepSpeed" in (saved.sharding or "") and not self.converts(saved)
        return self.sharding == saved.sharding and (self.processes == saved.processes or not fixed_count)

    def converts(self, saved: "Launch") -> bool:
        """Whether a checkpoint of the launch `saved` is converted first (preflab.training.universal_checkpoint)."""
        return self.sharding == saved.sharding == "DeepSpeed ZeRO-3" and self.processes != saved.processes


@dataclasses.dataclass
class RunFolders:
    """Where a run keeps its weights (`weights`) and its results (`results`), and whether it is finished already."""

    name: str
    weights: Path
    results: Path
    finished: bool = False
    lock: FileLock | None = None
    # Whether this call made the folders, and whether a preflight alone is what it should leave.
    created: bool = False
    keep_preflight: bool = False

    def __getstate__(self):
        # Sent to the other ranks, which do not hold the lock.
        return {**self.__dict__, "lock": None}

    def record_data_hash(self, data_sha256: str, **facts) -> None:
        """Tie the run to its data. Call on every rank after loading the data.

        Args:
            facts: what evaluations of this run need to read the same rows in the same way.

        Raises:
            UserError: a resumed run was started on other data.
        """
        manifest = read_json(self.weights / "run.json")
        # The first call records the hash; a resumed run must have the same.
        if manifest.setdefault("data_sha256", data_sha256) != data_sha256:
            raise UserError(f"{self.weights}: the data changed since this run began; choose another --run_name")
        write_json(self.weights / "run.json", {**manifest, **facts})

    def record_model(self, identity: dict) -> None:
        """Tie the run to its model, as `record_data_hash` does to its data. Rank 0 only.

        Args:
            identity: of `preflab.models.loading.identify`.

        Raises:
            UserError: a resumed run was started on another state of its model or under another chat template.
        """
        manifest = read_json(self.weights / "run.json")
        before = manifest.setdefault("model", {key: identity.get(key) for key in MODEL_PARTS})
        # None: a run on the hub's model that cannot be reached now.
        changed = [
            words
            for key, words in MODEL_PARTS.items()
            if None not in (before.get(key), identity.get(key)) and before[key] != identity[key]
        ]
        if changed:
            raise UserError(
                f"{self.weights}: {' and '.join(changed)} changed since this run began; restore the earlier state, or"
                " choose another --run_name"
            )
        write_json(self.weights / "run.json", manifest)

    def template_date(self, requested: str | None) -> str:
        """The date that chat templates print in this run: the recorded one, else `requested`, else today's."""
        recorded = read_json(self.weights / "run.json").get("template_date")
        return recorded or requested or date.today().isoformat()

    def ensure_data_unchanged(self, data: dict) -> None:
        """Raise UserError if local files that this finished run read have changed since.

        Args:
            data: summaries by split (or None) from the run's train.json, with name, files and sha256 of each source.
        """
        for source in (s for summary in data.values() if summary for s in summary["sources"] if "files" in s):
            path = local_path(source["name"])
            files = [path / name for name in source["files"]] if path.is_dir() else [path]
            # Files that were moved or deleted cannot be compared, and the results remain valid without them.
            if all(f.is_file() for f in files) and sha256_of_files(files) != source["sha256"]:
                raise UserError(
                    f"{self.weights} is finished, but {path} changed since it was trained on: choose another"
                    " --run_name, or pass --overwrite"
                )

    @property
    def begun(self) -> bool:
        """Whether a step was logged or a checkpoint saved."""
        return bool(checkpoints(self.weights)) or (self.results / "train_log.jsonl").exists()

    def undo(self) -> None:
        """Delete the folders that this call made, unless the run has begun; give up the lock."""
        if self.created and not self.begun and not self.keep_preflight:
            self.delete()
        if not self.weights.exists():
            # Deleted while it is held: afterwards it may be another process's.
            lock_path(self.weights).unlink(missing_ok=True)
        self.lock.release()

    def delete(self) -> None:
        """Delete both folders."""
        remove_folder(self.weights, ["run.json"])
        remove_folder(self.results, RESULTS)

    def finish(self) -> None:
        """Record that the run is complete, so that the same command prints its results instead of training again."""
        ended = {"finished": True, "finished_utc": time.strftime(TIME_FORMAT, time.gmtime())}
        write_json(self.weights / "run.json", {**read_json(self.weights / "run.json"), **ended})


def run_identity(parts: list, batch: int) -> dict:
    """The arguments that define a run: the global batch, and every argument that affects the weights."""
    return {"batch": batch, **{k: v for k, v in all_arguments(parts).items() if k not in ARGUMENTS_NOT_IN_IDENTITY}}


def claim_run(name: str, output_dir: str, eval_out: str, identity: dict, resume: str, overwrite: bool) -> RunFolders:
    """The folders of run `name`, created or taken up again, and locked against a second process. Rank 0 only.

    Args:
        identity: the run's `run_identity`.

    Raises:
        UserError: the folders belong to another run or were not created by this project; another process is training
            this run; `resume` is "never" and there is something to resume.
    """
    run = RunFolders(name, Path(output_dir) / name, Path(eval_out) / name)
    check_writable(output_dir, "--output_dir")
    check_writable(eval_out, "--eval_out")
    if overwrite and resume not in ("auto", "never"):
        raise UserError(f"--overwrite would delete the checkpoint of --resume {resume}: give only one of them")
    # First of all, so that two processes cannot both find the folders free. It is held as long as `run` exists.
    run.lock = _lock(run.weights)
    # A weak reference: the lock ends with the run's object.
    this = weakref.ref(run)
    undo_on_failure(lambda: (claimed := this()) and claimed.undo())
    manifest = run.weights / "run.json"
    # Checked before --overwrite deletes anything.
    _ensure_own_folders(run, manifest)
    if overwrite:
        run.delete()
    if manifest.exists():
        before = read_json(manifest)
        # Until something is trained (the first try may have failed at its data), other arguments may take the name.
        if before["finished"] or run.begun:
            _ensure_same_run(run.weights, before["args"], identity)
            if resume == "never":
                raise UserError(
                    f"{run.weights} already holds this run: --overwrite starts over, --resume auto continues"
                )
            run.finished = before["finished"]
            return run
    elif holds_files(run.results):
        # Results without weights, as after moving eval_out alone: only the same run may replace them.
        before = read_json(run.results / "train.json") if (run.results / "train.json").exists() else {}
        # train.json has the adapter's hash in another section, and not the global batch, which is therefore not
        # compared.
        adapter = {"adapter_sha256": (before.get("start") or {}).get("adapter_sha256")}
        _ensure_same_run(run.results, {**before.get("args", {}), **adapter, "batch": identity["batch"]}, identity)
        remove_folder(run.results, RESULTS)
    # From here the folders belong to this run. A start that fails before the first step leaves none of them, unless an
    # earlier call did.
    run.created = not manifest.exists()
    write_json(manifest, {"args": identity, "finished": False})
    run.results.mkdir(parents=True, exist_ok=True)
    return run


def _lock(weights: Path) -> FileLock:
    """Lock the run for this process."""
    return hold(lock_path(weights), str(weights), "wait for it, or choose another --run_name")


def _ensure_own_folders(run: RunFolders, manifest: Path) -> None:
    """Raise UserError where a folder holds files that this project did not write."""
    if holds_files(run.weights) and not manifest.exists():
        raise UserError(
            f"{run.weights} is not empty and has no run.json, so it was not created by this project: choose another"
            " --run_name"
        )
    if holds_files(run.results) and not any((run.results / f).exists() for f in RESULTS):
        raise UserError(
            f"{run.results} contains files that this project did not write: choose another --run_name, or move them"
        )


def _ensure_same_run(folder: Path, before: dict, identity: dict) -> None:
    """Raise UserError, naming the changed arguments, where `folder` holds a run with another identity."""
    changed = changed_arguments(before, identity, defaults=DEFAULTS_OF_OLD_RUNS)
    if changed:
        changes = describe_changes(before, identity, changed)
        raise UserError(f"{folder} holds another run ({changes}): choose another --run_name, or pass --overwrite")


# ------------------------------------------------------------------------------------------------------ checkpoints


def write_manifest(checkpoint: Path, **state) -> None:
    """Mark a checkpoint as complete: write sizes and hashes of its files, with `state`, as its last file."""
    # Sizes show a file that was cut off at once (--list, evaluations); hashes any damage, before training resumes.
    hashes = file_hashes(checkpoint)
    files = {name: (checkpoint / name).stat().st_size for name in hashes}
    write_json(checkpoint / MANIFEST, {**state, "files": files, "sha256": hashes})


def checkpoint_to_resume(run: RunFolders, resume: str, launch: Launch | None = None) -> Path | None:
    """The checkpoint to start from, None for step 0. Reads every byte of it: rank 0 only.

    Args:
        resume: "auto" (the newest complete and undamaged checkpoint; the others are named on stderr), "never", or a
            path.
        launch: of this call (default: one process without sharding).

    Raises:
        UserError: the path is not a complete and undamaged checkpoint of this run, or the checkpoint was saved under
            a launch that this one cannot read.
    """
    checkpoint = _undamaged_checkpoint(run, resume)
    if checkpoint is not None:
        _ensure_readable(checkpoint, launch or Launch())
    return checkpoint


def launch_of(checkpoint: Path) -> Launch | None:
    """The launch that saved a checkpoint; None in those of earlier versions, which do not say it."""
    manifest = read_json(checkpoint / MANIFEST)
    return Launch(manifest["sharding"], manifest["processes"]) if "sharding" in manifest else None


def _ensure_readable(checkpoint: Path, launch: Launch) -> None:
    saved = launch_of(checkpoint) or launch
    if not launch.reads(saved):
        raise UserError(
            f"{checkpoint}: saved under {saved}, and this call has {launch}, which cannot read it: launch the command"
            " as before (accelerate's --config_file and --num_processes), or start over with --overwrite"
        )


def _undamaged_checkpoint(run: RunFolders, resume: str) -> Path | None:
    """`checkpoint_to_resume`, whatever its launch."""
    if resume == "never":
        return None
    if resume != "auto":
        # A complete checkpoint of another run would be trained on with this run's data and arguments.
        if Path(resume).resolve().parent != run.weights.resolve() or not is_complete(Path(resume)):
            available = ", ".join(map(str, checkpoints(run.weights))) or "none"
            raise UserError(f"--resume {resume}: not a complete checkpoint of this run; its checkpoints: {available}")
        problem = damage(Path(resume))
        if problem:
            raise UserError(f"--resume {resume}: damaged ({problem}); --resume auto takes the newest undamaged one")
        return Path(resume)
    # Newest first; a kill during a save leaves an incomplete one, so an older one may be the newest usable.
    for checkpoint in checkpoints(run.weights):
        problem = damage(checkpoint) if is_complete(checkpoint) else "incomplete"
        if problem is None:
            return checkpoint
        print(f"skipping checkpoint {checkpoint}: {problem}", file=sys.stderr)
    return None
