"""Training curves of preference, SFT and reward-model runs."""

from collections.abc import Callable
from math import log

from preflab.training.log_keys import PAIR_MEAN, TIES_HALF
from utils.errors import is_main_process
from utils.plots import CHOSEN, EVAL, NEUTRAL, REJECTED, figure, save

# Single steps, behind their running mean.
PALE = {"alpha": 0.25, "lw": 0.8}
# Height of a row of the legend, in points.
LEGEND_ROW = 11
LEGEND = {"fontsize": 7, "borderaxespad": 0.2, "handlelength": 1.4, "columnspacing": 1.0}


def smooth(values: list[float]) -> list[float]:
    """Centred running mean over a tenth of the run, so that single steps do not hide the trend."""
    # On each side; at the ends of the run the window has only the values that exist.
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _curve(ax, rows: list[dict], key: str, colour: str, label: str) -> None:
    """Draw one metric of train_log.jsonl over the steps: train as a thin line with its running mean, test as dots."""
    points = [(r["step"], r[key]) for r in rows if r["split"] == "train" and r.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=colour, **PALE)
        ax.plot(x, smooth(y), color=colour, lw=1.8, label=f"{label}, train")
    # Means over pairs where the log has them, else TRL's means over batches.
    tests = [(r["step"], r.get(key + PAIR_MEAN, r.get(key))) for r in rows if r["split"] == "eval"]
    points = [(step, value) for step, value in tests if value is not None]
    if points:
        ax.plot(*zip(*points, strict=True), "o-", color=colour, mec="black", ms=5, lw=1, label=f"{label}, test")


def _finish(ax, name: str, unit: str) -> None:
    ax.set(xlabel="optimizer step", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True)
    lines = ax.get_legend_handles_labels()[0]
    if not lines:
        ax.text(0.5, 0.6, "not computed: the loss has no reference", ha="center", transform=ax.transAxes, fontsize=8)
    _titles(ax, name, lines)


def _titles(ax, name: str, lines: list) -> None:
    """The panel's title, and between it and the panel, where it hides no data, the legend of `lines`, two in a row."""
    labels = [line.get_label() for line in lines]
    ax.legend(lines, labels, loc="lower left", bbox_to_anchor=(0, 1), ncol=2, frameon=False, **LEGEND)
    ax.set_title(name, pad=LEGEND_ROW * -(-len(lines) // 2) + 6)


def _rate_and_norm(ax, train: list[dict]) -> None:
    """Draw learning rate (left axis) and gradient norm (right axis)."""
    steps = [r["step"] for r in train]
    rate = ax.plot(steps, [r.get("learning_rate") for r in train], color=NEUTRAL, label="learning rate")
    norm = ax.twinx()
    norms = [r.get("grad_norm") for r in train]
    norm.plot(steps, norms, color=EVAL, **PALE)
    # A step without gradient norm has nothing to smooth.
    smoothed = smooth([n for n in norms if n is not None])
    places = [step for step, n in zip(steps, norms, strict=True) if n is not None]
    lines = rate + norm.plot(places, smoothed, color=EVAL, lw=1.8, label="gradient norm")
    norm.set_ylabel("gradient norm")
    # The grid of the left axis is enough; two grids with different steps would overlap.
    norm.grid(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="optimizer step", ylabel="learning rate")
    # Each axis has its own lines, and one legend shows both.
    _titles(ax, "Learning rate and gradient norm", lines)


def picture(columns: int, loss_unit: str) -> Callable:
    """Decorate a function that draws panels, to make a picture of two rows of them that is saved. Rank 0 only.

    The first panel shows the loss, the last one learning rate and gradient norm. The picture is made with
    `(path, rows, title, warning=None)`: `rows` of train_log.jsonl, `warning` a sentence below the panels. Nothing is
    drawn where no step was logged.

    Args:
        columns: panels of a row. loss_unit: unit of the loss.
    """

    def decorate(draw_panels: Callable) -> Callable:
        def draw(path, rows: list[dict], title: str, warning: str | None = None) -> None:
            train = [row for row in rows if row["split"] == "train"]
            if not train or not is_main_process():
                return
            fig, axes = figure(2, columns, title)
            _curve(axes[0], rows, "loss", NEUTRAL, "loss")
            _finish(axes[0], "Loss", loss_unit)
            draw_panels(axes, rows)
            _rate_and_norm(axes[-1], train)
            if warning:
                # The layout engine keeps the panels above the figure's label.
                fig.supxlabel(f"Warning: {warning}", color=REJECTED, fontsize=9)
            save(fig, path)

        # Without `__wrapped__`, whose arguments are others.
        draw.__name__, draw.__doc__ = draw_panels.__name__, draw_panels.__doc__
        return draw

    return decorate


def _answers(reward_ax, logp_ax, rows: list[dict], names: tuple[str, str]) -> None:
    """Draw rewards and log-probabilities of both kinds of answers. `names`: of the better and the worse ones."""
    for side, name, colour in zip(("chosen", "rejected"), names, (CHOSEN, REJECTED), strict=True):
        _curve(reward_ax, rows, f"rewards/{side}", colour, name)
        _curve(logp_ax, rows, f"logps/{side}", colour, name)
    reward_ax.axhline(0, color="grey", ls=":", lw=1)
    _finish(reward_ax, "Rewards", "beta × log ratio (beta × nats)")
    _finish(logp_ax, "Log-probabilities", "summed over the answer (nats)")


def _accuracy(ax, rows: list[dict], key: str, name: str, unit: str) -> None:
    """Draw a share of pairs beside chance."""
    _curve(ax, rows, key, NEUTRAL, "accuracy")
    # 0.5 is chance.
    ax.axhline(0.5, color="grey", ls=":", lw=1)
    # Accuracies of exactly 0 and 1 stay visible.
    ax.set_ylim(-0.02, 1.02)
    _finish(ax, name, unit)


@picture(columns=2, loss_unit="nats per trained token")
def sft_curves(axes: list, rows: list[dict]) -> None:
    """Draw an SFT run's four panels: loss, token accuracy, entropy, learning rate and gradient norm."""
    _curve(axes[1], rows, "mean_token_accuracy", NEUTRAL, "token accuracy")
    _finish(axes[1], "Token accuracy", "share of tokens ranked first")
    # Around equal values, matplotlib's limits would leave 0 to 1.
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(max(low, -0.02), min(high, 1.02))
    _curve(axes[2], rows, "entropy", NEUTRAL, "entropy of the next token")
    _finish(axes[2], "Entropy of the next token", "nats")


@picture(columns=2, loss_unit="nats per pair")
def reward_curves(axes: list, rows: list[dict]) -> None:
    """Draw a reward model's four panels: loss, accuracy, margin with rewards, learning rate."""
    # The loss of equal rewards.
    axes[0].axhline(log(2), color="grey", ls=":", lw=1)
    _accuracy(axes[1], rows, "accuracy", "Accuracy", "share of pairs, chosen ranked higher")
    _curve(axes[2], rows, "margin", CHOSEN, "margin")
    _curve(axes[2], rows, "mean_reward", NEUTRAL, "mean reward")
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    _finish(axes[2], "Margin and mean reward", "reward (log-odds)")


@picture(columns=3, loss_unit="loss per answer")
def kto_curves(axes: list, rows: list[dict]) -> None:
    """Draw a KTO run's six panels: loss, rewards, log-probs, KL, entropy, learning rate."""
    _answers(axes[1], axes[2], rows, ("thumb up", "thumb down"))
    _curve(axes[3], rows, "kl", NEUTRAL, "KL")
    _finish(axes[3], "Estimated KL to the reference", "nats")
    _curve(axes[4], rows, "entropy", NEUTRAL, "entropy")
    _finish(axes[4], "Entropy of the next token", "nats")


@picture(columns=3, loss_unit="loss per pair")
def dpo_curves(axes: list, rows: list[dict]) -> None:
    """Draw a preference run's six panels: loss, accuracy, margin, rewards, log-probs, learning rate.

    Thin lines are single logged steps, thick lines their running mean, dots the test split.
    """
    # Logs of earlier versions have TRL's accuracy only, in which ties are wrong.
    ties_half = any(TIES_HALF in row for row in rows)
    unit = f"chosen above rejected (ties {'half' if ties_half else 'wrong'})"
    _accuracy(axes[1], rows, TIES_HALF if ties_half else "rewards/accuracies", "Reward accuracy", unit)
    _curve(axes[2], rows, "rewards/margins", NEUTRAL, "margin")
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    _finish(axes[2], "Reward margin", "chosen − rejected (beta × nats)")
    _answers(axes[3], axes[4], rows, ("chosen", "rejected"))
