"""The report of generate_preference_pairs.py: tables, verdict and picture."""

from pathlib import Path

import numpy as np

from utils.plots import CHOSEN, NEUTRAL, REJECTED, count_axis, figure, save
from utils.stage import Report, fits_terminal
from utils.tables import cell, estimate, p_equals, p_value
from utils.tables import render as render_table


@fits_terminal
def render(sections: dict, title: str) -> Report:
    """What was sampled, which pairs came of it, and how far the scorers agree.

    Args:
        sections: from `preflab.pairs.metrics.pair_sections`.
    """
    blocks = [render_table(title, pair_lines(sections))]
    if sections["agreement"]:
        blocks.append(render_table("agreement with other scorers (chance: 50% same order)", _agreement_lines(sections)))
    verdict = verdict_of(sections)
    return Report("\n\n".join([*blocks, verdict]), verdict)


def verdict_of(sections: dict) -> str:
    """How many pairs there are, and why prompts were left out."""
    counts = sections["counts"]
    dropped = ", ".join(f"{reason} {n}" for reason, n in counts["dropped"].items()) or "nothing"
    verdict = (
        f"{counts['train']} train and {counts['test']} test pairs from {counts['prompts']} prompts;"
        f" left out: {dropped}."
    )
    # In the verdict itself, which the artifact keeps: shuffled pairs look like ordinary training data.
    if sections["shuffled"]:
        verdict += " SCORES WERE SHUFFLED among each prompt's answers: a control, not preference data."
    return verdict


def pair_lines(sections: dict) -> list[tuple[str, str]]:
    """Rows of the main table: the answers as sampled, then the pairs."""
    sampling, pairs, counts = sections["sampling"], sections["pairs"], sections["counts"]
    lines = [("sampled answers and their pairs", "value")]
    lines.append(("prompts", f"{counts['prompts']}"))
    lines.append(("distinct answers per prompt", cell(sampling["distinct_answers"], 1, 2)))
    # Missing for --answers given, where the dataset does not record them.
    if "tokens" in sampling:
        lines.append(("tokens per answer", cell(sampling["tokens"])))
        lines.append(("truncated, %", cell(sampling["truncated_share"], 100)))
    lines.append(("empty, %", cell(sampling["empty_share"], 100)))
    lines.append(("mean score of all samples", cell(pairs["score_mean"], 1, 3)))
    for side in ("chosen", "rejected"):
        lines.append((f"score of {side}", cell(pairs[f"score_{side}"], 1, 3)))
    for side in ("chosen", "rejected"):
        lines.append((f"win probability of {side}, %", cell(pairs[f"win_{side}"], 100)))
    # A share far from 50% shows a scorer that rewards length.
    longer = f"{estimate(pairs['chosen_longer'], 100)} {p_equals(pairs['p_chosen_longer_is_half']['value'])}"
    lines.append(("chosen is longer than rejected, %", longer))
    return lines


def _agreement_lines(sections: dict) -> list[tuple]:
    """Rows of the agreement table, one per further scorer."""
    lines = [("other scorers on the same answers", "pairs", "same order, %", "p", "same best, %", "Kendall's tau")]
    for name, m in sections["agreement"].items():
        order, p = estimate(m["same_order"], 100), p_value(m["p_same_order_is_half"]["value"])
        best, tau = cell(m["same_best"], 100), cell(m["rank_correlation"], 1, 2)
        lines.append((name, str(m["same_order"]["n"]), order, p, best, tau))
    return lines


def pairs_figure(path: Path, rows: list[dict], title: str) -> None:
    """Draw three histograms over the pairs: scores, win probabilities, difference in length. Rank 0 only.

    Args:
        rows: from `preflab.pairs.pairing.pairs_of`.
    """
    fig, axes = figure(1, 3, title)
    for ax, key in zip(axes, ("score", "win"), strict=False):
        values = {side: np.array([row[f"{key}_{side}"] for row in rows]) for side in ("chosen", "rejected")}
        # Both sides have the same bins, so that they can be compared; those of win probabilities are fixed.
        bins = np.linspace(0, 1, 21) if key == "win" else np.histogram_bin_edges(np.concatenate([*values.values()]), 20)
        for (side, of_side), colour in zip(values.items(), (CHOSEN, REJECTED), strict=True):
            ax.hist(of_side, bins=bins, color=colour, alpha=0.6, label=f"{side}, mean {of_side.mean():.2g}")
    length = np.array([len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows])
    axes[2].hist(length, bins=20, color=NEUTRAL, label=f"chosen longer in {(length > 0).mean():.0%}")
    axes[2].axvline(0, color="grey", ls=":", lw=1)
    # Log-odds from reward models, rankers and the controls; judges give win probabilities as scores.
    axes[0].set(title="Scores", xlabel="score (log-odds, or the scorer's own scale)", ylabel="pairs")
    axes[1].set(title="Win probabilities", xlabel="P(beats a sample of the policy)", ylabel="pairs")
    axes[2].set(title="Length difference", xlabel="chosen − rejected (characters)", ylabel="pairs")
    for ax in axes:
        count_axis(ax.yaxis)
        ax.legend()
    save(fig, path)
