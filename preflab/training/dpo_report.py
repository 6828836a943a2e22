"""Printed table, verdict and warning of a preference-training run."""

from preflab.evaluation.reward_table import (
    COIN_FLIP,
    accuracy_row,
    comparison_row,
    heading,
    margin_row,
    minus_half,
    ranking_row,
)
from preflab.training.training_table import DPO_FIGURES, accuracy_power, run_report
from utils.stats import direction
from utils.tables import cell, difference, undecided

LIST_NOTE = (
    "A pair is a list's best and worst answer; the lines `all answers` compare every two answers of different score."
)


def verdict_of(metrics: dict) -> tuple[bool, str]:
    """Whether held-out reward accuracy is above 50% beyond chance, and the sentence about it."""
    accuracy = metrics["reward_accuracy"]
    if accuracy["ci95"] is None:
        return False, f"No claim: {accuracy['n']} held-out pair is too few for an interval."
    low, high = (100 * x for x in accuracy["ci95"])
    finding = f"held-out reward accuracy is {100 * accuracy['value']:.1f}% (95% interval {low:.1f} to {high:.1f})"
    p = metrics["p_reward_accuracy_is_half"]["value"]
    above = direction(accuracy, p, 0.5)
    if above > 0:
        return True, f"Training helped: {finding}, above 50%.{surface_caveat(metrics)}"
    if above < 0:
        return False, f"Training hurt: {finding}, below 50%: the rewards prefer the rejected answers."
    return False, f"Inconclusive: {finding}, {undecided(accuracy, p, 0.5, '50%')}."


def surface_caveat(metrics: dict) -> str:
    """A sentence where the words and lengths of the answers rank the pairs as well as the rewards do, else ""."""
    ahead = metrics.get("reward_accuracy_minus_surface")
    if ahead is None or direction(ahead, metrics["p_reward_accuracy_is_surface"]["value"]) > 0:
        return ""
    baseline = f"{100 * metrics['surface_classifier_accuracy']['value']:.1f}%"
    return (
        f" The bag-of-words and length baseline is not clearly below it ({baseline}), so the gain may come from"
        " surface features of the answers."
    )


def displacement(metrics: dict) -> str | None:
    """A warning where both mean log-probabilities fell beyond chance on the held-out pairs, else None.

    Likelihood displacement (Razin et al. 2024): for both, 95% interval and test say that the difference is below 0.
    """
    changes = [metrics[f"logps_{side}_difference"] for side in ("chosen", "rejected")]
    tests = [metrics[f"p_logps_{side}_difference"]["value"] for side in ("chosen", "rejected")]
    if any(direction(change, p) >= 0 for change, p in zip(changes, tests, strict=True)):
        return None
    return displacement_text(*(change["value"] for change in changes))


def displacement_text(chosen: float, rejected: float) -> str:
    """The warning for mean changes of the log-probabilities of chosen and rejected answers, in nats."""
    return (
        f"likelihood displacement: on the test split the log-probability of chosen answers changed by {chosen:+.2f}"
        f" nats and that of rejected ones by {rejected:+.2f} nats: the margin grows by making both less likely"
    )


def table_lines(metrics: dict) -> list[tuple]:
    """The lines of the printed table, its head first: base beside tuned, with differences and 95% intervals."""
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
        # A line across the columns: the classifier is neither base nor tuned.
        baseline, ahead = metrics["surface_classifier_accuracy"], metrics["reward_accuracy_minus_surface"]
        behind = difference(ahead, metrics["p_reward_accuracy_is_surface"], 100)
        lines.append((f"bag-of-words baseline {cell(baseline, 100)}%; tuned reward - baseline {behind}",))
    return lines + list_rows_of_table(metrics)


def list_rows_of_table(metrics: dict) -> list[tuple]:
    """Lines of the printed table about complete lists; none for pairs."""
    if "list_accuracy" not in metrics:
        return []
    accuracy, tau = metrics["list_accuracy"], metrics["kendall_tau"]
    ranking = (metrics[f"list_ranking_{key}"] for key in ("base", "tuned", "difference"))
    change, p = minus_half(accuracy), metrics["p_list_accuracy_is_half"]
    return [
        comparison_row("all answers: pairs in order, %", COIN_FLIP, accuracy, change, p, 100),
        comparison_row("all answers: Kendall's tau-b", "0 by def.", tau, tau, metrics["p_kendall_tau_is_0"], 1, 3),
        comparison_row("all answers: likelier better, %", *ranking, metrics["p_list_ranking_difference"], 100),
    ]


def notes_of(metrics: dict) -> list[str]:
    """Sentences below the verdict; "" where there is nothing to say."""
    return [accuracy_power(metrics), LIST_NOTE if "list_accuracy" in metrics else ""]


render = run_report(DPO_FIGURES, table_lines, verdict_of, notes_of, displacement)
