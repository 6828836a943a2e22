"""Printed tables, verdict and picture of eval_reward_model.py."""

from preflab.training.reward_report import is_ahead
from utils.plots import CHOSEN, EVAL, NEUTRAL, REJECTED, empty_panel, figure, save, shorten
from utils.stage import Report, fits_terminal
from utils.stats import direction
from utils.tables import cell, difference, estimate, paragraphs, undecided
from utils.tables import render as render_table

# Points of the best-of-n table.
SHOWN = (1, 2, 4, 8, 16)


@fits_terminal
def render(name: str, data: str, metrics: dict, sections: dict, note: str = "", not_held_out: str = "") -> Report:
    """The tables with the verdict below them.

    Args:
        name: the scorer.
        data: the rows, in words.
        metrics: from `pair_metrics`; empty for RewardBench 2, whose rows are no pairs.
        sections: categories, benchmark, best_of, other (the second scorer's name), failures.
        note, not_held_out: of `LabelledData`.
    """
    parts = []
    if metrics:
        parts.append(render_table(f"{name} on {data}", pair_lines(metrics, sections.get("other"))))
    for title, content in (("by category", sections.get("categories")), ("benchmark", sections.get("benchmark"))):
        if content:
            lines = [(title, "rows", "accuracy, % [95% interval]" if title == "by category" else "score, %")]
            lines += [(str(key), str(m["n"]), estimate(m, 100)) for key, m in content.items()]
            parts.append(render_table(f"{name} on {data}" if not metrics else title, lines))
    if sections.get("best_of"):
        parts.append(render_table("best of n samples, by this scorer", best_of_lines(sections["best_of"])))
    verdict = verdict_of(name, metrics, sections)
    if not_held_out:
        verdict = f"{not_held_out} ({verdict})"
    failures = sections.get("failures") or {}
    reasons = "; ".join(f"{count} without scores: {reason}" for reason, count in failures.items())
    parts += [paragraphs(text) for text in (verdict, note, reasons) if text]
    return Report("\n\n".join(parts), verdict)


def pair_lines(metrics: dict, other: str | None = None) -> list[tuple]:
    """The table of a scorer on pairs, its head first."""
    accuracy = metrics["reward_accuracy"]
    lines = [
        (f"on {accuracy['n']} labelled pairs", "value [95% interval]", "scorer - it"),
        ("better answer scored higher, % (ties half)", estimate(accuracy, 100), ""),
        ("longer answer is better, %", cell(metrics["longer_accuracy"], 100),
         difference(metrics["reward_accuracy_minus_longer"], metrics["p_reward_accuracy_is_longer"], 100)),
    ]  # fmt: skip
    if "other_accuracy" in metrics:
        change, p = metrics["reward_accuracy_minus_other"], metrics["p_reward_accuracy_is_other"]
        lines += [
            (
                f"{shorten(other or 'the other scorer')}, %",
                cell(metrics["other_accuracy"], 100),
                difference(change, p, 100),
            ),
            ("both prefer the same answer, %", cell(metrics["agreement_with_other"], 100), ""),
            ("rank correlation of their margins", cell(metrics["margin_correlation_with_other"], 1, 2), ""),
        ]
    for key, label in (
        ("length_matched", "of similar length"), ("better_is_shorter", "better answer shorter"),
        ("better_is_longer", "better answer longer"),
    ):  # fmt: skip
        part = metrics[f"reward_accuracy_{key}"]
        lines.append((f"{part['n']} pairs, {label}, %", cell(part, 100), ""))
    for key, label, scale, digits in (
        ("reward_margin", "margin, log-odds", 1, 3), ("calibration_log_loss", "log loss (0.693 knows nothing)", 1, 3),
        ("calibration_ece", "calibration error, %", 100, 1),
        ("calibration_ece_if_calibrated", "... of a calibrated scorer, %", 100, 1),
        ("calibration_scale", "best factor on the margins", 1, 2),
    ):  # fmt: skip
        lines.append((label, cell(metrics[key], scale, digits), ""))
    return lines


def best_of_lines(points: list[dict]) -> list[tuple]:
    """The best-of-n table, its head first."""
    lines = [("n", "KL at most, nats", "prompts", "gain in reward", "characters", "gain by the other scorer")]
    for point in points:
        if point["n"] in SHOWN or point is points[-1]:
            other = cell(point["other"], 1, 3) if "other" in point else "-"
            lines.append((str(point["n"]), f"{point['kl']:.3f}", str(point["prompts"]),
                          cell(point["reward"], 1, 3), cell(point["chars"], 1, 0), other))  # fmt: skip
    return lines


def verdict_of(name: str, metrics: dict, sections: dict) -> str:
    """The evaluation in one sentence."""
    if not metrics:
        benchmark = sections["benchmark"]
        title, score = list(benchmark.items())[-1]
        return f"{name}: {title} {estimate(score, 100)}%."
    accuracy = metrics["reward_accuracy"]
    finding = f"{name} scores the better answer higher in {estimate(accuracy, 100)}% of {accuracy['n']} labelled pairs"
    above = direction(accuracy, metrics["p_reward_accuracy_is_half"]["value"], 0.5)
    if above < 0:
        return f"{finding}: it prefers the worse answers."
    if not above:
        p = metrics["p_reward_accuracy_is_half"]["value"]
        return f"Inconclusive: {finding}, {undecided(accuracy, p, 0.5, '50%')}."
    ahead = estimate(metrics["reward_accuracy_minus_longer"], 100)
    if is_ahead(metrics, "longer"):
        return f"{finding}, {ahead} points more than the longer answer."
    return f"{finding}, but does not beat the longer answer ({ahead} points)."


def draw(path, title: str, metrics: dict, bins: list[dict], points: list[dict], categories: dict) -> None:
    """Draw calibration, categories and, where there are samples, reward and length of best-of-n."""
    fig, axes = figure(2, 2, title)
    _calibration(axes[0], bins)
    _categories(axes[1], categories or {})
    for ax, key, name, unit in ((axes[2], "reward", "Best of n: reward", "gain in reward"),
                                (axes[3], "chars", "Best of n: length", "characters")):  # fmt: skip
        if not points:
            empty_panel(ax, "no samples (--best_of)")
            ax.set(title=name, xlabel="KL at most (nats)", ylabel=unit)
            continue
        kl = [p["kl"] for p in points]
        ax.plot(kl, [p[key]["value"] for p in points], "o-", color=NEUTRAL, ms=3, label="this scorer")
        low, high = zip(*(p[key]["ci95"] or (p[key]["value"],) * 2 for p in points), strict=True)
        ax.fill_between(kl, low, high, color=NEUTRAL, alpha=0.15)
        if key == "reward" and "other" in points[0]:
            ax.plot(kl, [p["other"]["value"] for p in points], "o-", color=EVAL, ms=3, label="other scorer")
            ax.legend()
        ax.set(title=name, xlabel="KL at most (nats)", ylabel=unit)
    save(fig, path)


def _calibration(ax, bins: list[dict]) -> None:
    ax.set(title="Calibration", xlabel="confidence (%)", ylabel="accuracy (%)")
    if not bins:
        return empty_panel(ax, "no pairs")
    x, y = [100 * b["confidence"] for b in bins], [100 * b["accuracy"]["value"] for b in bins]
    ends = [b["accuracy"]["ci95"] or (b["accuracy"]["value"],) * 2 for b in bins]
    errors = [[v - 100 * low for v, (low, _) in zip(y, ends, strict=True)],
              [100 * high - v for v, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
    ax.errorbar(x, y, yerr=[[max(0, e) for e in side] for side in errors], fmt="o-", color=CHOSEN, ms=4, lw=1)
    ax.plot([50, 100], [50, 100], color="grey", ls=":", lw=1)
    ax.set(xlim=(48, 102), ylim=(-2, 102))


def _categories(ax, categories: dict) -> None:
    ax.set(title="By category", xlabel="better answer scored higher (%)", ylabel="category")
    if not categories:
        return empty_panel(ax, "no categories")
    # The Ties score of RewardBench 2 reaches 101%.
    names = sorted(categories, key=lambda name: categories[name]["value"])[-12:]
    ax.barh(range(len(names)), [min(100.0, 100 * categories[n]["value"]) for n in names], color=NEUTRAL, height=0.6)
    ax.axvline(50, color=REJECTED, ls=":", lw=1)
    ax.set_yticks(range(len(names)), [shorten(n) for n in names])
    ax.set(xlim=(0, 102))
