"""Checks of a figure's layout without eyes: overlapping or clipped text, hidden data, axes without names, impossible
shares.

`check` is called for every figure that `utils.plots.save` writes while the tests run (conftest.py).
"""

from itertools import combinations

import numpy as np
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullLocator

from utils.plots import tick_boxes


def check(fig, path) -> None:
    """Raise AssertionError with all problems of a figure."""
    problems = problems_of(fig)
    assert not problems, f"{path}: " + "; ".join(problems)


def problems_of(fig) -> list[str]:
    """Every problem of the layout of a figure that has been drawn, in words."""
    problems = clipped_texts(fig) + overlapping_texts(fig)
    for number, ax in enumerate(fig.axes):
        where = f"panel {number} ({ax.get_title()!r})"
        problems += [f"{where}: {text}" for text in (*unnamed_axes(ax), *impossible_shares(ax), *covered_data(ax))]
    return problems


def texts_of(fig) -> list[Text]:
    """All visible texts but tick labels, which are listed with their axes."""
    ticks = {id(t) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.get_majorticklabels()}
    ticks |= {id(t) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.get_minorticklabels()}
    ticks |= {id(tick.label2) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks()}
    return [
        text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip() and id(text) not in ticks
    ]


def boxes_of(fig) -> list[tuple[str, object]]:
    """(name, box in pixels) of every visible text, tick labels included."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(fig)]
    for ax in fig.axes:
        boxes += [
            (f"{name} tick label", b) for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)) for b in tick_boxes(axis)
        ]
    return boxes


def clipped_texts(fig) -> list[str]:
    width, height = fig.bbox.width, fig.bbox.height
    return [
        f"{name!r} is cut off by the figure's edge"
        for name, box in boxes_of(fig)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def overlapping_texts(fig) -> list[str]:
    return [f"{name!r} overlaps {other!r}" for (name, a), (other, b) in combinations(boxes_of(fig), 2) if overlap(a, b)]


def overlap(a, b) -> bool:
    """Whether two boxes share more than a pixel in both directions: boxes of text include space below its baseline."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def unnamed_axes(ax) -> list[str]:
    """Axes of numbers without a label; words as tick labels need none."""
    problems = []
    for name, axis, label in (("x", ax.xaxis, ax.get_xlabel()), ("y", ax.yaxis, ax.get_ylabel())):
        numbers = not isinstance(axis.get_major_locator(), (FixedLocator, NullLocator))
        if numbers and axis.get_visible() and tick_boxes(axis) and not label:
            problems.append(f"no {name} label")
    return problems + ([] if ax.get_title() or _is_twin(ax) else ["no title"])


def _is_twin(ax) -> bool:
    """Whether axes share their place with earlier ones."""
    earlier = ax.figure.axes[: ax.figure.axes.index(ax)]
    return any(np.allclose(ax.get_position().bounds, other.get_position().bounds) for other in earlier)


def share_scale(label: str) -> float | None:
    """The largest value of an axis of shares: 100 or 1; None for other axes and for differences."""
    if "points" in label or "tuned - base" in label:
        return None
    if "%" in label:
        return 100.0
    return 1.0 if label.startswith(("share", "confidence", "P(", "win rate")) else None


def impossible_shares(ax) -> list[str]:
    """Limits or data outside 0% to 100%."""
    problems = []
    for name, label, limits, column in (
        ("x", ax.get_xlabel(), ax.get_xlim(), 0),
        ("y", ax.get_ylabel(), ax.get_ylim(), 1),
    ):
        scale = share_scale(label)
        if scale is None:
            continue
        low, high = sorted(limits)
        # Room for markers and error bars at 0 and 1.
        if low < -0.05 * scale or high > 1.05 * scale:
            problems.append(f"{name} limits {low:.3g} to {high:.3g} of a share")
        values = data_points(ax)[:, column]
        outside = values[(values < -1e-6 * scale) | (values > (1 + 1e-6) * scale)]
        if len(outside):
            problems.append(f"{name} values {outside[:3]} of a share")
    return problems


def data_points(ax) -> np.ndarray:
    """Every drawn point in data coordinates, shape (points, 2): lines, error bars, markers, corners of bars."""
    points = [np.zeros((0, 2))]
    for line in ax.get_lines():
        # Reference lines (axhline, axvline) have other coordinates on one axis.
        if line.get_transform() == ax.transData and line.get_marker() not in ("|", "_"):
            points.append(np.column_stack([np.asarray(x, float) for x in line.get_data()]))
    for collection in ax.collections:
        if isinstance(collection, PathCollection):
            points.append(np.asarray(collection.get_offsets(), float))
        elif isinstance(collection, LineCollection):
            points += [np.asarray(segment, float) for segment in collection.get_segments()]
    for patch in ax.patches:
        if patch.get_transform().contains_branch(ax.transData):
            corners = patch.get_verts() if not isinstance(patch, Rectangle) else patch.get_corners()
            inverse = ax.transData.inverted()
            points.append(np.asarray(corners if isinstance(patch, Rectangle) else inverse.transform(corners), float))
    points = np.concatenate(points)
    return points[np.isfinite(points).all(1)]


def covered_data(ax) -> list[str]:
    """A legend over drawn points or bars."""
    legend = ax.get_legend()
    if legend is None:
        return []
    box = legend.get_window_extent()
    points = data_points(ax)
    pixels = ax.transData.transform(points) if len(points) else points
    inside = (pixels > (box.x0, box.y0 + 1)).all(1) & (pixels < (box.x1, box.y1)).all(1)
    bars = [patch.get_window_extent() for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_height()]
    return ["the legend covers data"] if inside.any() or any(overlap(bar, box) for bar in bars) else []
