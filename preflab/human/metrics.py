"""Metrics of a human evaluation. Prompts are resampled: all votes on one prompt are one observation."""

from itertools import combinations

import numpy as np

from preflab.human.study import COLUMN_OF
from preflab.judging.battle_metrics import answer_metrics, bradley_terry, by_category, style_controlled, win_rate
from preflab.judging.battles import pairings
from preflab.judging.panel import krippendorff_alpha
from preflab.judging.style import style_differences
from utils.artifacts import metric
from utils.stats import RESAMPLES, bootstrap, share, sign_test

# Ten annotators have 45 pairs, forty have 780: their bootstraps would take half an hour, and nobody reads as many rows.
MOST_KAPPAS_WITH_INTERVAL = 45


def summarise(rows: list[dict], key: dict, candidates: list[dict], about: dict, seed: int) -> dict:
    """Every section of human_eval.json: metrics (of tuned against base), matches, annotators, agreement, answers.

    Args:
        rows: from `preflab.human.votes.unblind`.
        key, candidates, about: from `preflab.human.study.read_study`.
    """
    counted = counted_votes(rows)
    matches, units = [], []
    for a, b in pairings(key["models"], None):
        # `unblind` orders a and b as `pairings` does, so each vote belongs to exactly one pairing.
        match_rows = [row for row in counted if (row["a"], row["b"]) == (a, b)]
        match_units = by_prompt(match_rows)
        if match_units:
            metrics = match_metrics(match_rows, match_units, candidates, about["answers"], seed)
            on_page = [item for item in key["items"] if {item["left"], item["right"]} == {a, b}]
            # Repeats measure self-consistency and do not count as further pairs.
            pairs = sum(item["repeat_of"] is None for item in on_page)
            identical = sum((pair["a"], pair["b"]) == (a, b) for pair in key["identical"])
            metrics |= with_identical(metrics["win_rate"], pairs, identical)
            matches.append({"a": a, "b": b, "metrics": metrics, "categories": by_category(match_units, seed)})
            units += match_units
    agreements = agreement(counted, seed)
    main = next((match["metrics"] for match in matches if (match["a"], match["b"]) == ("tuned", "base")), {})
    alphas = {k: agreements[k] for k in ("alpha_ordinal", "alpha_nominal") if k in agreements}
    return {
        # annotator_metrics needs all votes: repeats, which `counted` leaves out, measure self-consistency.
        "metrics": {**main, **alphas, **annotator_metrics(rows, key, seed)},
        "matches": matches,
        "agreement": agreements,
        "annotators": {
            name: one_annotator([row for row in rows if row["annotator"] == name], key, seed)
            for name in dict.fromkeys(row["annotator"] for row in rows)
        },
        "answers": {
            name: {**answer_metrics(answers, seed), "acceptable": acceptable(counted, name, seed)}
            for name, answers in about["answers"].items()
        },
        "bradley_terry": strengths(units, key["models"], seed),
    }


def counted_votes(rows: list[dict]) -> list[dict]:
    """One vote per annotator and pair: the first, or that on the repeat where the first was skipped or left open."""
    judged = {(row["annotator"], row["id"]) for row in rows if row["repeat_of"] is None and row["outcome"] is not None}

    def replaces_first(row):
        return row["outcome"] is not None and (row["annotator"], row["repeat_of"]) not in judged

    return [row for row in rows if row["repeat_of"] is None or replaces_first(row)]


def by_prompt(rows: list[dict]) -> list[dict]:
    """One row per prompt of a pairing, `{prompt, category, a, b, consistent, preference}`: means over its votes.

    `consistent` is the mean outcome of `a`; the name is that of preflab.judging.battles, whose functions read it.
    """
    units = []
    for votes in _grouped([row for row in rows if row["outcome"] is not None]).values():
        # Several annotators on one prompt are one observation: their votes share the prompt's difficulty.
        means = {"consistent": _mean(votes, "outcome"), "preference": _mean(votes, "preference")}
        units.append({**{k: votes[0][k] for k in ("prompt", "category", "a", "b")}, **means})
    return units


def with_identical(rate: dict, pairs: int, identical: int) -> dict:
    """The win rate over the complete prompt set, where pairs of identical answers, which are not shown, count as ties.

    The judged pairs stand for all `pairs` on the page; otherwise ties would pull a half-finished study towards 50%.

    Args:
        rate: the win rate over judged prompts.
        pairs: pairs on the page, without repeats.
        identical: pairs of identical answers.
    """
    # A tie is 1/2, so adding ties shrinks the distance from 1/2 by this factor, for value, ends and error equally.
    weight = pairs / (pairs + identical)
    ends = None if rate["ci95"] is None else [0.5 + weight * (end - 0.5) for end in rate["ci95"]]
    stderr = None if rate["stderr"] is None else weight * rate["stderr"]
    all_prompts = metric(0.5 + weight * (rate["value"] - 0.5), stderr, ends, rate["n"])
    return {"identical_answers": metric(identical), "win_rate_whole_set": all_prompts}


def match_metrics(rows: list[dict], units: list[dict], candidates: list[dict], answers: dict, seed: int) -> dict:
    """Metrics of one pairing, from the side of `a`.

    Args:
        rows: the counted votes on this pairing.
        units: `by_prompt(rows)`.
    """
    judged = [row for row in rows if row["outcome"] is not None]
    votes = np.array([row["preference"] for row in judged])
    # Shape (prompts,): the mean outcome of `a`, from 0 to 1. Votes have shape (votes,), in steps from -2 to 2.
    y = np.array([unit["consistent"] for unit in units])
    names = {side: units[0][side] for side in "ab"}
    texts = [[candidates[unit["prompt"]][COLUMN_OF.get(names[side], names[side])] for unit in units] for side in "ab"]
    tokens = [[answers[names[side]][unit["prompt"]]["tokens"] for unit in units] for side in "ab"]
    metrics = {
        "votes": metric(len(judged)),
        "prompts": metric(len(units)),
        # Of prompts, by the mean of their votes; counts of votes follow below.
        "wins": metric(int((y > 0.5).sum()), n=len(y)),
        "ties": metric(int((y == 0.5).sum()), n=len(y)),
        "losses": metric(int((y < 0.5).sum()), n=len(y)),
        **win_rate(y, seed),
        # Features of `a` relative to `b`: length, headers, lists, bold.
        "win_rate_style_controlled": style_controlled(style_differences(*texts, *tokens), y, seed),
        "preference_steps": bootstrap([unit["preference"] for unit in units], seed),
        "votes_much_better": metric(int((votes == 2).sum()), n=len(votes)),
        "votes_better": metric(int((votes == 1).sum()), n=len(votes)),
        "votes_tie": metric(sum(row["preference"] == 0 and not row["both_bad"] for row in judged), n=len(votes)),
        "votes_both_bad": metric(sum(row["both_bad"] for row in judged), n=len(votes)),
        "votes_worse": metric(int((votes == -1).sum()), n=len(votes)),
        "votes_much_worse": metric(int((votes == -2).sum()), n=len(votes)),
        "both_bad_share": marked_share(judged, "both_bad", seed),
    }
    for side in "ab":
        # Over all rows, since an answer can be marked without a choice.
        metrics[f"acceptable_{side}"] = marked_share(rows, f"{side}_acceptable", seed)
    return metrics | acceptable_difference(rows, seed)


def acceptable_difference(rows: list[dict], seed: int) -> dict:
    """Share of acceptable answers of `a` minus that of `b`, and its sign test, on votes that mark both answers."""
    marked = [row for row in rows if row["a_acceptable"] is not None and row["b_acceptable"] is not None]
    # Shape (prompts, 2), paired: the difference is taken within each prompt.
    means = [[_mean(votes, f"{side}_acceptable") for side in "ab"] for votes in _grouped(marked).values()]
    if not means:
        return {}
    pairs = np.array(means)
    # Rounded before the sign is taken: equal means of thirds may differ in the last bit, and must tie.
    sides = 0.5 + 0.5 * np.sign(np.round(pairs[:, 0] - pairs[:, 1], 9))
    return {
        "acceptable_difference": share(pairs, seed),
        "p_acceptable_difference": metric(sign_test(sides), n=len(pairs)),
    }


def acceptable(rows: list[dict], model: str, seed: int) -> dict:
    """Share of a model's answers that were marked acceptable, over all its pairings; prompts have equal weight."""
    marks = [{"prompt": row["prompt"], "mark": row[f"{side}_acceptable"]} for row in rows for side in "ab"
             if row[side] == model]  # fmt: skip
    return marked_share(marks, "mark", seed)


def strengths(units: list[dict], models: list[str], seed: int) -> dict | None:
    """Bradley-Terry strengths; None for two models, or where votes do not connect every model with the first.

    Strengths of unconnected models are not identifiable (Ford 1957).
    """
    pairs, connected = {(unit["a"], unit["b"]) for unit in units}, {models[0]}
    # Each pass adds the neighbours of connected models; a path has fewer steps than there are models.
    for _ in models:
        connected |= {name for pair in pairs if connected & set(pair) for name in pair}
    return bradley_terry(units, models, seed) if len(models) > 2 and connected == set(models) else None


def marked_share(rows: list[dict], name: str, seed: int) -> dict:
    """Share of votes whose `name` is true, of those where it is marked; prompts have equal weight."""
    means = _prompt_means([row for row in rows if row[name] is not None], name)
    return share(means, seed) if means else metric(None)


def annotator_metrics(rows: list[dict], key: dict, seed: int) -> dict:
    """How one annotator voted, or all together: coverage, position bias, self-consistency, time.

    Returns:
        judged and skipped, counts; left_wins: share of the left answer among votes for one side;
        a_on_the_left: share of judged pairs whose `a` was on the left, near 0.5 by design; seconds_median: per vote;
        self_consistency: share of repeated pairs where winner, tie or "both bad" stayed the same.
    """
    judged = [row for row in rows if row["outcome"] is not None]
    # `a` won on the left or lost on the right: in both cases the left answer won. Ties are left out.
    decided = [{**row, "left": (row["outcome"] == 1) == row["a_is_left"]} for row in judged if row["outcome"] != 0.5]
    annotators = len({row["annotator"] for row in rows})
    # By display id; a repeat has its own id and names the first one in repeat_of.
    first_votes = {(row["annotator"], row["id"]): row for row in judged}
    repeated = [(first_votes.get((row["annotator"], row["repeat_of"])), row) for row in judged if row["repeat_of"]]
    repeats = [
        {**row, "same": (row["outcome"], row["both_bad"]) == (first["outcome"], first["both_bad"])}
        for first, row in repeated
        if first
    ]
    return {
        # n counts every pair on the page, repeats included, for every annotator.
        "judged": metric(len(judged), n=annotators * len(key["items"])),
        "skipped": metric(sum(row["skip"] is not None for row in rows), n=annotators * len(key["items"])),
        "left_wins": marked_share(decided, "left", seed),
        "p_left_wins_is_half": metric(sign_test(_prompt_means(decided, "left")), n=len(_grouped(decided))),
        "a_on_the_left": marked_share(judged, "a_is_left", seed),
        # The median, because a pause in front of the open page would dominate the mean.
        "seconds_median": metric(float(np.median([row["seconds"] for row in judged])), n=len(judged)),
        "self_consistency": marked_share(repeats, "same", seed),
    }


def one_annotator(rows: list[dict], key: dict, seed: int) -> dict:
    """`annotator_metrics`, and the win rate of tuned against base by this annotator's votes alone."""
    main = [row for row in counted_votes(rows) if (row["a"], row["b"]) == ("tuned", "base")]
    judged = [row for row in main if row["outcome"] is not None]
    return {**annotator_metrics(rows, key, seed), "win_rate": share(_prompt_means(judged, "outcome"), seed)}


# --------------------------------------------------------------------------------------------------------- agreement


def agreement(rows: list[dict], seed: int) -> dict:
    """Krippendorff's alpha (2018) over all annotators and Cohen's kappa of every two, with intervals over pairs.

    Ordinal alpha and quadratic kappa use the five steps of preference; nominal alpha and plain kappa use win, tie and
    loss. Empty where no pair was judged by two annotators; NaN where all votes are equal. With many annotators, kappas
    have no intervals (MOST_KAPPAS_WITH_INTERVAL).
    """
    annotators = list(dict.fromkeys(row["annotator"] for row in rows))
    # One row per pair of answers, one column per annotator, NaN where the annotator did not judge it.
    table: dict[tuple, list] = {}
    for row in rows:
        if row["preference"] is not None:
            ratings = table.setdefault((row["prompt"], row["a"], row["b"]), [np.nan] * len(annotators))
            ratings[annotators.index(row["annotator"])] = row["preference"]
    steps = np.array(list(table.values()), float).reshape(-1, len(annotators))
    # Units with one rating carry no information about agreement (Krippendorff 2018) and would only dilute n.
    steps = steps[(~np.isnan(steps)).sum(1) >= 2]
    if not len(steps):
        return {}
    kappas, pairs = [], list(combinations(range(len(annotators)), 2))
    resamples = RESAMPLES if len(pairs) <= MOST_KAPPAS_WITH_INTERVAL else 0
    for i, j in pairs:
        both = steps[:, [i, j]]
        both = both[~np.isnan(both).any(1)]
        if len(both):
            kappas.append(
                {
                    "annotators": [annotators[i], annotators[j]],
                    "pairs": len(both),
                    # The sign reduces five steps to loss, tie and win.
                    "kappa": _kappa(np.sign(both), "plain", seed, resamples),
                    "kappa_weighted": _kappa(both, "quadratic", seed, resamples),
                }
            )
    return {
        "pairs": metric(len(steps)),
        "alpha_ordinal": krippendorff_alpha(steps, "ordinal", seed),
        "alpha_nominal": krippendorff_alpha(np.sign(steps), "nominal", seed),
        "kappas": kappas,
    }


def cohen_kappa(both: np.ndarray, weights: str = "plain") -> float:
    """Cohen's kappa of two annotators (1960), or with quadratic weights (1968); 1 where all votes are equal.

    The bootstrap calls this 2,000 times per pair of annotators. sklearn.metrics.cohen_kappa_score gives the same
    values but takes 3 s for these calls, this function 0.1 s.

    Args:
        both: votes in integer steps, shape (n, 2).
        weights: plain or quadratic.
    """
    # Levels are those that occur: steps that neither annotator used have probability 0 in both tables.
    levels, codes = np.unique(both, return_inverse=True)
    if len(levels) < 2:
        return 1.0
    # reshape, because the shape of return_inverse differs between numpy versions.
    first, second = codes.reshape(both.shape).T
    k = len(levels)
    # Shape (k, k): joint frequencies of the two annotators' levels.
    observed = np.bincount(first * k + second, minlength=k * k).reshape(k, k) / len(both)
    # Joint frequencies under independence, from the two annotators' own distributions.
    expected = np.outer(observed.sum(1), observed.sum(0))
    distance = levels[:, None] - levels[None, :]
    cost = distance**2 if weights == "quadratic" else (distance != 0)
    # Kappa = 1 - observed / expected disagreement. The denominator is above 0, since two levels occur.
    return float(1 - (cost * observed).sum() / (cost * expected).sum())


def _kappa(both: np.ndarray, weights: str, seed: int, resamples: int) -> dict:
    # Without variation, agreement beyond chance is not defined; within a resample, `cohen_kappa` counts it as 1.
    if len(np.unique(both)) < 2:
        return metric(float("nan"), n=len(both))
    if not resamples:
        return metric(cohen_kappa(both, weights), n=len(both))
    return bootstrap(both, seed, resamples, statistic=lambda rows: cohen_kappa(rows, weights))


def _grouped(rows: list[dict]) -> dict[int, list[dict]]:
    """Rows by prompt."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def _prompt_means(rows: list[dict], name: str) -> list[float]:
    return [_mean(votes, name) for votes in _grouped(rows).values()]


def _mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
