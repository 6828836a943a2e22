"""Rows and metrics of a scorer on labelled pairs."""

import numpy as np
from scipy.special import logit

from preflab.evaluation.reward_accuracy import accuracy_metrics, longer_scores, selected_share
from preflab.evaluation.rewards import prompts_of
from preflab.pairs.scorers import Scores
from preflab.rewards.labelled import Labelled
from utils.artifacts import metric
from utils.stats import bootstrap, pairwise_correct, rank_correlation, share


def score_rows(items: list[Labelled], results: list[Scores | str]) -> list[dict]:
    """One row per scored prompt; those without scores are left out, with the reason in `failures`."""
    rows, first = [], {}
    for i, (item, result) in enumerate(zip(items, results, strict=True)):
        if isinstance(result, str):
            continue
        row = {
            "row": i,
            "where": item.source,
            "prompt": first.setdefault(item.prompt_key, i),
            "category": item.category,
            "uid": item.uid,
            "correct": item.correct,
            "scores": [float(score) for score in result.scores],
        }
        if len(item.answers) == 2:
            chars = [len(answer) for answer in item.answers]
            row |= {"margin": margin_of(result), "chars_chosen": chars[0], "chars_rejected": chars[1]}
        rows.append(row)
    return rows


def margin_of(result: Scores) -> float:
    """The log-odds that the first of two answers beats the second.

    Judges and columns of win probabilities have no other scores: their mean over both answers, of which the answer
    itself counts 1/2, gives P(first beats second) = 2 × wins - 1/2.
    """
    if result.scores != result.wins:
        return float(result.scores[0] - result.scores[1])
    return float(logit(np.clip(2 * result.wins[0] - 0.5, 1e-9, 1 - 1e-9)))


def pair_metrics(rows: list[dict], other: dict[int, dict] | None, seed: int) -> dict:
    """Accuracy, slices by length, calibration, and the comparison with `longer` and a second scorer.

    Args:
        rows: of pairs, from `score_rows`.
        other: rows of the second scorer by their number; pairs that it did not score are left out of its metrics.
    """
    metrics = accuracy_metrics(rows, {"longer": longer_scores(rows)}, seed)
    if other is None:
        return metrics
    both = [row for row in rows if row["row"] in other]
    if not both:
        return metrics
    margins = np.array([[row["margin"], other[row["row"]]["margin"]] for row in both])
    compared = accuracy_metrics(both, {"other": margins[:, 1]}, seed)
    names = ("other_accuracy", "reward_accuracy_minus_other", "p_reward_accuracy_is_other")
    groups = prompts_of(both)
    # 1 where both prefer the same answer, 0 where they disagree, 1/2 where one of them has a tie.
    same = 0.5 * (1 + np.sign(margins[:, 0]) * np.sign(margins[:, 1]))
    return metrics | {
        **{name: compared[name] for name in names},
        "agreement_with_other": share(same, seed, groups=groups),
        "margin_correlation_with_other": bootstrap(margins, seed, statistic=rank_correlation, groups=groups),
    }


def category_metrics(rows: list[dict], seed: int) -> dict:
    """Accuracy per category, ties half; rows without a category are in none."""
    margin, groups = np.array([row["margin"] for row in rows]), prompts_of(rows)
    correct = pairwise_correct(margin, np.zeros(len(rows)))
    categories = sorted({row["category"] for row in rows if row["category"] is not None})
    return {
        name: selected_share(correct, np.array([row["category"] == name for row in rows]), groups, seed)
        for name in categories
    }


def scored_share(items: int, rows: int) -> dict:
    """The share of rows that have scores."""
    return metric(rows / items, n=items)
