"""Printed tables fit 100 columns and keep every word."""

import pytest

from utils.tables import cell, decimals_of, difference, estimate, markdown_table, number, p_value, paragraphs, render

WIDE = [
    ("on 120 held-out pairs", "base", "tuned", "tuned - base [95% interval]"),
    ("reward per token, % (ties half)", "50.0 by definition", "68.3 ± 4.3", "+18.3 [+10.0, +26.7] p=7.3e-05"),
    ("  mean over units", "63.472 ± 31.578", "55.701 ± 23.807", ""),
]  # fmt: skip


def test_decimals_show_small_values():
    assert decimals_of((-3.2, -0.06)) == 1 and decimals_of((-0.012, 0.0, None)) == 2
    assert decimals_of((0.5, float("nan")), 2) == 2 and decimals_of((1e-12,)) == 6
    assert f"{-0.004:.{decimals_of((-0.004,))}f}" == "-0.004"


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


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.8, "0.8"), (1.0, "1"), (2.3456e-6, "2.3e-06"), (1e-320, "1e-320"), (0.0, "<1e-300"), (None, "-"),
        # Two digits would show both as 0.05, one significant and the other not.
        (0.0496, "0.0496"), (0.05, "0.05"), (0.0503, "0.0503"), (0.04999, "0.04999"), (float("nan"), "-"),
    ],
)  # fmt: skip
def test_p_values_are_never_zero_and_keep_their_side_of_5_percent(p, text):
    assert p_value(p) == text


def test_numbers_have_no_negative_zero_and_fit_their_columns():
    assert number(-0.0004, 3) == "0.000" and number(-0.0004, 3, "+") == "+0.000" and number(-2.5) == "-2.5"
    assert number(1.23e9, 3) == "1.23e+09" and number(float("inf")) == "inf" and number(None) == "-"


def metric_of(value, stderr, ci95=None):
    return {"value": value, "stderr": stderr, "ci95": ci95, "n": 9}


def test_small_figures_show_their_error():
    tiny = metric_of(-2.3e-5, 1.2e-5, (-4e-5, 1e-6))
    assert cell(tiny, 1, 3) == "-0.00002 ± 0.00001"
    assert difference(tiny, {"value": 0.2}, 1, 3) == "-0.00002 [-0.00004, +0.00000] p=0.2"
    assert cell(metric_of(0.0, 0.0), 1, 3) == "0.000 ± 0.000"
    assert estimate(metric_of(0.717, 0.04, (0.63, 0.8)), 100) == "71.7 [63.0, 80.0]"
