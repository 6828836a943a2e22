"""What eval_win_rate.py prints in reward mode."""

from preflab.data.length_bias import sentence
from utils.errors import is_main_process
from utils.plots import CHOSEN, NEUTRAL, REJECTED, figure, save
from utils.stats import pairwise_correct
from utils.tables import cell, difference, estimate, render


def conclude(
    metrics: dict, parts: dict, bias: dict, expected: dict | None, title: str, left_out: str, seen: bool
) -> tuple[str, str]:
    """(text, verdict): the table with everything below it, and the one sentence that answers the question.

    Args:
        seen: whether the run trained on these very pairs, so that nothing is shown by them.
    """
    verdict = claim(metrics)
    if seen:
        verdict = f"NOT HELD OUT: the run trained on these pairs, so they show nothing. ({verdict})"
    blocks = [table(metrics, title), slices_table(parts), left_out]
    blocks.append("\n".join(sentence(s, b) for s, b in bias.items()))
    if expected:
        blocks.append(expected_table(expected))
    return "\n\n".join([*blocks, verdict]), verdict


def claim(metrics: dict) -> str:
    """Whether the rewards rank held-out pairs better than chance, and better than the base model does."""
    rate = metrics["win_rate_ties_half"]
    if rate["ci95"] is None:
        return f"No claim: {rate['n']} held-out pair is too few for an interval."
    figure = f"the reward win rate is {estimate(rate, 100)}% (95% interval; ties half)"
    if not (rate["ci95"][0] > 0.5 and metrics["p_win_rate_is_half"]["value"] < 0.05):
        return f"No claim that training helped: {figure}, which cannot be told from 50%."
    ahead = metrics["win_rate_minus_base_ranking"]
    base = f"the base model's own ranking ({cell(metrics['likelihood_ranking_base'], 100)}%)"
    if ahead["ci95"][0] > 0 and metrics["p_win_rate_is_base_ranking"]["value"] < 0.05:
        return f"By its rewards, training helped: {figure}, above 50% and above {base}. --battle compares answers."
    return f"Training moved the rewards the right way: {figure}, above 50%, but no better than {base}."


def table(metrics: dict, title: str) -> str:
    """Base beside tuned."""
    m, chance = metrics, minus_half(metrics["win_rate_ties_half"])
    lines = [
        (f"on {m['evaluated_examples']['value']} held-out pairs", "base", "tuned", "tuned - base [95% interval]"),
        (
            "win rate by reward, % (ties half)",
            "50.0 by definition",
            cell(m["win_rate_ties_half"], 100),
            difference(chance, m["p_win_rate_is_half"], 100),
        ),
        (
            f"win rate, % ({m['exact_ties']['value']} exact ties lose)",
            "0.0 by definition",
            cell(m["win_rate"], 100),
            "as the trainer counts",
        ),
        (
            "win rate by reward per token, % (ties half)",
            "50.0 by definition",
            cell(m["win_rate_length_normalised_ties_half"], 100),
            f"p={m['p_win_rate_length_normalised_is_half']['value']:.2g}",
        ),
        (
            "base likelihood against tuned reward, %",
            cell(m["likelihood_ranking_base"], 100),
            cell(m["win_rate_ties_half"], 100),
            difference(m["win_rate_minus_base_ranking"], m["p_win_rate_is_base_ranking"], 100),
        ),
        (
            "likelier answer is chosen, %",
            cell(m["likelihood_ranking_base"], 100),
            cell(m["likelihood_ranking_tuned"], 100),
            difference(m["likelihood_ranking_difference"], m["p_likelihood_ranking_difference"], 100),
        ),
        (
            "reward margin, beta x nats",
            "0 by definition",
            cell(m["avg_margin"], 1, 3),
            difference(m["avg_margin"], m["p_avg_margin_is_0"], 1, 3),
        ),
        ("reward of chosen, beta x nats", "0 by definition", cell(m["avg_reward_chosen"], 1, 3), ""),
        ("reward of rejected, beta x nats", "0 by definition", cell(m["avg_reward_rejected"], 1, 3), ""),
        (
            "log loss of sigmoid(margin)",
            "0.693 by definition",
            cell(m["calibration_log_loss"], 1, 3),
            f"calibration error {m['calibration_ece']['value']:.3f}",
        ),
        (
            "rank correlation, margin and length",
            "",
            estimate(m["margin_length_correlation"], 1, 2),
            "",
        ),
    ]
    return render(title, lines)


def slices_table(parts: dict) -> str:
    """Win rate and base ranking in every slice."""
    lines = [("slice", "pairs", "base ranking, %", "win rate, % (ties half)", "tuned reward - base ranking")]
    for groups in parts.values():
        for label, s in groups.items():
            ahead = difference(s["win_rate_minus_base_ranking"], {"value": s["p_win_rate_is_base_ranking"]}, 100)
            lines.append((label, str(s["n"]), cell(s["base_ranking"], 100), cell(s["win_rate_ties_half"], 100), ahead))
    return render("by length, longer side and score gap", lines)


def expected_table(expected: dict) -> str:
    """The trainer's own figures beside those recomputed from the rows."""
    lines = [("metric", "trainer", "from our rows, its batches", "mean over rows", "")]
    for key, f in expected["figures"].items():
        numbers = [f"{f[k]:.4f}" for k in ("trainer", "recomputed", "mean_over_rows")]
        lines.append((key, *numbers, "agrees" if f["agrees"] else "DIFFERS"))
    batches = f"batches of {expected['batch_size']} on {expected['processes']} process(es)"
    return render(f"the trainer's evaluation, {batches}, within {expected['tolerance']}", lines)


def win_rate_figure(path, rows: list[dict], bins: list[dict], headline: str) -> None:
    """Three panels: the margins' histogram, accuracy over the length difference, and calibration.

    Args:
        rows: of win_rate_rows.jsonl.
        bins: from `preflab.evaluation.reward_slices.calibration_bins`.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)
    margin = np.array([row["margin"] for row in rows])
    # An edge at 0, so that no bar holds both.
    width = (np.ptp(margin) or 1.0) / min(40, max(8, len(rows) // 8))
    edges = width * np.arange(np.floor(margin.min() / width), np.ceil(margin.max() / width) + 1.5)
    for part, colour, label in ((margin > 0, CHOSEN, "chosen above"), (margin <= 0, REJECTED, "chosen not above")):
        axes[0].hist(margin[part], bins=edges, color=colour, alpha=0.8, label=f"{label} ({part.mean():.0%})")
    axes[0].axvline(0, color="grey", ls=":", lw=1)
    axes[0].axvline(margin.mean(), color=NEUTRAL, lw=1.5, label=f"mean {margin.mean():+.3f}")
    axes[0].set(title="Reward margins", xlabel="margin (beta × nats)", ylabel="pairs")

    longer = np.array([row["tokens_chosen"] - row["tokens_rejected"] for row in rows])
    tuned = pairwise_correct(margin, np.zeros(len(rows)))
    base = pairwise_correct([row["ref_chosen"] for row in rows], [row["ref_rejected"] for row in rows])
    parts = [p for p in np.array_split(np.argsort(longer, kind="stable"), min(8, max(1, len(rows) // 10))) if len(p)]
    for right, colour, label in ((tuned, CHOSEN, "tuned, implicit reward"), (base, NEUTRAL, "base, likelihood")):
        y, error = [right[p].mean() for p in parts], [1.96 * right[p].std() / len(p) ** 0.5 for p in parts]
        axes[1].errorbar([longer[p].mean() for p in parts], y, error, fmt="o-", ms=4, lw=1, color=colour, label=label)
    axes[1].axhline(0.5, color="grey", ls=":", lw=1)
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set(
        title="Accuracy by length difference",
        xlabel="chosen - rejected (tokens)",
        ylabel="share right",
        ylim=(-0.02, 1.02),
    )

    x, y = [b["confidence"] for b in bins], [b["accuracy"]["value"] for b in bins]
    low, high = ([abs((b["accuracy"]["ci95"] or [v, v])[i] - v) for b, v in zip(bins, y, strict=True)] for i in (0, 1))
    axes[2].plot([0.5, 1], [0.5, 1], color="grey", ls=":", lw=1, label="calibrated")
    axes[2].errorbar(x, y, [low, high], fmt="o-", ms=4, lw=1, color=CHOSEN, label="tuned, 95% interval")
    axes[2].set(title="Calibration", xlabel="confidence, sigmoid(|margin|)", ylabel="share right", ylim=(-0.02, 1.02))
    for ax in axes:
        ax.legend(fontsize=7, framealpha=0.6)
    save(fig, path)


def minus_half(share: dict) -> dict:
    """A share's metric as its distance from 50%, the reward accuracy of the base by definition."""
    interval = [x - 0.5 for x in share["ci95"]] if share["ci95"] else None
    return {**share, "value": share["value"] - 0.5, "ci95": interval}
