"""Metrics of eval_win_rate.py in reward mode: win rates, calibration, and slices by length and score gap."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from preflab.evaluation.rewards import prompts_of, reward_metrics
from utils.artifacts import metric
from utils.stats import bootstrap, mcnemar, pairwise_correct, rank_correlation, share, sign_test

# This artifact's names of the metrics that training reports under the trainer's names.
WIN_RATE_NAMES = {
    "reward_accuracy_strict": "win_rate",
    "reward_accuracy": "win_rate_ties_half",
    "reward_margin": "avg_margin",
    "reward_chosen": "avg_reward_chosen",
    "reward_rejected": "avg_reward_rejected",
    "p_reward_accuracy_is_half": "p_win_rate_is_half",
    "reward_accuracy_minus_base_ranking": "win_rate_minus_base_ranking",
    "p_reward_accuracy_is_base_ranking": "p_win_rate_is_base_ranking",
    "p_reward_margin_is_0": "p_avg_margin_is_0",
}
# Pairs whose lengths differ by at most this share of the longer answer count as length-matched.
LENGTH_MATCHED = 0.1


def win_rate_metrics(rows: list[dict], beta: float, skipped: dict, seed: int) -> dict:
    """All summary metrics of the rows: those of `rewards.reward_metrics` under the artifact's names, and more.

    Length-normalised rewards are beta × the mean log-ratio over an answer's tokens instead of the sum.

    Args:
        skipped: {reason: rows that were left out}.
    """
    metrics = {WIN_RATE_NAMES.get(k, k): m for k, m in reward_metrics(rows, seed=seed).items()}
    # Shape (n, 2): chosen, rejected.
    # A sum of log-ratios grows with the answer's length; their mean over tokens does not.
    normalised = np.array(
        [
            [beta * (row[side] - row[f"ref_{side}"]) / row[f"tokens_{side}"] for side in ("chosen", "rejected")]
            for row in rows
        ]
    )
    correct, prompts = pairwise_correct(*normalised.T), prompts_of(rows)
    return metrics | {
        "win_rate_length_normalised": share(normalised[:, 0] > normalised[:, 1], seed, groups=prompts),
        "win_rate_length_normalised_ties_half": share(correct, seed, groups=prompts),
        "avg_margin_length_normalised": bootstrap(normalised, seed, groups=prompts),
        "p_win_rate_length_normalised_is_half": metric(sign_test(correct, prompts), n=len(rows)),
        "evaluated_examples": metric(len(rows), n=len(rows)),
        "skipped_examples": metric(sum(skipped.values())),
        **length_correlations(rows, seed),
        **calibration_metrics(margins(rows), seed, prompts),
    }


def margins(rows: list[dict]) -> np.ndarray:
    """Reward margins, shape (n,), in beta × nats."""
    return np.array([row["margin"] for row in rows])


# ------------------------------------------------------------------------------------------------------ calibration


def calibration_metrics(margin: np.ndarray, seed: int, groups=None) -> dict:
    """Calibration of sigmoid(margin), the probability that chosen is preferred under Bradley-Terry, DPO's model.

    log_loss is mean -log sigmoid(margin), the DPO loss on the data (log 2 = 0.693 at margin 0). brier is the mean of
    (1 - sigmoid(margin))^2. ece is `calibration_error`, ece_if_calibrated what sampling alone gives to it.

    Args:
        margin: shape (n,), in beta × nats.
        groups: the prompt of each pair, whose pairs are resampled together.
    """
    return {
        "calibration_log_loss": bootstrap(-log_expit(margin), seed, groups=groups),
        "calibration_brier": bootstrap((1 - expit(margin)) ** 2, seed, groups=groups),
        "calibration_ece": calibration_error(margin),
        "calibration_ece_if_calibrated": calibration_error_if_calibrated(margin, seed),
        "calibration_scale": metric(best_scale(margin), n=len(margin)),
    }


def calibration_error(margin: np.ndarray) -> dict:
    """Expected calibration error (Guo et al. 2017) over bins of equal count; NaN without margins.

    The mean of |accuracy - confidence| over the bins of `bins_of`, weighted by count.
    """
    confidence, correct = expit(np.abs(margin)), pairwise_correct(margin, np.zeros(len(margin)))
    return metric(_ece(confidence, correct[None])[0] if len(margin) else float("nan"), n=len(margin))


def calibration_error_if_calibrated(margin: np.ndarray, seed: int) -> dict:
    """The calibration error of these confidences if they were exactly right: its mean, deviation and 95% range.

    Outcomes are drawn with probability sigmoid(|margin|). Few pairs per bin alone give an error above 0.
    """
    if not len(margin):
        return metric(float("nan"), n=0)
    confidence = expit(np.abs(margin))
    # Fewer draws of many pairs, which bounds the memory: their error varies less.
    draws = int(np.clip(2_000_000 // len(margin), 200, 2000))
    outcomes = np.random.default_rng(seed).random((draws, len(margin))) < confidence
    errors = _ece(confidence, outcomes)
    low, high = np.quantile(errors, (0.025, 0.975))
    return metric(float(errors.mean()), float(errors.std(ddof=1)), (float(low), float(high)), len(margin))


def _ece(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Calibration errors, shape (draws,), of confidences (n,) for outcomes of shape (draws, n)."""
    distances = [len(part) * abs(correct[:, part].mean(1) - confidence[part].mean()) for part in bins_of(confidence)]
    return np.sum(distances, 0) / len(confidence)


def bins_of(confidence: np.ndarray, most: int = 10, least: int = 10) -> list[np.ndarray]:
    """Up to `most` bins of equal count over the confidence, each of at least `least` rows: their indices."""
    count = int(np.clip(len(confidence) // least, 1, most))
    # Sorted by confidence and cut into equal counts; a stable sort keeps ties in row order.
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), count) if len(part)]


def best_scale(margin: np.ndarray) -> float:
    """The factor on the margins that minimises the log loss; below 1 the margins are overconfident."""
    # Every pair's outcome is "chosen won", so the scale is bounded: it diverges if every margin is positive.
    # The scale is the inverse of the temperature in temperature scaling (Guo et al. 2017).
    fit = minimize_scalar(lambda scale: -log_expit(scale * margin).mean(), bounds=(0, 1e3), method="bounded")
    return float(fit.x)


def calibration_bins(margin: np.ndarray, seed: int, groups=None) -> list[dict]:
    """Confidence sigmoid(|margin|) and accuracy in the bins of `bins_of`; `groups`: the prompt of each pair."""
    # The probability of the answer that the reward prefers, from 0.5 to 1, and whether that answer is the chosen one.
    confidence, correct = expit(np.abs(margin)), pairwise_correct(margin, np.zeros(len(margin)))
    return [
        {
            "confidence": float(confidence[part].mean()),
            "accuracy": share(correct[part], seed, groups=None if groups is None else [groups[i] for i in part]),
            "n": len(part),
        }
        for part in bins_of(confidence)
    ]


# ----------------------------------------------------------------------------------------------------------- slices


def length_correlations(rows: list[dict], seed: int) -> dict:
    """Spearman's correlation of margins with length differences, and of rewards with lengths (in tokens).

    The rewards' correlation pools both answers of every pair; pairs are resampled, so both stay together.
    """
    # Shape (n, 4).
    sides = np.array(
        [[r["reward_chosen"], r["tokens_chosen"], r["reward_rejected"], r["tokens_rejected"]] for r in rows]
    )

    def pooled(x):
        # Shape (2n, 2): (reward, length) of all chosen, then of all rejected answers.
        return rank_correlation(np.concatenate([x[:, :2], x[:, 2:]]))

    prompts = prompts_of(rows)
    difference = np.stack([sides[:, 0] - sides[:, 2], sides[:, 1] - sides[:, 3]], 1)
    return {
        "margin_length_correlation": bootstrap(difference, seed, statistic=rank_correlation, groups=prompts),
        "reward_length_correlation": bootstrap(sides, seed, statistic=pooled, groups=prompts),
    }


def slices(rows: list[dict], seed: int) -> dict:
    """Win rates by length, on length-matched pairs, by the longer side, and by score gap if the data have scores.

    Returns:
        `{slicing: {slice: {n, win_rate, win_rate_ties_half, avg_margin, base_ranking, ...}}}`. Lengths are in tokens.
    """
    chosen, rejected = (np.array([row[f"tokens_{side}"] for row in rows]) for side in ("chosen", "rejected"))
    longer, mean_length = np.maximum(chosen, rejected), (chosen + rejected) / 2
    # Where lengths match, a preference for length cannot explain the win rate.
    matched = np.abs(chosen - rejected) <= LENGTH_MATCHED * longer
    masks = {
        "by_length": _quantiles(mean_length, "tokens"),
        "by_length_match": {
            f"lengths within {LENGTH_MATCHED:.0%}": matched,
            f"lengths beyond {LENGTH_MATCHED:.0%}": ~matched,
        },
        "by_longer_side": {
            "chosen longer, tokens": chosen > rejected,
            "rejected longer, tokens": chosen < rejected,
            "equal, tokens": chosen == rejected,
        },
    }
    scores = [(r["score_chosen"], r["score_rejected"]) for r in rows]
    scored = np.array([None not in pair for pair in scores])
    if scored.any():
        # NaN for unscored pairs; `scored` excludes them from the quantiles.
        gap = np.array([np.nan if None in pair else pair[0] - pair[1] for pair in scores])
        masks["by_score_gap"] = _quantiles(gap, "score gap", scored, parts=3)
        if not scored.all():
            masks["by_score_gap"]["without scores"] = ~scored
    return {
        name: {label: _slice(rows, mask, seed) for label, mask in groups.items() if mask.any()}
        for name, groups in masks.items()
    }


def _quantiles(values, unit: str, among=None, parts: int = 4) -> dict:
    """`{label: mask}` of up to `parts` quantile groups of `values` where `among` is true."""
    among = np.ones(len(values), bool) if among is None else among
    # Many equal values give equal quantiles: the groups are then fewer.
    edges = np.unique(np.quantile(values[among], np.linspace(0, 1, parts + 1)))
    if len(edges) == 1:
        return {f"{unit} {edges[0]:.4g}": among}
    groups = {}
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        # Groups are half open, so that no row is in two; the last one includes the maximum.
        last = i == len(edges) - 2
        inside = among & (values >= low) & ((values <= high) if last else (values < high))
        groups[f"{unit} {low:.4g} to {'' if last else 'below '}{high:.4g}"] = inside
    return groups


def _slice(rows: list[dict], mask, seed: int) -> dict:
    part = [row for row, inside in zip(rows, mask, strict=True) if inside]
    margin, prompts = margins(part), prompts_of(part)
    correct = pairwise_correct(margin, np.zeros(len(part)))
    base = pairwise_correct([r["ref_chosen"] for r in part], [r["ref_rejected"] for r in part])
    return {
        "n": len(part),
        "win_rate": share(margin > 0, seed, groups=prompts),
        "win_rate_ties_half": share(correct, seed, groups=prompts),
        "avg_margin": bootstrap(margin, seed, groups=prompts),
        "base_ranking": share(base, seed, groups=prompts),
        # Paired: both figures are on the same pairs, so their common difficulty cancels.
        "win_rate_minus_base_ranking": share(np.stack([correct, base], 1), seed, groups=prompts),
        "p_win_rate_is_base_ranking": mcnemar(correct, base, prompts),
    }
