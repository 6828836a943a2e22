"""Table and verdict of a preference-training run."""

from preflab.evaluation.win_rate_report import minus_half
from utils.tables import cell, difference, render


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


def table(metrics: dict, title: str) -> str:
    """The one table that a training run prints: base beside tuned, with differences and their 95% intervals."""
    chance = minus_half(metrics["reward_accuracy"])
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
