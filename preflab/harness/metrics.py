"""Figures of a suite for base and tuned: the harness's figures, and paired differences from its logged samples."""

import json
import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from preflab.evaluation.comparison import Comparison, ensure_models_differ
from preflab.harness.calls import UNQUANTISED, Call
from preflab.harness.results import ModelResults, figures_of, leaves, read_side, reported_figures
from preflab.harness.suites import Suite, averages, errors, load_reference
from utils.artifacts import metric
from utils.stats import bootstrap, mcnemar, mean_test, of_sums, share

# How the harness turns a mean over documents into its figure: unchanged, perplexity, bits per byte.
AGGREGATIONS = {
    "mean": lambda r: r,
    # r is the mean log-likelihood in nats per unit; exp overflows beyond 709.
    "perplexity": lambda r: np.exp(np.minimum(-r, 700)),
    "bits": lambda r: -r / math.log(2),
}


@dataclass
class SuiteResults:
    """All results of a suite, for the report.

    Attributes:
        sides: `{"base": ModelResults, "tuned": ModelResults}`.
        rows: from `rows`. averages: from `suite_averages`. references: from `load_reference`.
        settings: see `settings_of`.
        alone: whether there is one model only; it then takes both places in the rows, without differences and tests.
        contamination: from `preflab.harness.contamination.contamination`, None without --contamination.
    """

    title: str
    suite: Suite
    sides: dict[str, ModelResults]
    rows: list[dict]
    averages: dict[str, dict]
    references: list[dict]
    settings: dict
    alone: bool = False
    contamination: dict | None = None


def compare(
    comparison: Comparison, suite: Suite, calls: dict[str, list[Call]], settings: dict, seed: int
) -> SuiteResults:
    """Read the results of both models and compare them.

    Args:
        calls: finished calls by side. settings: from `settings_of`.

    Raises:
        UserError: both models gave the same answers everywhere.
    """
    sides = {side: read_side(side_calls) for side, side_calls in calls.items()}
    references, alone = [load_reference(name) for name in suite.references], len(sides) == 1
    both = {"base": sides["base"], "tuned": sides["base" if alone else "tuned"]}
    if not alone:
        ensure_answers_differ(**both, comparison=comparison)
    figures = rows(**both, suite=suite, seed=seed)
    means = suite_averages(suite, **both, seed=seed)
    for row in [*figures, *means.values()] if alone else ():
        row.update(difference=metric(None), p=None, note=None)
    title = f"{comparison.name}: {suite.title}"
    return SuiteResults(title, suite, sides, figures, means, references, settings, alone)


def settings_of(options: dict, arguments: dict, missing: dict[str, str], quantized: bool) -> dict:
    """The settings that decide whether published figures are comparable, as the report and the summary show them.

    Args:
        options: from `preflab.harness.calls.call_options`. arguments: --model_args of the tuned model.
        missing: tasks left out and why. quantized: whether training quantised the base.
    """
    return {
        **{key: options[key] for key in ("apply_chat_template", "limit", "num_fewshot", "batch_size")},
        "dtype": arguments.get("mixed_precision_dtype", arguments["dtype"]),
        "missing": missing,
        "unquantised": UNQUANTISED if quantized else None,
    }


def leading_bos(tokenizer, prompt: str) -> int:
    """BOS tokens at the start of a prompt tokenised as the harness does: it adds none if the text starts with one."""
    bos = tokenizer.bos_token
    if bos is None:
        return 0
    # Two BOS tokens shift a model away from its training data; the artifact records their number.
    ids = tokenizer.encode(prompt, add_special_tokens=not prompt.startswith(bos))
    count = 0
    while count < len(ids) and ids[count] == tokenizer.bos_token_id:
        count += 1
    return count


def metrics(results: SuiteResults) -> dict[str, dict]:
    """`{"task/metric,filter/side": metric}` and `{"average/side": metric}`; side: base, tuned or difference."""
    kinds = ("base",) if results.alone else ("base", "tuned", "difference")
    figures = {f"{r['task']}/{r['metric']},{r['filter']}/{k}": r[k] for r in results.rows for k in kinds}
    return figures | {f"{name}/{k}": m[k] for name, m in results.averages.items() for k in kinds}


def ensure_answers_differ(base: ModelResults, tuned: ModelResults, comparison: Comparison) -> None:
    """Raise UserError if both models gave the same answer to every request (`ensure_models_differ`)."""
    # Responses include log-likelihoods, which an applied adapter changes even where no choice changes.
    pairs = [(a[k], tuned.samples[task][k]) for task, a in base.samples.items() for k in a if k in tuned.samples[task]]
    identical = bool(pairs) and all(a["answer"] == b["answer"] for a, b in pairs)
    ensure_models_differ(identical, f"the same answer to all {len(pairs)} requests", comparison)


# ----------------------------------------------------------------------------------------------------- paired figures


def rows(base: ModelResults, tuned: ModelResults, suite: Suite, seed: int) -> list[dict]:
    """One row per figure that the harness's tables have for both models, groups before their subtasks.

    Returns:
        `{task, alias, depth, top, version, filter, shots, metric, higher, base, tuned, difference, p, test, n, note}`,
        and `under`, [depth, alias] of the groups above it that have no figure.
        base and tuned are the harness's value and stderr; difference and p are paired over documents. `top` rows are
        those not already covered by a group's figure.
    """
    table, members = [], {child for kids in base.subtasks.values() for child in kids}

    def visit(name: str, depth: int, top: bool, under: tuple = ()):
        before = len(table)
        for key in sorted(figures_of(base, name) & figures_of(tuned, name)):
            measure, _, filtered = key.partition(",")
            row = _row(base, tuned, name, measure, filtered, depth, seed)
            # A separate key only under a group without a figure, which has no row to be the heading.
            table.append({**row, "top": top, **({"under": [list(each) for each in under]} if under else {})})
        children, has_figure = base.subtasks.get(name, []), len(table) > before
        if children and not has_figure:
            under = (*under, (depth, _alias(base, name)))
        for child in children:
            # Subtasks are `top` only where the group has no figure, so that no document is tested in its
            # group and again in its subtask.
            visit(child, depth + 1, top and not has_figure, under)

    order = [entry["task"] for entry in suite.tasks]
    tops = [name for name in base.results if name not in members]
    # The suite's order; tasks that a group or pattern added follow by name.
    for name in sorted(tops, key=lambda name: (order.index(name) if name in order else len(order), name)):
        visit(name, 0, True)
    return table


def _row(
    base: ModelResults, tuned: ModelResults, name: str, measure: str, filtered: str, depth: int, seed: int
) -> dict:
    reported = reported_figures(base, tuned, name, measure, filtered)
    return {
        "task": name,
        "alias": _alias(base, name),
        "depth": depth,
        "version": base.versions.get(name),
        "filter": filtered,
        "shots": base.shots.get(name),
        "metric": measure,
        # True, False, or None where the harness does not state it; then there is no verdict on the row.
        "higher": base.higher.get(name, {}).get(measure),
        **reported,
        **paired(base, tuned, leaves(base, name), measure, filtered, reported, seed),
    }


def _alias(side: ModelResults, name: str) -> str:
    return str(side.results.get(name, {}).get("alias", name)).strip(" -")


def paired(
    base: ModelResults, tuned: ModelResults, tasks: list[str], measure: str, filtered: str, reported: dict, seed: int
) -> dict:
    """Tuned minus base over the documents of `tasks`: `{difference, p, test, n, note}`.

    0/1 metrics are tested by exact McNemar, others by `utils.stats.mean_test`. If the harness's figure cannot be
    reproduced from its samples, or the prompts differ between the models, the error is unpaired and there is no test.

    Args:
        reported: `{"base": metric, "tuned": metric}` as the harness reports the figure.
    """
    values, unpaired = values_of(base, tuned, tasks, measure, filtered)
    # The fallback: the harness's own figures with the error of independent samples, usually too large for paired data.
    point = reported["tuned"]["value"] - reported["base"]["value"]
    result = {
        "difference": metric(point, _independent(reported)),
        "p": None,
        "test": None,
        "n": len(values),
        "note": None,
    }
    # A paired test on the shared documents alone would describe another set than the reported figures.
    if unpaired:
        return {**result, "note": f"{unpaired} documents have other prompts or are missing in one model: unpaired"}
    if not len(values):
        return {**result, "note": "no samples"}
    aggregation = aggregation_of(values, reported)
    if aggregation is None:
        return _by_task(base, tuned, tasks, measure, filtered, reported, seed) or {
            **result,
            "note": "computed by the task's own aggregation: unpaired",
        }
    # Columns of values: tuned's sum, base's sum, weight.
    plain_mean = aggregation == "mean" and (values[:, 2] == 1).all()
    right_or_wrong = plain_mean and np.isin(values[:, :2], (0, 1)).all()
    if plain_mean:
        # Columns tuned and base: the mean of their difference.
        difference = (share if right_or_wrong else bootstrap)(values[:, :2], seed)
    else:
        figure = AGGREGATIONS[aggregation]
        # Ratio of sums within each resample, as corpus-level perplexity and accuracy over instructions are defined.
        difference = of_sums(values, lambda s: figure(s[..., 0] / s[..., 2]) - figure(s[..., 1] / s[..., 2]), seed)
    if plain_mean and len(values) > 1:
        # The sample's standard error, with n - 1, as the harness computes those of both columns.
        spread = np.std(values[:, 0] - values[:, 1], ddof=1)
        difference = {**difference, "stderr": float(spread / math.sqrt(len(values)))}
    # Exact McNemar: only documents on which the models disagree carry information (McNemar 1947).
    if right_or_wrong:
        p, test = mcnemar(values[:, 0], values[:, 1]), "McNemar"
    else:
        # Test the sums: the aggregation is monotonic, so the figures are equal exactly where the sums are.
        p, test = mean_test(values[:, 0] - values[:, 1], seed=seed), "permutation"
    return {**result, "difference": difference, "p": p, "test": test}


def values_of(
    base: ModelResults, tuned: ModelResults, tasks: list[str], measure: str, filtered: str
) -> tuple[np.ndarray, int]:
    """(tuned's sum, base's sum, weight) per document, shape (n, 3), and the number of documents without a partner."""
    values, unpaired = [], 0
    for task in tasks:
        base_samples, tuned_samples = base.samples.get(task, {}), tuned.samples.get(task, {})
        # Documents are matched by id, and their hashes must be equal: the same document, rendered to the same prompt.
        keys = [key for key in base_samples if key[0] == filtered]
        unpaired += len({key for key in tuned_samples if key[0] == filtered} - set(keys))
        for key in keys:
            a, b = base_samples[key], tuned_samples.get(key)
            if b is None or (a["document"], a["prompt"]) != (b["document"], b["prompt"]):
                unpaired += 1
                continue
            of_base, of_tuned = _number(a["values"].get(measure)), _number(b["values"].get(measure))
            # The weights (words, instructions) describe the document, so they are equal for both models.
            if of_base and of_tuned and of_base[1] == of_tuned[1]:
                values.append((of_tuned[0], of_base[0], of_base[1]))
            elif measure in a["values"]:
                # Data for the task's own aggregation, like f1's pairs of gold and prediction. NaN matches no known one.
                return np.full((1, 3), np.nan), 0
    return np.array(values, float).reshape(-1, 3), unpaired


def _number(value) -> tuple[float, float] | None:
    """(sum, weight) of one document's figure, None for other data.

    The figure is a number, a list of booleans (IFEval's instructions), or a log-likelihood with its length
    (word_perplexity).
    """
    if isinstance(value, (bool, int, float)):
        return float(value), 1.0
    # Before the pair of numbers: two booleans would match it too.
    if isinstance(value, list) and value and all(isinstance(v, bool) for v in value):
        return float(sum(value)), float(len(value))
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return float(value[0]), float(value[1])
    return None


def aggregation_of(values: np.ndarray, reported: dict) -> str | None:
    """The name in `AGGREGATIONS` that reproduces both reported figures from the documents' mean; else None."""
    for name, figure in AGGREGATIONS.items():
        # Only a figure that the samples reproduce may be tested with them: this replaces knowledge of every task's
        # aggregation.
        computed = [figure(values[:, k].sum() / values[:, 2].sum()) for k in (0, 1)]
        if np.allclose(computed, [reported["tuned"]["value"], reported["base"]["value"]], rtol=1e-6, atol=1e-9):
            return name
    return None


def _independent(reported: dict) -> float | None:
    """Standard error of the difference of two independent figures."""
    parts = [reported[side]["stderr"] for side in ("base", "tuned")]
    # sqrt(a^2 + b^2): variances of independent estimates add up.
    return None if None in parts else math.hypot(*parts)


def figures_of_tasks(base, tuned, tasks, measure, filtered, reported) -> dict[str, dict] | None:
    """`{task: {base, tuned}}` of a group whose figure is the unweighted mean of its tasks'; None for other groups."""
    if len(tasks) < 2:
        return None
    of_tasks = {task: reported_figures(base, tuned, task, measure, filtered) for task in tasks}
    for side in ("base", "tuned"):
        values = [pair[side]["value"] for pair in of_tasks.values()]
        if None in values or not np.isclose(np.mean(values), reported[side]["value"], rtol=1e-6):
            return None
    return of_tasks


def _by_task(base, tuned, tasks, measure, filtered, reported, seed) -> dict | None:
    """The difference of a group of `figures_of_tasks`; None for other groups."""
    # A group weighted by documents (MMLU) is reproduced from its pooled samples and does not reach this point.
    of_tasks = figures_of_tasks(base, tuned, tasks, measure, filtered, reported)
    if of_tasks is None:
        return None
    # Paired within each task; tasks have different documents, so their errors are independent.
    parts = [paired(base, tuned, [task], measure, filtered, pair, seed) for task, pair in of_tasks.items()]
    difference = _plain_mean([part["difference"] for part in parts])
    freedom = degrees_of_freedom([(part["difference"]["stderr"], part["n"]) for part in parts])
    return {
        **normal(difference["value"], difference["stderr"], freedom),
        "test": "t",
        "n": sum(p["n"] for p in parts),
        "note": None,
    }


def degrees_of_freedom(parts: list[tuple[float | None, int]]) -> float:
    """Welch and Satterthwaite's degrees of freedom of a sum of independent means (Satterthwaite 1946).

    Args:
        parts: (standard error, number of documents) of each mean.
    """
    squares = [(error**2, n - 1) for error, n in parts if error and n > 1]
    below = sum(square**2 / n for square, n in squares)
    return sum(square for square, _ in squares) ** 2 / below if below else math.inf


def normal(value: float, stderr: float | None, freedom: float = math.inf) -> dict:
    """`{difference, p}` of a figure whose error is normal, or t-distributed with `freedom` degrees of freedom."""
    # No error or an error of 0: a p-value cannot be computed.
    if not stderr:
        return {"difference": metric(value, stderr), "p": None}
    # With infinite degrees of freedom, t is the normal distribution.
    half = float(student_t.ppf(0.975, freedom)) * stderr
    return {
        "difference": metric(value, stderr, (value - half, value + half)),
        # Two-sided; sf is accurate in the tail, where 1 - cdf would be 0.
        "p": float(2 * student_t.sf(abs(value) / stderr, freedom)),
    }


# ----------------------------------------------------------------------------------------------------------- averages


def suite_averages(suite: Suite, base: ModelResults, tuned: ModelResults, seed: int) -> dict[str, dict]:
    """`{average: {base, tuned, difference, p}}` of the suite, as its leaderboard computes it.

    Values are None if a task is missing. The difference's error is propagated from the paired errors of its entries.
    """
    # Each entry is computed once: several averages may contain it, and it needs bootstraps.
    entries = {json.dumps(e, sort_keys=True): e for a in suite.averages for e in a["of"] if not isinstance(e, str)}
    known = {key: _entry(entry, base, tuned, seed) for key, entry in entries.items()}

    def part(side: str, kind: str):
        def of(entry):
            figure = known[json.dumps(entry, sort_keys=True)]
            return None if figure is None else figure[side][kind]

        return of

    # Three passes over the same entries: reported values (rounded), their errors, and exact values for the difference.
    sides = {side: averages(suite, part(side, "value")) for side in ("base", "tuned")}
    spread = {side: errors(suite, part(side, "value"), part(side, "stderr")) for side in ("base", "tuned")}
    exact = {side: averages(suite, part(side, "value"), rounded=False) for side in ("base", "tuned")}

    def lower(entry):
        """The lower of both figures: if it is below the baseline, the difference's error is unknown."""
        values = [part(side, "value")(entry) for side in sides]
        return None if None in values else min(values)

    difference_errors = errors(suite, lower, part("difference", "stderr"))
    result = {}
    for name, value in sides["base"].items():
        figures = {side: metric(sides[side][name], spread[side][name]) for side in sides}
        if value is None or sides["tuned"][name] is None:
            result[name] = {**figures, "difference": metric(None), "p": None}
        else:
            # Unrounded: the difference of two rounded averages could be off by a full rounding step.
            difference = exact["tuned"][name] - exact["base"][name]
            result[name] = {**figures, **normal(difference, difference_errors[name])}
    return result


def _entry(entry: dict, base: ModelResults, tuned: ModelResults, seed: int) -> dict | None:
    """Base, tuned and their paired difference for one entry of an average; None if one of its tasks did not run."""
    filtered, measure = entry.get("filter", "none"), entry["metric"]
    if entry.get("subtasks"):
        tasks = leaves(base, entry["task"])
        parts = [_entry({"task": task, "metric": measure, "filter": filtered}, base, tuned, seed) for task in tasks]
        # The last condition: the group did not run, so `leaves` returned its name.
        if not parts or None in parts or tasks == [entry["task"]]:
            return None
        return {kind: _plain_mean([part[kind] for part in parts]) for kind in ("base", "tuned", "difference")}
    if "choices" in entry:
        return _subset(entry, base, tuned, seed)
    sides = reported_figures(base, tuned, entry["task"], measure, filtered)
    if sides["base"]["value"] is None or sides["tuned"]["value"] is None:
        return None
    return {**sides, **paired(base, tuned, leaves(base, entry["task"]), measure, filtered, sides, seed)}


def _subset(entry: dict, base: ModelResults, tuned: ModelResults, seed: int) -> dict | None:
    """An entry with `choices`: the documents of a pooled task that have this number of answer options."""
    # The pooled task has no reported figure for a subset, so it is computed from the samples. "options" counts the
    # answer options of a document.
    subsets = [
        ModelResults(
            samples={
                entry["task"]: {
                    k: s for k, s in side.samples.get(entry["task"], {}).items() if s["options"] == entry["choices"]
                }
            }
        )
        for side in (base, tuned)
    ]
    values, unpaired = values_of(*subsets, [entry["task"]], entry["metric"], entry.get("filter", "none"))
    if unpaired or not len(values):
        return None
    interval_of = share if np.isin(values[:, :2], (0, 1)).all() else bootstrap
    return {
        "base": interval_of(values[:, 1], seed),
        "tuned": interval_of(values[:, 0], seed),
        "difference": interval_of(values[:, :2], seed),
    }


def _plain_mean(figures: list[dict]) -> dict:
    """Mean of independent metrics with its propagated standard error."""
    stderrs = [figure["stderr"] for figure in figures]
    stderr = None if None in stderrs else math.sqrt(sum(e * e for e in stderrs)) / len(stderrs)
    return metric(sum(figure["value"] for figure in figures) / len(figures), stderr)
