"""The output folder of generate_preference_pairs.py and its manifest: which stages are finished, for which arguments.

Torch is imported inside functions: the script reads STAGES before it answers --help.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from preflab.data.template_date import choose_template_date
from utils.artifacts import (
    RowFile,
    changed_arguments,
    check_writable,
    describe_changes,
    holds_files,
    read_json,
    with_limit_suffix,
    write_json,
)
from utils.distributed import on_main_process
from utils.errors import UserError, at_end
from utils.locks import hold, let_go
from utils.provenance import run_record

STAGES = ("sample", "score", "pair")
# Files that --overwrite deletes. A stage's files are the next stage's input.
FILES_OF_STAGE = {
    "sample": ("samples.jsonl",),
    "score": ("scores.jsonl",),
    "pair": ("train.jsonl", "test.jsonl", "preference_pairs.json", "preference_pairs.png"),
}
# Arguments that do not change the pairs; they may differ between calls that write the same files.
ARGUMENTS_NOT_IN_IDENTITY = {
    "stage",
    "batch_size",
    "batch_tokens",
    "overwrite",
    "eval_out",
    "run_name",
    "engine",
    "vllm_args",
    "trust_remote_code",
    "server_timeout",
    "server_concurrency",
}
# The stage that first depends on an argument (default: sample).
STAGE_OF_ARGUMENT = {
    "scorer": "score",
    "also_score": "score",
    "scorer_dtype": "score",
    "judge_prompt": "score",
    "seed": "score",
    "shuffle_scores": "pair",
    "pairs": "pair",
    "min_score_margin": "pair",
}


@dataclass
class PairsFolder:
    """`<eval_out>/<run_name>/` with its manifest, `{args, template_date, stages: {stage: counts, ...}}`."""

    path: Path
    manifest: dict

    def rows(self, name: str, stage: str) -> list[dict]:
        """The rows of a file that `stage` wrote. Raises UserError if there are none yet."""
        rows = RowFile(self.path / name).read()
        if not rows:
            raise UserError(f"{self.path}/{name} does not exist: run --stage {stage} first, or --stage all")
        return rows

    def about(self, stage: str) -> dict:
        """The manifest's entry of a finished stage; empty if it is not finished."""
        return self.manifest["stages"].get(stage, {})

    @contextmanager
    def recording(self, stage: str, seed: int):
        """Time a stage and record it in the manifest when it ends without an error.

        Yields:
            The stage's manifest entry, to be filled.
        """
        from accelerate import PartialState

        # If the stage fails, the exception passes through `yield` and the manifest never names it as finished.
        started, entry = time.monotonic(), {}
        yield entry
        entry |= {"seconds": round(time.monotonic() - started, 1), "run": run_record(seed, 0.0)}
        self.manifest["stages"][stage] = entry
        # Written after the stage's files, so an entry means that they are complete.
        write_json(self.path / "manifest.json", self.manifest)
        # The next stage reads files that rank 0 wrote.
        PartialState().wait_for_everyone()


def open_folder(args, arguments: dict) -> PairsFolder:
    """The folder of this call, created or checked by rank 0 and read by every process.

    Args:
        arguments: every argument of this call as JSON, for the manifest.

    Raises:
        UserError: the folder holds something else, other pairs, or input that was made with other arguments.
    """
    from accelerate import PartialState

    path = on_main_process(lambda: _prepare(args, arguments))
    folder = PairsFolder(path, read_json(path / "manifest.json"))
    choose_template_date(folder.manifest["template_date"])
    # No process may record a stage before all have read the manifest.
    PartialState().wait_for_everyone()
    return folder


def _prepare(args, arguments: dict) -> Path:
    """Check the folder against this call's arguments, delete what --overwrite replaces, write the manifest."""
    # Runs on rank 0 only, through on_main_process; an error there ends every process.
    check_writable(args.eval_out, "--eval_out")
    path = Path(args.eval_out) / with_limit_suffix(args.run_name, args.limit)
    lock_file = path.with_name(f".{path.name}.pairs.lock")
    lock = hold(lock_file, str(path), "wait for it, or choose another --run_name")
    at_end(lambda: let_go(lock))
    manifest = path / "manifest.json"
    if not manifest.exists() and holds_files(path):
        raise UserError(
            f"{path} contains files that generate_preference_pairs.py did not write: choose another --run_name"
        )
    before = read_json(manifest) if manifest.exists() else {"args": arguments, "stages": {}}
    first = 0 if args.stage == "all" else STAGES.index(args.stage)
    # Without a finished stage there is nothing to protect: the caches hash the settings of answers and scores.
    if before["stages"]:
        _ensure_same_pairs(path, before["args"], arguments, first, args.overwrite)
    if args.overwrite:
        # Later stages depend on this one, so their files and entries become invalid with it.
        for stage in STAGES[first:]:
            before["stages"].pop(stage, None)
            for name in FILES_OF_STAGE[stage]:
                (path / name).unlink(missing_ok=True)
    # Written before the first answer, so that an interrupted call can be recognised.
    # Answers of one call may be sampled over several days, from the same prompts.
    day = args.template_date or before.get("template_date") or date.today().isoformat()
    write_json(manifest, {"args": arguments, "stages": before["stages"], "template_date": day})
    return path


def _ensure_same_pairs(path: Path, before: dict, now: dict, first: int, overwrite: bool) -> None:
    """Raise UserError if this call would mix pairs of different arguments.

    Args:
        first: index of the first stage that this call runs. With --overwrite, arguments of that stage and later ones
            may change; those of earlier stages may not, since their files are this call's input.
    """
    # Folders of earlier versions do not name how pairs are chosen.
    changed = changed_arguments(before, now, ARGUMENTS_NOT_IN_IDENTITY, defaults={"pairs": "best_worst"})
    if overwrite:
        # A setting of an earlier stage cannot change here, because that stage's files are kept.
        changed = [key for key in changed if STAGES.index(STAGE_OF_ARGUMENT.get(key, "sample")) < first]
    if changed:
        remedy = "or run their stage again, too" if overwrite else "or --overwrite them"
        raise UserError(
            f"{path} holds other pairs ({describe_changes(before, now, changed)}): choose another --run_name, {remedy}"
        )
