"""Suites of lm-evaluation-harness tasks, the averages that leaderboards take over them, and published results."""

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
    """A suite as read from its YAML file.

    Attributes:
        tasks: `{task, num_fewshot}` each; without num_fewshot the task's own number of shots is used.
        averages: `{name, of, scale, round}` each; see `averages`.
        references: names of files in configs/lm_eval/reference.
        gen_kwargs: settings of generation in place of the tasks', such as max_gen_toks.
        needs: packages, extras, nltk data and gated data by task; see `preflab.harness.tasks.missing`.
    """

    name: str
    title: str
    source: str
    tasks: list[dict]
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    include_path: str | None = None
    gen_kwargs: dict = field(default_factory=dict)
    averages: list[dict] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    needs: dict = field(default_factory=dict)


def suites() -> list[str]:
    """Names of the suites in configs/lm_eval."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite by name or by the path of its YAML file.

    Raises:
        UserError: there is no such suite (the message suggests similar names), or its file is invalid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, suites(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--suite {name}: no such suite; {hint}available: {', '.join(suites())}")
    content = read_yaml(path)
    try:
        # An unknown key in the file is a TypeError here, so a misspelled key is an error and not ignored.
        suite = Suite(path.stem, **content)
        tasks = [entry["task"] for entry in suite.tasks]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a valid suite ({error}); compare configs/lm_eval/openllm_v1.yaml") from None
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"{path}: needs a list of tasks without duplicates")
    try:
        # Resolve every name in averages and references now, before anything runs for hours.
        averages(suite, lambda entry: 0.5 if entry["task"] and entry["metric"] else None)
        for reference in suite.references:
            load_reference(reference)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: an average refers to an unknown average, task or metric ({error})") from None
    if suite.include_path:
        beside = path.parent / suite.include_path
        # Shipped suites name a folder of the repository, a user's file one beside it.
        suite.include_path = str((ROOT / suite.include_path if path.parent == FOLDER else beside).resolve())
    return suite


def suite_of(tasks: list[str]) -> Suite:
    """The suite for --tasks: the tasks' own shots, no averages; `needs` are collected from all suites."""
    known = {}
    for name in suites():
        for kind, entries in load_suite(name).needs.items():
            known.setdefault(kind, {}).update(entries)
    listed = [{"task": task} for task in dict.fromkeys(tasks)]
    # The name becomes a folder; 80 characters stay below the file systems' limit with suffixes.
    name = "-".join(Path(entry["task"]).stem for entry in listed)[:80]
    return Suite(name, ", ".join(tasks), "--tasks", listed, include_path=OWN_TASKS, needs=known)


def load_reference(name: str) -> dict:
    """Read published results: `{name, source, harness, dtype, apply_chat_template, scale, note, rows, averages}`."""
    return {"rows": [], "averages": {}, **read_yaml(FOLDER / "reference" / f"{name}.yaml")}


def averages(suite: Suite, value, rounded: bool = True) -> dict[str, float | None]:
    """Every average of the suite, as its leaderboard defines it: scale × the unweighted mean of its entries.

    An entry `{task, metric}` with a `baseline` b (the score of guessing) counts as max(0, x - b) / (1 - b), as on the
    Open LLM Leaderboard v2. An entry that is a name refers to an earlier average. An average with a missing entry is
    None.

    Args:
        value: maps an entry to its figure on the harness's scale, or to None.
        rounded: round where the leaderboard rounds, to reproduce its figures; False for exact differences.
    """
    result: dict[str, float | None] = {}
    for average in suite.averages:
        # An average of averages refers to earlier ones, so the order in the file matters.
        parts = [
            result[entry] if isinstance(entry, str) else _normalised(entry, value(entry)) for entry in average["of"]
        ]
        if any(part is None for part in parts):
            result[average["name"]] = None
            continue
        mean = average.get("scale", 1) * sum(parts) / len(parts)
        result[average["name"]] = round(mean, average["round"]) if rounded and "round" in average else mean
    return result


def _normalised(entry: dict, x: float | None) -> float | None:
    if x is None or "baseline" not in entry:
        return x
    # Written as 1/4 or 0.25 in YAML.
    b = float(Fraction(str(entry["baseline"])))
    # Guessing counts as 0 and an error-free model as 1.
    return max(0.0, x - b) / (1 - b)


def errors(suite: Suite, value, stderr) -> dict[str, float | None]:
    """Standard errors of the averages, propagated from their entries to first order (the delta method).

    Tasks count as independent; metrics of the same task count as perfectly correlated, so their errors add up. Where
    the baseline clips an entry to 0, the derivative is not defined and the average has no error (None).

    Args:
        value, stderr: map an entry to its figure and to the figure's standard error, or to None.
    """
    result: dict[str, float | None] = {}
    for average in suite.averages:
        # `scale` is the derivative of the average with respect to an entry; 1 / (1 - b) below that of the
        # normalisation.
        scale, squares, by_task, known = average.get("scale", 1) / len(average["of"]), 0.0, {}, True
        for entry in average["of"]:
            if isinstance(entry, str):
                known &= result[entry] is not None
                # Inner averages count as independent of each other.
                squares += (scale * (result[entry] or 0)) ** 2
                continue
            x, error = value(entry), stderr(entry)
            if x is None or error is None:
                known = False
                continue
            b = float(Fraction(str(entry.get("baseline", 0))))
            known &= "baseline" not in entry or x > b
            # Documents with different numbers of options are different documents, so they are independent.
            part = (entry["task"], entry.get("choices"))
            # Errors within a task add linearly (correlation 1), between tasks in quadrature below.
            by_task[part] = by_task.get(part, 0.0) + scale / (1 - b) * error
        result[average["name"]] = sqrt(squares + sum(e * e for e in by_task.values())) if known else None
    return result


def published_averages(suite: Suite, reference: dict) -> dict[str, float | None]:
    """The reference's published averages; if it has none, those computed from its rows at the suite's shots."""
    names = [average["name"] for average in suite.averages]
    # Published averages take precedence, since they were computed from unrounded rows.
    if set(names) & set(reference["averages"]):
        return {name: reference["averages"].get(name) for name in names}
    shots = {entry["task"]: entry.get("num_fewshot") for entry in suite.tasks}

    def value(entry):
        if entry.get("subtasks"):
            return None
        row = published_row(reference, entry, shots.get(entry["task"]))
        # A row in another setting would make the computed average incomparable, so the average is omitted (None).
        if row is None or row.get("how") == "generated" or row.get("shots") != shots.get(entry["task"]):
            return None
        return on_harness_scale(reference, row, "value")

    return averages(suite, value)


def published_row(reference: dict, entry: dict, shots: int | None) -> dict | None:
    """The published row for `{task, metric, filter, choices}`; of several, the one with these shots."""
    key = (entry["task"], entry["metric"], entry.get("filter", "none"), entry.get("choices"))
    rows = [
        row
        for row in reference["rows"]
        if (row["task"], row["metric"], row.get("filter", "none"), row.get("choices")) == key
    ]
    # Without a row at these shots, the first one: `differs` in the report then names the difference.
    return next((row for row in rows if row.get("shots") == shots), rows[0] if rows else None)


def on_harness_scale(reference: dict, row: dict, key: str) -> float | None:
    """A published row's value or stderr on the harness's scale (shares from 0 to 1)."""
    return None if row.get(key) is None else row[key] / row.get("scale", reference.get("scale", 1))
