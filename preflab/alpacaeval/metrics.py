"""Metrics of an AlpacaEval run: rates of base and tuned, their difference, and length control."""

from pathlib import Path

import numpy as np

from preflab.alpacaeval import package
from preflab.evaluation.contamination import without_overlap
from preflab.judging.judges import notes_of
from utils.artifacts import metric
from utils.errors import UserError
from utils.power import with_power
from utils.stats import mean_test, share

NO_INTERVAL = "on some resamples the package's regression left all its coefficients at zero"


def summarise(sides: dict, controls: dict, eval_out: str, seed: int, resamples: int) -> dict:
    """All metrics of both models.

    Args:
        sides: `{"base": annotations, "tuned": annotations}`.
        controls: annotations of the control judges, by `<side>_<control>`.
        resamples: refits for the interval of the length-controlled rate.

    Returns:
        metrics (names start with base_, tuned_ or difference_), length_control (the artifact's section), lc_name (the
        name of the length-controlled rate), judge, judge_notes (what it gave up), leaderboards_judge and alpacaeval
        (whether judge and instructions are those of the leaderboard).

    Raises:
        UserError: base and tuned were judged on different instructions.
    """
    sides = _same_order(sides)
    metrics = {}
    for name, rows in {**sides, **controls}.items():
        metrics |= {f"{name}_{k}": m for k, m in package.rates(rows, seed).items()}
    # Paired differences need a verdict on both sides; each side's own rates above use all of its verdicts.
    both = [k for k in range(len(sides["base"])) if None not in (_preference(sides, s, k) for s in sides)]
    # Shape (judged by both, 2): tuned, base. Preferences are percentages of a win after the factor 100.
    pairs = np.array([[_preference(sides, s, k) for s in ("tuned", "base")] for k in both], float).reshape(-1, 2)
    metrics |= win_rate_difference(pairs, seed, package.prompt_groups([sides["base"][k] for k in both]))
    judged = {side: [rows[k] for k in both] for side, rows in sides.items()}
    rates, errors, section, name = _length_controlled(sides["base"], judged, eval_out, seed, resamples)
    if rates:
        for side in sides:
            metrics[f"{side}_{name}"], metrics[f"{side}_lc_standard_error"] = rates[side], errors[side]
        metrics[f"difference_{name}"] = rates["tuned - base"]
        if rates["tuned - base"]["ci95"] is None:
            section["why_no_interval"] = NO_INTERVAL
    judge = sides["base"][0]["annotator"]
    return {
        "metrics": metrics,
        "length_control": section,
        "lc_name": name,
        "judge": judge,
        "judge_notes": notes_of([order for rows in sides.values() for row in rows for order in row.get("orders", [])]),
        "leaderboards_judge": judge == package.LEADERBOARD_JUDGE,
        # Without the last entry, "unknown": the package's default does not show where an instruction is from.
        "alpacaeval": any(row.get("dataset") in package.DATASETS[:-1] for row in sides["base"]),
    }


def win_rate_difference(pairs: np.ndarray, seed: int, groups: list[str] | None = None) -> dict:
    """The paired difference of the win rates in percentage points, and its test.

    Args:
        pairs: preferences from 1 to 2 of tuned and base, shape (n, 2).
        groups: the prompt of each row, which is resampled, and enters the test, as one unit.
    """
    difference, changes = share(pairs - 1, seed, 100, groups), pairs[:, 0] - pairs[:, 1]
    return {
        "difference_win_rate": with_power(difference, changes, "instructions", groups=groups, scale=100),
        # Preferences of a probability judge are continuous, so a sign test would ignore their size.
        "p_difference_win_rate": metric(mean_test(changes, groups, seed), n=len(pairs)),
    }


def instructions_without_overlap(
    sides: dict, results: dict, training, eval_out: str, seed: int, resamples: int
) -> dict:
    """Rates with and without the instructions that overlap with training data (--contamination).

    Args:
        sides, resamples: as for `summarise`. results: from `summarise`.
        training: preflab.evaluation.contamination.TrainingText.
    """
    sides = _same_order(sides)

    def chosen(results: dict) -> dict:
        names = ("win_rate", results["lc_name"])
        keys = [f"{prefix}_{name}" for name in names for prefix in ("base", "tuned", "difference")]
        known = {key: results["metrics"][key] for key in keys if key in results["metrics"]}
        return {**known, "p": results["metrics"]["p_difference_win_rate"]}

    def figures(places: list[int]) -> dict:
        if all(None in (_preference(sides, side, k) for side in sides) for k in places):
            return {}
        clean = {side: [rows[k] for k in places] for side, rows in sides.items()}
        return chosen(summarise(clean, {}, eval_out, seed, resamples))

    overlap = training.overlap([row["instruction"] for row in sides["base"]])
    return without_overlap(training, overlap, chosen(results), figures)


def _same_order(sides: dict) -> dict:
    """Both sides in the order of base's instructions. Raises UserError where the instructions differ."""
    texts = {name: [row["instruction"] for row in rows] for name, rows in sides.items()}
    if sorted(texts["base"]) != sorted(texts["tuned"]):
        different = len(set(texts["base"]) ^ set(texts["tuned"]))
        raise UserError(
            f"base and tuned were judged on different instructions ({different} differ): run --stage judge again"
        )
    # Instructions are unique (`read_annotations`), so the text determines the order.
    order = {text: i for i, text in enumerate(texts["base"])}
    return {name: sorted(rows, key=lambda row: order[row["instruction"]]) for name, rows in sides.items()}


def _preference(sides: dict, side: str, row: int) -> float | None:
    return sides[side][row]["preference"]


def _length_controlled(rows: list[dict], judged: dict, eval_out: str, seed: int, resamples: int) -> tuple:
    """(rates, the package's standard errors, the artifact's length_control section, name of the rate).

    The rates are those of `LengthControl.bootstrap`. Without rates the section has the reason.

    Args:
        rows: all rows of one model, which decide on the variant.
        judged: `{model: rows that have a verdict on every model}`.
    """
    control, reason = package.length_control(rows, Path(eval_out) / ".cache" / "minimal.csv")
    name, count = lc_name(reason), len(next(iter(judged.values())))
    section = {"variant": control.variant, "why_not_whole": reason, "resamples": resamples, "rows": count}
    # For all models or for none: a rate of one alone has no difference to report.
    problem = next(filter(None, map(package.why_no_fit, judged.values())), None)
    fits = {} if problem else {model: control.fit(each) for model, each in judged.items()}
    if any(np.isnan(rate) for rate, _ in fits.values()):
        problem = package.NOT_FITTED
    if problem:
        return {}, {}, {**section, "why_none": problem}, name
    # The package's own error, that of the predictions over rows; the bootstrap's includes the fit.
    errors = {model: metric(error, n=count) for model, (_, error) in fits.items()}
    return control.bootstrap(judged, seed, resamples), errors, section, name


def summarise_file(annotations: list[dict], eval_out: str, seed: int, resamples: int) -> dict:
    """All metrics of one annotations file, as `summarise` but for one model, without prefixes and differences.

    Raises:
        UserError: the rows are of several models or judges, or no row has a verdict.
    """
    # Rates over several models or judges have no meaning.
    for key in ("generator_2", "annotator"):
        values = sorted({str(row[key]) for row in annotations})
        if len(values) > 1:
            raise UserError(f"several values of {key} ({', '.join(values[:3])}); split the file")
    parsed = [row for row in annotations if row["preference"] is not None]
    if not parsed:
        raise UserError("no row has a verdict")
    metrics = package.rates(annotations, seed)
    rates, errors, section, name = _length_controlled(annotations, {"model": parsed}, eval_out, seed, resamples)
    if rates:
        metrics[name], metrics["lc_standard_error"] = rates["model"], errors["model"]
        if metrics[name]["ci95"] is None:
            section["why_no_interval"] = NO_INTERVAL
    first = annotations[0]
    return {
        "metrics": metrics,
        "length_control": section,
        "lc_name": name,
        "model": str(first["generator_2"]),
        "judge": str(first["annotator"]),
        "rows": len(annotations),
    }


def file_without_overlap(
    annotations: list[dict], results: dict, training, eval_out: str, seed: int, resamples: int
) -> dict:
    """`instructions_without_overlap` of one annotations file: the rates of its model."""

    def chosen(results: dict) -> dict:
        names = {"win_rate": "win_rate", "length_controlled": results["lc_name"]}
        return {key: results["metrics"][name] for key, name in names.items() if name in results["metrics"]}

    def figures(places: list[int]) -> dict:
        rows = [annotations[k] for k in places]
        if all(row["preference"] is None for row in rows):
            return {}
        return chosen(summarise_file(rows, eval_out, seed, resamples))

    overlap = training.overlap([row["instruction"] for row in annotations])
    return without_overlap(training, overlap, chosen(results), figures)


def lc_name(reason: str | None) -> str:
    """The name of the length-controlled rate: the minimal variant is reported under its own name."""
    return "length_controlled_winrate" if reason is None else "length_controlled_minimal_winrate"
