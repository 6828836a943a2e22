"""How well the scores of a reward model, or of any scorer, rank labelled pairs, beside what needs no reward model."""

import numpy as np

from preflab.evaluation.reward_slices import LENGTH_MATCHED, calibration_metrics
from preflab.evaluation.rewards import prompts_of
from utils.artifacts import metric
from utils.power import with_power
from utils.stats import bootstrap, mcnemar, mean_test, pairwise_correct, share, sign_test


def accuracy_metrics(rows: list[dict], baselines: dict[str, np.ndarray], seed: int = 42) -> dict:
    """Accuracy, margin and calibration on labelled pairs, each with its 95% interval over prompts.

    Args:
        rows: with margin (log-odds that chosen is better), chars_chosen, chars_rejected and prompt (`number_prompts`).
        baselines: {name: scores of chosen over rejected, shape (pairs,)}, compared with the rewards pair by pair.

    Returns:
        `{name: metric}`. reward_accuracy counts a margin of 0 as half. For each baseline its `<name>_accuracy`, the
        paired difference `reward_accuracy_minus_<name>` and `p_reward_accuracy_is_<name>` (exact McNemar test).
    """
    margin, groups = np.array([row["margin"] for row in rows], float), prompts_of(rows)
    zero, n = np.zeros(len(rows)), len(rows)
    correct = pairwise_correct(margin, zero)

    def rate(values):
        return share(values, seed, groups=groups)

    metrics = {
        "reward_accuracy": with_power(rate(correct), correct, "pairs", 0.5, groups),
        "p_reward_accuracy_is_half": metric(sign_test(correct, groups), n=n),
        "reward_margin": bootstrap(margin, seed, groups=groups),
        "p_reward_margin_is_0": metric(mean_test(margin, groups, seed), n=n),
        "exact_ties": metric(int((margin == 0).sum()), n=n),
    }
    for name, scores in baselines.items():
        theirs = pairwise_correct(scores, zero)
        metrics[f"{name}_accuracy"] = rate(theirs)
        metrics[f"reward_accuracy_minus_{name}"] = with_power(
            rate(np.stack([correct, theirs], 1)), correct - theirs, "pairs", groups=groups
        )
        metrics[f"p_reward_accuracy_is_{name}"] = metric(mcnemar(correct, theirs, groups), n=n)
    return metrics | length_slices(rows, correct, seed) | calibration_metrics(margin, seed, groups)


def length_slices(rows: list[dict], correct: np.ndarray, seed: int) -> dict:
    """Accuracy on pairs of similar length, and on those whose better answer is shorter, where length misleads."""
    # Shape (pairs, 2): characters of chosen and rejected.
    chars = np.array([[row["chars_chosen"], row["chars_rejected"]] for row in rows], float)
    difference, groups = chars[:, 0] - chars[:, 1], prompts_of(rows)
    slices = {
        "reward_accuracy_length_matched": np.abs(difference) <= LENGTH_MATCHED * chars.max(1),
        "reward_accuracy_better_is_shorter": difference < 0,
        "reward_accuracy_better_is_longer": difference > 0,
    }
    return {name: selected_share(correct, selected, groups, seed) for name, selected in slices.items()}


def selected_share(correct: np.ndarray, selected: np.ndarray, groups: list | None, seed: int) -> dict:
    """The mean of `correct` over the selected rows, NaN without any."""
    if not selected.any():
        return metric(float("nan"), n=0)
    return share(correct[selected], seed, groups=None if groups is None else np.array(groups)[selected].tolist())


def longer_scores(rows: list[dict]) -> np.ndarray:
    """The control `longer`: characters of chosen minus those of rejected, shape (pairs,)."""
    return np.array([row["chars_chosen"] - row["chars_rejected"] for row in rows], float)
