"""Printed table and verdict of a KTO run: do the implicit rewards separate answers with thumbs up and down?"""

from preflab.evaluation.reward_table import COIN_FLIP, NO_REWARD, comparison_row, minus_half
from preflab.training.training_table import KTO_FIGURES, run_report
from utils.stats import direction
from utils.tables import undecided

ONE_LABEL = "No claim: the held-out answers have one label only, so nothing can be separated."


def verdict_of(metrics: dict) -> tuple[bool, str]:
    """Whether the rewards separate the labels beyond chance (interval and test agree), and the sentence about it."""
    area = metrics.get("reward_auc")
    if area is None:
        return False, ONE_LABEL
    if area["ci95"] is None:
        return False, "No claim: too few held-out answers for an interval."
    low, high = (100 * x for x in area["ci95"])
    finding = (
        f"in {100 * area['value']:.1f}% of all couples of a held-out answer with a thumb up and one with a thumb down"
        f" (95% interval {low:.1f} to {high:.1f}) the first has the higher reward"
    )
    p = metrics["p_reward_auc_is_half"]["value"]
    above = direction(area, p, 0.5)
    if above:
        return above > 0, f"Training {'helped' if above > 0 else 'hurt'}: {finding}."
    return False, f"Inconclusive: {finding}; {undecided(area, p, 0.5, '50%')}."


def table_lines(metrics: dict) -> list[tuple]:
    """The lines of the printed table, its head first: base beside tuned, with differences and 95% intervals."""
    counts = [f"{metrics[f'reward_{name}']['n']} {name}" for name in ("up", "down") if f"reward_{name}" in metrics]
    lines = [(f"on held-out thumbs ({', '.join(counts)})", "base", "tuned", "tuned - base [95% interval]")]
    if "reward_auc" in metrics:
        area, p = metrics["reward_auc"], metrics["p_reward_auc_is_half"]
        lines.append(comparison_row("up above down by reward, %", COIN_FLIP, area, minus_half(area), p, 100))
        base, tuned, change = (metrics[f"likelihood_auc_{key}"] for key in ("base", "tuned", "difference"))
        lines.append(comparison_row("up above down by log-prob, %", base, tuned, change, None, 100))
    for name in ("up", "down"):
        if f"reward_{name}" in metrics:
            reward, p = metrics[f"reward_{name}"], metrics[f"p_reward_{name}_is_0"]
            lines.append(comparison_row(f"reward of {name}, beta x nats", NO_REWARD, reward, reward, p, 1, 3))
            base, tuned, change = (metrics[f"logps_{name}_{key}"] for key in ("base", "tuned", "difference"))
            lines.append(comparison_row(f"log-prob of {name}, nats", base, tuned, change, p, digits=2))
    return lines


render = run_report(KTO_FIGURES, table_lines, verdict_of)
