"""Figures in one style, laid out so that nothing is hidden, and written atomically."""

import textwrap
from collections.abc import Callable

from utils.artifacts import atomic_write
from utils.tables import is_missing

CHOSEN, REJECTED, NEUTRAL, EVAL = "#0b7a75", "#c8553d", "#3d405b", "#e09f3e"
SMALL = 7
# Inches that a bar needs per line of its label.
BAR_LINE = 0.17

# Called with (figure, path) before a figure is closed; tests add their check of the layout.
before_close: list[Callable] = []


def figure(rows: int, columns: int, title: str):
    """Create a figure and a flat list of its axes, in the project's style."""
    import matplotlib

    # The backend without a display; it must be chosen before pyplot is imported.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold"})
    # A $ in a name of a model or file is a $, not mathematics.
    plt.rcParams.update({"text.parse_math": False, "axes.axisbelow": True})
    # squeeze=False, so that axes is an array for a single panel too.
    # The dots per inch of the file: at another resolution, text has a slightly other size, and `arrange` would miss.
    size = {"figsize": (4.2 * columns, 2.9 * rows), "dpi": 130}
    fig, axes = plt.subplots(rows, columns, layout="constrained", squeeze=False, **size)
    fig.suptitle(title, fontsize=12, fontweight="bold")
    return fig, list(axes.flat)


def save(fig, path) -> None:
    """Arrange titles, legends and ticks, write the figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt

    arrange(fig)
    atomic_write(path, lambda p: fig.savefig(p, dpi="figure", format="png"))
    for check in before_close:
        check(fig, path)
    # pyplot keeps every open figure in memory.
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------- layout


def arrange(fig) -> None:
    """Wrap titles to their panels, put legends above the panels, and thin out ticks until none overlap."""
    around = [text for text in (fig._suptitle, fig._supxlabel) if text]
    for text in around:
        _wrap(text, 0.96 * fig.bbox.width)
    # A figure's own lines come on top of the height of its panels, as do legends.
    grow(fig, fig.get_figheight() + sum(0.2 * text.get_text().count("\n") for text in around))
    height, rows = fig.get_figheight(), fig.axes[0].get_gridspec().nrows
    for ax in fig.axes:
        _plain_numbers(ax)
    # Twice, since ticks and legends change the size of the panels that they must fit.
    for _ in range(2):
        fig.draw_without_rendering()
        grow(fig, height + rows * max([_legend_above(ax) for ax in fig.axes]))
        fig.draw_without_rendering()
        for ax in fig.axes:
            _fit_panel(ax)


def _wrap(text, width: float) -> None:
    """Break a text into lines of at most `width` pixels."""
    box = text.get_window_extent()
    content = " ".join(text.get_text().split())
    if content and box.width > width:
        per_line = int(len(content) * 0.97 * width / (box.width * max(1, 1 + text.get_text().count("\n"))))
        # A long path has no spaces: break it after its separators before breaking it anywhere.
        loose = content.replace("/", "/\u200b").replace("_", "_\u200b")
        lines = textwrap.wrap(loose.replace("\u200b", " \u200b"), max(12, per_line))
        text.set_text("\n".join(line.replace(" \u200b", "").replace("\u200b", "") for line in lines))


def _plain_numbers(ax) -> None:
    """Write ticks in full, 2e-05, where matplotlib would put a factor or an offset above the axis."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, ScalarFormatter

    for axis in (ax.xaxis, ax.yaxis):
        # The formatter of logarithmic axes writes formulas.
        if type(axis.get_major_formatter()) in (ScalarFormatter, LogFormatterSciNotation):
            places, digits = axis.get_majorticklocs(), 6
            # Ticks of 1000000.5 and 1000000.6 need eight digits.
            while digits < 15 and len({f"{place:.{digits}g}" for place in places}) < len(places):
                digits += 1
            # A sum of steps can miss 0 by its rounding.
            size = max([1e-300, *abs(places)])
            axis.set_major_formatter(
                FuncFormatter(
                    lambda x, _, d=digits, s=size: f"{x if abs(x) > 1e-12 * s else 0:.{d}g}".replace("-", "−", 1)
                )
            )


def _legend_above(ax) -> float:
    """Move a legend from the data to the space between panel and title; return its height in inches."""
    legend = ax.get_legend()
    if legend is None:
        return 0.0
    handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
    if not handles:
        legend.remove()
        return 0.0
    name, explanation = ax.get_title(), legend.get_title().get_text()
    for columns in range(len(labels), 0, -1):
        above = ax.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=SMALL, frameon=False,
            borderaxespad=0.3, columnspacing=1.0, handlelength=1.4, handletextpad=0.5, borderpad=0.1,
        )  # fmt: skip
        box = above.get_window_extent()
        if box.width <= ax.get_window_extent().width:
            break
    height = box.height / ax.figure.dpi
    # In points, as title pads are.
    ax.set_title(f"{name} ({explanation})" if explanation else name, pad=6 + 72 * height)
    return height


def _fit_panel(ax) -> None:
    """Wrap a panel's title, and reduce its ticks while their labels overlap."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

    _wrap(ax.title, ax.get_window_extent().width + 20)
    for axis, low, high in ((ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1")):
        locator = axis.get_major_locator()
        for step in range(7):
            boxes = sorted(tick_boxes(axis), key=lambda box: getattr(box, low))
            # 3 pixels apart, and no label so long that it reaches beyond its neighbour.
            ends = [max(getattr(box, high) for box in boxes[: k + 1]) for k in range(len(boxes) - 1)]
            if all(getattr(box, low) - end > 3 for box, end in zip(boxes[1:], ends, strict=True)):
                break
            if isinstance(locator, FixedLocator):
                # Smaller, then upright.
                upright = step > 2 and axis is ax.xaxis
                axis.set_tick_params(labelsize=max(5, SMALL - step), rotation=90 if upright else 0)
            elif not isinstance(locator, LogLocator):
                axis.set_major_locator(MaxNLocator(8 - step, integer=getattr(locator, "_integer", False)))


def count_axis(axis) -> None:
    """Put ticks at whole numbers only."""
    axis.get_major_locator().set_params(integer=True)


def tick_boxes(axis) -> list:
    """The boxes of an axis's visible tick labels, in pixels."""
    # The hidden axis of a panel that shares it with another one.
    if not axis.get_visible():
        return []
    # Updates the positions of the ticks.
    axis.get_tightbbox()
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    labels = [
        tick.label1 if tick.label1.get_visible() else tick.label2
        for tick in axis.get_major_ticks(len(axis.get_majorticklocs()))
        if low - margin <= tick.get_loc() <= high + margin
    ]
    return [label.get_window_extent() for label in labels if label.get_visible() and label.get_text().strip()]


def shorten(name: str, most: int = 28) -> str:
    """A long name with `…` in its middle: the end of paths and model names differs, their start says what they are."""
    if len(name) <= most:
        return name
    start = most // 3
    return f"{name[:start]}…{name[len(name) - (most - start - 1) :]}"


# ------------------------------------------------------------------------------------------------------------- panels


def interval_lengths(metrics: list[dict], scale: float = 1):
    """Lengths of the intervals below and above the values, shape (2, metrics), for matplotlib's error bars.

    A metric without an interval has lengths of 0. Lengths below 0, for an interval that excludes its value, become 0.
    """
    import numpy as np

    values = np.array([np.nan if m["value"] is None else m["value"] for m in metrics], float)
    ends = np.array([m["ci95"] or (v, v) for m, v in zip(metrics, values, strict=True)], float).reshape(-1, 2)
    return scale * np.clip([values - ends[:, 0], ends[:, 1] - values], 0, None)


def rate_bars(ax, entries: list[tuple], label: str = "win rate (%, ties half)") -> None:
    """Draw horizontal bars of rates in percent with 95% intervals, the first entry on top, and a line at 50%.

    Args:
        entries: (label, metric, colour) of each bar; metrics are rates from 0 to 1, a missing one is named.
        label: of the axis.
    """
    if not entries:
        return
    for y, (_, m, colour) in enumerate(entries):
        if is_missing(m["value"]):
            ax.text(2, y, "not defined", fontsize=SMALL, va="center", color="grey")
            continue
        lengths = interval_lengths([m], 100)
        ax.barh(y, 100 * m["value"], xerr=lengths, color=colour, capsize=2, height=0.7, error_kw={"lw": 1.2})
    name_bars(ax, [name for name, _, _ in entries])
    ax.axvline(50, color="grey", ls=":", lw=1)
    # A little room, so that intervals that end at 0 or 100 are seen.
    ax.set(xlim=(-1, 101), xlabel=label, xticks=range(0, 101, 20))


def name_bars(ax, names: list[str]) -> None:
    """Label horizontal bars from the top, and make the figure tall enough for every label."""
    shown = ["\n".join(shorten(line) for line in name.split("\n")) for name in names]
    ax.set_yticks(range(len(shown)), shown, fontsize=SMALL)
    ax.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    lines = max([1, *(name.count("\n") + 1 for name in shown)])
    grow(ax.figure, 1.3 + len(shown) * max(0.2, BAR_LINE * lines))


def grow(fig, height: float) -> None:
    """Make the figure at least `height` inches tall."""
    fig.set_figheight(max(fig.get_figheight(), height))


def empty_panel(ax, text: str) -> None:
    """Show `text` in a panel that has no data."""
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes, fontsize=8)
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
