"""Printed tables fit 100 columns and keep every word."""

import pytest

from utils.tables import markdown_table, paragraphs, render

WIDE = [
    ("on 120 held-out pairs", "base", "tuned", "tuned - base [95% interval]"),
    ("reward per token, % (ties half)", "50.0 by definition", "68.3 ± 4.3", "+18.3 [+10.0, +26.7] p=7.3e-05"),
    ("  mean over units", "63.472 ± 31.578", "55.701 ± 23.807", ""),
]  # fmt: skip


def test_narrow_table():
    assert render("title", [("a", "b"), ("1", "22")]) == "title\n-----\na  b\n-----\n1  22"


@pytest.mark.parametrize("width", [100, 80, 60])
def test_wide_table_wraps_and_keeps_every_word(width):
    text = render("a title that is rather long for a terminal of sixty columns, is it not?", WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    assert {word for line in WIDE for cell in line for word in cell.split()} <= set(text.split())


def test_intervals_are_not_broken():
    text = render("title", WIDE, 70)
    assert "[+10.0, +26.7]" in text and "63.472 ± 31.578" in text


def test_headings_wrap_before_cells():
    text = render("t", [("a very long heading of a column", "b"), ("1.0 ± 0.1", "2")], 20)
    assert text.splitlines()[-1] == "1.0 ± 0.1   2" or text.splitlines()[-1].startswith("1.0 ± 0.1")
    assert len(text.splitlines()) > 5


def test_indentation_survives_wrapping():
    text = render("t", [("head", "x"), ("  indented label of several words", "1")], 20)
    assert all(line.startswith("  ") for line in text.splitlines()[4:] if line.strip() and "1" not in line)


def test_markdown_escapes_pipes():
    assert markdown_table([["a|b", "c"], ["1", "2"]]).splitlines()[0].startswith("| a\\|b |")


def test_row_of_one_text_spans_the_columns():
    text = render("t", [("head", "x"), ("a name that is longer than the columns together",), ("a", "1")], 60)
    assert text.splitlines()[-2:] == ["a name that is longer than the columns together", "a     1"]


def test_paragraphs_wrap():
    text = paragraphs("one two three", "four", width=8)
    assert text == "one two\nthree\n\nfour"
