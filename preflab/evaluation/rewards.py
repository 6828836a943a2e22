"""Implicit rewards on held-out pairs: r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, eq. 5)."""

import numpy as np

from utils.artifacts import metric
from utils.stats import bootstrap, mcnemar, pairwise_correct, sign_test, signed_rank


def reward_rows(scores: list[dict], beta: float) -> list[dict]:
    """Each scored pair (`ResumableDPOTrainer.score`) with its rewards and margin, in beta x nats."""
    rows = []
    for s in scores:
        chosen, rejected = beta * (s["chosen"] - s["ref_chosen"]), beta * (s["rejected"] - s["ref_rejected"])
        rows.append({**s, "reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected})
    return rows


def reward_metrics(rows: list[dict], surface=None, seed: int = 42) -> dict:
    """Held-out metrics, base beside tuned, each with standard error and 95% bootstrap interval over pairs.

    Args:
        rows: from `reward_rows`.
        surface: shape (len(rows),), scores of the words-and-length classifier; None leaves it out.

    Returns:
        `{name: metric}`. reward_accuracy counts a margin of 0 as half; reward_accuracy_strict counts it as wrong, as
        TRL does. likelihood_ranking_* is the share of pairs whose chosen answer is the likelier one. `p_*` are
        two-sided tests: exact sign test against 50%, exact McNemar for paired shares, Wilcoxon's signed ranks else.
    """
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    zero = np.zeros(len(rows))
    right = pairwise_correct(columns["margin"], zero)
    base = pairwise_correct(columns["ref_chosen"], columns["ref_rejected"])
    tuned = pairwise_correct(columns["chosen"], columns["rejected"])

    def mean(values):
        return bootstrap(values, seed)

    metrics = {
        "reward_accuracy": mean(right),
        "reward_accuracy_strict": mean(columns["margin"] > 0),
        "reward_margin": mean(columns["margin"]),
        "reward_chosen": mean(columns["reward_chosen"]),
        "reward_rejected": mean(columns["reward_rejected"]),
        "exact_ties": metric(int((columns["margin"] == 0).sum()), n=len(rows)),
        "likelihood_ranking_base": mean(base),
        "likelihood_ranking_tuned": mean(tuned),
        "likelihood_ranking_difference": mean(np.stack([tuned, base], 1)),
        "reward_accuracy_minus_base_ranking": mean(np.stack([right, base], 1)),
        "p_reward_accuracy_is_half": metric(sign_test(right), n=len(rows)),
        "p_likelihood_ranking_difference": metric(mcnemar(tuned, base), n=len(rows)),
        "p_reward_accuracy_is_base_ranking": metric(mcnemar(right, base), n=len(rows)),
        "p_reward_margin_is_0": metric(signed_rank(columns["margin"]), n=len(rows)),
    }
    for side in ("chosen", "rejected"):
        metrics[f"logps_{side}_base"] = mean(columns[f"ref_{side}"])
        metrics[f"logps_{side}_tuned"] = mean(columns[side])
        metrics[f"logps_{side}_difference"] = mean(np.stack([columns[side], columns[f"ref_{side}"]], 1))
        metrics[f"p_logps_{side}_difference"] = metric(signed_rank(columns[side] - columns[f"ref_{side}"]), n=len(rows))
    if surface is not None:
        surface_right = pairwise_correct(surface, zero)
        metrics["surface_classifier_accuracy"] = mean(surface_right)
        metrics["reward_accuracy_minus_surface"] = mean(np.stack([right, surface_right], 1))
        metrics["p_reward_accuracy_is_surface"] = metric(mcnemar(right, surface_right), n=len(rows))
    return metrics
