"""Printed table and verdict of an SFT run: held-out perplexity of base and tuned model."""

from preflab.evaluation.perplexity_report import change_power
from preflab.training.training_table import SFT_FIGURES, run_report
from utils.stats import direction
from utils.tables import cell, decimals_of, difference, p_equals, undecided

NO_BASE = (
    "No claim: this sharded run was resumed without the cache of its base's figures; use eval_perplexity.py to compare."
)


def power_note(metrics: dict) -> str:
    """What these conversations could have shown, where the verdict is inconclusive; else ""."""
    if "heldout_ppl_ratio" not in metrics:
        return ""
    changed = direction(metrics["heldout_ppl_ratio"], metrics["p_heldout_nll_difference"]["value"], 1)
    return "" if changed else change_power(metrics["heldout_nll_difference"])


def table_lines(metrics: dict) -> list[tuple]:
    """The lines of the printed table, its head first."""
    n = metrics["heldout_ppl_tuned"]["n"]
    lines = [(f"on {n} held-out conversations", "base", "tuned", "tuned - base [95% interval]")]
    if "heldout_ppl_base" not in metrics:
        return [*lines, ("perplexity per token", "-", cell(metrics["heldout_ppl_tuned"], 1, 3), "")]
    # A test of one conversation means nothing.
    p = metrics["p_heldout_nll_difference"] if n > 1 else None
    for label, name, digits in (("perplexity per token", "ppl", 3), ("loss, nats per token", "nll", 4)):
        sides = [cell(metrics[f"heldout_{name}_{side}"], 1, digits) for side in ("base", "tuned")]
        lines.append((label, *sides, difference(metrics[f"heldout_{name}_difference"], p, 1, digits)))
    bits = [cell(metrics[f"heldout_bits_per_byte_{side}"], 1, 4) for side in ("base", "tuned")]
    return [*lines, ("bits per byte", *bits, "")]


def verdict_of(metrics: dict) -> tuple[bool, str]:
    """Whether held-out perplexity fell beyond chance, and the sentence about it.

    Both the 95% interval of the ratio and the permutation test must agree.
    """
    if "heldout_ppl_base" not in metrics:
        return False, NO_BASE
    ratio, p = metrics["heldout_ppl_ratio"], metrics["p_heldout_nll_difference"]["value"]
    if ratio["ci95"] is None:
        return False, "No claim: one held-out conversation is too few for an interval."
    # The ratio of perplexities, tuned over base, as a change in percent.
    change, low, high = (100 * (x - 1) for x in (ratio["value"], *ratio["ci95"]))
    digits = decimals_of((change, low, high))
    finding = f"held-out perplexity changed by {change:+.{digits}f}%"
    finding += f" (95% interval {low:+.{digits}f} to {high:+.{digits}f}"
    rose = direction(ratio, p, 1)
    if rose:
        verdict = "hurt" if rose > 0 else "helped"
        return rose < 0, f"Training {verdict}: {finding}, permutation test {p_equals(p)})."
    return False, f"Inconclusive: {finding}), {undecided(ratio, p, 1, 'no change')}."


render = run_report(SFT_FIGURES, table_lines, verdict_of, lambda metrics: [power_note(metrics)])
