"""Battles of models under a judge: both orders, two-order rules, position bias, Bradley-Terry, style control."""

from itertools import combinations

import numpy as np

from preflab.judging.style import scaled, style_differences
from utils.artifacts import metric
from utils.stats import bootstrap, sign_test

RIDGE = 1e-2
SPANNED = 0.95


# ------------------------------------------------------------------------------------------------------------- rows


def pairings(names: list[str], opponent: str | None) -> list[tuple[str, str]]:
    """Which models meet, as (a, b): every two of `names`, the later against the earlier, or each against `opponent`."""
    if opponent:
        return [(name, opponent) for name in names]
    return [(b, a) for a, b in combinations(names, 2)]


def both_orders(prompts: list, answers: dict[str, list[dict | None]], pairs: list[tuple[str, str]]):
    """Every question to the judge, both orders.

    Returns:
        (items, rows): items 2k and 2k + 1 belong to rows[k]; in the first `a` stands in the first slot.
    """
    from preflab.judging.judge_prompt import Item

    items, rows = [], []
    for number, prompt in enumerate(prompts):
        for a, b in pairs:
            one, other = answers[a][number], answers[b][number]
            if one is None or other is None:
                continue
            items += [Item(prompt, one["text"], other["text"]), Item(prompt, other["text"], one["text"])]
            rows.append(
                {
                    "prompt": number, "where": prompt.source, "category": prompt.category, "text": prompt.text,
                    "a": a, "b": b, "answer_a": one, "answer_b": other,
                }
            )  # fmt: skip
    return items, rows


def combine_orders(first, second) -> dict:
    """One pair of answers from its two verdicts (`a` in the first slot, then in the second).

    Returns:
        Scores of `a`, 1 win to 0 loss. consistent: FastChat's rule, a tie where the orders disagree; average: the mean
        of both orders; probability: the mean of the judge's probabilities. All None where an order has no verdict.
    """
    found = {"orders": [first.__dict__, second.__dict__]}
    if first.first is None or second.first is None:
        return {**found, "consistent": None, "average": None, "probability": None, "flipped": None, "votes": None}
    one, other = first.first, 1 - second.first
    known = first.probability is not None and second.probability is not None
    return {
        **found,
        "consistent": one if one == other else 0.5,
        "average": (one + other) / 2,
        "probability": (first.probability + 1 - second.probability) / 2 if known else None,
        "flipped": one != other,
        "votes": [one * first.weight + other * second.weight, first.weight + second.weight],
    }


def judge_rows(judge, items, rows, eval_out: str, overwrite: bool) -> list[dict]:
    """`rows` with the judge's verdicts settled."""
    from preflab.judging.judges import judge_all

    verdicts = judge_all(judge, items, eval_out, overwrite)
    return [{**row, **combine_orders(*verdicts[2 * k : 2 * k + 2])} for k, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------------- figures


def fit_logistic(x: np.ndarray, y: np.ndarray, weights=None) -> np.ndarray:
    """Coefficients of a logistic regression with outcomes in [0, 1] (a tie is 0.5) and no intercept.

    Newton's method with a line search, to a gradient below 1e-8 a row. A weak ridge (a normal prior of standard
    deviation 10 on each logit) keeps models that won or lost everything finite.

    Args:
        x: shape (n, k). y, weights: shape (n,).
    """
    from scipy.special import expit, log_expit

    weights = np.ones(len(y)) if weights is None else weights

    def loss(beta):
        z = x @ beta
        return -(weights * (y * log_expit(z) + (1 - y) * log_expit(-z))).sum() + RIDGE / 2 * beta @ beta

    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = expit(x @ beta)
        gradient = x.T @ (weights * (p - y)) + RIDGE * beta
        if np.abs(gradient).max() <= 1e-8 * max(1, len(y)):
            break
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(beta))
        step, size, here = np.linalg.solve(hessian, gradient), 1.0, loss(beta)
        while loss(beta - size * step) > here - 1e-4 * size * (gradient @ step) and size > 1e-10:
            size /= 2
        beta = beta - size * step
    return beta


def style_controlled(differences: np.ndarray, y: np.ndarray, seed: int) -> dict:
    """Win rate of `a` between two answers of the same style: sigmoid of the model column of a Bradley-Terry fit.

    It cannot be known where the answers of one model differ from the other's by the same style every time (the model
    column lies in the features' span, R^2 above 0.95): NaN then.

    Args:
        differences: shape (n, 4), from `style_differences`. y: shape (n,), outcomes of `a`.
    """
    from scipy.special import expit

    features = scaled(differences)

    def rate(rows):
        x, outcome = rows[:, 1:], rows[:, 0]
        fit, *_ = np.linalg.lstsq(x[:, 1:], x[:, 0], rcond=None)
        if 1 - np.mean((x[:, 0] - x[:, 1:] @ fit) ** 2) > SPANNED:
            return float("nan")
        return float(expit(fit_logistic(x, outcome)[0]))

    return bootstrap(np.column_stack([y, np.ones(len(y)), features]), seed, statistic=rate)


def bradley_terry(rows: list[dict], names: list[str], seed: int) -> dict:
    """Strengths in logits, the first of `names` at 0, with intervals over prompts: `{name: metric}`.

    sigmoid(strength_i - strength_j) is the chance that i beats j (Bradley & Terry 1952); a tie is half a win each.
    """
    column = {name: k for k, name in enumerate(names)}
    pairs = [(column[r["a"]], column[r["b"]]) for r in rows]
    # One row a prompt for the bootstrap: the outcomes of every pairing, NaN where it has none.
    kinds = sorted(set(pairs))
    table = np.full((1 + max(r["prompt"] for r in rows), len(kinds)), np.nan)
    for r, pair in zip(rows, pairs, strict=True):
        table[r["prompt"], kinds.index(pair)] = r["consistent"]
    table = table[~np.isnan(table).all(1)]
    design = np.zeros((len(kinds), len(names)))
    for k, (a, b) in enumerate(kinds):
        design[k, a], design[k, b] = 1, -1

    def fit(resampled):
        played = (~np.isnan(resampled)).sum(0)
        score = np.nansum(resampled, 0) / np.maximum(played, 1)
        return np.concatenate([[0.0], fit_logistic(design[:, 1:], score, played.astype(float))])

    return {
        name: metric(0.0, None, None, len(table))
        if k == 0
        else bootstrap(table, seed, statistic=lambda x, k=k: fit(x)[k])
        for k, name in enumerate(names)
    }


def battle_metrics(rows: list[dict], seed: int) -> dict:
    """Figures of one pairing, as the score of `a`: `{name: metric}`.

    Rows without a verdict in both orders are left out of every rate and counted in `dropped`. win_rate is FastChat's
    adjusted rate (wins + ties / 2) / n; win_rate_votes counts strong verdicts as often as the judge prompt says.
    """
    verdicts = [v for row in rows for v in row["orders"]]
    parsed = [v for v in verdicts if v["first"] is not None]
    kept = [row for row in rows if row["consistent"] is not None]
    y = np.array([row["consistent"] for row in kept])
    found = {
        "prompts": metric(len(rows)),
        "dropped": metric(len(rows) - len(kept), n=len(rows)),
        "unparsed_verdicts": metric(len(verdicts) - len(parsed), n=len(verdicts)),
        "identical_answers": metric(sum(v["label"] == "identical" for v in verdicts) // 2, n=len(rows)),
    }
    if not kept:
        return found
    texts = [[row[f"answer_{side}"] for row in kept] for side in "ab"]
    tokens = [np.array([answer["tokens"] for answer in side]) for side in texts]
    styles = style_differences(*([answer["text"] for answer in side] for side in texts), *tokens)
    votes = np.array([row["votes"] for row in kept], float)
    slots = np.array([[v["first"] for v in row["orders"]] for row in kept]).mean(1)
    found |= {
        "wins": metric(int((y == 1).sum()), n=len(y)),
        "losses": metric(int((y == 0).sum()), n=len(y)),
        "ties": metric(int((y == 0.5).sum()), n=len(y)),
        "win_rate": bootstrap(y, seed),
        "wins_average_of_orders": metric(sum(row["average"] > 0.5 for row in kept), n=len(y)),
        "losses_average_of_orders": metric(sum(row["average"] < 0.5 for row in kept), n=len(y)),
        "ties_average_of_orders": metric(sum(row["average"] == 0.5 for row in kept), n=len(y)),
        "win_rate_average_of_orders": bootstrap([row["average"] for row in kept], seed),
        "win_rate_votes": bootstrap(votes, seed, statistic=lambda x: x[:, 0].sum() / x[:, 1].sum()),
        "win_rate_style_controlled": style_controlled(styles, y, seed),
        "p_win_rate_is_half": metric(sign_test(y), n=len(y)),
        "flip_rate": bootstrap([row["flipped"] for row in kept], seed),
        "first_slot_wins": bootstrap(slots, seed),
        "tokens_a": bootstrap(tokens[0], seed),
        "tokens_b": bootstrap(tokens[1], seed),
        "tokens_difference": bootstrap(np.stack(tokens, 1), seed),
    }
    weighted = [row["probability"] for row in kept if row["probability"] is not None]
    if len(weighted) == len(kept):
        found["win_rate_probability"] = bootstrap(weighted, seed)
    mass = [v["mass"] for v in parsed if v["mass"] is not None]
    if mass:
        found["verdict_mass_median"] = metric(float(np.median(mass)), n=len(mass))
        found["verdict_mass_below_half"] = metric(float(np.mean(np.array(mass) < 0.5)), n=len(mass))
    return found


def by_category(rows: list[dict], seed: int) -> dict:
    """Win rate of `a` in each category of prompts: `{category: {n, win_rate, p}}`."""
    kept = [row for row in rows if row["consistent"] is not None]
    found = {}
    for category in sorted({row["category"] for row in kept if row["category"] is not None}):
        y = [row["consistent"] for row in kept if row["category"] == category]
        found[category] = {"n": len(y), "win_rate": bootstrap(y, seed), "p_win_rate_is_half": sign_test(y)}
    return found


def answer_metrics(answers: list[dict], seed: int) -> dict:
    """Mean length and truncated share of one model's answers."""
    known = [a for a in answers if a is not None]
    found = {"answers": metric(len(known)), "tokens": bootstrap([a["tokens"] for a in known], seed)}
    cut = [a["finish_reason"] == "length" for a in known if a["finish_reason"] is not None]
    if cut:
        found["truncated_share"] = bootstrap(cut, seed)
    return found


def against_opponent(rows: list[dict], names: list[str], opponent: str, seed: int) -> dict:
    """Tuned minus base where both met one opponent: the paired difference of their scores, and its test.

    Empty where no prompt has verdicts for both.
    """
    from utils.stats import signed_rank

    scores = {name: {r["prompt"]: r["consistent"] for r in rows if r["a"] == name} for name in names}
    both = [k for k, v in scores["base"].items() if v is not None and scores["tuned"].get(k) is not None]
    if not both:
        return {}
    pairs = np.array([[scores["tuned"][k], scores["base"][k]] for k in both])
    return {
        "win_rate_difference": bootstrap(pairs, seed),
        "p_win_rate_difference": metric(signed_rank(pairs[:, 0] - pairs[:, 1]), n=len(both)),
    }
