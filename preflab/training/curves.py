"""Training curves of DPO and SFT runs."""

from utils.errors import is_main_process
from utils.plots import CHOSEN, EVAL, NEUTRAL, REJECTED, figure, save


def _smooth(values: list[float]) -> list[float]:
    """Running mean over a twentieth of the run, so that single steps do not hide the trend."""
    span = max(1, len(values) // 20)
    # The window grows up to `span` at the start, so that the curve begins at the first step.
    return [sum(values[max(0, i - span + 1) : i + 1]) / (i + 1 - max(0, i - span + 1)) for i in range(len(values))]


def _curve(ax, rows: list[dict], key: str, colour: str, label: str) -> None:
    """Draw one metric of train_log.jsonl over the steps: train as a thin line with its running mean, test as dots."""
    points = [(r["step"], r[key]) for r in rows if r["split"] == "train" and r.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
        ax.plot(x, _smooth(y), color=colour, lw=1.8, label=f"{label}, train")
    points = [(r["step"], r[key]) for r in rows if r["split"] == "eval" and r.get(key) is not None]
    if points:
        ax.plot(*zip(*points, strict=True), "o-", color=colour, mec="black", ms=5, lw=1, label=f"{label}, test")


def _finish(ax, name: str, unit: str) -> None:
    ax.set(title=name, xlabel="optimizer step", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7, framealpha=0.6)


def _rate_and_norm(ax, train: list[dict]) -> None:
    """Draw learning rate (left axis) and gradient norm (right axis)."""
    steps = [r["step"] for r in train]
    ax.plot(steps, [r.get("learning_rate") for r in train], color=NEUTRAL, label="learning rate")
    norm = ax.twinx()
    norm.plot(steps, [r.get("grad_norm") for r in train], color=EVAL, lw=0.9, label="gradient norm")
    norm.set_ylabel("gradient norm")
    # The grid of the left axis is enough; two grids with different steps would overlap.
    norm.grid(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(title="Learning rate and gradient norm", xlabel="optimizer step", ylabel="learning rate")
    # Each axis has its own lines, and one legend shows both.
    lines = [*ax.get_lines(), *norm.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], fontsize=7, framealpha=0.6)


def _save(fig, path, warning: str | None) -> None:
    """Save the picture, with the warning, if any, below the panels."""
    if warning:
        # The layout engine keeps the panels above the figure's label.
        fig.supxlabel(f"Warning: {warning}", color=REJECTED, fontsize=9)
    save(fig, path)


def sft_curves(path, rows: list[dict], title: str, warning: str | None = None) -> None:
    """Draw an SFT run's four panels: loss, token accuracy, entropy, learning rate and gradient norm. Rank 0 only.

    Args:
        rows: of train_log.jsonl. Nothing is drawn where no step was logged.
        warning: a sentence below the panels.
    """
    train = [r for r in rows if r["split"] == "train"]
    if not train or not is_main_process():
        return
    fig, axes = figure(2, 2, title)
    for ax, key, name, unit in (
        (axes[0], "loss", "Loss", "nats per trained token"),
        (axes[1], "mean_token_accuracy", "Token accuracy", "share of tokens ranked first"),
        (axes[2], "entropy", "Entropy of the next token", "nats"),
    ):
        _curve(ax, rows, key, NEUTRAL, name.split()[0].lower())
        _finish(ax, name, unit)
        if key == "mean_token_accuracy":
            # Around equal values, matplotlib's limits would leave 0 to 1.
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, -0.02), min(high, 1.02))
    _rate_and_norm(axes[3], train)
    _save(fig, path, warning)


def dpo_curves(path, rows: list[dict], title: str, warning: str | None = None) -> None:
    """Draw a preference run's six panels: loss, accuracy, margin, rewards, log-probs, learning rate. Rank 0 only.

    Thin lines are single logged steps, thick lines their running mean, dots the test split.

    Args:
        rows: of train_log.jsonl. Nothing is drawn where no step was logged.
        warning: a sentence below the panels.
    """
    train = [r for r in rows if r["split"] == "train"]
    if not train or not is_main_process():
        return
    fig, axes = figure(2, 3, title)

    _curve(axes[0], rows, "loss", NEUTRAL, "loss")
    _finish(axes[0], "Loss", "loss per pair")
    _curve(axes[1], rows, "rewards/accuracies", NEUTRAL, "accuracy")
    # 0.5 is chance.
    axes[1].axhline(0.5, color="grey", ls=":", lw=1)
    # Accuracies of exactly 0 and 1 stay visible.
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
    _save(fig, path, warning)
