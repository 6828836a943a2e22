"""A suite's figures without the documents whose question overlaps with training data (--contamination)."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from preflab.evaluation.contamination import TrainingText
from preflab.harness.metrics import AGGREGATIONS, SuiteResults, aggregation_of, figures_of_tasks, paired, values_of
from preflab.harness.results import ModelResults, leaves
from utils import tables
from utils.artifacts import metric
from utils.tables import number, p_value

SIDES = ("base", "tuned")


def contamination(results: SuiteResults, training: TrainingText, seed: int) -> dict:
    """The artifact's section: the training data, overlapping documents per task, figures with and without them.

    Returns:
        `{training_data, rows, sources, ngram_sizes, shortest, models, tasks, figures}`. tasks: `{task: {documents,
        too_short, overlapping: {size: count}}}`; figures: for each row of the results that no group covers `{task,
        metric, filter, documents, all, without: {size: {documents, base, tuned, difference, p} or None}}`. None: no
        document overlaps, or the task's own aggregation cannot be computed from documents.
    """
    base = results.sides["base"]
    # One model alone takes both places, as in the rows.
    tuned = results.sides.get("tuned", base)
    tasks, flagged = {}, {str(size): {} for size in training.describe()["ngram_sizes"]}
    overlaps = training.overlaps({task: list(questions.values()) for task, questions in base.questions.items()})
    for task, questions in base.questions.items():
        overlap = overlaps[task]
        tasks[task] = {
            "documents": len(questions),
            "too_short": overlap.too_short,
            "overlapping": overlap.counts(),
        }
        for size, overlapping in overlap.overlapping.items():
            flagged[str(size)][task] = {document for document, hit in zip(questions, overlapping, strict=True) if hit}
    figures = []
    for row in results.rows:
        if not row["top"]:
            continue
        of_row = leaves(base, row["task"])
        removed = {size: sum(len(by_task.get(task, ())) for task in of_row) for size, by_task in flagged.items()}
        figures.append(
            {
                **{key: row[key] for key in ("task", "metric", "filter", "higher")},
                "documents": sum(tasks[task]["documents"] for task in of_row if task in tasks),
                "all": {key: row[key] for key in (*SIDES, "difference", "p")},
                "without": {
                    size: _without(base, tuned, row, flagged[size], seed) if count else None
                    for size, count in removed.items()
                },
                "removed": removed,
            }
        )
    return {**training.describe(), "models": list(results.sides), "tasks": tasks, "figures": figures}


def _without(base: ModelResults, tuned: ModelResults, row: dict, flagged: dict[str, set], seed: int) -> dict | None:
    """Base, tuned, their difference and its test on the documents that are not `flagged` ({task: document ids})."""
    tasks, measure, filtered = leaves(base, row["task"]), row["metric"], row["filter"]
    clean = {side: _clean(model, tasks, flagged) for side, model in zip(SIDES, (base, tuned), strict=True)}
    figures = _figures(base, tuned, clean, tasks, measure, filtered, row)
    if figures is None:
        of_tasks = figures_of_tasks(base, tuned, tasks, measure, filtered, row) or {}
        parts = [_figures(base, tuned, clean, [task], measure, filtered, pair) for task, pair in of_tasks.items()]
        if not parts or None in parts:
            return None
        for task, part in zip(tasks, parts, strict=True):
            for side in SIDES:
                keys = f"{measure},{filtered}", f"{measure}_stderr,{filtered}"
                clean[side].results[task] = dict(zip(keys, (part[side]["value"], part[side]["stderr"]), strict=True))
        figures = {side: metric(float(np.mean([part[side]["value"] for part in parts]))) for side in SIDES}
    compared = paired(clean["base"], clean["tuned"], tasks, measure, filtered, figures, seed)
    documents = len({(task, key[1]) for task in tasks for key in clean["base"].samples.get(task, {})})
    return {"documents": documents, **figures, "difference": compared["difference"], "p": compared["p"]}


def _clean(model: ModelResults, tasks: list[str], flagged: dict[str, set]) -> ModelResults:
    """The results of `tasks` without the samples of flagged documents, and without the harness's figures."""
    samples = {
        task: {key: s for key, s in model.samples.get(task, {}).items() if key[1] not in flagged.get(task, ())}
        for task in tasks
    }
    return dataclasses.replace(model, samples=samples, results=dict(model.results))


def _figures(base, tuned, clean, tasks, measure, filtered, reported) -> dict | None:
    """`{side: metric}` of the clean documents by the aggregation that gives the harness's figures of all; else None."""
    values, unpaired = values_of(base, tuned, tasks, measure, filtered)
    if unpaired or not len(values) or None in (reported[side]["value"] for side in SIDES):
        return None
    aggregation = aggregation_of(values, reported)
    left, _ = values_of(clean["base"], clean["tuned"], tasks, measure, filtered)
    if aggregation is None or not len(left):
        return None
    figures = {}
    # Columns of values: tuned's sum, base's sum, weight.
    for side, column in (("base", 1), ("tuned", 0)):
        error = None
        if aggregation == "mean" and (left[:, 2] == 1).all() and len(left) > 1:
            # With n - 1, as the harness.
            error = float(np.std(left[:, column], ddof=1) / math.sqrt(len(left)))
        value = AGGREGATIONS[aggregation](left[:, column].sum() / left[:, 2].sum())
        figures[side] = metric(float(value), error, n=len(left))
    return figures


def table(section: dict) -> str:
    """The printed table: figures of all documents, and without those that overlap, base and tuned."""
    head = f"overlap with {section['training_data']}, {section['rows']:,} rows"
    alone = len(section["models"]) == 1
    columns = section["models"] if alone else (*SIDES, "tuned - base", "p")
    lines: list[tuple] = [("questions that share an n-gram", "documents", *columns)]
    for figure in section["figures"]:
        if not any(figure["removed"].values()):
            continue
        measure = figure["metric"] if figure["filter"] == "none" else f"{figure['metric']}, {figure['filter']}"
        lines.append((f"{figure['task']}, {measure}",))
        lines.append(("  all", str(figure["documents"]), *_cells(figure["all"], alone)))
        for size, without in figure["without"].items():
            if figure["removed"][size]:
                count = figure["documents"] - figure["removed"][size]
                left = f"{count} ({-figure['removed'][size]})"
                lines.append((f"  without {size}-grams", left, *_cells(without, alone)))
    clean = ", ".join(f"{name} ({task['documents']:,})" for name, task in _without_overlap(section))
    parts = [tables.render(head, lines)] if len(lines) > 1 else [head]
    if clean:
        parts.append(tables.paragraphs(f"No question overlaps: {clean}."))
    return "\n\n".join(parts)


def _without_overlap(section: dict) -> Iterator[tuple[str, dict]]:
    return ((name, task) for name, task in section["tasks"].items() if not any(task["overlapping"].values()))


def _cells(figure: dict | None, alone: bool) -> tuple[str, ...]:
    if figure is None:
        return ("-",) * (1 if alone else 4)
    if alone:
        return (_cell(figure["base"]),)
    return (*(_cell(figure[side]) for side in SIDES), _cell(figure["difference"], "+"), p_value(figure["p"]))


def _cell(m: dict, sign: str = "") -> str:
    if m["value"] is None:
        return "-"
    error = "" if m["stderr"] is None else f" ± {number(m['stderr'], 4)}"
    return f"{number(m['value'], 4, sign)}{error}"
