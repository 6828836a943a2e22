"""Table and verdict of a preference-training run."""

from preflab.evaluation.reward_table import accuracy_row, comparison_row, heading, margin_row, ranking_row
from utils.tables import render


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
    accuracy, p = metrics["reward_accuracy"], metrics["p_reward_accuracy_is_half"]
    lines = [
        heading(accuracy["n"]),
        accuracy_row("reward accuracy, % (ties half)", accuracy, p),
        ranking_row(metrics),
        margin_row(metrics["reward_margin"], metrics["p_reward_margin_is_0"]),
    ]
    for side in ("chosen", "rejected"):
        base, tuned, change = (metrics[f"logps_{side}_{key}"] for key in ("base", "tuned", "difference"))
        p = metrics[f"p_logps_{side}_difference"]
        lines.append(comparison_row(f"log-prob of {side}, nats", base, tuned, change, p, digits=2))
    if "surface_classifier_accuracy" in metrics:
        baseline, ahead = metrics["surface_classifier_accuracy"], metrics["reward_accuracy_minus_surface"]
        p = metrics["p_reward_accuracy_is_surface"]
        lines.append(comparison_row("bag of words, tuned reward, %", baseline, accuracy, ahead, p, 100))
    return render(title, lines)
