"""Implicit rewards on held-out pairs: r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, eq. 5)."""

import numpy as np

from utils.artifacts import metric
from utils.stats import bootstrap, mcnemar, ranked_right, sign_test, signed_rank
from utils.tables import cell, difference, render


def reward_rows(scores: list[dict], beta: float) -> list[dict]:
    """Each scored pair (`PreferenceTrainer.score`) with its rewards and margin, in beta x nats."""
    rows = []
    for s in scores:
        chosen, rejected = beta * (s["chosen"] - s["ref_chosen"]), beta * (s["rejected"] - s["ref_rejected"])
        rows.append({**s, "reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected})
    return rows


def reward_metrics(rows: list[dict], surface=None, seed: int = 42) -> dict:
    """Held-out metrics, base beside tuned, each with standard error and 95% bootstrap interval over pairs.

    Args:
        rows: from `reward_rows`.
        surface: shape (len(rows),), scores of the words-and-length classifier; None leaves it out.

    Returns:
        `{name: metric}`. reward_accuracy counts a margin of 0 as half; reward_accuracy_strict counts it as wrong, as
        TRL does. likelihood_ranking_* is the share of pairs whose chosen answer is the likelier one. `p_*` are
        two-sided tests: exact sign test against 50%, exact McNemar for paired shares, Wilcoxon's signed ranks else.
    """
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    zero = np.zeros(len(rows))
    right = ranked_right(columns["margin"], zero)
    base = ranked_right(columns["ref_chosen"], columns["ref_rejected"])
    tuned = ranked_right(columns["chosen"], columns["rejected"])

    def mean(values):
        return bootstrap(values, seed)

    metrics = {
        "reward_accuracy": mean(right),
        "reward_accuracy_strict": mean(columns["margin"] > 0),
        "reward_margin": mean(columns["margin"]),
        "reward_chosen": mean(columns["reward_chosen"]),
        "reward_rejected": mean(columns["reward_rejected"]),
        "exact_ties": metric(int((columns["margin"] == 0).sum()), n=len(rows)),
        "likelihood_ranking_base": mean(base),
        "likelihood_ranking_tuned": mean(tuned),
        "likelihood_ranking_difference": mean(np.stack([tuned, base], 1)),
        "reward_accuracy_minus_base_ranking": mean(np.stack([right, base], 1)),
        "p_reward_accuracy_is_half": metric(sign_test(right), n=len(rows)),
        "p_likelihood_ranking_difference": metric(mcnemar(tuned, base), n=len(rows)),
        "p_reward_accuracy_is_base_ranking": metric(mcnemar(right, base), n=len(rows)),
        "p_reward_margin_is_0": metric(signed_rank(columns["margin"]), n=len(rows)),
    }
    for side in ("chosen", "rejected"):
        metrics[f"logps_{side}_base"] = mean(columns[f"ref_{side}"])
        metrics[f"logps_{side}_tuned"] = mean(columns[side])
        metrics[f"logps_{side}_difference"] = mean(np.stack([columns[side], columns[f"ref_{side}"]], 1))
        metrics[f"p_logps_{side}_difference"] = metric(signed_rank(columns[side] - columns[f"ref_{side}"]), n=len(rows))
    if surface is not None:
        surface_right = ranked_right(surface, zero)
        metrics["surface_classifier_accuracy"] = mean(surface_right)
        metrics["reward_accuracy_minus_surface"] = mean(np.stack([right, surface_right], 1))
        metrics["p_reward_accuracy_is_surface"] = metric(mcnemar(right, surface_right), n=len(rows))
    return metrics


def claim(metrics: dict) -> tuple[bool, str]:
    """Whether held-out reward accuracy is shown to lie above 50%, and the sentence that says so either way."""
    accuracy = metrics["reward_accuracy"]
    if accuracy["ci95"] is None:
        return False, f"No claim: {accuracy['n']} held-out pair is too few for an interval."
    low, high = (100 * x for x in accuracy["ci95"])
    figure = f"held-out reward accuracy is {100 * accuracy['value']:.1f}% (95% interval {low:.1f} to {high:.1f})"
    # With a handful of pairs a bootstrap interval can shrink to a point: the exact test must agree.
    if low > 50 and metrics["p_reward_accuracy_is_half"]["value"] < 0.05:
        return True, f"Training helped: {figure}, above 50%."
    why = "which does not lie above 50%" if low <= 50 else "but so few pairs cannot tell it from 50% (sign test)"
    return False, f"No claim that training helped: {figure}, {why}."


def displacement(metrics: dict) -> str | None:
    """A warning where both mean log-probabilities fell on the held-out pairs beyond chance (likelihood displacement,
    Razin et al. 2024): the 95% intervals of both differences lie below 0. Else None."""
    falls = [metrics[f"logps_{side}_difference"] for side in ("chosen", "rejected")]
    if any((fall["ci95"] or [None, fall["value"]])[1] >= 0 for fall in falls):
        return None
    return displacement_text(*(fall["value"] for fall in falls))


def displacement_text(chosen: float, rejected: float) -> str:
    """The warning for mean changes of the log-probabilities of chosen and rejected answers, in nats."""
    return (
        f"likelihood displacement: on the test split the log-probability of chosen answers changed by {chosen:+.2f}"
        f" nats and that of rejected ones by {rejected:+.2f} nats: the margin grows by making both less likely"
    )


def conclude(metrics: dict, title: str) -> tuple[str, str, str | None]:
    """What a run prints at its end.

    Returns:
        (text, verdict, warning): the table with verdict and warning below it, and these two alone.
    """
    if not metrics:
        verdict = "No claim: there is no test split."
        return f"{title}\n\n{verdict}", verdict, None
    (_, verdict), warning = claim(metrics), displacement(metrics)
    parts = [table(metrics, title), verdict, *([f"warning: {warning}"] if warning else [])]
    return "\n\n".join(parts), verdict, warning


def above_half(share: dict) -> dict:
    """A share's metric as its distance from 50%, the reward accuracy of the base by definition."""
    interval = [x - 0.5 for x in share["ci95"]] if share["ci95"] else None
    return {**share, "value": share["value"] - 0.5, "ci95": interval}


def table(metrics: dict, title: str) -> str:
    """The one table that a training run prints: base beside tuned, with differences and their 95% intervals."""
    chance = above_half(metrics["reward_accuracy"])
    lines = [
        (f"on {metrics['reward_accuracy']['n']} held-out pairs", "base", "tuned", "tuned - base [95% interval]"),
        (
            "reward accuracy, % (ties half)",
            "50.0 by definition",
            cell(metrics["reward_accuracy"], 100),
            difference(chance, metrics["p_reward_accuracy_is_half"], 100),
        ),
        (
            "likelier answer is chosen, %",
            cell(metrics["likelihood_ranking_base"], 100),
            cell(metrics["likelihood_ranking_tuned"], 100),
            difference(metrics["likelihood_ranking_difference"], metrics["p_likelihood_ranking_difference"], 100),
        ),
        (
            "reward margin, beta x nats",
            "0 by definition",
            cell(metrics["reward_margin"], 1, 3),
            difference(metrics["reward_margin"], metrics["p_reward_margin_is_0"], 1, 3),
        ),
    ]
    for side in ("chosen", "rejected"):
        base, tuned, moved = (f"logps_{side}_{k}" for k in ("base", "tuned", "difference"))
        row = (
            cell(metrics[base], 1, 2),
            cell(metrics[tuned], 1, 2),
            difference(metrics[moved], metrics[f"p_{moved}"], 1, 2),
        )
        lines.append((f"log-prob of {side}, nats", *row))
    if "surface_classifier_accuracy" in metrics:
        ahead = difference(metrics["reward_accuracy_minus_surface"], metrics["p_reward_accuracy_is_surface"], 100)
        surface = cell(metrics["surface_classifier_accuracy"], 100)
        lines.append(("words and length alone, % right", surface, "(no model at all)", f"rewards beat it by {ahead}"))
    return render(title, lines)
