"""Text and picture of eval_perplexity.py."""

import math

import numpy as np

from preflab.data.length_bias import sentence
from preflab.evaluation.reward_table import SIDES
from utils.errors import is_main_process
from utils.plots import CHOSEN, NEUTRAL, REJECTED, count_axis, empty_panel, figure, interval_lengths, save
from utils.power import power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction, holm
from utils.tables import cell, decimals_of, difference, estimate, number, p_equals, p_value
from utils.tables import render as render_table

SECTIONS = {
    "response_chosen": "chosen answers, given the prompt",
    "response_rejected": "rejected answers, given the prompt",
    "whole_chosen": "prompt and chosen answer",
    "whole_rejected": "prompt and rejected answer",
    "text": "plain text",
}

SHORT_LABELS = {
    "response_chosen": "chosen\nanswer",
    "response_rejected": "rejected\nanswer",
    "whole_chosen": "prompt +\nchosen",
    "whole_rejected": "prompt +\nrejected",
    "text": "plain\ntext",
}

COLOURS = {"chosen": CHOSEN, "rejected": REJECTED, "text": NEUTRAL}

# Perplexities that differ by more than this factor are drawn on a logarithmic axis.
LOGARITHMIC_FROM = 20

# With five units even equal signs everywhere give the permutation test a p-value of 0.0625.
FEWEST_UNITS_FOR_A_TEST = 6


@fits_terminal
def render(metrics: dict, bias: dict, title: str, left_out: str | None, not_held_out: str = "") -> Report:
    """The printed table, KL divergence and length bias, with one sentence per section as the verdict.

    Args:
        bias: `{split: bias}` of `held_out.length_bias`.
        left_out: the line of `held_out.left_out`; None without pairs.
        not_held_out: why the pairs are no evidence; "" for held-out pairs.
    """
    blocks = [_table(metrics, title)]
    kls = [
        f"{side} {metrics[f'kl_{side}']['value']:.4f} ± {metrics[f'kl_{side}']['stderr'] or 0:.4f}"
        for side in SIDES
        if f"kl_{side}" in metrics
    ]
    if kls:
        blocks.append(f"KL(tuned || base) on the data's answers, nats per token: {', '.join(kls)}")
    if left_out:
        blocks.append(left_out)
    if bias:
        blocks.append("\n".join(sentence(split, b) for split, b in bias.items()))
    verdict = " ".join(filter(None, [not_held_out, verdict_of(metrics)]))
    return Report("\n\n".join(filter(None, [*blocks, verdict, power_notes(metrics)])), verdict)


def verdict_of(metrics: dict) -> str:
    """How much the perplexity of each section changed, and whether the change is significant.

    The p-values have Holm's correction for the number of sections that can be tested.
    """
    measured = [name for name in SECTIONS if f"{name}_ppl_base" in metrics]
    if not any(f"{name}_ppl_tuned" in metrics for name in measured):
        return "No claim: one model's perplexity, without a second model to compare."
    p_values = adjusted(metrics)
    return " ".join(_change(metrics, name, SECTIONS[name], p_values) for name in measured)


def adjusted(metrics: dict) -> dict[str, float]:
    """The p-value of each section with enough units for a test, with Holm's correction for their number."""
    sections = {name: metrics[f"{name}_ppl_ratio"]["n"] for name in SECTIONS if f"{name}_ppl_ratio" in metrics}
    tested = [name for name, n in sections.items() if n >= FEWEST_UNITS_FOR_A_TEST]
    return dict(zip(tested, holm([metrics[f"p_{name}_nll_difference"]["value"] for name in tested]), strict=True))


def power_notes(metrics: dict) -> str:
    """What the texts could have shown, a line per section whose perplexity did not change significantly."""
    notes, p_values = [], adjusted(metrics)
    for name, label in SECTIONS.items():
        if f"{name}_ppl_ratio" in metrics and not direction(metrics[f"{name}_ppl_ratio"], p_values.get(name, 1.0), 1):
            notes.append(change_power(metrics[f"{name}_nll_difference"], label))
    return "\n".join(filter(None, notes))


def change_power(m: dict, of: str = "") -> str:
    """`power_sentence` of a difference in nats per token, as a change of perplexity."""

    def percent(nats: float) -> str:
        change = 100 * math.expm1(nats)
        return f"{number(change, decimals_of([change], 2))}%"

    return power_sentence(m, percent, "a change of perplexity", of)


def _change(metrics: dict, name: str, label: str, p_values: dict[str, float]) -> str:
    ratio = metrics[f"{name}_ppl_ratio"]
    change = f"{100 * (ratio['value'] - 1):+.2f}%"
    if ratio["ci95"] is None:
        return f"{label.capitalize()}: perplexity {change}, one unit, so no interval."
    if name not in p_values:
        return f"{label.capitalize()}: perplexity {change}, {ratio['n']} units, too few for a test."
    low, high, p = *(100 * (x - 1) for x in ratio["ci95"]), p_values[name]
    digits = decimals_of((100 * (ratio["value"] - 1), low, high), 2)
    change = f"{100 * (ratio['value'] - 1):+.{digits}f}%"
    outcome = {1: "rose", -1: "fell", 0: "did not change significantly"}[direction(ratio, p, 1)]
    # Where interval and test differ, the reader sees both.
    corrected = f" after Holm's correction for {len(p_values)} sections" if len(p_values) > 1 else ""
    test = f"; permutation test {p_equals(p)}{corrected}" if (p < 0.05) != (low > 0 or high < 0) else ""
    interval = f"95% interval {low:+.{digits}f} to {high:+.{digits}f}%"
    return f"{label.capitalize()}: perplexity {outcome} ({change}, {interval}{test})."


def _table(metrics: dict, title: str) -> str:
    """Base beside tuned, three lines per section: perplexity per token, mean over units, bits per byte."""
    if not any(f"{name}_ppl_tuned" in metrics for name in SECTIONS):
        return _table_of_one(metrics, title)
    lines = [("perplexity", "units / tokens", "base", "tuned", "tuned - base [95%]", "p")]
    for name in SECTIONS:
        if f"{name}_ppl_base" in metrics:
            # The section's metrics without its name. A `p_` metric starts differently and is read by its full name.
            m = {k.removeprefix(f"{name}_"): v for k, v in metrics.items() if k.startswith(f"{name}_")}
            # A single unit has no spread, so there is nothing to test.
            p = f"{p_value(metrics[f'p_{name}_nll_difference']['value'])}" if m["tokens"]["n"] > 1 else "-"
            sides = [cell(m[f"ppl_{side}"], 1, 3) for side in ("base", "tuned")]
            change = difference(m["ppl_difference"], None, 1, 3)
            label = SHORT_LABELS[name].replace("\n", " ")
            lines.append((label, f"{m['tokens']['n']} / {m['tokens']['value']}", *sides, change, p))
            sides = [cell(m[f"ppl_mean_{side}"], 1, 3) for side in ("base", "tuned")]
            lines.append(("  mean over units", "", *sides, "", ""))
            sides = [f"{m[f'bits_per_byte_{side}']['value']:.4f}" for side in ("base", "tuned")]
            lines.append(("  bits per byte", "", *sides, "", ""))
    return render_table(title, lines)


def _table_of_one(metrics: dict, title: str) -> str:
    """The table of one model: perplexity per token with its interval, mean over units, bits per byte."""
    lines = [("perplexity", "units / tokens", "per token [95%]", "mean over units", "bits per byte")]
    for name in SECTIONS:
        if f"{name}_ppl_base" in metrics:
            tokens, bits = metrics[f"{name}_tokens"], metrics[f"{name}_bits_per_byte_base"]["value"]
            shown = estimate(metrics[f"{name}_ppl_base"], 1, 3), cell(metrics[f"{name}_ppl_mean_base"], 1, 3)
            label = SHORT_LABELS[name].replace("\n", " ")
            lines.append((label, f"{tokens['n']} / {tokens['value']}", *shown, f"{bits:.4f}"))
    return render_table(title, lines)


def draw(path, metrics: dict, rows: list[dict], text_rows: list[dict], title: str) -> None:
    """Three panels: perplexity of base and tuned; histogram of the change; change over length. Rank 0 only.

    Args:
        rows, text_rows: the pair rows and the text rows of perplexity_rows.jsonl.
    """
    if not is_main_process():
        return
    fig, axes = figure(1, 3, title)
    _draw_perplexities(axes[0], metrics)
    if not any(name.endswith("_ppl_tuned") for name in metrics):
        for ax, name in zip(axes[1:], ("Change by row", "Change by length"), strict=True):
            ax.set_title(name)
            empty_panel(ax, "one model alone")
        return save(fig, path)
    # Change in nats per token: {set of rows: (change per row, scored tokens per row)}.
    changes = {}
    for side in SIDES if rows else ():
        tokens = np.array([row[f"tokens_response_{side}"] for row in rows])
        changes[side] = np.array([row[f"nll_response_{side}_difference"] for row in rows]) / tokens, tokens
    if text_rows:
        tokens = np.array([row["tokens"] for row in text_rows])
        changes["text"] = np.array([row["nll_difference"] for row in text_rows]) / tokens, tokens
    _draw_histogram(axes[1], changes)
    for name, (change, tokens) in changes.items():
        axes[2].scatter(tokens, change, s=6, alpha=0.5, color=COLOURS[name], label=name)
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    count_axis(axes[2].xaxis)
    axes[2].set(title="Change by length", xlabel="scored tokens per row", ylabel="tuned - base (nats per token)")
    axes[2].legend()
    save(fig, path)


def _draw_perplexities(ax, metrics: dict) -> None:
    names = [name for name in SHORT_LABELS if f"{name}_ppl_base" in metrics]
    largest, smallest = 0.0, float("inf")
    for side, colour, shift in (("base", NEUTRAL, -0.17), ("tuned", CHOSEN, 0.17)):
        ppls = [metrics[f"{name}_ppl_{side}"] for name in names if f"{name}_ppl_{side}" in metrics]
        if not ppls:
            continue
        value = np.array([m["value"] for m in ppls], float)
        at = np.arange(len(names)) + shift
        # Dots, not bars: on a logarithmic axis the length of a bar means nothing.
        ax.errorbar(at, value, interval_lengths(ppls), fmt="o", ms=4, lw=1.2, color=colour, capsize=2, label=side)
        largest, smallest = max(largest, value.max()), min(smallest, value.min())
    ax.set_xticks(range(len(names)), [SHORT_LABELS[name] for name in names], fontsize=7)
    ax.set(title="Perplexity, 95% intervals", ylabel="exp(nats per token)", xlim=(-0.5, len(names) - 0.5))
    if largest > LOGARITHMIC_FROM * smallest:
        ax.set_yscale("log")
        ax.minorticks_off()
    else:
        ax.set_ylim(0)
    ax.legend()


def _draw_histogram(ax, changes: dict) -> None:
    pooled = np.concatenate([change for change, _ in changes.values()])
    # If all changes are equal, the bins get the width of a visible change.
    low, high = (pooled.min(), pooled.max()) if np.ptp(pooled) > 1e-6 else (pooled.mean() - 0.01, pooled.mean() + 0.01)
    edges = np.linspace(low, high, min(40, max(8, len(pooled) // 8)))
    for name, (change, _) in changes.items():
        label = f"{name} {change.mean():+.2g}"
        ax.hist(change, bins=edges, histtype="step", lw=1.5, color=COLOURS[name], label=label)
    ax.axvline(0, color="grey", ls=":", lw=1)
    ax.set(title="Change by row", xlabel="tuned - base (nats per token)", ylabel="rows")
    count_axis(ax.yaxis)
    ax.legend(title="legend: means")
