"""The judges of a panel in AlpacaEval: each one's rates, the panel's without it, their agreement and cost."""

import numpy as np

from preflab.alpacaeval.metrics import win_rate_difference
from preflab.alpacaeval.package import prompt_groups
from preflab.judging.panel import krippendorff_alpha
from utils.stats import share

SIDES = ("base", "tuned")


def panel_section(annotations: dict[str, list[dict]], origins: dict[str, dict], about: dict, seed: int) -> dict:
    """The artifact's section of a panel.

    Args:
        annotations: of every judge, by `<side>_judge<number>`, all on the same instructions.
        origins: their .about.json, by the same names.
        about: `{judges, voting}`, names.

    Returns:
        members: per judge `base` and `tuned` (win rates in percent), `difference` and `p`, `without` (difference and p
        of the panel without it, where it has a vote and is not alone), `votes` and `cost`; agreement: `alpha`,
        Krippendorff's, of the judges' preferences.
    """
    rows = [_preferences(annotations, number) for number in range(1, len(about["judges"]) + 1)]
    instructions = [row["instruction"] for row in annotations["base_judge1"]]
    groups = prompt_groups(annotations["base_judge1"])
    voting = [k for k, name in enumerate(about["judges"]) if name in about["voting"]]
    members = {}
    for k, name in enumerate(about["judges"]):
        others = [other for other in voting if other != k]
        costs = [origins[f"{side}_judge{k + 1}"].get("work", {}) for side in SIDES]
        members[name] = {
            **{side: _rate(rows[k][:, column], seed, groups) for column, side in enumerate(SIDES)},
            **_difference(rows[k], seed, groups),
            "votes": k in voting,
            "cost": {key: round(sum(cost.get(key, 0) for cost in costs), 3) for key in ("seconds", "computed", "of")},
            **({"without": _difference(_mean([rows[o] for o in others]), seed, groups)}
               if k in voting and others else {}),
        }  # fmt: skip
    # A unit per instruction and side, a column per judge.
    ratings = np.stack([row.ravel() for row in rows], 1)
    units = [text for text in instructions for _ in SIDES]
    return {"members": members, "agreement": {"alpha": krippendorff_alpha(ratings, "ordinal", seed, units, 500)}}


def _preferences(annotations: dict[str, list[dict]], number: int) -> np.ndarray:
    """A judge's verdicts on both sides as a win, tie or loss (2, 1.5, 1), shape (instructions, 2); NaN without one."""
    columns = []
    for side in SIDES:
        by_instruction = {row["instruction"]: row["preference"] for row in annotations[f"{side}_judge{number}"]}
        values = [by_instruction[row["instruction"]] for row in annotations["base_judge1"]]
        # Judges' own probabilities have no common scale.
        columns.append([np.nan if p is None else 1.5 + 0.5 * np.sign(p - 1.5) for p in values])
    return np.array(columns, float).T


def _mean(rows: list[np.ndarray]) -> np.ndarray:
    """The mean of several judges' preferences, of those that have a verdict; NaN where none has."""
    stacked = np.stack(rows)
    counts = (~np.isnan(stacked)).sum(0)
    return np.where(counts > 0, np.nansum(stacked, 0) / np.maximum(counts, 1), np.nan)


def _rate(values: np.ndarray, seed: int, groups: list[str]) -> dict:
    judged = ~np.isnan(values)
    return share(values[judged] - 1, seed, 100, [g for g, known in zip(groups, judged, strict=True) if known])


def _difference(rows: np.ndarray, seed: int, groups: list[str]) -> dict:
    """The paired difference tuned - base in percentage points and its test."""
    both = ~np.isnan(rows).any(1)
    figures = win_rate_difference(rows[both][:, ::-1], seed, [g for g, k in zip(groups, both, strict=True) if k])
    return {"difference": figures["difference_win_rate"], "p": figures["p_difference_win_rate"]}
