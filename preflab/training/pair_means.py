"""Means over the pairs of an evaluation, for its row of train_log.jsonl."""

from preflab.evaluation.rewards import reward_rows
from preflab.evaluation.trainer_metrics import VALUE_OF_ROW
from preflab.training.log_keys import PAIR_MEAN, TIES_HALF
from utils.stats import pairwise_correct


def pair_means(scores: list[dict], beta: float) -> dict:
    """TRL's metrics of an evaluation as means over its pairs, and the reward accuracy with ties half.

    Args:
        scores: log-probabilities of each pair (`ResumableDPOTrainer.score`).

    Returns:
        `{"eval_<TRL's name>_pair_mean": mean}` and the accuracy under TIES_HALF.
    """
    rows = reward_rows(scores, beta)
    means = {f"{key}{PAIR_MEAN}": sum(map(value, rows)) / len(rows) for key, value in VALUE_OF_ROW.items()}
    means[TIES_HALF] = float(pairwise_correct([row["margin"] for row in rows], [0.0] * len(rows)).mean())
    return {f"eval_{key}": mean for key, mean in means.items()}
