"""Held-out metrics of KTO: do the implicit rewards separate answers with a thumb up from those with a thumb down?"""

import numpy as np
from scipy.stats import mannwhitneyu, rankdata

from preflab.evaluation.rewards import number_prompts, prompts_of
from utils.artifacts import metric
from utils.stats import bootstrap, mean_test


def evaluate_thumbs(trainer, splits, config) -> tuple[list[dict], dict]:
    """Score the test answers. Returns (rows, metrics), the rows in the order of the answers; both empty without any."""
    if not splits.test:
        return [], {}
    rows = trainer.score(splits.test_ids)
    number_prompts(rows, splits.test.pairs)
    for row, thumb in zip(rows, splits.test.pairs, strict=True):
        row |= {"reward": config.beta * (row["tuned"] - row["base"]), "label": thumb.label, "where": thumb.source}
    return rows, thumb_metrics(rows, config.seed)


def auc(values, labels) -> float:
    """Share of (up, down) couples in which the answer with a thumb up has the higher value, ties half.

    One half where all answers have the same label, as in resamples of few answers.
    """
    labels = np.asarray(labels, bool)
    up, down = int(labels.sum()), int((~labels).sum())
    if not up or not down:
        return 0.5
    # The Mann-Whitney statistic; ranks of equal values are their mean, which counts ties half.
    return float((rankdata(values)[labels].sum() - up * (up + 1) / 2) / (up * down))


def thumb_metrics(rows: list[dict], seed: int = 42) -> dict:
    """Held-out metrics, each with standard error and 95% bootstrap interval over prompts.

    Args:
        rows: answers with `reward` (beta × nats), `label`, `tuned` and `base` log-probabilities (nats).

    Returns:
        `{name: metric}`: reward_auc and likelihood_auc_* (`auc`), and per label the rewards and log-probabilities.
        Those of a label without answers are left out. `p_*` are two-sided; that of the AUC is the Mann-Whitney test
        over answers.
    """
    groups, labels = prompts_of(rows), np.array([row["label"] for row in rows], bool)
    rewards, tuned, base = (np.array([row[key] for row in rows], float) for key in ("reward", "tuned", "base"))
    metrics = {}
    if labels.any() and not labels.all():

        def area(values):
            def statistic(sample):
                return auc(sample[:, 0], sample[:, 1])

            return bootstrap(np.stack([values, labels], 1), seed, statistic=statistic, bca=False, groups=groups)

        def change(sample):
            return auc(sample[:, 0], sample[:, 2]) - auc(sample[:, 1], sample[:, 2])

        both = np.stack([tuned, base, labels], 1)
        p = mannwhitneyu(rewards[labels], rewards[~labels]).pvalue
        metrics |= {
            "reward_auc": area(rewards),
            "likelihood_auc_base": area(base),
            "likelihood_auc_tuned": area(tuned),
            "likelihood_auc_difference": bootstrap(both, seed, statistic=change, bca=False, groups=groups),
            "p_reward_auc_is_half": metric(float(p), n=len(rows)),
        }
    for name, part in (("up", labels), ("down", ~labels)):
        if not part.any():
            continue
        of_part = None if groups is None else [g for g, is_in in zip(groups, part, strict=True) if is_in]
        metrics |= {
            f"reward_{name}": bootstrap(rewards[part], seed, groups=of_part),
            f"logps_{name}_base": bootstrap(base[part], seed, groups=of_part),
            f"logps_{name}_tuned": bootstrap(tuned[part], seed, groups=of_part),
            f"logps_{name}_difference": bootstrap(np.stack([tuned[part], base[part]], 1), seed, groups=of_part),
            f"p_reward_{name}_is_0": metric(mean_test(rewards[part], of_part, seed), n=int(part.sum())),
        }
    return metrics
