"""Printed tables: aligned text of at most 100 columns, Markdown, and metrics with errors and intervals."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from utils.markdown import sentence, without_html

WIDTH = 100
GAP = "  "
# The width that tables are rendered at. Artifacts always have WIDTH, so that they do not depend on a terminal.
_table_width: ContextVar[int] = ContextVar("table_width", default=WIDTH)


def terminal_width() -> int:
    """Columns available to a table: the terminal's, at most 100; 100 if the output is not a terminal."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if os.isatty(1) else WIDTH


@contextmanager
def at_width(width: int) -> Iterator[None]:
    """Render tables at `width` characters inside this context."""
    token = _table_width.set(width)
    try:
        yield
    finally:
        _table_width.reset(token)


def render(title: str, lines: list[tuple], width: int | None = None) -> str:
    """Align columns under `title`, at most `width` characters wide; the first line is the heading.

    If a table is too wide, its widest columns wrap at spaces: headings first, then cells.

    Args:
        lines: tuples of equal length, one text per column; a tuple of one text spans all columns.
        width: default 100, or that of `at_width`.
    """
    width = width or _table_width.get()
    columns = [line for line in lines if len(line) == len(lines[0])]
    limits = _column_widths(columns, width - len(GAP) * (len(lines[0]) - 1))
    rows = [_wrapped_row(line, limits) if len(line) == len(lines[0]) else _wrap(line[0], width) for line in lines]
    longest = max(len(text) for row in rows for text in row)
    head = "\n".join(rows[0])
    body = "\n".join(text for row in rows[1:] for text in row)
    return "\n".join([*_wrap(title, width), "-" * longest, head, "-" * longest, *([body] if body else [])])


def _column_widths(lines: list[tuple], room: int) -> list[int]:
    """The width of each column, at most `room` characters together unless single words are longer."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    # A column cannot be narrower than its longest word. Headings wrap before cells do.
    cells = [max([1, *(len(line[i]) for line in lines[1:])]) for i in range(len(widths))]
    words = [max([1, *(len(word) for line in lines for word in _words(line[i]))]) for i in range(len(widths))]
    # Two passes: first only headings break (no column becomes narrower than its longest cell), then cells break too.
    for floors in ([max(c, w) for c, w in zip(cells, words, strict=True)], words):
        while sum(widths) > room:
            spare = [w - floor for w, floor in zip(widths, floors, strict=True)]
            if max(spare) <= 0:
                break
            # Shrink the widest column that can still shrink.
            widest = max((w, i) for i, w in enumerate(widths) if spare[i] > 0)[1]
            widths[widest] -= 1
    return widths


def _words(text: str) -> list[str]:
    """Split a cell where it may break: an interval in brackets and `± error` stay in one piece."""
    pieces: list[str] = []
    for word in text.split(" "):
        # A bracket of the last piece is still open.
        open_interval = pieces and pieces[-1].count("[") > pieces[-1].count("]")
        if open_interval or (pieces and pieces[-1].endswith("±")):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def _wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, broken between words."""
    if len(text) <= width:
        return [text]
    indent = " " * (len(text) - len(text.lstrip(" ")))
    lines: list[str] = []
    for word in _words(text.strip(" ")):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


def paragraphs(*texts: str, width: int | None = None) -> str:
    """Join texts by empty lines, each wrapped to `width` (default: that of `render`) where it has longer lines."""
    width = width or _table_width.get()
    return "\n\n".join("\n".join(part for line in text.split("\n") for part in _wrap(line, width)) for text in texts)


def wrap_sentences(text: str) -> str:
    """Wrap the long lines of a report that are not rows of a table."""
    # Table rows have columns, which are GAP apart; render has made them fit already.
    return "\n".join(line if GAP in line.strip() else paragraphs(line) for line in text.split("\n"))


def _wrapped_row(line: tuple, widths: list[int]) -> list[str]:
    """One table row as one or more lines of text."""
    columns = [_wrap(text, width) for text, width in zip(line, widths, strict=True)]
    height = max(map(len, columns))
    padded = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    return [
        GAP.join(lines[k].ljust(width) for lines, width in zip(padded, widths, strict=True)).rstrip()
        for k in range(height)
    ]


# Above this, digits behind the point say nothing, and a number would not fit its column.
LARGE = 1e7


def is_missing(x: float | None) -> bool:
    """Whether a figure has no value: NaN, or None, which NaN is when it is read back from an artifact."""
    # NaN is the only value that differs from itself.
    return x is None or x != x


def number(x: float | None, digits: int = 1, sign: str = "") -> str:
    """Format a number with `digits` decimals: no negative zero, `1.23e+09` from 1e7 on, a dash for None and NaN.

    Args:
        sign: "+" shows the sign of positive numbers too.
    """
    if is_missing(x):
        return "-"
    # `z` turns a zero that rounding made negative into a positive one.
    return f"{x:{sign}z.{digits}f}" if abs(x) < LARGE else f"{x:{sign}.3g}"


def decimals_of(values, digits: int = 1) -> int:
    """The number of decimals, `digits` at least and 6 at most, with which no value that is not 0 is shown as 0."""
    smallest = min((abs(x) for x in values if not is_missing(x) and x != 0), default=1.0)
    while digits < 6 and smallest < 0.5 * 10**-digits:
        digits += 1
    return digits


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min` or `3.4 h`; a dash if it is not known."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def p_value(p: float | None) -> str:
    """Format a p-value with two significant digits, more where rounding would move it across 0.05; never as 0."""
    if is_missing(p):
        return "-"
    if p == 0:
        # The exact value is below the smallest double.
        return "<1e-300"
    digits = 2
    while p != 0.05 and (float(f"{p:.{digits}g}") < 0.05) != (p < 0.05) or float(f"{p:.{digits}g}") == 0.05 != p:
        digits += 1
    return f"{p:.{digits}g}"


def p_equals(p: float | None) -> str:
    """`p=0.031` for sentences; `p<1e-300` below the smallest double."""
    text = p_value(p)
    return f"p{text}" if text.startswith("<") else f"p={text}"


def undecided(m: dict, p: float, null: float, name: str) -> str:
    """Why `utils.stats.direction` is 0: the value `null`, named `name`, is allowed by interval and test, or by one."""
    if m["ci95"] is None:
        return f"too few rows for an interval ({p_equals(p)})"
    covered = m["ci95"][0] <= null <= m["ci95"][1]
    if covered and not p < 0.05:
        return f"not significantly different from {name} ({p_equals(p)})"
    if covered:
        return f"but the interval contains {name} ({p_equals(p)})"
    return f"but the test is not significant ({p_equals(p)})"


def decimals(m: dict, scale: float = 1, digits: int = 1) -> int:
    """`digits`, or as many as the metric's standard error needs to be seen: 0.00002 ± 0.00001, not 0.000 ± 0.000."""
    error = abs(scale * (m["stderr"] or 0))
    # Below 1e-8 an error is one of rounding.
    return max(digits, math.ceil(-math.log10(error))) if 1e-8 < error < 0.5 * 10**-digits else digits


def cell(m: dict, scale: float = 1, digits: int = 1) -> str:
    """Format a metric with its standard error, `71.7 ± 4.2`; a dash if it has no value."""
    if is_missing(m["value"]):
        return "-"
    digits = decimals(m, scale, digits)
    error = "" if m["stderr"] is None else f" ± {number(scale * m['stderr'], digits)}"
    return f"{number(scale * m['value'], digits)}{error}"


def interval(m: dict, scale: float = 1, digits: int = 1, sign: str = "") -> str:
    """Format a metric's 95% interval, ` [63.3, 80.0]`, or nothing if it has none. `sign` "+" shows signs."""
    if m["ci95"] is None:
        return ""
    low, high = (number(scale * x, decimals(m, scale, digits), sign) for x in m["ci95"])
    return f" [{low}, {high}]"


def estimate(m: dict, scale: float = 1, digits: int = 1) -> str:
    """Format a metric with its 95% interval, `71.7 [63.3, 80.0]`; a dash if it has no value."""
    if is_missing(m["value"]):
        return "-"
    return f"{number(scale * m['value'], decimals(m, scale, digits))}{interval(m, scale, digits)}"


def difference(m: dict, p: dict | None = None, scale: float = 1, digits: int = 1) -> str:
    """Format a signed metric with its 95% interval and its test's p-value, `+21.7 [+13.3, +30.0] p=2e-06`."""
    value = None if m["value"] is None else scale * m["value"]
    shown = number(value, decimals(m, scale, digits), "+") + interval(m, scale, digits, "+")
    return shown + (f" {p_equals(p['value'])}" if p else "")


def markdown_table(lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first line is the heading."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


# What is shown beside an answer whose generation ended at the token limit.
CUT_OFF_TEXT = "cut off at the token limit"


def answer_label(name: str, cut_off: bool) -> str:
    """The heading of an answer in a page of samples, marked where it was cut off at the token limit."""
    return f"{name} ({CUT_OFF_TEXT})" if cut_off else name


def quoted(text: str) -> str:
    """`text` as a Markdown quotation, so that an unclosed code fence ends with it; its HTML is shown as text."""
    return "".join(f"> {line}\n" for line in without_html(text).splitlines() or ["(empty)"])


def side_by_side(title: str, entries: list[tuple], note: str = "") -> str:
    """A Markdown page of prompts with several answers each, one below the other.

    Args:
        entries: (heading, prompt, {label: answer}) each; a fourth member is Markdown that follows the answers.
        note: a line below the title.
    """
    parts = [f"# {sentence(title)}\n", *([f"{note}\n"] if note else [])]
    for heading, prompt, answers, *after in entries:
        parts.append(f"---\n\n## {sentence(heading)}\n\n{quoted(prompt)}")
        parts += [f"### {sentence(label)}\n\n{quoted(answer)}" for label, answer in answers.items()]
        parts += [f"{text}\n" for text in after]
    return "\n".join(parts)
