"""Power against scipy's noncentral t, enumeration by hand, published figures, and simulations of the actual tests."""

import math

import numpy as np
import pytest
from scipy.stats import binom, nct, norm, t

from utils.power import (
    Pilot,
    pilot_of,
    pilot_of_metric,
    plan_rows,
    plan_table,
    power_record,
    power_sentence,
    sign_test_power,
    t_test_power,
    with_power,
)
from utils.stats import bootstrap, direction, linearised_ratio, mean_test, share, sign_test


@pytest.mark.parametrize("n, effect", [(5, 1.0), (24, 0.6), (120, 0.2), (900, 0.1), (5000, 0.04)])
def test_t_test_power_is_the_noncentral_t_distribution(n, effect):
    shift, threshold = effect * math.sqrt(n), t.ppf(0.975, n - 1)
    exact = nct.sf(threshold, n - 1, shift) + nct.cdf(-threshold, n - 1, shift)
    assert t_test_power(n, effect) == pytest.approx(exact, abs=1e-3)


def test_rows_needed_are_those_of_cohens_tables():
    """One-sample t-test, two-sided 5%, power 0.8, as G*Power 3.1 gives them: d 0.2, 0.5 and 0.8."""
    pilot = Pilot(n=20, mean=0.0, deviation=1.0)
    for n, d in ((199, 0.2), (34, 0.5), (15, 0.8)):
        assert t_test_power(n - 1, d) < 0.8 <= t_test_power(n, d)
        # The permutation test with its correction for skewness needs two more.
        assert pilot.needed(d) == n + 2 and pilot.detectable(n + 2) <= d < pilot.detectable(n + 1)
    # Five rows are never significant.
    assert pilot.detectable(5) is None and pilot.power(5, 100.0) == 0


def test_five_rows_detect_no_mean():
    """The permutation test of five equal signs has p = 0.6^5 = 0.078 at least, of six 0.047."""
    pilot = Pilot(n=5, mean=3.0, deviation=1.0)
    assert pilot.detectable(5) is None and pilot.detectable(6) is not None and pilot.needed(50.0) == 6
    assert mean_test([1.0] * 5) > 0.05 > mean_test([1.0] * 6)


def test_sign_test_power_by_hand():
    # 10 rows without ties: p < 0.05 for 0, 1, 9 and 10 wins (2 * 11 / 1024 = 0.021; two losses give 0.109).
    win = 0.8
    by_hand = sum(binom.pmf(k, 10, win) for k in (0, 1, 9, 10))
    assert sign_test_power(10, 1.0, 2 * win - 1) == pytest.approx(by_hand, rel=1e-9)
    # Five decided rows can never be significant: 2 / 32 = 0.0625.
    assert sign_test_power(5, 1.0, 1.0) == 0 and sign_test_power(6, 1.0, 1.0) == pytest.approx(1)
    # With ties: the same, over the number of decided rows.
    by_hand = sum(binom.pmf(k, 8, 0.9) for k in (6, 7, 8))
    assert sign_test_power(8, 0.9, 0.9) == pytest.approx(by_hand, rel=1e-9)


def test_sign_test_power_of_many_rows_is_connors():
    """Connor (1987): n = (z sqrt(q) + z_power sqrt(q - d^2))^2 / d^2, on both sides of the switch to the formula."""
    z, z_power, q, d = norm.ppf(0.975), norm.ppf(0.8), 0.5, 0.0142
    n = ((z * math.sqrt(q) + z_power * math.sqrt(q - d * d)) / d) ** 2
    assert 19_000 < n < 20_000
    pilot = Pilot(n=100, mean=0.0, deviation=1.0, decided=q)
    assert pilot.needed(d) == pytest.approx(n, rel=0.02)
    assert pilot.needed(d / 10) == pytest.approx(100 * n, rel=0.001)
    assert sign_test_power(20_000, q, d) == pytest.approx(sign_test_power(20_001, q, d), abs=0.01)


@pytest.mark.parametrize("n, decided", [(60, 1.0), (120, 0.5), (400, 0.2)])
def test_detectable_share_is_detected_in_80_of_100_draws(n, decided):
    """The verdict itself, interval and sign test, on outcomes drawn at the detectable difference."""
    pilot = Pilot(n, 0.0, 0.5, decided, step=0.5)
    difference = pilot.detectable(n) / pilot.step
    chances = [(decided - difference) / 2, 1 - decided, (decided + difference) / 2]
    rng = np.random.default_rng(1)
    draws = [rng.choice([0, 0.5, 1], n, p=chances) for _ in range(500)]
    found = np.mean([direction(share(y), sign_test(y), 0.5) == 1 for y in draws])
    assert found == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("n", [16, 80])
def test_detectable_mean_is_detected_in_80_of_100_draws(n):
    """The verdict on means of rows in prompts: two rows each, that share half of their variance."""
    rng = np.random.default_rng(2)

    def rows(mean):
        return mean + (rng.normal(size=(n, 1)) + rng.normal(size=(n, 2))).ravel() / math.sqrt(2)

    prompts = np.repeat(np.arange(n), 2)
    # The deviation of the mean of two such rows, known instead of estimated.
    difference = Pilot(n, 0.0, math.sqrt(0.75)).detectable(n)
    found = []
    for _ in range(300):
        x = rows(difference)
        m = bootstrap(x, resamples=400, groups=prompts)
        found.append(direction(m, mean_test(x, prompts)) == 1)
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)
    assert pilot_of(rows(0.0), groups=prompts).deviation == pytest.approx(math.sqrt(0.75), rel=0.35)


def test_pilot_counts_ties_and_prompts():
    y = [1, 1, 0.5, 0.5, 0, 1, 0.5, 0.5]
    pilot = pilot_of(y, 0.5)
    assert (pilot.n, pilot.decided, pilot.mean) == (8, 0.5, 0.125)
    # The same from the metric of paired differences: mean and standard error give the share of ties back.
    steps = [2 * (v - 0.5) for v in y]
    m = {"value": np.mean(steps), "stderr": np.std(steps, ddof=1) / math.sqrt(8)}
    again = pilot_of_metric(m, 8, of_shares=True)
    assert (again.decided, again.mean) == (pytest.approx(0.5), 2 * pilot.mean)
    assert again.needed(again.mean) == pilot.needed(pilot.mean)
    # Four equal pairs of each prompt: the prompts count, not the pairs.
    copies = with_power({}, np.repeat(y, 4), "pairs", 0.5, np.repeat(range(8), 4))["power"]
    assert (copies["n"], copies["unit"]) == (8, "prompts") and copies["needed"] < 200


def test_linearised_ratio_has_the_mean_and_error_of_a_ratio():
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 200, 400)
    rows = np.stack([tokens * rng.normal(0.1, 0.3, 400), tokens], 1)
    values = linearised_ratio(rows)
    ratio = bootstrap(rows, statistic=lambda x: x[:, 0].sum() / x[:, 1].sum(), bca=False)
    assert values.mean() == pytest.approx(ratio["value"])
    assert values.std(ddof=1) / 20 == pytest.approx(ratio["stderr"], rel=0.1)


def test_sentence_of_an_inconclusive_verdict():
    text = power_sentence(with_power({}, [1, 0, 0.5, 0.5, 1] * 20, "prompts", 0.5))
    assert text.startswith("Power: 100 prompts detect a difference of 11.1 points or more with 80% power")
    assert text.endswith("one of the observed size, 10.0 points, needs about 120 prompts.")
    assert "40% ties" in text
    # Nothing observed, nothing varied, nothing possible.
    assert power_sentence(with_power({}, [1, 0] * 20, "pairs", 0.5)).endswith("the observed one is 0.")
    assert "no variation" in power_sentence(with_power({}, [0.5] * 9, "pairs", 0.5))
    assert "too few to detect any" in power_sentence(with_power({}, [1, 0], "pairs", 0.5))
    assert "too few to detect any" in power_sentence(with_power({}, [1, 1, 1], "pairs", 0.5))
    assert power_sentence(with_power({}, [1], "pairs", 0.5)) == power_sentence({}) == ""


def test_records_are_on_the_metrics_scale():
    rows = np.random.default_rng(4).normal(0.02, 0.3, 50)
    plain, percent = with_power({}, rows, "rows")["power"], with_power({}, rows, "rows", scale=100)["power"]
    assert percent["detectable"] == pytest.approx(100 * plain["detectable"])
    assert percent["needed"] == plain["needed"]
    # A smaller level, as for one of several tests, needs more rows.
    assert power_record(pilot_of(rows), "rows", 0.01)["needed"] > plain["needed"]


def test_plan_lists_rows_detectable_differences_and_time():
    pilot = pilot_of([1, 0, 0.5, 0.5, 1] * 4, 0.5)
    rows = plan_rows(pilot, 124, 3.0)
    assert pilot.needed(pilot.mean) == 124
    text = plan_table(rows, pilot.n, 124, "prompts", "plan")
    assert [row["n"] for row in rows] == sorted({20, 124, 50, 100, 200, 400, 800, 1600, 3200, 6400})
    detectable = [row["detectable"] for row in rows]
    assert detectable == sorted(detectable, reverse=True)
    at_100 = next(line for line in text.splitlines() if line.startswith("100 "))
    assert "11.1 points" in at_100 and "5 min" in at_100
    assert "the pilot" in text and "for the pilot's difference" in text
