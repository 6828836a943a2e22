"""Metrics of an AlpacaEval run: rates of base and tuned, their difference, and length control."""

from pathlib import Path

import numpy as np

from preflab.alpacaeval import package
from preflab.judging.judges import notes_of
from utils.artifacts import metric
from utils.errors import UserError
from utils.stats import share, signed_rank

NO_INTERVAL = "on some resamples the package's regression left all its coefficients at zero"
# The judge of AlpacaEval 2's leaderboard.
LEADERBOARD_JUDGE = "weighted_alpaca_eval_gpt4_turbo"


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
    metrics["difference_win_rate"] = share(pairs - 1, seed, 100)
    # Wilcoxon's signed-rank test on rows: preferences of a probability judge are continuous, so a sign test would
    # ignore their size.
    metrics["p_difference_win_rate"] = metric(signed_rank(pairs[:, 0] - pairs[:, 1]), n=len(pairs))
    judged = {side: [rows[k] for k in both] for side, rows in sides.items()}
    controlled, section, lc_name = _length_controlled(sides["base"], judged, eval_out, seed, resamples)
    judge = sides["base"][0]["annotator"]
    return {
        "metrics": metrics | controlled,
        "length_control": section,
        "lc_name": lc_name,
        "judge": judge,
        "judge_notes": notes_of([order for rows in sides.values() for row in rows for order in row.get("orders", [])]),
        "leaderboards_judge": judge == LEADERBOARD_JUDGE,
        # Without the last entry, "unknown": the package's default does not show where an instruction is from.
        "alpacaeval": any(row.get("dataset") in package.DATASETS[:-1] for row in sides["base"]),
    }


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


def _length_controlled(base: list[dict], judged: dict, eval_out: str, seed: int, resamples: int) -> tuple:
    """(metrics, the artifact's length_control section, name of the rate) of the length control that applies.

    Args:
        base: all rows of base, which decide on the variant.
        judged: `{side: rows that have a verdict on both sides}`.
    """
    control, reason = package.length_control(base, Path(eval_out) / ".cache" / "minimal.csv")
    name = lc_name(reason)
    rows = len(judged["base"])
    section = {"variant": control.variant, "why_not_whole": reason, "resamples": resamples, "rows": rows}
    # For both models or for neither: a rate of one alone has no difference to report.
    problems = [package.why_no_fit(rows) for rows in judged.values()]
    if not any(problems):
        problems = [package.NOT_FITTED if np.isnan(control.fit(rows)[0]) else None for rows in judged.values()]
    if any(problems):
        section["why_none"] = next(filter(None, problems))
        return {}, section, name
    metrics, rates = {}, control.bootstrap(judged, seed, resamples)
    for side in judged:
        metrics[f"{side}_{name}"] = rates[side]
        # The package's own error, that of the predictions over rows; the bootstrap's includes the fit.
        metrics[f"{side}_lc_standard_error"] = metric(control.fit(judged[side])[1], n=rows)
    metrics[f"difference_{name}"] = rates["tuned - base"]
    if metrics[f"difference_{name}"]["ci95"] is None:
        section["why_no_interval"] = NO_INTERVAL
    return metrics, section, name


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
    control, reason = package.length_control(annotations, Path(eval_out) / ".cache" / "minimal.csv")
    metrics, name = package.rates(annotations, seed), lc_name(reason)
    section = {"variant": control.variant, "why_not_whole": reason, "resamples": resamples, "rows": len(parsed)}
    problem = package.why_no_fit(parsed)
    value, error = (None, None) if problem else control.fit(parsed)
    if problem or np.isnan(value):
        section["why_none"] = problem or package.NOT_FITTED
    else:
        metrics[name] = control.bootstrap({"model": parsed}, seed, resamples)["model"]
        metrics["lc_standard_error"] = metric(error, n=len(parsed))
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


def lc_name(reason: str | None) -> str:
    """The name of the length-controlled rate: the minimal variant is reported under its own name."""
    return "length_controlled_winrate" if reason is None else "length_controlled_minimal_winrate"
