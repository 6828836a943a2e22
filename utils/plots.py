"""Figures in one style, written atomically."""

from utils.artifacts import atomic_write

CHOSEN, REJECTED, NEUTRAL, EVAL = "#0b7a75", "#c8553d", "#3d405b", "#e09f3e"


def figure(rows: int, columns: int, title: str):
    """Create a figure and a flat list of its axes, in the project's style."""
    import matplotlib

    # The backend without a display; it must be chosen before pyplot is imported.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold"})
    # squeeze=False, so that axes is an array for a single panel too.
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, list(axes.flat)


def save(fig, path) -> None:
    """Write the figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt

    atomic_write(path, lambda p: fig.savefig(p, dpi=130, format="png"))
    # pyplot keeps every open figure in memory.
    plt.close(fig)


def win_rate_bars(ax, entries: list[tuple]) -> None:
    """Draw horizontal bars with 95% intervals, the first entry on top.

    Args:
        entries: (label, metric, colour) of each bar; metrics are win rates from 0 to 1.
    """
    import numpy as np

    for y, (_, m, colour) in enumerate(reversed(entries)):
        low, high = m["ci95"] or (m["value"], m["value"])
        # A percentile interval may exclude the estimate itself; matplotlib rejects negative error lengths.
        error = np.clip([[m["value"] - low], [high - m["value"]]], 0, None)
        ax.barh(y, m["value"], xerr=error, color=colour, capsize=2, height=0.7)
    ax.set_yticks(range(len(entries)), [label for label, _, _ in reversed(entries)], fontsize=7)
    ax.axvline(0.5, color="grey", ls=":", lw=1)
    ax.set(xlim=(0, 1), xlabel="win rate (ties half)")


def empty_panel(ax, text: str) -> None:
    """Show `text` in a panel that has no data."""
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes, fontsize=8)
