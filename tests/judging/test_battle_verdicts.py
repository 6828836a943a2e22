"""The three outcomes of a battle: tuned preferred, base preferred, inconclusive."""

import pytest

from preflab.judging.battle_report import verdict_of
from utils.artifacts import metric


def sections(**metrics) -> dict:
    return {"metrics": metrics, "matches": [{"a": "tuned", "b": "base"}], "answers": {"base": {}, "tuned": {}}}


@pytest.mark.parametrize(
    ("value", "ci95", "p", "sentence"),
    [
        (0.8, (0.72, 0.87), 1e-10, "The judge prefers tuned:"),
        (0.2, (0.13, 0.28), 1e-10, "The judge prefers base:"),
        (0.55, (0.46, 0.64), 0.3, "Inconclusive:"),
        # Interval and test must agree.
        (0.2, (0.13, 0.28), 0.07, "Inconclusive:"),
        (0.8, None, 1e-3, "Inconclusive:"),
    ],
)
def test_verdict_of_a_battle(value, ci95, p, sentence):
    result = sections(win_rate=metric(value, 0.04, ci95, 120), p_win_rate_is_half=metric(p))
    assert verdict_of(result).startswith(sentence)


@pytest.mark.parametrize(
    ("value", "ci95", "sentence"),
    [
        (0.1, (0.05, 0.15), "The judge prefers tuned:"),
        (-0.1, (-0.15, -0.05), "The judge prefers base:"),
        (0.0, (-0.1, 0.1), "Inconclusive:"),
    ],
)
def test_verdict_against_an_opponent(value, ci95, sentence):
    d = {"win_rate_difference": metric(value, 0.02, ci95, 60), "p_win_rate_difference": metric(0.001)}
    assert verdict_of(sections(**d)).startswith(sentence)
