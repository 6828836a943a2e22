"""Figures of a suite for base and tuned: the harness's own results, and paired differences from its logged samples."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preflab.evaluation.comparison import ensure_models_differ
from preflab.harness.calls import Call
from preflab.harness.suites import Suite, averages, errors
from utils.artifacts import metric, read_json
from utils.errors import UserError
from utils.provenance import shorten_paths
from utils.stats import bootstrap, bootstrap_test, mcnemar

# How the harness makes one figure of a mean: as it is, perplexity, bits a byte.
AGGREGATIONS = {
    "mean": lambda r: r,
    "perplexity": lambda r: math.exp(min(-r, 700)),
    "bits": lambda r: -r / math.log(2),
}


@dataclass
class ModelResults:
    """What the harness reported of one model, its calls put together, and its samples by task."""

    results: dict = field(default_factory=dict)
    subtasks: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    shots: dict = field(default_factory=dict)
    higher: dict = field(default_factory=dict)
    configs: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    headers: list = field(default_factory=list)
    templates: set = field(default_factory=set)
    lengths: dict = field(default_factory=dict)
    first_prompt: str = ""
    seconds: float = 0.0


def read_side(calls: list[Call]) -> ModelResults:
    """The newest results of every call and all its samples."""
    side = ModelResults()
    for call in calls:
        path = max(call.folder.glob("results_*.json"), key=lambda p: p.stat().st_mtime)
        found = read_json(path)
        side.results |= {**found["results"], **found.get("groups", {})}
        side.subtasks |= {k: v for k, v in found.get("group_subtasks", {}).items() if v}
        for name, key in (("versions", "versions"), ("shots", "n-shot"), ("higher", "higher_is_better")):
            getattr(side, name).update(found.get(key, {}))
        side.configs |= found["configs"]
        side.headers.append(_header(found, call))
        side.templates.add(found.get("chat_template") is not None)
        side.seconds += call.seconds
        stamp = path.stem.removeprefix("results_")
        for task in found["configs"]:
            side.samples[task] = _samples(call.folder / f"samples_{task}_{stamp}.jsonl", side, task)
    return side


def _header(found: dict, call: Call) -> str:
    """The line that the harness prints above its table."""
    c = found["config"]
    sizes = ",".join(map(str, c.get("batch_sizes") or []))
    return (
        f"{c['model']} ({shorten_paths(c['model_args'])}), gen_kwargs: ({c['gen_kwargs']}), limit: {c['limit']},"
        f" num_fewshot: {call.shots}, batch_size: {c['batch_size']}{f' ({sizes})' if sizes else ''}"
    )


def _samples(path: Path, side: ModelResults, task: str) -> dict[tuple, dict]:
    """`{(filter, doc_id): {document, prompt, values, options, answer}}`: what pairing needs of each logged sample."""
    found, lengths = {}, []
    generated = side.configs[task].get("output_type") == "generate_until"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError:
        raise UserError(f"{path}: the harness's samples are gone; --overwrite runs the task again") from None
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        answers = row["resps"]
        found[row["filter"], row["doc_id"]] = {
            "document": row["doc_hash"],
            "prompt": row["prompt_hash"],
            "values": {name: row[name] for name in row["metrics"] if name in row},
            "options": len(answers),
            "answer": json.dumps(answers),
        }
        if generated:
            lengths.append(len(str(answers[0][0])))
        if not side.first_prompt:
            side.first_prompt = str(row["arguments"]["gen_args_0"]["arg_0"])
    if lengths:
        side.lengths[task] = sum(lengths) / len(lengths)
    return found


def ensure_adapter_applied(base: ModelResults, tuned: ModelResults) -> None:
    """Raise UserError where both models answered every request alike: the adapter was not applied."""
    pairs = [(a[k], tuned.samples[task][k]) for task, a in base.samples.items() for k in a if k in tuned.samples[task]]
    identical = bool(pairs) and all(a["answer"] == b["answer"] for a, b in pairs)
    ensure_models_differ(identical, f"the same answer to all {len(pairs)} requests")


# ----------------------------------------------------------------------------------------------------- paired figures


def leaves(side: ModelResults, name: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    children = side.subtasks.get(name, [])
    return [leaf for child in children for leaf in leaves(side, child)] if children else [name]


def rows(base: ModelResults, tuned: ModelResults, suite: Suite, seed: int) -> list[dict]:
    """A row for every figure of the harness's tables, base beside tuned, groups before their subtasks.

    Returns:
        `{task, alias, depth, top, version, filter, shots, metric, higher, base, tuned, difference, p, test, n, note}`.
        base and tuned are the harness's own value and stderr; difference and p are paired over documents.
    """
    found, children = [], {child for kids in base.subtasks.values() for child in kids}

    def visit(name: str, depth: int, top: bool):
        before = len(found)
        for key in sorted(base.results.get(name, {})):
            value = base.results[name][key]
            measure, _, filtered = key.partition(",")
            if filtered and not measure.endswith("_stderr") and isinstance(value, (int, float)):
                row = _row(base, tuned, name, measure, filtered, depth, seed)
                found.append({**row, "top": top})
        for child in base.subtasks.get(name, []):
            visit(child, depth + 1, top and len(found) == before)

    asked = [entry["task"] for entry in suite.tasks]
    tops = [name for name in base.results if name not in children]
    for name in sorted(tops, key=lambda name: (asked.index(name) if name in asked else len(asked), name)):
        visit(name, 0, True)
    return found


def _row(
    base: ModelResults, tuned: ModelResults, name: str, measure: str, filtered: str, depth: int, seed: int
) -> dict:
    sides = {"base": base, "tuned": tuned}
    reported = {key: _reported(side, name, measure, filtered) for key, side in sides.items()}
    return {
        "task": name,
        "alias": str(base.results[name].get("alias", name)).strip(" -"),
        "depth": depth,
        "version": base.versions.get(name),
        "filter": filtered,
        "shots": base.shots.get(name),
        "metric": measure,
        "higher": base.higher.get(name, {}).get(measure),
        **reported,
        **paired(base, tuned, leaves(base, name), measure, filtered, reported, seed),
    }


def _reported(side: ModelResults, name: str, measure: str, filtered: str) -> dict:
    results = side.results.get(name, {})
    value, error = results.get(f"{measure},{filtered}"), results.get(f"{measure}_stderr,{filtered}")
    return metric(value, error if isinstance(error, (int, float)) else None)


def paired(
    base: ModelResults, tuned: ModelResults, tasks: list[str], measure: str, filtered: str, reported: dict, seed: int
) -> dict:
    """Tuned minus base over the documents of `tasks`: `{difference, p, test, n, note}`.

    0/1 metrics are tested by exact McNemar, others by a paired bootstrap. A figure that the harness makes in a way
    which cannot be followed from its samples, or whose prompts differ between the models, gets an unpaired error.
    """
    values, unpaired = _values(base, tuned, tasks, measure, filtered)
    point = reported["tuned"]["value"] - reported["base"]["value"]
    found = {
        "difference": metric(point, _independent(reported)),
        "p": None,
        "test": None,
        "n": len(values),
        "note": None,
    }
    if unpaired:
        return {**found, "note": f"{unpaired} documents have other prompts or are missing in one model: unpaired"}
    if not len(values):
        return {**found, "note": "no samples"}
    link = aggregation_of(values, reported)
    if link is None:
        return _by_task(base, tuned, tasks, measure, filtered, reported, seed) or {
            **found,
            "note": "made by the task's own aggregation: unpaired",
        }
    plain = link == "mean" and (values[:, 2] == 1).all()
    if plain:
        difference = bootstrap(values[:, :2], seed)
    else:
        turn = AGGREGATIONS[link]
        difference = bootstrap(
            values, seed, statistic=lambda v: turn(v[:, 0].sum() / v[:, 2].sum()) - turn(v[:, 1].sum() / v[:, 2].sum())
        )
    if plain and np.isin(values[:, :2], (0, 1)).all():
        p, test = mcnemar(values[:, 0], values[:, 1]), "McNemar"
    else:
        # On the mean itself: what the link makes of it is equal where the means are.
        p = bootstrap_test(values, seed, statistic=lambda v: (v[:, 0].sum() - v[:, 1].sum()) / v[:, 2].sum())
        test = "bootstrap"
    return {**found, "difference": difference, "p": p, "test": test}


def _values(
    base: ModelResults, tuned: ModelResults, tasks: list[str], measure: str, filtered: str
) -> tuple[np.ndarray, int]:
    """(tuned's sum, base's sum, weight) of every document, shape (n, 3), and how many cannot be paired."""
    found, unpaired = [], 0
    for task in tasks:
        here, there = base.samples.get(task, {}), tuned.samples.get(task, {})
        keys = [key for key in here if key[0] == filtered]
        unpaired += len({key for key in there if key[0] == filtered} - set(keys))
        for key in keys:
            a, b = here[key], there.get(key)
            if b is None or (a["document"], a["prompt"]) != (b["document"], b["prompt"]):
                unpaired += 1
                continue
            one, other = _number(b["values"].get(measure)), _number(a["values"].get(measure))
            if one and other and one[1] == other[1]:
                found.append((one[0], other[0], one[1]))
            elif measure in a["values"]:
                # Answers kept for an aggregation of the task's own, as f1's pairs of gold and prediction.
                return np.full((1, 3), np.nan), 0
    return np.array(found, float).reshape(-1, 3), unpaired


def _number(value) -> tuple[float, float] | None:
    """(sum, weight) of one document's figure: a number, a list of them, or a pair of log-likelihood and length."""
    if isinstance(value, (bool, int, float)):
        return float(value), 1.0
    if isinstance(value, list) and value and all(isinstance(v, bool) for v in value):
        return float(sum(value)), float(len(value))
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return float(value[0]), float(value[1])
    return None


def aggregation_of(values: np.ndarray, reported: dict) -> str | None:
    """Which of `AGGREGATIONS` makes both reported figures of the documents' mean."""
    for name, turn in AGGREGATIONS.items():
        made = [turn(values[:, k].sum() / values[:, 2].sum()) for k in (0, 1)]
        if np.allclose(made, [reported["tuned"]["value"], reported["base"]["value"]], rtol=1e-6, atol=1e-9):
            return name
    return None


def _independent(reported: dict) -> float | None:
    parts = [reported[side]["stderr"] for side in ("base", "tuned")]
    return None if None in parts else math.hypot(*parts)


def _by_task(base, tuned, tasks, measure, filtered, reported, seed) -> dict | None:
    """A group whose figure is the plain mean of its tasks'; None for what is not."""
    if len(tasks) < 2:
        return None
    each = [
        {key: _reported(side, t, measure, filtered) for key, side in (("base", base), ("tuned", tuned))} for t in tasks
    ]
    if any(pair[side]["value"] is None for pair in each for side in pair):
        return None
    means = [np.mean([pair[side]["value"] for pair in each]) for side in ("base", "tuned")]
    if not np.allclose(means, [reported[side]["value"] for side in ("base", "tuned")], rtol=1e-6):
        return None
    parts = [paired(base, tuned, [t], measure, filtered, pair, seed) for t, pair in zip(tasks, each, strict=True)]
    stderr = _plain_mean([part["difference"] for part in parts])["stderr"]
    return {
        **normal(float(means[1] - means[0]), stderr),
        "test": "normal",
        "n": sum(p["n"] for p in parts),
        "note": None,
    }


def normal(value: float, stderr: float | None) -> dict:
    """`{difference, p}` of a figure with a normal error."""
    from scipy.stats import norm

    if not stderr:
        return {"difference": metric(value, stderr), "p": None}
    half = 1.959964 * stderr
    return {
        "difference": metric(value, stderr, (value - half, value + half)),
        "p": float(2 * norm.sf(abs(value) / stderr)),
    }


# ----------------------------------------------------------------------------------------------------------- averages


def suite_averages(suite: Suite, base: ModelResults, tuned: ModelResults, seed: int) -> dict[str, dict]:
    """`{average: {base, tuned, difference, p}}` of the suite, as its leaderboard has it; None where a task lacks.

    The difference's error comes from the paired errors of its entries.
    """
    entries = {json.dumps(e, sort_keys=True): e for a in suite.averages for e in a["of"] if not isinstance(e, str)}
    known = {key: _entry(entry, base, tuned, seed) for key, entry in entries.items()}

    def part(side: str, kind: str):
        def of(entry):
            figure = known[json.dumps(entry, sort_keys=True)]
            return None if figure is None else figure[side][kind]

        return of

    sides = {side: averages(suite, part(side, "value")) for side in ("base", "tuned")}
    spread = {side: errors(suite, part(side, "value"), part(side, "stderr")) for side in ("base", "tuned")}
    exact = {side: averages(suite, part(side, "value"), rounded=False) for side in ("base", "tuned")}

    def lower(entry):
        """The lower of both figures: where it lies below a baseline, the difference's error is not known."""
        values = [part(side, "value")(entry) for side in sides]
        return None if None in values else min(values)

    moved = errors(suite, lower, part("difference", "stderr"))
    found = {}
    for name, value in sides["base"].items():
        figures = {side: metric(sides[side][name], spread[side][name]) for side in sides}
        if value is None or sides["tuned"][name] is None:
            found[name] = {**figures, "difference": metric(None), "p": None}
        else:
            found[name] = {**figures, **normal(exact["tuned"][name] - exact["base"][name], moved[name])}
    return found


def _entry(entry: dict, base: ModelResults, tuned: ModelResults, seed: int) -> dict | None:
    """Base, tuned and their paired difference of one entry of an average; None where a task of it did not run."""
    filtered, measure = entry.get("filter", "none"), entry["metric"]
    if entry.get("subtasks"):
        tasks = leaves(base, entry["task"])
        parts = [_entry({"task": task, "metric": measure, "filter": filtered}, base, tuned, seed) for task in tasks]
        if not parts or None in parts or tasks == [entry["task"]]:
            return None
        return {kind: _plain_mean([part[kind] for part in parts]) for kind in ("base", "tuned", "difference")}
    if "choices" in entry:
        return _subset(entry, base, tuned, seed)
    sides = {key: _reported(side, entry["task"], measure, filtered) for key, side in (("base", base), ("tuned", tuned))}
    if sides["base"]["value"] is None or sides["tuned"]["value"] is None:
        return None
    return {**sides, **paired(base, tuned, leaves(base, entry["task"]), measure, filtered, sides, seed)}


def _subset(entry: dict, base: ModelResults, tuned: ModelResults, seed: int) -> dict | None:
    """The documents of a pooled task that have so many answer options."""
    chosen = [
        ModelResults(
            samples={
                entry["task"]: {
                    k: s for k, s in side.samples.get(entry["task"], {}).items() if s["options"] == entry["choices"]
                }
            }
        )
        for side in (base, tuned)
    ]
    values, unpaired = _values(*chosen, [entry["task"]], entry["metric"], entry.get("filter", "none"))
    if unpaired or not len(values):
        return None
    return {
        "base": bootstrap(values[:, 1], seed),
        "tuned": bootstrap(values[:, 0], seed),
        "difference": bootstrap(values[:, :2], seed),
    }


def _plain_mean(figures: list[dict]) -> dict:
    found = [figure["stderr"] for figure in figures]
    stderr = None if None in found else math.sqrt(sum(e * e for e in found)) / len(found)
    return metric(sum(figure["value"] for figure in figures) / len(figures), stderr)
