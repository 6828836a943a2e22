"""Held-out metrics over all answers of ranked lists, beside those of each list's best and worst answer."""

import numpy as np
from scipy.stats import kendalltau

from preflab.evaluation.rewards import prompts_of
from utils.artifacts import metric
from utils.power import with_power
from utils.stats import bootstrap, mean_test, pairwise_correct

# The figures of a list: its pairs in order by reward, by likelihood of base and tuned, and the rank correlation.
FIGURES = ("accuracy", "ranking_base", "ranking_tuned", "tau")


def add_list_scores(rows: list[dict], scores: list[list[float]], beta: float) -> None:
    """Add to scored lists the rewards (beta × nats) and the scores of all answers, from the best to the worst.

    Args:
        rows: from `RankedListTrainer.score`.
    """
    for row, list_scores in zip(rows, scores, strict=True):
        row["rewards"] = [beta * (a - b) for a, b in zip(row["answers"], row["ref_answers"], strict=True)]
        row["scores"] = list(list_scores)


def figures_of(row: dict) -> tuple[float, ...]:
    """FIGURES of one list of `add_list_scores`."""
    scores = np.array(row["scores"])
    better, worse = np.nonzero(scores[:, None] > scores)

    def in_order(values) -> float:
        values = np.array(values)
        return float(pairwise_correct(values[better], values[worse]).mean())

    tau = kendalltau(row["rewards"], scores).statistic
    # NaN where all rewards are equal: no order, and so no correlation.
    tau = 0.0 if np.isnan(tau) else float(tau)
    return in_order(row["rewards"]), in_order(row["ref_answers"]), in_order(row["answers"]), tau


def list_metrics(rows: list[dict], seed: int = 42) -> dict:
    """Metrics of lists (`add_list_scores`), each with standard error and 95% bootstrap interval over prompts.

    Returns:
        `{name: metric}`. list_accuracy is the share of a list's pairs of different score whose better answer has the
        higher reward, ties half, averaged over lists; list_ranking_* the same by log-probability; kendall_tau is
        Kendall's tau-b of rewards and scores. `p_*` as in `reward_metrics`.
    """
    figures = dict(zip(FIGURES, np.array([figures_of(row) for row in rows]).T, strict=True))
    groups = prompts_of(rows)

    def mean(values):
        return bootstrap(values, seed, groups=groups)

    def p(values):
        return metric(mean_test(values, groups, seed), n=len(rows))

    accuracy, base, tuned, tau = figures.values()
    return {
        "list_accuracy": with_power(mean(accuracy), accuracy, "lists", 0.5, groups),
        "kendall_tau": with_power(mean(tau), tau, "lists", 0.0, groups),
        "list_ranking_base": mean(base),
        "list_ranking_tuned": mean(tuned),
        "list_ranking_difference": mean(np.stack([tuned, base], 1)),
        "p_list_accuracy_is_half": p(accuracy - 0.5),
        "p_kendall_tau_is_0": p(tau),
        "p_list_ranking_difference": p(tuned - base),
    }
