"""Prediction-powered means: the formulas by hand, their limits, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from utils.prediction_powered import ADDED, prediction_powered


def draw(rng, n: int, further: int, p: float, right: float, bias: float = 0.0):
    """Outcomes with mean p and predictions that are right with probability `right`, then 1 with probability `bias`."""
    y = (rng.random(n + further) < p).astype(float)
    f = np.where(rng.random(len(y)) < right, y, 1 - y)
    f[rng.random(len(y)) < bias] = 1
    return y[:n], f[:n], f[n:]


def test_mean_and_weight_by_hand():
    """Equations of PPI++ for the mean, variances from the rows and half a row per cell."""
    y, f = [1, 1, 1, 0, 0.5, 1, 0, 1], [1, 1, 0, 0, 0.5, 1, 1, 0.9]
    g = [1, 0, 1, 1, 0.2, 0, 1, 1, 1, 0, 1, 0.5]
    rows = [(a, b, 1.0) for a, b in zip(y, f, strict=True)] + [(a, b, ADDED) for a in (0, 1) for b in (0, 1)]
    total = sum(w for *_, w in rows)
    mean_y, mean_f = (sum(row[k] * row[2] for row in rows) / total for k in (0, 1))
    n = len(y)
    cov = n / (n - 2) * sum(w * (a - mean_y) * (b - mean_f) for a, b, w in rows) / total
    var_f = n / (n - 2) * sum(w * (b - mean_f) ** 2 for _, b, w in rows) / total
    var_y = n / (n - 2) * sum(w * (a - mean_y) ** 2 for a, _, w in rows) / total
    weight = cov / (var_f * (1 + n / len(g)))
    value = np.mean(y) + weight * (np.mean(g) - np.mean(f))
    padded = [*g, 0, 1]
    stderr = math.sqrt((var_y - 2 * weight * cov + weight**2 * var_f) / n + weight**2 * np.var(padded, ddof=1) / len(g))
    result = prediction_powered(y, f, g)
    assert 0 < weight < 1 and result.weight == pytest.approx(weight)
    assert result.rate["value"] == pytest.approx(value) and result.rate["stderr"] == pytest.approx(stderr)
    half = t.ppf(0.975, n - 2) * stderr
    centre = mean_y + weight * (np.mean(g) - mean_f)
    assert result.rate["ci95"] == pytest.approx([max(0, centre - half), min(1, centre + half)])
    assert result.as_precise_as == pytest.approx(var_y / stderr**2) and result.rate["n"] == n


def test_useless_predictions_cost_nothing():
    rng = np.random.default_rng(0)
    y = rng.choice([0.0, 1.0], 400)
    alone = prediction_powered(y, np.zeros(400), [])
    # Constant, opposite, or without further rows: the outcomes alone.
    for f, g in ((np.full(400, 0.5), np.full(900, 0.5)), (1 - y, rng.choice([0.0, 1.0], 900)), (y, [])):
        result = prediction_powered(y, f, g)
        assert result.weight == pytest.approx(0, abs=1e-9) and result.rate["value"] == pytest.approx(y.mean())
        assert result.rate["ci95"] == pytest.approx(alone.rate["ci95"], abs=1e-6)
    assert alone.p["value"] == pytest.approx(ttest_1samp(y, 0.5).pvalue, abs=0.01)


def test_biased_predictions_are_corrected():
    """The judge prefers one side in 40% of all cases: its own rate is far off, the corrected one is not."""
    y, f, g = draw(np.random.default_rng(1), 300, 20_000, 0.5, 0.9, bias=0.4)
    result = prediction_powered(y, f, g)
    low, high = result.rate["ci95"]
    assert g.mean() > 0.65 and low < 0.5 < high and abs(result.rate["value"] - 0.5) < 0.1


def test_predictions_that_were_always_right_are_not_taken_for_certain():
    y = np.ones(20)
    low, high = prediction_powered(y, y, np.ones(500)).rate["ci95"]
    # Wilson's interval of 20 of 20 is 83.9% to 100%.
    assert 0.8 < low < 0.99 and high == 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_outcomes_have_no_interval(n):
    result = prediction_powered(np.ones(n), np.ones(n), np.ones(50))
    assert result.rate["ci95"] is None and result.p["value"] == 1 and result.rate["n"] == n


def coverage(draws: int, n: int, further: int, p: float, right: float, bias: float) -> tuple[float, float, float]:
    """(coverage, mean width of the interval over that of the outcomes alone, mean saved share of outcomes)."""
    rng = np.random.default_rng([n, further, int(100 * p), int(100 * right)])
    covered, ratio, saved = 0, 0.0, 0.0
    for _ in range(draws):
        y, f, g = draw(rng, n, further, p, right, bias)
        result, alone = prediction_powered(y, f, g), prediction_powered(y, f, [])
        low, high = result.rate["ci95"]
        covered += low <= p <= high
        ratio += (high - low) / (alone.rate["ci95"][1] - alone.rate["ci95"][0])
        saved += max(0.0, 1 - n / result.as_precise_as)
    return covered / draws, ratio / draws, saved / draws


def test_coverage():
    share, ratio, saved = coverage(1500, 60, 400, 0.6, 0.85, 0.1)
    assert 0.935 <= share <= 0.972 and ratio < 0.9 and 0.2 < saved < 0.7


@pytest.mark.slow
def test_table_of_coverage():
    print("\n| mean, share of right predictions, bias | n = 20 | 40 | 60 | 120 |")
    for p, right, bias in ((0.5, 0.6, 0.0), (0.5, 0.8, 0.0), (0.5, 0.9, 0.3), (0.7, 0.8, 0.0), (0.8, 0.8, 0.2),
                           (0.95, 0.95, 0.0)):  # fmt: skip
        cells = []
        for n in (20, 40, 60, 120):
            share, _, saved = coverage(4000, n, 500, p, right, bias)
            cells.append(f"{100 * share:.1f} / {100 * saved:.0f}")
            # Too wide where few rows hold few disagreements; never too narrow.
            assert share >= 0.935, (p, right, bias, n)
            # Within 1.5 points where each cell of outcome and prediction has several rows.
            if n * min(1 - right + bias * (1 - p), p, 1 - p) >= 12:
                assert share <= 0.965, (p, right, bias, n)
        print(f"| {p:.0%}, {right:.0%}, {bias:.0%} | {' | '.join(cells)} |", flush=True)
