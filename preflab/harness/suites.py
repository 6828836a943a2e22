"""Suites of lm-evaluation-harness tasks, the averages that leaderboards make of them, and published rows."""

import difflib
from dataclasses import dataclass, field
from fractions import Fraction
from math import sqrt
from pathlib import Path

from utils.artifacts import read_yaml
from utils.errors import UserError
from utils.provenance import ROOT

FOLDER = ROOT / "configs" / "lm_eval"
OWN_TASKS = str(FOLDER / "tasks")


@dataclass
class Suite:
    """A suite as its YAML says it. `tasks`: `{task, num_fewshot}` each; a missing num_fewshot leaves the task's own."""

    name: str
    title: str
    source: str
    tasks: list[dict]
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    include_path: str | None = None
    averages: list[dict] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    needs: dict = field(default_factory=dict)


def suites() -> list[str]:
    """The names of the suites that ship with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A suite by name, or by the path of its YAML. Raises UserError, naming what is close, where there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, suites(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--suite {name}: no such suite; {hint}there are {', '.join(suites())}")
    content = read_yaml(path)
    try:
        suite = Suite(path.stem, **content)
        tasks = [entry["task"] for entry in suite.tasks]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a suite ({error}); configs/lm_eval/openllm_v1.yaml shows every key") from None
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"{path}: needs tasks, each of them once")
    try:
        # What the averages and references name is there, before anything runs for hours.
        averages(suite, lambda entry: 0.5 if entry["task"] and entry["metric"] else None)
        for reference in suite.references:
            load_reference(reference)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: an average names what is not there or is no entry ({error})") from None
    if suite.include_path:
        beside = path.parent / suite.include_path
        suite.include_path = str((ROOT / suite.include_path if path.parent == FOLDER else beside).resolve())
    return suite


def suite_of(tasks: list[str]) -> Suite:
    """The suite of --tasks: each with its own shots, without averages; `needs` are those that any suite knows."""
    known = {}
    for name in suites():
        for kind, entries in load_suite(name).needs.items():
            known.setdefault(kind, {}).update(entries)
    listed = [{"task": task} for task in dict.fromkeys(tasks)]
    name = "-".join(Path(entry["task"]).stem for entry in listed)[:80]
    return Suite(name, ", ".join(tasks), "--tasks", listed, include_path=OWN_TASKS, needs=known)


def load_reference(name: str) -> dict:
    """Published rows: `{name, source, harness, dtype, apply_chat_template, scale, note, rows, averages}`."""
    return {"rows": [], "averages": {}, **read_yaml(FOLDER / "reference" / f"{name}.yaml")}


def averages(suite: Suite, value, rounded: bool = True) -> dict[str, float | None]:
    """Every average of the suite, as its leaderboard defines it: scale × the plain mean of its entries.

    An entry `{task, metric}` with a `baseline` b counts as max(0, x - b) / (1 - b) (Open LLM Leaderboard v2); one that
    is a name is an earlier average. An average that lacks an entry is None.

    Args:
        value: a function of an entry to its figure, in the harness's own scale, or None.
        rounded: round where the leaderboard does, so that its figures come out; without, differences are exact.
    """
    found: dict[str, float | None] = {}
    for average in suite.averages:
        parts = [
            found[entry] if isinstance(entry, str) else _normalised(entry, value(entry)) for entry in average["of"]
        ]
        if any(part is None for part in parts):
            found[average["name"]] = None
            continue
        mean = average.get("scale", 1) * sum(parts) / len(parts)
        found[average["name"]] = round(mean, average["round"]) if rounded and "round" in average else mean
    return found


def _normalised(entry: dict, x: float | None) -> float | None:
    if x is None or "baseline" not in entry:
        return x
    b = float(Fraction(str(entry["baseline"])))
    return max(0.0, x - b) / (1 - b)


def errors(suite: Suite, value, stderr) -> dict[str, float | None]:
    """Standard errors of the averages, from those of their entries to first order.

    Tasks are independent of each other; two metrics of one task are taken as if they moved together. Where a baseline
    cuts an entry to 0, first order knows nothing of its error: the average has none then.

    Args:
        value, stderr: functions of an entry to its figure and the figure's standard error, or None.
    """
    found: dict[str, float | None] = {}
    for average in suite.averages:
        scale, squares, by_task, known = average.get("scale", 1) / len(average["of"]), 0.0, {}, True
        for entry in average["of"]:
            if isinstance(entry, str):
                known &= found[entry] is not None
                squares += (scale * (found[entry] or 0)) ** 2
                continue
            x, error = value(entry), stderr(entry)
            if x is None or error is None:
                known = False
                continue
            b = float(Fraction(str(entry.get("baseline", 0))))
            known &= "baseline" not in entry or x > b
            part = (entry["task"], entry.get("choices"))
            by_task[part] = by_task.get(part, 0.0) + scale / (1 - b) * error
        found[average["name"]] = sqrt(squares + sum(e * e for e in by_task.values())) if known else None
    return found


def published_averages(suite: Suite, reference: dict) -> dict[str, float | None]:
    """The reference's published averages; where it has none, those that its rows make, at the suite's shots."""
    names = [average["name"] for average in suite.averages]
    if set(names) & set(reference["averages"]):
        return {name: reference["averages"].get(name) for name in names}
    shots = {entry["task"]: entry.get("num_fewshot") for entry in suite.tasks}

    def value(entry):
        if entry.get("subtasks"):
            return None
        row = published_row(reference, entry, shots.get(entry["task"]))
        if row is None or row.get("how") == "generated" or row.get("shots") != shots.get(entry["task"]):
            return None
        return on_harness_scale(reference, row, "value")

    return averages(suite, value)


def published_row(reference: dict, entry: dict, shots: int | None) -> dict | None:
    """The published row of `{task, metric, filter, choices}`, that of these shots where there are several."""
    asked = (entry["task"], entry["metric"], entry.get("filter", "none"), entry.get("choices"))
    rows = [
        row
        for row in reference["rows"]
        if (row["task"], row["metric"], row.get("filter", "none"), row.get("choices")) == asked
    ]
    return next((row for row in rows if row.get("shots") == shots), rows[0] if rows else None)


def on_harness_scale(reference: dict, row: dict, key: str) -> float | None:
    """A published row's value or stderr, on the scale on which the harness reports it."""
    return None if row.get(key) is None else row[key] / row.get("scale", reference.get("scale", 1))
