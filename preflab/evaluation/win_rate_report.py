"""Text and picture of eval_win_rate.py in reward mode."""

import numpy as np

from preflab.data.length_bias import sentence
from preflab.evaluation.reward_table import (
    COIN_FLIP,
    NO_REWARD,
    accuracy_row,
    comparison_row,
    heading,
    margin_row,
    ranking_row,
)
from utils.errors import is_main_process
from utils.plots import CHOSEN, NEUTRAL, REJECTED, count_axis, figure, interval_lengths, save
from utils.power import power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction, pairwise_correct, share
from utils.tables import cell, difference, estimate, p_equals, p_value, undecided
from utils.tables import render as render_table


@fits_terminal
def render(
    metrics: dict,
    slices: dict,
    bias: dict,
    expected: dict | None,
    title: str,
    left_out: str,
    not_held_out: str = "",
    base_run: str | None = None,
) -> Report:
    """The printed tables and the verdict.

    Args:
        metrics: of `reward_slices.win_rate_metrics`; slices: of `reward_slices.slices`.
        bias: `{split: bias}` of `held_out.length_bias`.
        expected: of `trainer_metrics.compare`, or None without --expected.
        left_out: the line of `held_out.left_out`.
        not_held_out: why these pairs are no evidence; "" for held-out pairs.
        base_run: the run in the base's place (--base_run), or None.
    """
    verdict = verdict_of(metrics, base_run)
    if not_held_out:
        verdict = f"{not_held_out} ({verdict})"
    blocks = [render_table(title, table_lines(metrics, not not_held_out)), _slices_table(slices), left_out]
    blocks.append("\n".join(sentence(split, b) for split, b in bias.items()))
    if expected:
        blocks.append(_expected_table(expected))
    note = "" if not_held_out else power_note(metrics, base_run)
    return Report("\n\n".join([*blocks, verdict, *([note] if note else [])]), verdict)


def verdict_of(metrics: dict, base_run: str | None = None) -> str:
    """Whether the rewards rank held-out pairs better than chance, and better than the base model's likelihood does.

    With `base_run`, only which way the two runs differ: neither of them is "before training".
    """
    rate = metrics["win_rate_ties_half"]
    if rate["ci95"] is None:
        return f"No claim: {rate['n']} held-out pair is too few for an interval."
    against = f" against {base_run}" if base_run else ""
    shown = f"the reward win rate{against} is {estimate(rate, 100)}% (95% interval; ties half)"
    p = metrics["p_win_rate_is_half"]["value"]
    above = direction(rate, p, 0.5)
    if not above:
        return f"Inconclusive: {shown}, {undecided(rate, p, 0.5, '50%')}."
    if base_run:
        side, bound = ("chosen", "above") if above > 0 else ("rejected", "below")
        return f"Compared with {base_run}, this run favours the {side} answers more: {shown}, {bound} 50%."
    if above < 0:
        return f"By its rewards, training hurt: {shown}, below 50%: the rewards prefer the rejected answers."
    # Above 50% is not enough: the base's likelihood may rank these pairs as well without any training.
    ahead, p = metrics["win_rate_minus_base_ranking"], metrics["p_win_rate_is_base_ranking"]["value"]
    base = f"the base model's own ranking ({cell(metrics['likelihood_ranking_base'], 100)}%)"
    better = direction(ahead, p)
    if better > 0:
        return f"By its rewards, training helped: {shown}, above 50% and above {base}. --battle compares answers."
    if better < 0:
        return f"By its rewards, training hurt: {shown}, above 50% but below {base}."
    return f"Reward accuracy is above 50%, but not above {base}: {shown}."


def power_note(metrics: dict, base_run: str | None = None) -> str:
    """What these pairs could have shown, where the verdict leaves a question open; else ""."""
    rate, ahead = metrics["win_rate_ties_half"], metrics["win_rate_minus_base_ranking"]
    above = direction(rate, metrics["p_win_rate_is_half"]["value"], 0.5)
    if not above:
        return power_sentence(rate)
    if above < 0 or base_run or direction(ahead, metrics["p_win_rate_is_base_ranking"]["value"]):
        return ""
    return power_sentence(ahead, what="a difference from the base model's own ranking")


def table_lines(m: dict, held_out: bool = True) -> list[tuple]:
    """The lines of the printed table, its head first: base beside tuned."""
    per_token_p = m["p_win_rate_length_normalised_is_half"]["value"]
    correlation, _, correlation_interval = estimate(m["margin_length_correlation"], 1, 2).partition(" ")
    return [
        heading(m["evaluated_examples"]["value"], held_out),
        accuracy_row("win rate by reward, % (ties half)", m["win_rate_ties_half"], m["p_win_rate_is_half"]),
        (
            f"win rate, % ({m['exact_ties']['value']} exact ties lose)",
            # Every margin of the base is 0, a tie, and ties lose in this row.
            "0.0 by def.",
            cell(m["win_rate"], 100),
            "as the trainer counts",
        ),
        (
            "win rate per token, % (ties half)",
            COIN_FLIP,
            cell(m["win_rate_length_normalised_ties_half"], 100),
            f"{p_equals(per_token_p)}",
        ),
        comparison_row(
            "base likelihood, tuned reward, %",
            m["likelihood_ranking_base"],
            m["win_rate_ties_half"],
            m["win_rate_minus_base_ranking"],
            m["p_win_rate_is_base_ranking"],
            100,
        ),
        ranking_row(m),
        margin_row(m["avg_margin"], m["p_avg_margin_is_0"]),
        ("reward of chosen, beta x nats", NO_REWARD, cell(m["avg_reward_chosen"], 1, 3), ""),
        ("reward of rejected, beta x nats", NO_REWARD, cell(m["avg_reward_rejected"], 1, 3), ""),
        (
            "log loss of sigmoid(margin)",
            # log 2: at margin 0 the probability is one half.
            "0.693 by def.",
            cell(m["calibration_log_loss"], 1, 3),
            "",
        ),
        *_calibration_line(m),
        ("rank correlation, margin/length", "", correlation, correlation_interval),
    ]


def _calibration_line(m: dict) -> list[tuple]:
    """The calibration error, beside the one that sampling alone gives to calibrated margins; older files lack that."""
    expected = m.get("calibration_ece_if_calibrated")
    beside = f"{cell(expected, 1, 3)} if calibrated" if expected else ""
    return [("calibration error", "", cell(m["calibration_ece"], 1, 3), beside)]


def _slices_table(slices: dict) -> str:
    """Win rate and base ranking of every slice."""
    lines = [("slice", "pairs", "base ranking, %", "win rate, %", "win rate - base ranking", "p")]
    for groups in slices.values():
        for label, s in groups.items():
            ahead, p = difference(s["win_rate_minus_base_ranking"], None, 100), s["p_win_rate_is_base_ranking"]
            shares = cell(s["base_ranking"], 100), cell(s["win_rate_ties_half"], 100)
            lines.append((label, str(s["n"]), *shares, ahead, p_value(p)))
    return render_table("by length, longer side and score gap (ties half)", lines)


def _expected_table(expected: dict) -> str:
    """The trainer's own metrics beside those recomputed from the rows."""
    lines = [("metric", "trainer", "recomputed, same batches", "mean over rows", "")]
    for key, f in expected["figures"].items():
        numbers = [f"{f[k]:.4f}" for k in ("trainer", "recomputed", "mean_over_rows")]
        lines.append((key, *numbers, "agrees" if f["agrees"] else "DIFFERS"))
    batches = f"batches of {expected['batch_size']} on {expected['processes']} process(es)"
    return render_table(f"the trainer's evaluation, {batches}, tolerance {expected['tolerance']}", lines)


def draw(path, rows: list[dict], bins: list[dict], title: str) -> None:
    """Three panels: histogram of margins, accuracy over length difference, calibration. Rank 0 only.

    Args:
        rows: of win_rate_rows.jsonl.
        bins: of `reward_slices.calibration_bins`.
    """
    if not is_main_process():
        return
    fig, axes = figure(1, 3, title)
    margin = np.array([row["margin"] for row in rows])
    _draw_margins(axes[0], margin)
    _draw_accuracy_by_length(axes[1], rows, margin)
    _draw_calibration(axes[2], bins)
    for ax in axes:
        ax.legend()
    save(fig, path)


def _draw_margins(ax, margin: np.ndarray) -> None:
    # Bin edges include 0, so that no bar mixes correct and wrong pairs.
    width = (np.ptp(margin) or 1.0) / min(40, max(8, len(margin) // 8))
    edges = width * np.arange(np.floor(margin.min() / width), np.ceil(margin.max() / width) + 1.5)
    for part, colour, label in ((margin > 0, CHOSEN, "chosen higher"), (margin <= 0, REJECTED, "chosen not higher")):
        ax.hist(margin[part], bins=edges, color=colour, alpha=0.8, label=f"{label} ({part.mean():.0%})")
    ax.axvline(0, color="grey", ls=":", lw=1)
    ax.axvline(margin.mean(), color=NEUTRAL, lw=1.5, label=f"mean {margin.mean():+.2g}")
    ax.set(title="Reward margins", xlabel="margin (beta × nats)", ylabel="pairs")
    count_axis(ax.yaxis)


def _draw_accuracy_by_length(ax, rows: list[dict], margin: np.ndarray) -> None:
    longer = np.array([row["tokens_chosen"] - row["tokens_rejected"] for row in rows])
    tuned = pairwise_correct(margin, np.zeros(len(rows)))
    base = pairwise_correct([row["ref_chosen"] for row in rows], [row["ref_rejected"] for row in rows])
    # Up to 8 groups of equal count, of about 10 pairs or more.
    order = np.argsort(longer, kind="stable")
    groups = [group for group in np.array_split(order, min(8, max(1, len(rows) // 10))) if len(group)]
    for correct, colour, label in ((tuned, CHOSEN, "tuned, implicit reward"), (base, NEUTRAL, "base, likelihood")):
        shares, x = [share(correct[group]) for group in groups], [longer[group].mean() for group in groups]
        y = [100 * m["value"] for m in shares]
        ax.errorbar(x, y, interval_lengths(shares, 100), fmt="o-", ms=4, lw=1, color=colour, label=label)
    ax.axhline(50, color="grey", ls=":", lw=1)
    ax.axvline(0, color="grey", ls=":", lw=1)
    labels = {"xlabel": "chosen - rejected (tokens)", "ylabel": "correct (%), 95% interval"}
    ax.set(title="Accuracy by length difference", ylim=(-2, 102), **labels)


def _draw_calibration(ax, bins: list[dict]) -> None:
    shares = [b["accuracy"] for b in bins]
    x, y = [100 * b["confidence"] for b in bins], [100 * m["value"] for m in shares]
    # The line spans what is shown: margins near 0 have confidences near 50%.
    ends = (min([50, *x]), max([51, *x]))
    ax.plot(ends, ends, color="grey", ls=":", lw=1, label="calibrated")
    ax.errorbar(x, y, interval_lengths(shares, 100), fmt="o-", ms=4, lw=1, color=CHOSEN, label="tuned, 95% interval")
    labels = {"xlabel": "confidence, sigmoid(|margin|) (%)", "ylabel": "correct (%)"}
    ax.set(title="Calibration", ylim=(-2, 102), **labels)
