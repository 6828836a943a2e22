"""Figures of a human evaluation. Prompts are what is resampled: several people's votes on one are one observation."""

from itertools import combinations

import numpy as np

from preflab.human.study import SHOWN
from preflab.judging.battle_metrics import answer_metrics, bradley_terry, by_category, style_controlled
from preflab.judging.battles import pairings
from preflab.judging.style import style_differences
from utils.artifacts import metric
from utils.stats import bootstrap, sign_test


def summarise(rows: list[dict], key: dict, candidates: list[dict], about: dict, seed: int) -> dict:
    """Every section of human_eval.json: metrics (of tuned against base), matches, annotators, agreement, answers.

    Args:
        rows: from `preflab.human.votes.unblind`.
    """
    first = first_judgements(rows)
    matches, settled = [], []
    for a, b in pairings(key["models"], None):
        mine = [row for row in first if (row["a"], row["b"]) == (a, b)]
        identical = [pair["prompt"] for pair in key["identical"] if (pair["a"], pair["b"]) == (a, b)]
        units = by_prompt(mine)
        if units:
            metrics = match_metrics(mine, units, candidates, about["answers"], seed)
            asked = sum({item["left"], item["right"]} == {a, b} and item["repeat_of"] is None for item in key["items"])
            metrics |= with_identical(metrics["win_rate"], asked, len(identical))
            matches.append({"a": a, "b": b, "metrics": metrics, "categories": by_category(units, seed)})
            settled += units
    agreed = agreement(first, seed)
    everyone = annotator_metrics(rows, key, seed)
    main = next((match["metrics"] for match in matches if (match["a"], match["b"]) == ("tuned", "base")), {})
    shared = {k: agreed[k] for k in ("alpha_ordinal", "alpha_nominal") if k in agreed}
    return {
        "metrics": {**main, **shared, **everyone},
        "matches": matches,
        "agreement": agreed,
        "annotators": {
            name: one_annotator([row for row in rows if row["annotator"] == name], key, seed)
            for name in dict.fromkeys(row["annotator"] for row in rows)
        },
        "answers": {
            name: {**answer_metrics(found, seed), "acceptable": acceptable(first, name, seed)}
            for name, found in about["answers"].items()
        },
        "bradley_terry": strengths(settled, key["models"], seed),
    }


def acceptable(rows: list[dict], model: str, seed: int) -> dict:
    """Share of a model's answers that were marked acceptable, over all its pairings; prompts weigh alike."""
    marks = [{"prompt": row["prompt"], "mark": row[f"{side}_acceptable"]} for row in rows for side in "ab"
             if row[side] == model]  # fmt: skip
    return share(marks, "mark", seed)


def strengths(units: list[dict], models: list[str], seed: int) -> dict | None:
    """Bradley-Terry strengths, None for two models, and where votes do not connect every model with the first."""
    met, linked = {(unit["a"], unit["b"]) for unit in units}, {models[0]}
    for _ in models:
        linked |= {name for pair in met if linked & set(pair) for name in pair}
    return bradley_terry(units, models, seed) if len(models) > 2 and linked == set(models) else None


def first_judgements(rows: list[dict]) -> list[dict]:
    """Each person's one vote on each pair: the first asking, or the second where the first was left open or skipped."""
    judged = {(row["annotator"], row["id"]) for row in rows if row["repeat_of"] is None and row["outcome"] is not None}

    def stands_in(row):
        return row["outcome"] is not None and (row["annotator"], row["repeat_of"]) not in judged

    return [row for row in rows if row["repeat_of"] is None or stands_in(row)]


def by_prompt(rows: list[dict]) -> list[dict]:
    """One row a prompt of a pairing, `{prompt, category, a, b, consistent, preference}`: means over its votes.

    `consistent` is the mean outcome of `a`, as battles call it.
    """
    found = []
    for votes in _grouped([row for row in rows if row["outcome"] is not None]).values():
        means = {"consistent": _mean(votes, "outcome"), "preference": _mean(votes, "preference")}
        found.append({**{k: votes[0][k] for k in ("prompt", "category", "a", "b")}, **means})
    return found


def with_identical(rate: dict, asked: int, identical: int) -> dict:
    """The win rate over the whole prompt set: pairs of identical answers, which nobody was asked about, tie.

    Judged pairs stand for all `asked` ones, so that a half-finished study is not drawn to 50%.
    """
    weight = asked / (asked + identical)
    ends = None if rate["ci95"] is None else [0.5 + weight * (end - 0.5) for end in rate["ci95"]]
    stderr = None if rate["stderr"] is None else weight * rate["stderr"]
    whole = metric(0.5 + weight * (rate["value"] - 0.5), stderr, ends, rate["n"])
    return {"identical_answers": metric(identical), "win_rate_whole_set": whole}


def match_metrics(rows: list[dict], units: list[dict], candidates: list[dict], answers: dict, seed: int) -> dict:
    """Figures of one pairing as the score of `a`; votes on pairs asked again are not among `rows`."""
    judged = [row for row in rows if row["outcome"] is not None]
    votes = np.array([row["preference"] for row in judged])
    y = np.array([unit["consistent"] for unit in units])
    names = {side: units[0][side] for side in "ab"}
    texts = [[candidates[unit["prompt"]][SHOWN.get(names[side], names[side])] for unit in units] for side in "ab"]
    tokens = [[answers[names[side]][unit["prompt"]]["tokens"] for unit in units] for side in "ab"]
    found = {
        "votes": metric(len(judged)),
        "prompts": metric(len(units)),
        "wins": metric(int((y > 0.5).sum()), n=len(y)),
        "ties": metric(int((y == 0.5).sum()), n=len(y)),
        "losses": metric(int((y < 0.5).sum()), n=len(y)),
        "win_rate": bootstrap(y, seed),
        "p_win_rate_is_half": metric(sign_test(y), n=len(y)),
        "win_rate_style_controlled": style_controlled(style_differences(*texts, *tokens), y, seed),
        "preference_steps": bootstrap([unit["preference"] for unit in units], seed),
        "votes_much_better": metric(int((votes == 2).sum()), n=len(votes)),
        "votes_better": metric(int((votes == 1).sum()), n=len(votes)),
        "votes_tie": metric(sum(row["preference"] == 0 and not row["both_bad"] for row in judged), n=len(votes)),
        "votes_both_bad": metric(sum(row["both_bad"] for row in judged), n=len(votes)),
        "votes_worse": metric(int((votes == -1).sum()), n=len(votes)),
        "votes_much_worse": metric(int((votes == -2).sum()), n=len(votes)),
        "both_bad_share": share(judged, "both_bad", seed),
    }
    for side in "ab":
        found[f"acceptable_{side}"] = share(rows, f"{side}_acceptable", seed)
    marked = [row for row in rows if row["a_acceptable"] is not None and row["b_acceptable"] is not None]
    means = [[_mean(votes, f"{side}_acceptable") for side in "ab"] for votes in _grouped(marked).values()]
    if means:
        pairs = np.array(means)
        # The sign of the difference: means of thirds that are equal must tie exactly.
        found["acceptable_difference"] = bootstrap(pairs, seed)
        sides = 0.5 + 0.5 * np.sign(np.round(pairs[:, 0] - pairs[:, 1], 9))
        found["p_acceptable_difference"] = metric(sign_test(sides), n=len(pairs))
    return found


def share(rows: list[dict], name: str, seed: int) -> dict:
    """Share of votes whose `name` is true, among those where it is marked at all; prompts weigh alike."""
    means = _prompt_means([row for row in rows if row[name] is not None], name)
    return bootstrap(means, seed) if means else metric(None)


def annotator_metrics(rows: list[dict], key: dict, seed: int) -> dict:
    """How one person voted, or all of them together: coverage, position bias, self-consistency, time.

    left_wins: of the votes that decided for a side, the share for the left one. a_on_the_left: how balanced the sides
    of the judged pairs were. self_consistency: of the pairs that were asked again with sides swapped, the share where
    the winner, the tie or "both bad" stayed. seconds: median a vote.
    """
    judged = [row for row in rows if row["outcome"] is not None]
    decided = [{**row, "left": (row["outcome"] == 1) == row["a_is_left"]} for row in judged if row["outcome"] != 0.5]
    people = len({row["annotator"] for row in rows})
    found = {
        "judged": metric(len(judged), n=people * len(key["items"])),
        "skipped": metric(sum(row["skip"] is not None for row in rows), n=people * len(key["items"])),
        "left_wins": share(decided, "left", seed),
        "p_left_wins_is_half": metric(sign_test(_prompt_means(decided, "left")), n=len(_grouped(decided))),
        "a_on_the_left": share(judged, "a_is_left", seed),
        "seconds_median": metric(float(np.median([row["seconds"] for row in judged])), n=len(judged)),
    }
    before = {(row["annotator"], row["id"]): row for row in judged}
    again = [(before.get((row["annotator"], row["repeat_of"])), row) for row in judged if row["repeat_of"]]
    again = [
        {**row, "same": (row["outcome"], row["both_bad"]) == (old["outcome"], old["both_bad"])}
        for old, row in again
        if old
    ]
    found["self_consistency"] = share(again, "same", seed)
    return found


def one_annotator(rows: list[dict], key: dict, seed: int) -> dict:
    """`annotator_metrics`, and the win rate of tuned against base by this person's votes alone."""
    main = [row for row in first_judgements(rows) if (row["a"], row["b"]) == ("tuned", "base")]
    judged = [row for row in main if row["outcome"] is not None]
    return {**annotator_metrics(rows, key, seed), "win_rate": bootstrap(_prompt_means(judged, "outcome"), seed)}


def agreement(rows: list[dict], seed: int) -> dict:
    """Krippendorff's alpha (2018) over all annotators, and Cohen's kappa of every two, with intervals over pairs.

    Ordinal alpha and quadratic kappa take the five steps of preference, nominal alpha and plain kappa win, tie and
    loss. Empty where no pair was judged by two; NaN where all votes are one and the same, so that nothing is known.
    """
    people = list(dict.fromkeys(row["annotator"] for row in rows))
    table: dict[tuple, list] = {}
    for row in rows:
        if row["preference"] is not None:
            unit = table.setdefault((row["prompt"], row["a"], row["b"]), [np.nan] * len(people))
            unit[people.index(row["annotator"])] = row["preference"]
    steps = np.array(list(table.values()), float).reshape(-1, len(people))
    steps = steps[(~np.isnan(steps)).sum(1) >= 2]
    if not len(steps):
        return {}
    kappas = []
    for i, j in combinations(range(len(people)), 2):
        both = steps[:, [i, j]]
        both = both[~np.isnan(both).any(1)]
        if len(both):
            weighted, plain = _kappa(both, "quadratic", seed), _kappa(np.sign(both), "plain", seed)
            kappas.append(
                {"annotators": [people[i], people[j]], "pairs": len(both), "kappa": plain, "kappa_weighted": weighted}
            )
    return {
        "pairs": metric(len(steps)),
        "alpha_ordinal": _alpha(steps, "ordinal", seed),
        "alpha_nominal": _alpha(np.sign(steps), "nominal", seed),
        "kappas": kappas,
    }


def _alpha(ratings: np.ndarray, distance: str, seed: int) -> dict:
    from evalica import alpha
    from pandas import DataFrame

    if len(np.unique(ratings[~np.isnan(ratings)])) < 2:
        return metric(float("nan"), n=len(ratings))
    return bootstrap(ratings, seed, statistic=lambda rows: alpha(DataFrame(rows.T), distance=distance).alpha)


def cohen_kappa(both: np.ndarray, weights: str = "plain") -> float:
    """Cohen's kappa of two annotators (1960), or with quadratic weights (1968); 1 where all votes are one and the same.

    Args:
        both: votes in whole steps, shape (n, 2). weights: plain or quadratic.
    """
    levels, codes = np.unique(both, return_inverse=True)
    if len(levels) < 2:
        return 1.0
    first, second = codes.reshape(both.shape).T
    k = len(levels)
    counts = np.bincount(first * k + second, minlength=k * k).reshape(k, k) / len(both)
    apart = levels[:, None] - levels[None, :]
    cost = apart**2 if weights == "quadratic" else (apart != 0)
    return float(1 - (cost * counts).sum() / (cost * np.outer(counts.sum(1), counts.sum(0))).sum())


def _kappa(both: np.ndarray, weights: str, seed: int) -> dict:
    if len(np.unique(both)) < 2:
        return metric(float("nan"), n=len(both))
    return bootstrap(both, seed, statistic=lambda rows: cohen_kappa(rows, weights))


def _grouped(rows: list[dict]) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row)
    return found


def _prompt_means(rows: list[dict], name: str) -> list[float]:
    return [_mean(votes, name) for votes in _grouped(rows).values()]


def _mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
