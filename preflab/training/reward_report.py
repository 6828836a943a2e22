"""Printed table and verdict of a reward model's training: held-out accuracy beside what needs no training."""

from preflab.evaluation.reward_table import minus_half
from preflab.training.training_table import REWARD_FIGURES, accuracy_power, run_report
from utils.stats import direction
from utils.tables import cell, difference, estimate, undecided

# Name in the metrics, label in the table, name in sentences.
BASELINES = (
    ("base_ranking", "base model's likelihood, %", "the base model's likelihood"),
    ("surface", "bag of words and length, %", "the bag-of-words and length baseline"),
    ("longer", "longer answer, %", "the longer answer"),
)


def verdict_of(metrics: dict) -> tuple[bool, str]:
    """Whether the rewards rank held-out pairs better than chance and than every baseline, and the sentence about it."""
    accuracy = metrics["reward_accuracy"]
    if accuracy["ci95"] is None:
        return False, f"No claim: {accuracy['n']} held-out pair is too few for an interval."
    low, high = (100 * x for x in accuracy["ci95"])
    finding = f"held-out accuracy is {100 * accuracy['value']:.1f}% (95% interval {low:.1f} to {high:.1f})"
    p = metrics["p_reward_accuracy_is_half"]["value"]
    above = direction(accuracy, p, 0.5)
    if above < 0:
        return False, f"The reward model prefers the worse answers: {finding}, below 50%."
    if not above:
        return False, f"Inconclusive: {finding}, {undecided(accuracy, p, 0.5, '50%')}."
    behind = [name for key, _, name in BASELINES if not is_ahead(metrics, key)]
    if behind:
        return False, f"The reward model beats chance: {finding}; it does not clearly beat {' or '.join(behind)}."
    return True, f"The reward model beats chance and every baseline: {finding}."


def is_ahead(metrics: dict, baseline: str) -> bool:
    """Whether interval and test say that the rewards rank better than the baseline; True where it was not computed."""
    ahead = metrics.get(f"reward_accuracy_minus_{baseline}")
    return ahead is None or direction(ahead, metrics[f"p_reward_accuracy_is_{baseline}"]["value"]) > 0


def table_lines(metrics: dict) -> list[tuple]:
    """The lines of the printed table, its head first."""
    accuracy = metrics["reward_accuracy"]
    lines = [
        (f"chosen ranked higher, {accuracy['n']} held-out pairs", "accuracy", "rewards - it [95% interval]"),
        ("rewards, % (ties half)", estimate(accuracy, 100), ""),
        ("chance, %", "50.0 by def.", difference(minus_half(accuracy), metrics["p_reward_accuracy_is_half"], 100)),
    ]
    for key, label, _ in BASELINES:
        if f"{key}_accuracy" in metrics:
            change, p = metrics[f"reward_accuracy_minus_{key}"], metrics[f"p_reward_accuracy_is_{key}"]
            lines.append((label, cell(metrics[f"{key}_accuracy"], 100), difference(change, p, 100)))
    for key, label in (("length_matched", "length-matched"), ("better_is_shorter", "better answer shorter")):
        part = metrics[f"reward_accuracy_{key}"]
        lines.append((f"rewards on {part['n']} pairs, {label}, %", cell(part, 100), ""))
    margin = metrics["reward_margin"]
    lines.append(("margin, chosen - rejected, log-odds", cell(margin, 1, 3), ""))
    ece, floor = metrics["calibration_ece"], metrics["calibration_ece_if_calibrated"]
    return [*lines, (f"calibration error {cell(ece, 100)}%; of a calibrated model {cell(floor, 100)}%",)]


render = run_report(REWARD_FIGURES, table_lines, verdict_of, lambda metrics: [accuracy_power(metrics)])
