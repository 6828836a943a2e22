"""Metrics of the pairs: the answers as sampled, chosen against rejected, and how far scorers agree."""

import numpy as np
from scipy.stats import kendalltau

from preflab.pairs.pairing import Pairs, Sampled
from preflab.pairs.scorers import Candidates, Scores
from utils.artifacts import metric
from utils.errors import UserError
from utils.stats import bootstrap, share, sign_test


def pair_sections(pairs: Pairs, seed: int) -> dict:
    """Every computed section of preference_pairs.json: sampling, pairs, agreement, counts, shuffled."""
    rows = [*pairs.train, *pairs.test]
    return {
        "sampling": sampling_metrics(pairs.samples, seed),
        "pairs": pair_metrics(rows, list(pairs.scored.values()), seed),
        "agreement": agreement(rows, pairs.scored, pairs.other_scorers, seed) if pairs.other_scorers else {},
        "counts": pairs.counts,
        "shuffled": pairs.shuffled,
    }


def summary_metrics(sections: dict) -> dict:
    """The `metrics` of preference_pairs.json; agreement with another scorer as `<scorer>/<metric>`."""
    agreements = {f"{name}/{k}": m for name, metrics in sections["agreement"].items() for k, m in metrics.items()}
    return {**sections["sampling"], **sections["pairs"], **agreements}


def sampling_metrics(samples: list[Sampled], seed: int = 42) -> dict:
    """Of the answers as sampled: distinct answers per prompt, tokens, shares truncated and empty.

    Intervals resample prompts, since the answers to one prompt are not independent.
    """
    # Answers that the dataset holds (--answers given) have no token count and no finish reason.
    counted = [s for s in samples if s.answers and s.answers[0].get("tokens") is not None]
    # Stripped, as in `candidates_of`: two answers that differ only in outer spacing are one candidate.
    distinct = [len({a["text"].strip() for a in s.answers}) for s in samples]
    empty = [np.mean([not a["text"].strip() for a in s.answers]) for s in samples]
    metrics = {
        "samples": metric(sum(len(s.answers) for s in samples), n=len(samples)),
        "distinct_answers": bootstrap(distinct, seed),
        "empty_share": share(empty, seed),
    }
    if counted:
        metrics["tokens"] = bootstrap([np.mean([a["tokens"] for a in s.answers]) for s in counted], seed)
        truncated = [np.mean([a["finish_reason"] == "length" for a in s.answers]) for s in counted]
        metrics["truncated_share"] = share(truncated, seed)
    return metrics


def pair_metrics(rows: list[dict], scored: list[tuple[Candidates, Scores]], seed: int = 42) -> dict:
    """Of the pairs: scores of all samples, of chosen and rejected, win probabilities, and which side is longer.

    Pairs of a prompt (--pairs all) are resampled and tested as one unit.

    Args:
        rows: from `pairs_of`.
        scored: the candidates and scores of every scored prompt.
    """
    # 1: chosen is longer, 0: rejected is longer, 0.5: equal; lengths in characters.
    longer = [0.5 + 0.5 * np.sign(_length(r, "chosen") - _length(r, "rejected")) for r in rows]
    # Weighted by count: the mean over samples, not over distinct answers.
    sample_scores = [np.average(scores.scores, weights=candidates.counts) for candidates, scores in scored]
    prompts = [r["prompt_id"] for r in rows]
    return {
        "score_mean": bootstrap(sample_scores, seed),
        "score_chosen": bootstrap([r["score_chosen"] for r in rows], seed, groups=prompts),
        "score_rejected": bootstrap([r["score_rejected"] for r in rows], seed, groups=prompts),
        "win_chosen": share([r["win_chosen"] for r in rows], seed, groups=prompts),
        "win_rejected": share([r["win_rejected"] for r in rows], seed, groups=prompts),
        "chosen_longer": share(longer, seed, groups=prompts),
        "p_chosen_longer_is_half": metric(sign_test(longer, prompts), n=len(rows)),
    }


def _length(row: dict, side: str) -> int:
    return len(row[side][0]["content"])


def agreement(
    rows: list[dict], scored: dict[str, tuple[Candidates, Scores]], others: dict[str, dict], seed: int = 42
) -> dict:
    """How far other scorers agree with the main one on the same answers: `{scorer: metrics}`.

    Args:
        rows: from `pairs_of`.
        scored: the main scorer's candidates and scores by prompt_id.
        others: `{scorer: {prompt_id: Scores}}`; prompts without a score are left out of that scorer's metrics.

    Returns:
        same_order: share of pairs whose chosen answer the other scorer ranks above the rejected one (ties half).
        same_best: share of prompts with the same best answer.
        rank_correlation: Kendall's tau-b over a prompt's answers, averaged over prompts.

    Raises:
        UserError: another scorer scored none of the pairs.
    """
    metrics = {}
    for name, other_scores in others.items():
        order, best, tau = [], [], []
        # A scorer may have failed on a prompt, e.g. a judge without a verdict.
        compared = [row for row in rows if row["prompt_id"] in other_scores]
        prompts = [row["prompt_id"] for row in compared]
        for row in compared:
            other = other_scores[row["prompt_id"]].scores
            # The pair's texts identify its answers among the distinct candidates, whose order both scorers share.
            answers = scored[row["prompt_id"]][0].answers
            chosen, rejected = (answers.index(row[side][0]["content"]) for side in ("chosen", "rejected"))
            # 1: same order, 0: reversed, 0.5: a tie of the other scorer.
            order.append(0.5 + 0.5 * np.sign(other[chosen] - other[rejected]))
        # Once per prompt, also where it has several pairs.
        for prompt in dict.fromkeys(prompts):
            main, other = scored[prompt][1].scores, other_scores[prompt].scores
            # argmax takes the first of several best answers, for both scorers.
            best.append(float(np.argmax(other) == np.argmax(main)))
            correlation = kendalltau(main, other).statistic
            # Undefined where one of the two scorers gives all answers the same score.
            if np.isfinite(correlation):
                tau.append(correlation)
        if not order:
            raise UserError(f"--also_score {name}: returned no score for any pair")
        metrics[name] = {
            "same_order": share(order, seed, groups=prompts),
            "p_same_order_is_half": metric(sign_test(order, prompts), n=len(order)),
            "same_best": share(best, seed),
            "rank_correlation": bootstrap(tau, seed) if tau else metric(float("nan"), n=0),
        }
    return metrics
