"""Table rows that compare base and tuned, shared by the reports of DPO training and of eval_win_rate.py."""

from utils.tables import cell, difference, is_missing

# The two answers of a pair.
SIDES = ("chosen", "rejected")
# Rewards are log-ratios against the base model, so its own rewards are 0 and its accuracy is 50%, by definition.
NO_REWARD, COIN_FLIP = "0 by def.", "50.0 by def."


def heading(pairs: int, held_out: bool = True) -> tuple:
    """The head of a reward table over `pairs` pairs."""
    name = f"on {pairs} held-out pairs" if held_out else f"on {pairs} pairs, not held out"
    return (name, "base", "tuned", "tuned - base [95% interval]")


def comparison_row(label: str, base, tuned, change: dict, p: dict | None, scale: float = 1, digits: int = 1) -> tuple:
    """One row. `base` and `tuned` are metrics, or text as printed; `change` is the metric of their difference."""
    sides = [side if isinstance(side, str) else cell(side, scale, digits) for side in (base, tuned)]
    return (label, *sides, difference(change, p, scale, digits))


def accuracy_row(label: str, accuracy: dict, p: dict) -> tuple:
    """Share of pairs whose chosen answer has the higher reward, in percent, against 50%."""
    return comparison_row(label, COIN_FLIP, accuracy, minus_half(accuracy), p, 100)


def ranking_row(metrics: dict) -> tuple:
    """Share of pairs whose chosen answer is the likelier one, in percent."""
    base, tuned, change = (metrics[f"likelihood_ranking_{key}"] for key in ("base", "tuned", "difference"))
    p = metrics["p_likelihood_ranking_difference"]
    return comparison_row("likelier answer is chosen, %", base, tuned, change, p, 100)


def margin_row(margin: dict, p: dict) -> tuple:
    """Mean reward margin of chosen over rejected."""
    return comparison_row("reward margin, beta x nats", NO_REWARD, margin, margin, p, 1, 3)


def minus_half(share: dict) -> dict:
    """The metric of a share as its distance from 50%."""
    # A constant shift moves the interval and leaves the standard error as it is.
    interval = [x - 0.5 for x in share["ci95"]] if share["ci95"] else None
    return {**share, "value": None if is_missing(share["value"]) else share["value"] - 0.5, "ci95": interval}
