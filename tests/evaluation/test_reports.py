"""Texts of both evaluation scripts, rendered from the artifacts of docs/example_run."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from preflab.evaluation import perplexity_report, win_rate_report
from preflab.evaluation.comparison import ensure_models_differ
from preflab.evaluation.reward_table import comparison_row, minus_half
from utils.artifacts import metric, read_json
from utils.errors import UserError
from utils.stage import Report
from utils.stats import share, sign_test
from utils.tables import WIDTH

TITLE = "quickstart: checkpoints/quickstart against builtin:smollm2-135m-instruct"


@pytest.fixture
def win_rate() -> dict:
    return read_json(ROOT / "docs/example_run/win_rate.json")


@pytest.fixture
def perplexity() -> dict:
    return read_json(ROOT / "docs/example_run/perplexity.json")


def table_lines(text: str) -> list[str]:
    """The lines of all tables in a report: blocks that contain a rule of dashes."""
    return [line for block in text.split("\n\n") if "\n---" in block for line in block.split("\n")]


def test_win_rate_report(win_rate):
    sections = [win_rate[key] for key in ("metrics", "slices", "length_bias", "expected")]
    report = win_rate_report.render(*sections, TITLE, "120 of 120 rows evaluated")
    lines = table_lines(report.text)
    assert len(lines) >= 29 and max(map(len, lines)) <= WIDTH
    row = next(line for line in lines if line.startswith("win rate by reward"))
    assert "71.7 ± 4.1" in row and "+21.7 [+13.0, +29.0] p=2.3e-06" in row
    assert report.text.replace("\n", " ").endswith(report.verdict) and "NOT HELD OUT" not in report.verdict
    report = win_rate_report.render(*sections, TITLE, "120 of 120 rows evaluated", "NOT HELD OUT: x.")
    assert report.verdict.startswith("NOT HELD OUT: x. (By its rewards") and "held-out pairs  " not in report.text


def test_win_rate_verdict_needs_interval_and_test(win_rate):
    metrics = win_rate["metrics"]
    rate, ahead = metrics["win_rate_ties_half"], metrics["win_rate_minus_base_ranking"]
    assert win_rate_report.verdict_of(metrics).startswith("By its rewards, training helped")
    below = {"win_rate_minus_base_ranking": {**ahead, "ci95": [-0.1, 0.3]}}
    assert win_rate_report.verdict_of(metrics | below).startswith("Reward accuracy is above 50%, but not above")
    for weak in ({"win_rate_ties_half": {**rate, "ci95": [0.49, 0.8]}}, {"p_win_rate_is_half": metric(0.06)}):
        assert win_rate_report.verdict_of(metrics | weak).startswith("Inconclusive")
    one_pair = {"win_rate_ties_half": {**rate, "ci95": None, "n": 1}}
    assert win_rate_report.verdict_of(metrics | one_pair).startswith("No claim")


def test_win_rate_below_one_half_is_harmful(win_rate):
    """The same pairs with the sides swapped: the interval is mirrored at 50%, the p-value stays."""
    metrics = win_rate["metrics"]
    rate = metrics["win_rate_ties_half"]
    swapped = {**rate, "value": 1 - rate["value"], "ci95": [1 - x for x in reversed(rate["ci95"])]}
    assert "training hurt" in win_rate_report.verdict_of(metrics | {"win_rate_ties_half": swapped})


def test_perplexity_report(perplexity):
    report = perplexity_report.render(perplexity["metrics"], perplexity["length_bias"], TITLE, None)
    lines = table_lines(report.text)
    # A title, two rules, a heading of one or two lines, and three lines per section.
    assert len(lines) >= 19 and max(map(len, lines)) <= WIDTH
    row = next(line for line in lines if line.startswith("rejected answer"))
    assert "23.200 ± 2.117" in row and "+0.862 [+0.520, +1.270]" in row and row.endswith("1e-05")
    text = report.text.replace("\n", " ")
    assert "chosen 0.0212 ± 0.0010" in text and f"{report.verdict}  Power, chosen answers" in text


def test_perplexity_verdict(perplexity):
    sentences = perplexity_report.verdict_of(perplexity["metrics"]).split(". ")
    assert [s.split(": ")[1].split(" (")[0] for s in sentences[:2]] == [
        "perplexity did not change significantly",
        "perplexity rose",
    ]
    assert "too few for a test" in sentences[-1]
    # Four sections have enough units. Of their p-values 0.03 is the third smallest, so Holm's factor is 2.
    weaker = {"p_response_rejected_nll_difference": metric(0.03)}
    sentences = perplexity_report.verdict_of(perplexity["metrics"] | weaker).split(". ")
    assert "did not change significantly" in sentences[1]
    assert "p=0.06 after Holm's correction for 4 sections" in sentences[1]


def test_comparison_row():
    share = metric(0.75, 0.05, [0.65, 0.85], 100)
    assert minus_half(share) == metric(0.25, 0.05, [pytest.approx(0.15), pytest.approx(0.35)], 100)
    row = comparison_row("accuracy, %", "50.0 by def.", share, minus_half(share), metric(0.001), 100)
    assert row == ("accuracy, %", "50.0 by def.", "75.0 ± 5.0", "+25.0 [+15.0, +35.0] p=0.001")


def test_ensure_models_differ():
    results = "the same answer to all 2 prompts"
    comparison = SimpleNamespace(args=SimpleNamespace(allow_identical=False), adapter="lora", servers={})
    ensure_models_differ(False, results, comparison)
    with pytest.raises(UserError, match="the same answer to all 2 prompts: the adapter was not applied"):
        ensure_models_differ(True, results, comparison)
    # Two complete models have no adapter.
    comparison.adapter = None
    with pytest.raises(UserError, match="one model, or too alike.*--allow_identical") as refused:
        ensure_models_differ(True, results, comparison)
    assert "adapter" not in str(refused.value)
    comparison.args.allow_identical = True
    ensure_models_differ(True, results, comparison)
    report = Report("table\n\nInconclusive.", "Inconclusive.").noted(comparison.identical)
    assert report.verdict == f"IDENTICAL: base and tuned gave {results}. Inconclusive."
    assert report.text.endswith(f"IDENTICAL: base and tuned gave {results}.")
    assert report.noted("") is report


@pytest.mark.parametrize(
    ("rate", "words"), [(0.9, "favours the chosen"), (0.1, "favours the rejected"), (0.5, "Incon")]
)
def test_verdict_on_two_runs_does_not_speak_of_training(rate, words):
    outcomes = np.repeat([1.0, 0.0], [int(40 * rate), 40 - int(40 * rate)])
    metrics = {"win_rate_ties_half": share(outcomes), "p_win_rate_is_half": metric(sign_test(outcomes), n=40)}
    verdict = win_rate_report.verdict_of(metrics, "other")
    assert words in verdict and "training" not in verdict and "other" in verdict
