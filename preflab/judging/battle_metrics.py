"""Metrics of battles: win rates, position bias, Bradley-Terry strengths, style control."""

import numpy as np
from scipy.special import expit, log_expit

from preflab.evaluation.contamination import without_overlap
from preflab.judging.style import scaled, style_differences
from utils.artifacts import metric
from utils.power import with_power
from utils.stats import bootstrap, mean_test, of_sums, share, sign_test

# 1 / variance of the prior on each logit: a normal prior of standard deviation 10.
RIDGE = 1e-2
# Style and model count as collinear above this R^2.
COLLINEAR_R2 = 0.95


def battle_sections(
    judged: dict[str, list[dict]], answers: dict[str, list], pairs: list[tuple[str, str]], names: list[str], seed: int
) -> dict:
    """The computed sections of battle.json.

    Args:
        judged: `{judge: rows}` from `judge_battle`, the judge before its controls.
        answers: `{model: answers}`.
        pairs: the pairings (a, b).
        names: the models that answered here; the other one, if any, is the opponent of --opponent_outputs.

    Returns:
        metrics: of tuned against base, or of each against the opponent.
        matches: metrics per pairing and judge, and win rates by category.
        answers: length and truncation per model.
        bradley_terry: strengths, None for two models.
    """
    matches = []
    for a, b in pairs:
        pair_rows = {judge: [r for r in rows if (r["a"], r["b"]) == (a, b)] for judge, rows in judged.items()}
        judges = {judge: battle_metrics(rows, seed) for judge, rows in pair_rows.items()}
        # Under the judge itself, which comes before its controls.
        categories = by_category(next(iter(pair_rows.values())), seed)
        matches.append({"a": a, "b": b, "judges": judges, "categories": categories})
    main_rows = next(iter(judged.values()))
    # With an opponent, every pairing has it as `b`.
    opponent = pairs[0][1] if pairs[0][1] not in names else None
    metrics = main_metrics(matches, opponent)
    if opponent:
        metrics |= against_opponent(main_rows, seed)
    lengths = {name: answer_metrics(model_answers, seed) for name, model_answers in answers.items()}
    decided = [row for row in main_rows if row["consistent"] is not None]
    everyone = list(dict.fromkeys([*names, *lengths]))
    # With two models, the strength is only the win rate on the logit scale.
    strengths = bradley_terry(decided, everyone, seed) if len(everyone) > 2 and decided else None
    return {"metrics": metrics, "matches": matches, "answers": lengths, "bradley_terry": strengths}


def with_confidence_sequence(sections: dict, stopping: dict) -> None:
    """Give the figure that --stop_when watched its confidence sequence, and its test the anytime-valid p-value.

    Args:
        sections: from `battle_sections`. stopping: the section of preflab.judging.battle_judging.
    """
    rate, p = ("win_rate_difference", "p_win_rate_difference") if stopping["quantity"] == "difference" else (
        "win_rate", "p_win_rate_is_half")  # fmt: skip
    figures = [sections["metrics"]]
    if stopping["quantity"] == "rate":
        main = _main(sections)
        figures += [next(iter(m["judges"].values())) for m in sections["matches"] if (m["a"], m["b"]) == main]
    for metrics in figures:
        if rate in metrics:
            # Power is that of a test at a number of rows chosen in advance.
            known = {key: value for key, value in metrics[rate].items() if key != "power"}
            metrics[rate] = {**known, "ci95": [stopping["low"], stopping["high"]]}
            metrics[p] = {**metrics[p], "value": stopping["p"]}


def _main(sections: dict) -> tuple[str, str]:
    """The pairing that the metrics are about: tuned against base, else the first."""
    pairs = [(match["a"], match["b"]) for match in sections["matches"]]
    return ("tuned", "base") if ("tuned", "base") in pairs else pairs[0]


def battles_without_overlap(
    judged: dict[str, list[dict]], prompts: list, pairs: list[tuple[str, str]], training, seed: int
) -> list[dict]:
    """Win rates with and without the prompts that overlap with training data, per pairing, under the first judge.

    Args:
        training: preflab.evaluation.contamination.TrainingText.

    Returns:
        `{a, b, ...}` each, as `preflab.evaluation.contamination.without_overlap`.
    """
    rows, texts = next(iter(judged.values())), ["\n".join(m["content"] for m in prompt.messages) for prompt in prompts]
    rows_of = {pair: [row for row in rows if (row["a"], row["b"]) == pair] for pair in pairs}
    overlaps = training.overlaps({pair: [texts[row["prompt"]] for row in rows_of[pair]] for pair in pairs})
    sections = []
    for (a, b), of_pair in rows_of.items():

        def figures(places: list[int], of_pair=of_pair) -> dict:
            outcomes = [of_pair[place]["consistent"] for place in places]
            decided = np.array([outcome for outcome in outcomes if outcome is not None])
            return win_rate(decided, seed) if len(decided) else {}

        everything = figures(range(len(of_pair)))
        sections.append({"a": a, "b": b, **without_overlap(training, overlaps[a, b], everything, figures)})
    return sections


def main_metrics(matches: list[dict], opponent: str | None) -> dict:
    """The metrics of tuned against base, or with the model's name as prefix those of each against the opponent.

    Controls have their name as a further prefix: `longer_win_rate`.
    """
    metrics = {}
    for match in matches:
        if not opponent and (match["a"], match["b"]) != ("tuned", "base"):
            continue
        prefix = f"{match['a']}_" if opponent else ""
        for k, (judge, judge_metrics) in enumerate(match["judges"].items()):
            judge_prefix = prefix if k == 0 else f"{prefix}{judge}_"
            metrics |= {f"{judge_prefix}{name}": m for name, m in judge_metrics.items()}
    return metrics


def battle_metrics(rows: list[dict], seed: int) -> dict:
    """Metrics of one pairing under one judge, seen from `a`: `{name: metric}`.

    Rows without a verdict in both orders are left out of every rate and counted in `dropped`. win_rate is FastChat's
    adjusted rate (wins + ties / 2) / n; win_rate_votes weights strong verdicts as the judge prompt says.
    """
    verdicts = [v for row in rows for v in row["orders"]]
    parsed = [v for v in verdicts if v["first"] is not None]
    decided = [row for row in rows if row["consistent"] is not None]
    y = np.array([row["consistent"] for row in decided])
    metrics = {
        "prompts": metric(len(rows)),
        "dropped": metric(len(rows) - len(decided), n=len(rows)),
        "unparsed_verdicts": metric(len(verdicts) - len(parsed), n=len(verdicts)),
        # Both orders of a prompt have the label, hence // 2.
        "identical_answers": metric(sum(v["label"] == "identical" for v in verdicts) // 2, n=len(rows)),
    }
    if not decided:
        return metrics
    answers = [[row[f"answer_{side}"] for row in decided] for side in "ab"]
    tokens = [np.array([answer["tokens"] for answer in side]) for side in answers]
    styles = style_differences(*([answer["text"] for answer in side] for side in answers), *tokens)
    votes = np.array([row["votes"] for row in decided], float)
    # Mean score of the first slot over both orders: 0.5 without position bias.
    first_slot = np.array([[v["first"] for v in row["orders"]] for row in decided]).mean(1)
    metrics |= {
        "wins": metric(int((y == 1).sum()), n=len(y)),
        "losses": metric(int((y == 0).sum()), n=len(y)),
        "ties": metric(int((y == 0.5).sum()), n=len(y)),
        **win_rate(y, seed),
        "wins_average_of_orders": metric(sum(row["average"] > 0.5 for row in decided), n=len(y)),
        "losses_average_of_orders": metric(sum(row["average"] < 0.5 for row in decided), n=len(y)),
        "ties_average_of_orders": metric(sum(row["average"] == 0.5 for row in decided), n=len(y)),
        "win_rate_average_of_orders": share([row["average"] for row in decided], seed),
        "win_rate_votes": win_rate_votes(votes, seed),
        "win_rate_style_controlled": style_controlled(styles, y, seed),
        "flip_rate": share([row["flipped"] for row in decided], seed),
        "first_slot_wins": share(first_slot, seed),
        "tokens_a": bootstrap(tokens[0], seed),
        "tokens_b": bootstrap(tokens[1], seed),
        # Shape (n, 2): mean(a - b), paired by prompt.
        "tokens_difference": bootstrap(np.stack(tokens, 1), seed),
    }
    probabilities = [row["probability"] for row in decided if row["probability"] is not None]
    # All or none: over a part of the rows the figure would not be comparable with win_rate.
    if len(probabilities) == len(decided):
        metrics["win_rate_probability"] = share(probabilities, seed)
    # A low mass means that the judge rarely answers with a label at all, so its verdicts are weak evidence.
    mass = [v["mass"] for v in parsed if v["mass"] is not None]
    if mass:
        metrics["verdict_mass_median"] = metric(float(np.median(mass)), n=len(mass))
        metrics["verdict_mass_below_half"] = metric(float(np.mean(np.array(mass) < 0.5)), n=len(mass))
    return metrics


def win_rate(y: np.ndarray, seed: int) -> dict:
    """The mean of outcomes (1 win, 0.5 tie, 0 loss), one per prompt, and its test against one half."""
    return {
        "win_rate": with_power(share(y, seed), y, "prompts", 0.5),
        "p_win_rate_is_half": metric(sign_test(y), n=len(y)),
    }


def win_rate_votes(votes: np.ndarray, seed: int) -> dict:
    """Votes for `a` over all votes: a ratio of sums, so that strong verdicts weigh more. `votes` has shape (n, 2)."""
    of_rows = votes[:, 0] / votes[:, 1]
    if not np.ptp(of_rows) or len(votes) < 2:
        # Where all rows agree, every resample does, but the interval of a share is never a point.
        return share(of_rows, seed)
    rate = of_sums(votes, seed=seed)
    return {**rate, "ci95": [min(max(end, 0.0), 1.0) for end in rate["ci95"]]}


def by_category(rows: list[dict], seed: int) -> dict:
    """Win rate of `a` in each category of prompts: `{category: {n, win_rate, p_win_rate_is_half}}`."""
    decided = [row for row in rows if row["consistent"] is not None]
    categories = {}
    for category in sorted({row["category"] for row in decided if row["category"] is not None}):
        y = [row["consistent"] for row in decided if row["category"] == category]
        categories[category] = {"n": len(y), "win_rate": share(y, seed), "p_win_rate_is_half": sign_test(y)}
    return categories


def answer_metrics(answers: list[dict | None], seed: int) -> dict:
    """Number, mean length and truncated share of one model's answers. The share is left out if it is not known."""
    answers = [answer for answer in answers if answer is not None]
    metrics = {"answers": metric(len(answers)), "tokens": bootstrap([a["tokens"] for a in answers], seed)}
    truncated = [a["finish_reason"] == "length" for a in answers if a["finish_reason"] is not None]
    if truncated:
        metrics["truncated_share"] = share(truncated, seed)
    return metrics


def against_opponent(rows: list[dict], seed: int) -> dict:
    """Difference of the scores of tuned and base against the same opponent, paired by prompt, and its test.

    Empty if no prompt has verdicts for both.
    """
    scores = {name: {r["prompt"]: r["consistent"] for r in rows if r["a"] == name} for name in ("base", "tuned")}
    prompts = [k for k, v in scores["base"].items() if v is not None and scores["tuned"].get(k) is not None]
    if not prompts:
        return {}
    # Shape (prompts, 2). Paired, because both scores depend on how well the opponent answered the prompt.
    pairs = np.array([[scores["tuned"][k], scores["base"][k]] for k in prompts])
    return {
        "win_rate_difference": with_power(share(pairs, seed), pairs[:, 0] - pairs[:, 1], "prompts"),
        "p_win_rate_difference": metric(mean_test(pairs[:, 0] - pairs[:, 1], seed=seed), n=len(prompts)),
    }


def bradley_terry(rows: list[dict], names: list[str], seed: int) -> dict:
    """Bradley-Terry strengths in logits, the first of `names` fixed at 0: `{name: metric}`.

    sigmoid(strength_i - strength_j) is the probability that i beats j (Bradley & Terry 1952); a tie counts as half a
    win for each. Intervals resample prompts, each with all of its pairings.
    """
    column = {name: k for k, name in enumerate(names)}
    pair_of_row = [(column[r["a"]], column[r["b"]]) for r in rows]
    pairs = sorted(set(pair_of_row))
    # Outcomes, shape (prompts, pairings), NaN where a pairing has none: the bootstrap resamples its rows.
    outcomes = np.full((1 + max(r["prompt"] for r in rows), len(pairs)), np.nan)
    for r, pair in zip(rows, pair_of_row, strict=True):
        outcomes[r["prompt"], pairs.index(pair)] = r["consistent"]
    outcomes = outcomes[~np.isnan(outcomes).all(1)]
    # One row per pairing, +1 for a and -1 for b.
    design = np.zeros((len(pairs), len(names)))
    for k, (a, b) in enumerate(pairs):
        design[k, a], design[k, b] = 1, -1

    def fit(resampled):
        # The likelihood depends on each pairing only through its mean score and its number of battles.
        battles = (~np.isnan(resampled)).sum(0)
        score = np.nansum(resampled, 0) / np.maximum(battles, 1)
        # Only differences of strengths are identified, so the first one is fixed and its column left out. A pairing
        # without battles in a resample has score 0 and weight 0.
        return np.concatenate([[0.0], fit_logistic(design[:, 1:], score, battles.astype(float))])

    return {
        name: metric(0.0, None, None, len(outcomes))
        if k == 0
        else bootstrap(outcomes, seed, statistic=lambda x, k=k: fit(x)[k])
        for k, name in enumerate(names)
    }


def style_controlled(differences: np.ndarray, y: np.ndarray, seed: int) -> dict:
    """Win rate of `a` for answers of equal style: the sigmoid of the model's coefficient in a Bradley-Terry fit.

    NaN if style and model are collinear, so that their effects cannot be separated: one model's style differs from
    the other's in the same way on every prompt (the features explain the constant with R^2 above 0.95).

    Args:
        differences: from `style_differences`, shape (n, 4).
        y: outcomes of `a`, shape (n,).
    """
    features = scaled(differences)

    def rate(rows):
        # Columns: outcome, constant 1 (the model), four style features.
        outcome, x = rows[:, 0], rows[:, 1:]
        fit, *_ = np.linalg.lstsq(x[:, 1:], x[:, 0], rcond=None)
        # Uncentred R^2 of the constant; its mean square is 1.
        if 1 - np.mean((x[:, 0] - x[:, 1:] @ fit) ** 2) > COLLINEAR_R2:
            return float("nan")
        # Coefficient 0 belongs to the constant: the model's own effect, in logits, at a style difference of 0.
        return float(expit(fit_logistic(x, outcome)[0]))

    controlled = bootstrap(np.column_stack([y, np.ones(len(y)), features]), seed, statistic=rate)
    if controlled["ci95"] and np.ptp(controlled["ci95"]) < 1e-9:
        # All outcomes are equal, and so is every resample; the interval of a share is never a point.
        return {**share(y, seed), "value": controlled["value"]}
    return controlled


def fit_logistic(x: np.ndarray, y: np.ndarray, weights=None) -> np.ndarray:
    """Coefficients of a logistic regression without intercept, shape (k,); outcomes in [0, 1], a tie is 0.5.

    Newton's method with a line search, until the gradient is below 1e-8 per row. A weak ridge (a normal prior of
    standard deviation 10 on each logit) keeps the strength of a model that won or lost everything finite.

    Args:
        x: shape (n, k).
        y: outcomes, shape (n,).
        weights: shape (n,); default 1.
    """
    weights = np.ones(len(y)) if weights is None else weights

    def loss(beta):
        # log_expit(-z) is log(1 - sigmoid(z)) without cancellation.
        z = x @ beta
        return -(weights * (y * log_expit(z) + (1 - y) * log_expit(-z))).sum() + RIDGE / 2 * beta @ beta

    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = expit(x @ beta)
        # Gradient of the loss. The Hessian below is X' W X + RIDGE I with W = diag(weights * p * (1 - p)).
        gradient = x.T @ (weights * (p - y)) + RIDGE * beta
        if np.abs(gradient).max() <= 1e-8 * max(1, len(y)):
            break
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(beta))
        step, size, current = np.linalg.solve(hessian, gradient), 1.0, loss(beta)
        # Halve the step until the loss falls enough (Armijo): plain Newton steps diverge on nearly separable data.
        while loss(beta - size * step) > current - 1e-4 * size * (gradient @ step) and size > 1e-10:
            size /= 2
        beta = beta - size * step
    return beta
