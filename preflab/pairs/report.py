"""What generate_preference_pairs.py prints."""

from utils.errors import is_main_process
from utils.plots import CHOSEN, NEUTRAL, REJECTED, figure, save
from utils.tables import cell, estimate, render


def conclude(sections: dict, title: str) -> tuple[str, str]:
    """(text, verdict): what was sampled, what became of it, how the scorers agree, and one sentence.

    Args:
        sections: sampling, pairs (metrics), counts, agreement (metrics by scorer), controls (marks of a trial).
    """
    sampled, pairs, counts = sections["sampling"], sections["pairs"], sections["counts"]
    lines = [("of the model's own answers", "value")]
    lines.append(("prompts", f"{counts['prompts']}"))
    lines.append(("distinct answers a prompt", cell(sampled["distinct_answers"], 1, 2)))
    if "tokens" in sampled:
        lines.append(("tokens an answer", cell(sampled["tokens"])))
        lines.append(("cut off at the longest, %", cell(sampled["truncated_share"], 100)))
    lines.append(("empty, %", cell(sampled["empty_share"], 100)))
    lines.append(("score of a sample", cell(pairs["score_mean"], 1, 3)))
    sides = ", ".join(cell(pairs[f"score_{side}"], 1, 3) for side in ("chosen", "rejected"))
    lines.append(("score of chosen, of rejected", sides))
    lines.append(("win probability of chosen, %", cell(pairs["win_chosen"], 100)))
    lines.append(("win probability of rejected, %", cell(pairs["win_rejected"], 100)))
    longer = f"{estimate(pairs['chosen_longer'], 100)} p={pairs['p_chosen_longer_is_half']['value']:.2g}"
    lines.append(("chosen is the longer one, %", longer))
    blocks = [render(title, lines)]
    if sections["agreement"]:
        table = [("other scorers on the same answers", "pairs", "same order, %", "same best, %", "Kendall's tau")]
        for name, m in sections["agreement"].items():
            order = f"{estimate(m['same_order'], 100)} p={m['p_same_order_is_half']['value']:.2g}"
            best, tau = cell(m["same_best"], 100), cell(m["rank_correlation"], 1, 2)
            table.append((name, str(m["same_order"]["n"]), order, best, tau))
        blocks.append(render("agreement (chance: 50% of orders)", table))
    dropped = ", ".join(f"{reason} {n}" for reason, n in counts["dropped"].items()) or "nothing"
    verdict = (
        f"{counts['train']} train and {counts['test']} test pairs of {counts['prompts']} prompts; left out: {dropped}."
    )
    if sections["shuffled"]:
        verdict += " SCORES WERE SHUFFLED among each prompt's answers: a control, no preference data."
    return "\n\n".join([*blocks, verdict]), verdict


def pairs_figure(path, rows: list[dict], title: str) -> None:
    """Three panels of preference pairs: scores of both sides, win probabilities, and the difference in length.

    Args:
        rows: from `preflab.pairs.pairing.pair_of`.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 3, title)
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        for ax, key in zip(axes, ("score", "win"), strict=False):
            values = np.array([row[f"{key}_{side}"] for row in rows])
            bins = np.linspace(0, 1, 21) if key == "win" else 20
            ax.hist(values, bins=bins, color=colour, alpha=0.6, label=f"{side}, mean {values.mean():.2f}")
    length = np.array([len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows])
    axes[2].hist(length, bins=20, color=NEUTRAL, label=f"chosen longer in {(length > 0).mean():.0%}")
    axes[2].axvline(0, color="grey", ls=":", lw=1)
    axes[0].set(title="Scores", xlabel="score (log-odds, or as the scorer has it)", ylabel="pairs")
    axes[1].set(title="Win probabilities", xlabel="estimated P(beats the policy's own answers)", ylabel="pairs")
    axes[2].set(title="Length", xlabel="chosen − rejected (characters)", ylabel="pairs")
    for ax in axes:
        ax.legend(fontsize=7, framealpha=0.6)
    save(fig, path)
