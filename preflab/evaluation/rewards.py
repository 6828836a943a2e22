"""Implicit rewards on held-out pairs: r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, eq. 5)."""

from dataclasses import dataclass

import numpy as np

from preflab.data.preferences import PreferenceData
from preflab.evaluation.held_out import held_out_pairs
from preflab.evaluation.logprob_scoring import Sequence, score_sequences
from preflab.evaluation.two_models import TwoModels
from utils.artifacts import metric
from utils.power import with_power
from utils.stats import bootstrap, mcnemar, mean_test, pairwise_correct, share, sign_test

# What the metrics of `reward_rows` are computed from.
COLUMNS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "reward_chosen", "reward_rejected", "margin")


@dataclass
class PairRewards:
    """Held-out pairs with their implicit rewards: rows for `win_rate_rows.jsonl`, speed, and truncation counts."""

    data: PreferenceData
    rows: list[dict]
    speed: dict
    truncation: dict


def implicit_rewards(models: TwoModels, beta: float) -> PairRewards:
    """Score the held-out pairs under base and tuned. Base is the reference model of the rewards."""
    data, ids, truncation = held_out_pairs(models.comparison, models.tokenizer)
    # Sequences 2i and 2i + 1 hold the chosen and the rejected answer of pair i; only the answers are scored.
    sequences = [
        Sequence(row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"]))
        for row in ids
        for side in ("chosen", "rejected")
    ]

    def sums(index, scores):
        return {"base": float(scores.base.sum()), "tuned": float(scores.tuned.sum())}

    logps, speed = score_sequences(models, sequences, sums, "win-rate")
    scores = [
        {
            "row": i,
            "chosen": chosen["tuned"],
            "rejected": rejected["tuned"],
            "ref_chosen": chosen["base"],
            "ref_rejected": rejected["base"],
        }
        # Even entries are chosen answers, odd ones rejected answers.
        for i, (chosen, rejected) in enumerate(zip(logps[::2], logps[1::2], strict=True))
    ]
    rows = reward_rows(scores, beta)
    number_prompts(rows, data.pairs)
    for row, pair, tokens in zip(rows, data.pairs, ids, strict=True):
        row |= {f"tokens_{part}": len(tokens[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
        row |= {"where": pair.source, "score_chosen": pair.score_chosen, "score_rejected": pair.score_rejected}
    return PairRewards(data, rows, speed, truncation)


def reward_rows(scores: list[dict], beta: float) -> list[dict]:
    """Add rewards and margin, in beta × nats, to scored pairs (`ResumableDPOTrainer.score`)."""
    rows = []
    for s in scores:
        # The partition term beta log Z(x) of eq. 5 depends on the prompt only and cancels in the margin.
        chosen, rejected = beta * (s["chosen"] - s["ref_chosen"]), beta * (s["rejected"] - s["ref_rejected"])
        rows.append({**s, "reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected})
    return rows


def number_prompts(rows: list[dict], pairs: list) -> None:
    """Give each row the key `prompt`: the number of the first row with the same prompt."""
    first: dict[str, int] = {}
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        row["prompt"] = first.setdefault(pair.prompt_key, i)


def prompts_of(rows: list[dict]) -> list[int] | None:
    """The group of each row for resampling, its prompt (`number_prompts`); None for rows without that key."""
    return [row["prompt"] for row in rows] if all("prompt" in row for row in rows) else None


def reward_metrics(rows: list[dict], surface=None, seed: int = 42) -> dict:
    """Held-out metrics of base and tuned, each with standard error and 95% bootstrap interval over prompts.

    A prompt with several pairs is resampled, and enters the tests, as one unit.

    Args:
        rows: from `reward_rows`.
        surface: shape (len(rows),), scores of the bag-of-words and length baseline; None omits it.

    Returns:
        `{name: metric}`. reward_accuracy counts a margin of 0 as half; reward_accuracy_strict counts it as wrong, as
        TRL does. likelihood_ranking_* is the share of pairs whose chosen answer has the higher log-probability. `p_*`
        are two-sided p-values: exact sign test against 50%, exact McNemar test of paired shares, else the
        permutation test of `utils.stats.mean_test`.
    """
    # Each of shape (pairs,).
    columns = {key: np.array([row[key] for row in rows]) for key in COLUMNS}
    zero = np.zeros(len(rows))
    # 1, 0.5 or 0 per pair: ranked correctly by reward, by the base's and by the tuned model's likelihood.
    correct = pairwise_correct(columns["margin"], zero)
    base = pairwise_correct(columns["ref_chosen"], columns["ref_rejected"])
    tuned = pairwise_correct(columns["chosen"], columns["rejected"])

    groups = prompts_of(rows)

    def mean(values):
        return bootstrap(values, seed, groups=groups)

    def rate(values):
        return share(values, seed, groups=groups)

    # np.stack([a, b], 1) has shape (pairs, 2): the figure is mean(a - b), with pairs resampled together.
    metrics = {
        "reward_accuracy": with_power(rate(correct), correct, "pairs", 0.5, groups),
        "reward_accuracy_strict": rate(columns["margin"] > 0),
        "reward_margin": mean(columns["margin"]),
        "reward_chosen": mean(columns["reward_chosen"]),
        "reward_rejected": mean(columns["reward_rejected"]),
        # At step 0 policy and reference are equal, so every pair is an exact tie.
        "exact_ties": metric(int((columns["margin"] == 0).sum()), n=len(rows)),
        "likelihood_ranking_base": rate(base),
        "likelihood_ranking_tuned": rate(tuned),
        "likelihood_ranking_difference": rate(np.stack([tuned, base], 1)),
        "reward_accuracy_minus_base_ranking": with_power(
            rate(np.stack([correct, base], 1)), correct - base, "pairs", groups=groups
        ),
        "p_reward_accuracy_is_half": metric(sign_test(correct, groups), n=len(rows)),
        "p_likelihood_ranking_difference": metric(mcnemar(tuned, base, groups), n=len(rows)),
        "p_reward_accuracy_is_base_ranking": metric(mcnemar(correct, base, groups), n=len(rows)),
        "p_reward_margin_is_0": metric(mean_test(columns["margin"], groups, seed), n=len(rows)),
    }
    for side in ("chosen", "rejected"):
        metrics[f"logps_{side}_base"] = mean(columns[f"ref_{side}"])
        metrics[f"logps_{side}_tuned"] = mean(columns[side])
        # Below 0 for chosen: likelihood displacement, the chosen answer itself became less likely.
        metrics[f"logps_{side}_difference"] = mean(np.stack([columns[side], columns[f"ref_{side}"]], 1))
        p = mean_test(columns[side] - columns[f"ref_{side}"], groups, seed)
        metrics[f"p_logps_{side}_difference"] = metric(p, n=len(rows))
    if surface is not None:
        surface_correct = pairwise_correct(surface, zero)
        metrics["surface_classifier_accuracy"] = rate(surface_correct)
        metrics["reward_accuracy_minus_surface"] = rate(np.stack([correct, surface_correct], 1))
        metrics["p_reward_accuracy_is_surface"] = metric(mcnemar(correct, surface_correct, groups), n=len(rows))
    return metrics
