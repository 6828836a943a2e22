"""Rows and metrics of the held-out split after training."""

from functools import partial

import numpy as np

from preflab.evaluation.perplexity import add_power, section_metrics
from preflab.evaluation.reward_accuracy import accuracy_metrics, longer_scores
from preflab.evaluation.rewards import number_prompts, prompts_of, reward_metrics, reward_rows
from preflab.evaluation.surface_baseline import bag_of_words_scores
from preflab.training.list_metrics import add_list_scores, list_metrics
from preflab.training.resumable import BeforeFirstStep
from preflab.training.run import TrainingRun


def evaluate_pairs(trainer, splits, config) -> tuple[list[dict], dict]:
    """Score the test pairs: implicit rewards, the base's own ranking, and the bag-of-words baseline.

    Returns:
        (rows, metrics), the rows in the order of the pairs; both empty without a test split.
    """
    if not splits.test:
        return [], {}
    # The last step's evaluation may already be in the log.
    logged = [row["step"] for row in trainer.row_log.read() if row["split"] == "eval"]
    trainer.complete_reference()
    scores = trainer.score(trainer.eval_dataset, log=trainer.state.global_step not in logged)
    rows = reward_rows(scores, config.beta)
    number_prompts(rows, splits.test.pairs)
    of_lists = {}
    if config.uses_lists:
        add_list_scores(rows, splits.test_ids["scores"], config.beta)
        of_lists = list_metrics(rows, config.seed)
    for row, pair in zip(rows, splits.test.pairs, strict=True):
        row.update(where=pair.source, score_chosen=pair.score_chosen, score_rejected=pair.score_rejected)
    # The baseline is fitted on the texts of the train pairs and scores those of the test pairs.
    texts = [[(pair.chosen, pair.rejected) for pair in split.pairs] for split in (splits.train, splits.test)]
    return rows, reward_metrics(rows, bag_of_words_scores(*texts, seed=config.seed), config.seed) | of_lists


def evaluate_rewards(trainer, splits, base: list[dict] | None, seed: int) -> tuple[list[dict], dict]:
    """Score the test pairs with the reward model and compare with length, words and the base's likelihood.

    Args:
        base: from `rank_by_likelihood`.

    Returns:
        (rows, metrics), the rows in the order of the pairs; both empty without a test split.
    """
    if not splits.test:
        return [], {}
    rows = []
    for i, (scored, pair) in enumerate(zip(trainer.score(trainer.eval_dataset), splits.test.pairs, strict=True)):
        rewards = {f"reward_{side}": scored[side] for side in ("chosen", "rejected")}
        lengths = {"chars_chosen": len(pair.chosen), "chars_rejected": len(pair.rejected)}
        likelihood = {f"base_logp_{side}": base[i][side] for side in ("chosen", "rejected")} if base else {}
        margin = scored["chosen"] - scored["rejected"]
        rows.append({"row": i, "where": pair.source, **rewards, "margin": margin, **lengths, **likelihood})
    number_prompts(rows, splits.test.pairs)
    # The baseline is fitted on the texts of the train pairs and scores those of the test pairs.
    texts = [[(pair.chosen, pair.rejected) for pair in split.pairs] for split in (splits.train, splits.test)]
    baselines = {"surface": bag_of_words_scores(*texts, seed=seed), "longer": longer_scores(rows)}
    if base:
        baselines["base_ranking"] = np.array([row["base_logp_chosen"] - row["base_logp_rejected"] for row in rows])
    return rows, accuracy_metrics(rows, baselines, seed)


def score_base(training: TrainingRun, trainer, splits) -> None:
    """Score each test conversation before training, cached on disk, into `trainer.base_nll`.

    A sharded model exists only inside training: there it is scored at the first step.
    """
    if not splits.test:
        return
    start = training.start_adapter.describe() if training.start_adapter else None
    # A merged adapter is named here too, beside the merged weights that model_identity describes.
    identity = {**training.model_identity(trainer), "start": start}
    score = partial(trainer.score_base, splits.test_ids, training.config.eval_out, identity)
    if trainer.is_sharded:
        trainer.add_callback(BeforeFirstStep(trainer, score))
        return
    score()
    training.end_phase("base on held-out rows")


def evaluate_conversations(trainer, splits, seed: int) -> tuple[list[dict], dict]:
    """Score the test conversations with the tuned model and compare with the base.

    Returns:
        (rows, metrics), the rows in the order of the conversations; both empty without a test split.
    """
    if not splits.test:
        return [], {}
    rows = heldout_rows(splits.test, splits.test_ids, trainer.base_nll, trainer.score(splits.test_ids))
    return rows, heldout_metrics(rows, seed)


def heldout_rows(data, dataset, base: list[float] | None, tuned: list[float]) -> list[dict]:
    """One row per held-out conversation: negative log-likelihood (nats) under both models, scored tokens and bytes."""
    rows = []
    for i, (conversation, row) in enumerate(zip(data.conversations, dataset, strict=True)):
        # The first token has no prediction.
        tokens = sum(label != -100 for label in row["labels"][1:])
        rows.append(
            {
                "row": i,
                "where": conversation.source,
                "tokens": tokens,
                "bytes": row["bytes"],
                "nll_base": base[i] if base else None,
                "nll_tuned": tuned[i],
            }
        )
    number_prompts(rows, data.conversations)
    return rows


def heldout_metrics(rows: list[dict], seed: int = 42) -> dict:
    """Perplexity, nats per token and bits per byte under base and tuned, with intervals and a paired test.

    Only the tuned model's metrics where the base was not scored.
    """
    tuned_only = rows[0]["nll_base"] is None
    # section_metrics expects both models; without a base the tuned column stands in, and its metrics are removed below.
    keys = ("nll_tuned" if tuned_only else "nll_base", "nll_tuned", "tokens", "bytes")
    # Shape (conversations, 4).
    values = np.array([[row[key] for key in keys] for row in rows], float)
    metrics = section_metrics("heldout", values, seed, prompts_of(rows))
    if tuned_only:
        return {name: m for name, m in metrics.items() if name.endswith("_tuned")}
    add_power(metrics, {"heldout": (values, "conversations", prompts_of(rows))})
    return metrics
