"""What ran, what is stale because its inputs changed since, what to run next, and what uses the disk."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflab.doctor.cleaning import leftovers
from preflab.evaluation.run_list import disk, disk_use
from preflab.evaluation.runs import checkpoints as checkpoints_of
from preflab.evaluation.runs import folder_size
from preflab.models.adapter_files import adapter_sha256
from preflab.reporting.artifacts import TRAINING, Artifact, RunArtifacts, part
from preflab.reporting.stages import STAGES, title_of
from preflab.training.next_steps import commands_for
from utils.provenance import ROOT, sha256_of, sha256_of_files
from utils.tables import duration, paragraphs, render

CURRENT, STALE, TRIAL, DAMAGED, MISSING = "done", "stale", "trial", "damaged", "not run"


@dataclass
class StageState:
    """A stage of a run.

    Attributes:
        stage: its key in STAGES.
        title: as shown.
        state: done, stale, trial, damaged or not run.
        reasons: why it is stale or damaged.
        finished: when it ended, UTC.
        command: that runs it (again).
    """

    stage: str
    title: str
    state: str
    reasons: list[str]
    finished: str = ""
    command: str = ""


def states_of(run: RunArtifacts) -> list[StageState]:
    """The state of every stage of a run: those with a summary, then those that could follow."""
    states = []
    for artifact in run.artifacts:
        if artifact.problem:
            states.append(StageState(artifact.stage, title_of(artifact), DAMAGED, [artifact.problem]))
            continue
        reasons = stale_reasons(artifact, run)
        state = STALE if reasons else TRIAL if artifact.limit is not None else CURRENT
        finished = str(artifact.run.get("finished_utc") or "")
        states.append(StageState(artifact.stage, title_of(artifact), state, reasons, finished, command_of(artifact)))
    done = {s.stage for s in states if s.state != TRIAL}
    for stage, command in missing_commands(run, done):
        states.append(StageState(stage, STAGES[stage].title, MISSING, [], "", command))
    return states


def missing_commands(run: RunArtifacts, done: set[str]) -> Iterator[tuple[str, str]]:
    """(stage, command) of the evaluations that a finished training run does not have yet."""
    training = run.training
    if not training or not run.run.state.startswith("finished"):
        return
    kind = {"stage": training.stage, "held_out": "reward_accuracy" in training.metrics}
    lora = (run.weights / "adapter_config.json").exists()
    for command, _ in commands_for(run.weights, run.run.results, **kind, lora=lora):
        stages = [stage for stage in STAGES if command.startswith(STAGES[stage].command.partition(" --score")[0])]
        # `eval_win_rate.py --battle` starts like `eval_win_rate.py`; training on top is another run.
        stage = max(stages, key=lambda name: len(STAGES[name].command), default=None)
        if stage is None or stage in TRAINING or command.endswith("--list") or "--list " in command:
            continue
        # The page for people is made by the call whose summary is human_eval_dump.
        stage = "human_eval_dump" if stage == "human_eval" else stage
        if stage not in done:
            yield stage, command


def command_of(artifact: Artifact) -> str:
    """The command that wrote an artifact, to be typed again."""
    words = artifact.run.get("command") or []
    if not isinstance(words, list) or not words:
        return ""
    script = str(words[0])
    interpreter = "bash" if script.endswith(".sh") else "python"
    return shlex.join([interpreter, *map(str, words)])


# --------------------------------------------------------------------------------------------------------------- stale


def stale_reasons(artifact: Artifact, run: RunArtifacts) -> list[str]:
    """What a result was made from and has changed since. Files that are gone cannot be compared, so they count as same.

    Hashes decide for data and adapters; complete models are large, so their files' times do.
    """
    reasons = []
    for source in _sources(artifact.summary.get("data")):
        place = _path(source.get("name"))
        if place is None or not source.get("files") or not source.get("sha256"):
            continue
        files = [place / str(name) for name in source["files"]] if place.is_dir() else [place]
        if all(f.is_file() for f in files) and run.once(sha256_of_files, files) != source["sha256"]:
            reasons.append(f"{source['name']} changed since")
    reasons += _changed_models(artifact, run)
    study = artifact.part("study")
    candidates = artifact.path.with_name("manual_eval_candidates.json")
    if artifact.stage == "human_eval" and study.get("candidates_sha256") and candidates.is_file():
        if sha256_of(candidates.read_text(encoding="utf-8")) != study["candidates_sha256"]:
            reasons.append("the answers were generated again after these votes")
    return list(dict.fromkeys(reasons))


def _sources(section) -> Iterator[dict]:
    """Every source in a summary's section `data`, however deep."""
    if isinstance(section, dict):
        for key, content in section.items():
            if key == "sources" and isinstance(content, list):
                yield from (source for source in content if isinstance(source, dict))
            else:
                yield from _sources(content)


def _path(name) -> Path | None:
    """A file or folder that an artifact names, if it is on this machine."""
    if not isinstance(name, str) or not name:
        return None
    # Artifacts have paths relative to the repository, and a tilde for the home folder.
    places = (Path(name).expanduser(), ROOT / name)
    return next((place for place in places if place.exists()), None)


def _changed_models(artifact: Artifact, run: RunArtifacts) -> Iterator[str]:
    model, ended = artifact.part("model"), artifact.path.stat().st_mtime
    start = artifact.part("start")
    made_with = {
        "the adapter that it started from": (start.get("adapter"), start.get("adapter_sha256")),
        "the policy's adapter": (artifact.args.get("adapter_path"), part(model, "policy").get("adapter_sha256")),
        "the base's adapter": (artifact.args.get("base_adapter"), part(model, "base").get("adapter_sha256")),
    }
    if artifact.stage not in (*TRAINING, "preference_pairs"):
        tuned = part(model, "tuned")
        # The run may have been renamed or moved since: its own weights come first.
        folder = run.weights if (run.weights / "adapter_config.json").is_file() else tuned.get("name")
        made_with["the adapter"] = (str(folder), tuned.get("adapter_sha256"))
        weights = next(iter(sorted(run.weights.glob("*.safetensors"))), None)
        if weights and not tuned.get("adapter_sha256") and weights.stat().st_mtime > ended:
            yield f"{run.weights} was trained again after it"
    for what, (folder, before) in made_with.items():
        place = _path(folder)
        if (
            before
            and place
            and (place / "adapter_config.json").is_file()
            and run.once(adapter_sha256, str(place)) != before
        ):
            yield f"{what} in {folder} was trained again since"


# ---------------------------------------------------------------------------------------------------------------- disk

DISK = ("place", "size", "deleting it loses")


def disk_lines(runs: list[RunArtifacts], checkpoints: Path, eval_out: Path) -> list[tuple]:
    """(place, size, what is lost with it), the largest first: runs, their checkpoints, caches and leftovers."""
    entries = []
    for run in runs:
        saved = [folder for folder in checkpoints_of(run.weights) if folder.is_dir()]
        states = sum(folder_size(folder) for folder in saved)
        entries.append((folder_size(run.weights) - states, f"{run.weights}", "the run's weights"))
        if saved:
            entries.append((states, f"{run.weights}/checkpoint-*", "only resuming and evaluating earlier steps"))
        entries.append((folder_size(run.run.results), f"{run.run.results}", "its results"))
    sizes: dict[tuple[str, str], int] = {}
    for left in leftovers(checkpoints, eval_out):
        # The cache's folders have names that say nothing; doctor.sh --clean lists them one by one.
        place = left.path.parent if left.path.parent == eval_out / ".cache" else left.path
        key = (str(place), left.costs)
        sizes[key] = sizes.get(key, 0) + left.size
    entries += [(size, *key) for key, size in sizes.items()]
    shown = sorted((entry for entry in entries if entry[0]), reverse=True)
    return [DISK, *((place, disk(size), lost) for size, place, lost in shown)]


# ------------------------------------------------------------------------------------------------------------ terminal


def status_text(runs: list[RunArtifacts], checkpoints: Path, eval_out: Path, report: Path) -> str:
    """What --status prints.

    Args:
        runs: newest first.
        report: the file that the report writes.
    """
    if not runs:
        return f"{checkpoints}/ and {eval_out}/ hold nothing yet: `bash quickstart.sh` makes a run in minutes"
    lines, stale, missing = [("run", "stage", "state", "finished, UTC")], [], []
    problems = [problem for run in runs for problem in run.problems]
    for run in runs:
        name = run.name
        if run.is_training and not (run.training and run.run.state.startswith("finished")):
            lines.append((name, f"training: {run.run.trains or '-'}", run.run.state, duration(run.run.seconds)))
            name = ""
        for state in states_of(run):
            if state.state == MISSING:
                missing.append((run, state))
                continue
            lines.append((name, state.title, state.state, state.finished.replace("T", " ").removesuffix("Z")))
            name = ""
            lines += [(f"    {reason}",) for reason in state.reasons if state.state == STALE]
            if state.state == STALE:
                stale.append((run, state))
    parts = [render("what ran", lines)]
    if problems:
        parts.append(paragraphs("missing or damaged:\n" + "\n".join(f"  {problem}" for problem in problems)))
    parts.append("\n".join(["next:", *_next_lines(runs, stale, missing, report)]))
    largest = disk_lines(runs, checkpoints, eval_out)
    parts.append(render("what uses the disk", largest[:11]))
    parts.append(paragraphs(f"{disk_use(checkpoints, eval_out)}\nbash doctor.sh --clean lists what can be deleted"))
    return "\n\n".join(parts)


def _next_lines(runs: list[RunArtifacts], stale: list, missing: list, report: Path) -> list[str]:
    """Stale results again, unfinished training, then the evaluations that the newest finished run lacks."""
    lines = []
    for run, state in stale:
        again = f"{state.command} --overwrite" if state.command else STAGES[state.stage].command
        lines += [f"  # {run.name}, {state.title} is stale: {state.reasons[0]}", f"  {again}"]
    for run in runs:
        if run.is_training and not run.run.state.startswith(("finished", "running", "preflight only")):
            lines.append(f"  # {run.name}: {run.run.state}; its training command continues it")
    # A trial is not evaluated further.
    missing = [(run, state) for run, state in missing if run.training and run.training.limit is None]
    newest = missing[0][0] if missing else None
    for run, state in missing:
        if run is newest:
            lines += [f"  # {state.title}: {STAGES[state.stage].question}", f"  {state.command}"]
    others: dict[str, list[str]] = {}
    for run, state in missing:
        if run is not newest:
            others.setdefault(run.name, []).append(state.title)
    lines += [f"  # {name} also lacks: {', '.join(titles)}" for name, titles in others.items()]
    if is_outdated(report, runs):
        why = "is older than these results" if report.exists() else "is not written yet"
        lines += [f"  # {report} {why}", "  python report.py"]
    return lines or ["  nothing: every result is current"]


def is_outdated(report: Path, runs: list[RunArtifacts]) -> bool:
    """Whether a result is newer than the report, or there is no report."""
    newest = max((os.path.getmtime(a.path) for run in runs for a in run.artifacts), default=0.0)
    return not report.exists() or os.path.getmtime(report) < newest
