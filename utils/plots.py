"""Pictures: one style, titles and axis units on all, written atomically."""

from utils.artifacts import atomic_write
from utils.errors import is_main_process
from utils.stats import ranked_right

CHOSEN, REJECTED, NEUTRAL, EVAL = "#0b7a75", "#c8553d", "#3d405b", "#e09f3e"

SECTIONS = {
    "response_chosen": "chosen\nanswer",
    "response_rejected": "rejected\nanswer",
    "whole_chosen": "prompt +\nchosen",
    "whole_rejected": "prompt +\nrejected",
    "text": "plain\ntext",
}


def figure(rows: int, columns: int, title: str):
    """A figure and its flat list of axes, in the project's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold"})
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, list(axes.flat)


def save(fig, path) -> None:
    """Write the figure as PNG, atomically, and free it."""
    import matplotlib.pyplot as plt

    atomic_write(path, lambda p: fig.savefig(p, dpi=130, format="png"))
    plt.close(fig)


def _smooth(values: list[float]) -> list[float]:
    """Running mean over a twentieth of the run, so that single steps do not hide the trend."""
    span = max(1, len(values) // 20)
    return [sum(values[max(0, i - span + 1) : i + 1]) / (i + 1 - max(0, i - span + 1)) for i in range(len(values))]


def _curve(ax, rows: list[dict], key: str, colour: str, label: str) -> None:
    """One figure of train_log.jsonl over the steps: train as a thin line with its running mean, test as dots."""
    points = [(r["step"], r[key]) for r in rows if r["split"] == "train" and r.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
        ax.plot(x, _smooth(y), color=colour, lw=1.8, label=f"{label}, train")
    points = [(r["step"], r[key]) for r in rows if r["split"] == "eval" and r.get(key) is not None]
    if points:
        ax.plot(*zip(*points, strict=True), "o-", color=colour, mec="black", ms=5, lw=1, label=f"{label}, test")


def _finish(ax, name: str, unit: str) -> None:
    ax.set(title=name, xlabel="optimiser step", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7, framealpha=0.6)


def _rate_and_norm(ax, train: list[dict]) -> None:
    """Learning rate and gradient norm, an axis each."""
    steps = [r["step"] for r in train]
    ax.plot(steps, [r.get("learning_rate") for r in train], color=NEUTRAL, label="learning rate")
    norm = ax.twinx()
    norm.plot(steps, [r.get("grad_norm") for r in train], color=EVAL, lw=0.9, label="gradient norm")
    norm.set_ylabel("gradient norm")
    norm.grid(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(title="Learning rate and gradient norm", xlabel="optimiser step", ylabel="learning rate")
    lines = [*ax.get_lines(), *norm.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], fontsize=7, framealpha=0.6)


def instruction_curves(path, rows: list[dict], title: str) -> None:
    """Four panels from train_log.jsonl: loss, token accuracy, entropy, learning rate and gradient norm."""
    train = [r for r in rows if r["split"] == "train"]
    if not train or not is_main_process():
        return
    fig, axes = figure(2, 2, title)
    for ax, key, name, unit in (
        (axes[0], "loss", "Loss", "nats a token trained on"),
        (axes[1], "mean_token_accuracy", "Token accuracy", "share of tokens that are likeliest"),
        (axes[2], "entropy", "Entropy of the next token", "nats"),
    ):
        _curve(ax, rows, key, NEUTRAL, name.split()[0].lower())
        _finish(ax, name, unit)
    _rate_and_norm(axes[3], train)
    save(fig, path)


def training_curves(path, rows: list[dict], title: str, warning: str | None = None) -> None:
    """Six panels from train_log.jsonl: loss, accuracy, margin, rewards, log-probs, learning rate and gradient norm.

    Thin lines are single logged steps, thick lines their running mean, dots the test split. Draws nothing where no
    step was logged.
    """
    train = [r for r in rows if r["split"] == "train"]
    if not train or not is_main_process():
        return
    fig, axes = figure(2, 3, title)

    _curve(axes[0], rows, "loss", NEUTRAL, "loss")
    _finish(axes[0], "Loss", "loss per pair")
    _curve(axes[1], rows, "rewards/accuracies", NEUTRAL, "accuracy")
    axes[1].axhline(0.5, color="grey", ls=":", lw=1)
    axes[1].set_ylim(-0.02, 1.02)
    _finish(axes[1], "Reward accuracy (chosen above rejected)", "share of pairs")
    _curve(axes[2], rows, "rewards/margins", NEUTRAL, "margin")
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    _finish(axes[2], "Reward margin", "chosen − rejected (beta × nats)")
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        _curve(axes[3], rows, f"rewards/{side}", colour, side)
        _curve(axes[4], rows, f"logps/{side}", colour, side)
    axes[3].axhline(0, color="grey", ls=":", lw=1)
    _finish(axes[3], "Rewards", "beta × log ratio (beta × nats)")
    _finish(axes[4], "Log-probabilities", "summed over the answer (nats)")
    _rate_and_norm(axes[5], train)
    if warning:
        fig.text(0.5, -0.03, f"Warning: {warning}", ha="center", color=REJECTED, fontsize=9)
        fig.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))
        fig.texts[-1].set_y(0.005)
    save(fig, path)


def win_rate_figure(path, rows: list[dict], bins: list[dict], headline: str) -> None:
    """Three panels: the margins' histogram, accuracy over the length difference, and calibration.

    Args:
        rows: of win_rate_rows.jsonl.
        bins: from `utils.reward_analysis.calibration_bins`.
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
    tuned = ranked_right(margin, np.zeros(len(rows)))
    base = ranked_right([row["ref_chosen"] for row in rows], [row["ref_rejected"] for row in rows])
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


def perplexity_figure(path, metrics: dict, rows: list[dict], text_rows: list[dict], headline: str) -> None:
    """Three panels: perplexity of base and tuned, the histogram of what moved, and where chosen and rejected went.

    Args:
        metrics: of perplexity.json; rows and text_rows: of perplexity_rows.jsonl.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)
    names = [n for n in SECTIONS if f"{n}_ppl_base" in metrics]
    for side, colour, shift in (("base", NEUTRAL, -0.17), ("tuned", CHOSEN, 0.17)):
        found = [metrics[f"{name}_ppl_{side}"] for name in names]
        value = np.array([m["value"] for m in found])
        ends = np.array([m["ci95"] or (m["value"], m["value"]) for m in found])
        error = np.clip([value - ends[:, 0], ends[:, 1] - value], 0, None)
        axes[0].bar(np.arange(len(names)) + shift, value, 0.32, yerr=error, color=colour, capsize=2, label=side)
    axes[0].set_xticks(range(len(names)), [SECTIONS[name] for name in names], fontsize=7)
    axes[0].set(title="Perplexity, 95% intervals", ylabel="exp(nats a token)")
    axes[0].legend(fontsize=7)

    moved = {
        side: np.array([r[f"nll_response_{side}_difference"] / r[f"tokens_response_{side}"] for r in rows])
        for side in ("chosen", "rejected")
        if rows
    }
    if text_rows:
        moved["text"] = np.array([r["nll_difference"] / r["tokens"] for r in text_rows])
    colours = {"chosen": CHOSEN, "rejected": REJECTED, "text": NEUTRAL}
    every = np.concatenate(list(moved.values()))
    edges = np.linspace(every.min(), every.max() + 1e-9, min(40, max(8, len(every) // 8)))
    for name, values in moved.items():
        axes[1].hist(
            values, bins=edges, histtype="step", lw=1.5, color=colours[name], label=f"{name}, {values.mean():+.4f}"
        )
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set(title="What moved, by row", xlabel="tuned - base (nats a token)", ylabel="rows")
    axes[1].legend(fontsize=7, title="mean over rows", title_fontsize=7)

    for side, values in moved.items():
        key = "tokens" if side == "text" else f"tokens_response_{side}"
        lengths = [row[key] for row in (text_rows if side == "text" else rows)]
        axes[2].scatter(lengths, values, s=6, alpha=0.5, color=colours[side], label=side)
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    axes[2].set(title="What moved, by length", xlabel="scored tokens of the row", ylabel="tuned - base (nats a token)")
    axes[2].legend(fontsize=7)
    save(fig, path)


def _win_rate_bars(ax, entries: list[tuple]) -> None:
    """Horizontal bars with intervals from the top: (label, metric, colour) each."""
    import numpy as np

    for y, (_, m, colour) in enumerate(reversed(entries)):
        low, high = m["ci95"] or (m["value"], m["value"])
        error = np.clip([[m["value"] - low], [high - m["value"]]], 0, None)
        ax.barh(y, m["value"], xerr=error, color=colour, capsize=2, height=0.7)
    ax.set_yticks(range(len(entries)), [label for label, _, _ in reversed(entries)], fontsize=7)
    ax.axvline(0.5, color="grey", ls=":", lw=1)
    ax.set(xlim=(0, 1), xlabel="win rate (ties half)")


def _say(ax, text: str) -> None:
    """An empty panel that says why."""
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes, fontsize=8)


def battle_figure(path, sections: dict, headline: str) -> None:
    """Win rates of every pairing under the judge and its controls, by category, and answer lengths.

    Args:
        sections: from `utils.battle_report.battle_summary`.
    """

    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)

    rates = []
    for match in sections["matches"]:
        who = f"{match['a']} vs {match['b']}"
        for k, (judge, m) in enumerate(match["judges"].items()):
            if "win_rate" in m:
                rates.append((f"{who}\n{judge.split(':')[-1][-28:]}", m["win_rate"], CHOSEN if k == 0 else NEUTRAL))
            if k == 0 and "win_rate" in m:
                rates.append((f"{who}\nstyle held equal", m["win_rate_style_controlled"], EVAL))
    _win_rate_bars(axes[0], rates[:12])
    axes[0].set_title("Win rate, 95% intervals")
    main = sections["matches"][-1]
    parts = [(f"{name} ({c['n']})", c["win_rate"], CHOSEN) for name, c in main["categories"].items()]
    _win_rate_bars(axes[1], parts[:16])
    axes[1].set_title(f"{main['a']} vs {main['b']}, by category")
    if not parts:
        _say(axes[1], "the prompts name no category")
    names = list(sections["answers"])
    length = [sections["answers"][name]["tokens"] for name in names]
    cut = [sections["answers"][name].get("truncated_share", {}).get("value") for name in names]
    axes[2].barh(range(len(names)), [m["value"] for m in length], color=NEUTRAL, height=0.6)
    labels = [n if c is None else f"{n}\n{c:.0%} cut off" for n, c in zip(names, cut, strict=True)]
    axes[2].set_yticks(range(len(names)), labels, fontsize=7)
    axes[2].invert_yaxis()
    axes[2].set(title="Answer length", xlabel="mean tokens an answer")
    save(fig, path)


def alpacaeval_figure(path, metrics: dict, published: dict, headline: str) -> None:
    """Two panels: win rates of base and tuned with intervals and controls, and win rate against answer length.

    Args:
        published: rows judged by GPT-4 Turbo, drawn in grey.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 2, headline)
    colours = {"base": NEUTRAL, "tuned": CHOSEN}
    kinds = {
        "win_rate": "win rate",
        "length_controlled_winrate": "length-\ncontrolled",
        "length_controlled_minimal_winrate": "length-contr.\n(minimal)",
        "longer_win_rate": "`longer`\nas judge",
        "random_win_rate": "`random`\nas judge",
    }
    kinds = {k: label for k, label in kinds.items() if f"base_{k}" in metrics}
    for side, shift in (("base", -0.18), ("tuned", 0.18)):
        found = [metrics[f"{side}_{k}"] for k in kinds]
        value = np.array([m["value"] for m in found])
        ends = np.array([m["ci95"] or (m["value"], m["value"]) for m in found])
        error = np.clip([value - ends[:, 0], ends[:, 1] - value], 0, None)
        axes[0].bar(np.arange(len(kinds)) + shift, value, 0.34, yerr=error, capsize=2, color=colours[side], label=side)
        axes[1].errorbar(
            metrics[f"{side}_avg_length"]["value"], value[0], error[:, :1], fmt="o", color=colours[side], label=side
        )
    axes[0].set_xticks(range(len(kinds)), kinds.values(), fontsize=7)
    axes[0].axhline(50, color="grey", ls=":", lw=1)
    axes[0].set(title="Against the reference, 95% intervals", ylabel="win rate (%)", ylim=(0, 100))
    for name, row in published.items():
        axes[1].plot(row["avg_length"], row["win_rate"], "x", color="grey", ms=5)
        axes[1].annotate(name, (row["avg_length"], row["win_rate"]), fontsize=6, color="grey", xytext=(3, 3),
                         textcoords="offset points")  # fmt: skip
    axes[1].set(title="Against length (grey: published, GPT-4 Turbo judged)", xlabel="mean answer length (characters)")
    axes[1].set(ylabel="win rate (%)", ylim=(0, 100))
    for ax in axes:
        ax.legend(fontsize=7)
    save(fig, path)


VOTES = {
    "much_better": ("much better", CHOSEN),
    "better": ("better", "#7fb8b4"),
    "tie": ("tie", "#d9d9de"),
    "both_bad": ("both bad", "#8d8fa3"),
    "worse": ("worse", "#e6a898"),
    "much_worse": ("much worse", REJECTED),
}


def human_eval_figure(path, sections: dict, headline: str) -> None:
    """Win rates by pairing and annotator, the votes themselves, and win rates by category.

    Args:
        sections: from `utils.human_figures.summarise`.
    """
    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)
    axes[0].set_title("Win rate, 95% intervals")
    axes[1].set(title="Votes, as the first named model fared", xlabel="share of votes", xlim=(0, 1))
    if not sections["matches"]:
        for ax in axes:
            _say(ax, "no votes yet")
        return save(fig, path)
    rates = []
    for match in sections["matches"][:4]:
        who = f"{match['a']} against {match['b']}"
        rates.append((who, match["metrics"]["win_rate"], CHOSEN))
        rates.append((f"{who}\nstyle held equal", match["metrics"]["win_rate_style_controlled"], EVAL))
    people = [(name, m["win_rate"], NEUTRAL) for name, m in sections["annotators"].items() if m["win_rate"]["n"]]
    _win_rate_bars(axes[0], [*rates, *people[:10]])
    if len(people) > 10:
        axes[0].set_title(f"Win rate, 95% intervals (10 of {len(people)} people)")

    matches = sections["matches"][:8]
    for y, match in enumerate(matches):
        total, left = match["metrics"]["votes"]["value"], 0.0
        for step, (label, colour) in VOTES.items():
            width = match["metrics"][f"votes_{step}"]["value"] / max(total, 1)
            axes[1].barh(y, width, left=left, color=colour, height=0.6, label=label if y == 0 else None)
            left += width
    axes[1].set_yticks(range(len(matches)), [f"{m['a']}\nagainst {m['b']}" for m in matches], fontsize=7)
    axes[1].set_ylim(len(matches) - 0.4, -1.1)
    axes[1].legend(fontsize=7, ncols=3, loc="upper center", framealpha=0.9)

    main = next((m for m in sections["matches"] if (m["a"], m["b"]) == ("tuned", "base")), sections["matches"][0])
    parts = [(f"{name} ({c['n']})", c["win_rate"], CHOSEN) for name, c in main["categories"].items()]
    _win_rate_bars(axes[2], parts[:16])
    axes[2].set_title(f"{main['a']} against {main['b']}, by category")
    if not parts:
        _say(axes[2], "the prompts name no category")
    save(fig, path)


def pairs_figure(path, rows: list[dict], title: str) -> None:
    """Three panels of preference pairs: scores of both sides, win probabilities, and the difference in length.

    Args:
        rows: from `utils.pairing.pair_of`.
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


def is_share(metric: str) -> bool:
    """Whether a metric of the harness is a share of documents right, from 0 to 1."""
    return metric.startswith(("acc", "exact_match")) or metric.endswith(("_acc", "_match")) or metric == "em"


def harness_figure(path, rows: list[dict], headline: str) -> None:
    """Two panels, a line a task and metric: base and tuned with 95% intervals and published figures, and differences.

    Subtasks of groups are left out, and so are metrics that are no shares (perplexities, scores).

    Args:
        rows: from `utils.harness_figures.rows`.
    """
    import numpy as np

    if not is_main_process():
        return
    shown = [r for r in rows if r["top"] and is_share(r["metric"])]
    fig, axes = figure(1, 2, headline)
    if not shown:
        for ax in axes:
            _say(ax, "no figure of these tasks is a share: see lm_eval.md")
        return save(fig, path)
    fig.set_size_inches(9.5, max(2.6, 1.2 + 0.32 * len(shown)))
    y = np.arange(len(shown))
    for side, colour, shift in (("base", NEUTRAL, -0.14), ("tuned", CHOSEN, 0.14)):
        value = 100 * np.array([r[side]["value"] for r in shown])
        error = 196 * np.array([r[side]["stderr"] or 0 for r in shown])
        axes[0].errorbar(value, y + shift, xerr=error, fmt="o", ms=4, lw=1.2, color=colour, label=side)
    published = [
        (y[k], f"{name}{', other setting' if m['other_setting'] else ''}", 100 * m["value"])
        for k, r in enumerate(shown)
        for name, m in r.get("references", {}).items()
    ]
    for marker, name in zip("x+1234", dict.fromkeys(name for _, name, _ in published), strict=False):
        points = [(value, place) for place, other, value in published if other == name]
        axes[0].plot(*zip(*points, strict=True), marker, color="grey", ms=6, alpha=0.6, label=f"published: {name}")
    filters = [f" ({r['filter']})" if r["filter"] != "none" else "" for r in shown]
    names = [f"{r['task']}\n{r['metric']}{f}, {r['shots']}-shot" for r, f in zip(shown, filters, strict=True)]
    axes[0].set_yticks(y, names, fontsize=7)
    axes[0].set(title="Base and tuned, 95% intervals", xlabel="score (%)")
    axes[0].legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.06), frameon=False)
    difference = 100 * np.array([r["difference"]["value"] for r in shown])
    ends = [r["difference"]["ci95"] or (r["difference"]["value"],) * 2 for r in shown]
    error = np.clip(
        [difference - 100 * np.array([e[0] for e in ends]), 100 * np.array([e[1] for e in ends]) - difference], 0, None
    )
    colours = [EVAL if r.get("significant") else NEUTRAL for r in shown]
    for k, colour in enumerate(colours):
        axes[1].errorbar(difference[k], y[k], xerr=error[:, k : k + 1], fmt="o", ms=4, lw=1.2, color=colour)
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set_yticks(y, [])
    axes[1].set(title="Tuned - base (orange: certain after Holm)", xlabel="percentage points")
    for ax in axes:
        ax.set_ylim(len(shown) - 0.4, -0.6)
    save(fig, path)
