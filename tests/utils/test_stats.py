"""Intervals and tests against closed forms, scipy, published values and hand counts."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from utils.stats import (
    bootstrap,
    direction,
    effective_rows,
    holm,
    independent_values,
    mcnemar,
    mean_test,
    of_sums,
    pairwise_correct,
    sample_skewness,
    score_interval,
    share,
    sign_flip,
    sign_test,
    skewness_corrected,
)
from utils.tables import undecided

# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(("right", "n"), [(10, 10), (0, 20), (9, 10), (86, 120), (1, 2)])
def test_share_has_wilsons_interval(right, n):
    m = share([1] * right + [0] * (n - right))
    wilson = reference.binomtest(right, n).proportion_ci(method="wilson")
    assert m["value"] == right / n and m["n"] == n and m["stderr"] > 0
    assert m["ci95"] == pytest.approx([wilson.low, wilson.high], abs=1e-9)
    percent = share([1] * right + [0] * (n - right), scale=100)
    assert percent["ci95"] == pytest.approx([100 * wilson.low, 100 * wilson.high], abs=1e-7)
    assert percent["stderr"] == pytest.approx(100 * m["stderr"])


@pytest.mark.parametrize(
    ("wins", "losses", "n", "level", "low", "high"),
    [
        # Fagerland, Lydersen & Laake (2017), chapter 8: airway hyper-responsiveness in 21 children (Bentur 2009).
        (1, 7, 21, 0.95, -0.517, -0.026),
        # PropCIs::scoreci.mp in R, as two public analyses print it.
        (28, 25, 618, 0.90, -0.0148, 0.0247),
        (48, 41, 549, 0.90, -0.0157, 0.0414),
    ],
)
def test_score_interval_has_the_published_values(wins, losses, n, level, low, high):
    digits = 3 if level == 0.95 else 4
    signed = score_interval(wins, losses, n, reference.norm.ppf((1 + level) / 2))
    # R's function subtracts in the other order, so one of the two orders is printed.
    assert tuple(round(x, digits) for x in signed) in ((low, high), (-high, -low))


def test_paired_difference_of_shares():
    pairs = np.array([[1, 0]] + [[0, 1]] * 7 + [[1, 1]] + [[0, 0]] * 12)
    m = share(pairs)
    assert m["value"] == pytest.approx(-6 / 21) and m["ci95"] == pytest.approx([-0.517, -0.026], abs=5e-4)
    # The standard error with n - 1 in its denominator.
    assert m["stderr"] == pytest.approx(reference.sem(pairs[:, 0] - pairs[:, 1]))
    same = share([[1, 1]] * 24)
    assert same["value"] == 0 and same["ci95"] == pytest.approx([-0.138, 0.138], abs=5e-4) and same["stderr"] > 0


def test_share_is_never_certain_and_never_leaves_its_range():
    for rows in ([1.0] * 10, [0.5] * 10, [0.5] * 9 + [1], [2 / 3] * 10, [0.99, 1.0, 1.0, 0.98], [0, 1]):
        low, high = share(rows)["ci95"]
        assert 0 <= low <= np.mean(rows) <= high <= 1 and high - low > 0.01, rows
    assert share([1.0])["ci95"] is None and share([])["n"] == 0


# -------------------------------------------------------------------------------------------------------------- means


def test_mean_has_its_standard_error_and_students_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    m = bootstrap(values)
    assert m["n"] == 400 and m["value"] == pytest.approx(values.mean())
    assert m["stderr"] == pytest.approx(reference.sem(values))
    student = reference.ttest_1samp(values, 0).confidence_interval()
    # The bootstrap-t interval may be a little wider, never narrower.
    assert m["ci95"][0] <= student.low and m["ci95"][1] >= student.high
    assert m["ci95"] == pytest.approx(list(student), abs=0.03)
    assert bootstrap(values) == m and bootstrap(values, seed=1) != m


def test_skewed_rows_have_a_skewed_interval():
    values = np.random.default_rng(0).lognormal(size=40)
    m = bootstrap(values)
    assert m["ci95"][1] - m["value"] > 1.3 * (m["value"] - m["ci95"][0])


def test_bootstrap_of_pairs_keeps_the_pairing():
    a = np.random.default_rng(0).normal(0, 5, 300)
    m = bootstrap(np.stack([a + 1, a], 1))
    assert m["value"] == pytest.approx(1) and m["stderr"] < 1e-9 and m["ci95"] == pytest.approx([1, 1])


def test_bootstrap_of_few_or_constant_rows():
    assert bootstrap([2.0]) == {"value": 2.0, "stderr": None, "ci95": None, "n": 1}
    constant = bootstrap([1.0] * 5)
    assert constant["value"] == 1 and constant["ci95"] == [1, 1]
    # Nine equal rows: most resamples have no spread, so the bootstrap-t interval is undefined. By hand: G1 is 3.162,
    # 1.5 times that over sqrt(10) is 1.5, above the bound 0.99 / 2.262: the right half is 3 (1 - 0.01^(1/3)) / 0.99
    # times that of Student.
    nearly = bootstrap([1.0] * 9 + [2.0])
    student = reference.ttest_1samp([1.0] * 9 + [2.0], 0).confidence_interval()
    wide = 3 * (1 - 0.01 ** (1 / 3)) / 0.99
    assert nearly["ci95"] == pytest.approx([student.low, 1.1 + wide * (student.high - 1.1)])


def test_ratio_of_sums_has_the_error_of_the_delta_method():
    """Standard error of a ratio estimator (Cochran 1977, eq. 2.46), and a bootstrap-t interval written out."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 60, 30).astype(float)
    nll = tokens * rng.lognormal(0, 0.5, 30)
    m = of_sums(np.stack([nll, tokens], 1))
    r = nll.sum() / tokens.sum()
    residuals = nll - r * tokens
    assert m["value"] == pytest.approx(r)
    assert m["stderr"] == pytest.approx(math.sqrt((residuals**2).sum() / 29 / 30) / tokens.mean())
    spread, t = residuals.std() / tokens.mean(), []
    for _ in range(4000):
        rows = rng.integers(0, 30, 30)
        star = nll[rows].sum() / tokens[rows].sum()
        t.append((star - r) / ((nll - star * tokens)[rows].std() / tokens[rows].mean()))
    low, high = r - np.quantile(t, (0.975, 0.025)) * spread
    # The interval may be wider than the bootstrap-t's, never narrower but for the difference of the draws.
    width = high - low
    assert low - 0.15 * width <= m["ci95"][0] <= low + 0.05 * width
    assert high - 0.05 * width <= m["ci95"][1] <= high + 0.3 * width


def test_figure_of_three_sums_has_the_delta_methods_error():
    """exp(b / n) - exp(a / n) against the bootstrap's standard error."""
    rng = np.random.default_rng(4)
    rows = np.stack([rng.normal(50, 5, 80), rng.normal(52, 5, 80), rng.integers(20, 30, 80)], 1)

    def figure(sums):
        return np.exp(sums[..., 1] / sums[..., 2]) - np.exp(sums[..., 0] / sums[..., 2])

    m, scipys = of_sums(rows, figure), bootstrap(rows, statistic=lambda x: float(figure(x.sum(0))))
    assert m["value"] == pytest.approx(scipys["value"]) and m["stderr"] == pytest.approx(scipys["stderr"], rel=0.08)
    # Four copies of each row in one group are one unit.
    grouped = of_sums(np.repeat(rows, 4, 0), figure, groups=np.repeat(np.arange(80), 4).tolist())
    assert grouped["ci95"] == pytest.approx(m["ci95"]) and grouped["n"] == 320


def test_statistic_has_scipys_bca_interval():
    rows = np.random.default_rng(0).lognormal(size=(50, 2))
    m = bootstrap(rows, statistic=lambda x: x[:, 0].sum() / x[:, 1].sum())
    scipys = reference.bootstrap(
        tuple(rows.T), lambda a, b: a.sum() / b.sum(), paired=True, vectorized=False, n_resamples=2000, method="BCa",
        rng=np.random.default_rng(42),
    )  # fmt: skip
    assert m["ci95"] == pytest.approx(list(scipys.confidence_interval))
    assert m["stderr"] == pytest.approx(scipys.standard_error)
    # Where BCa is undefined, because every row gives the same figure, the percentile interval remains.
    assert bootstrap(np.ones((5, 2)), statistic=lambda x: x[:, 0].sum() / x[:, 1].sum())["ci95"] == [1, 1]


# -------------------------------------------------------------------------------------------------------------- tests


def test_pairwise_correct_counts_ties_half():
    assert pairwise_correct([2, 1, 1], [1, 2, 1]).tolist() == [1, 0, 0.5]


def test_sign_test_and_mcnemar_by_hand():
    # 9 of 10 right: 2 (10 + 1) / 2^10; the tie is dropped.
    assert sign_test([1] * 9 + [0] + [0.5]) == pytest.approx(22 / 1024)
    # 5 rows where only a is right, none where only b is: 2 / 2^5; concordant rows do not count.
    assert mcnemar([1] * 5 + [1, 0], [0] * 5 + [1, 0]) == pytest.approx(2 / 32)
    assert mcnemar([1, 0], [1, 0]) == 1 and sign_test([0.5]) == 1


@pytest.mark.parametrize("n", [6, 14])
def test_sign_flip_equals_scipys_exact_permutation_test(n):
    x = np.random.default_rng(n).normal(0.4, 1, n)
    scipys = reference.permutation_test(
        (x,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf, batch=4096
    )
    assert sign_flip(x) == pytest.approx(scipys.pvalue) and sign_flip(-1000 * x) == pytest.approx(scipys.pvalue)
    # Zeros change nothing; sums that tie in exact arithmetic count as equal.
    assert sign_flip(np.append(x, [0, 0])) == pytest.approx(scipys.pvalue)
    assert sign_flip(np.array([0.1, 0.2, 0.3, -0.6])) == 1


def test_drawn_sign_flips_are_near_the_exact_share_and_fine():
    x = np.random.default_rng(2).normal(0.5, 1, 20)
    signs = 1 - 2 * ((np.arange(2**19)[:, None] >> np.arange(20)) & 1)
    exact = (np.abs(signs @ x) >= abs(x.sum()) - 1e-9).mean()
    assert sign_flip(x) == pytest.approx(exact, rel=0.2) and sign_flip(x) == sign_flip(x)
    # Fine enough for Holm's correction over 100 tests.
    assert mean_test(np.random.default_rng(0).normal(1, 1, 60)) == pytest.approx(1e-5)


def test_mean_test_by_hand():
    # All five differences positive: the most extreme of 2^5 sign patterns, two-sided, and 0.6^5 = 0.078 is larger.
    assert sign_flip(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(2 / 32)
    assert mean_test([10, 10.1, 9.9, 10, 10.2]) == pytest.approx(0.6**5)
    assert mean_test([0, 0]) == 1 and mean_test([]) == 1 and mean_test([1.0]) == 1
    # Equal differences have no standard error; the sign patterns remain, 2 / 2^10.
    assert mean_test([0.5] * 10) == pytest.approx(0.6**10) and sign_flip(np.full(10, 0.5)) == pytest.approx(2 / 1024)


def test_skewness_correction_by_hand():
    x = np.array([-1.0, -1.2, -0.8, -1.1, -0.9, -1.0, -1.3, 2.0])
    assert sample_skewness(x) == pytest.approx(reference.skew(x, bias=False))
    distance = abs(x.mean()) / reference.sem(x)
    z = (1.5 * reference.skew(x, bias=False) + math.sqrt(6 * 56 / (6 * 9 * 11))) / math.sqrt(8) * distance / 3
    assert skewness_corrected(x) == pytest.approx(2 * reference.t.sf(distance * (1 - z + z * z / 3), 7))
    # A tail on the claim's own side does not strengthen it.
    student = reference.ttest_1samp(np.abs(x), 0).pvalue
    assert student <= skewness_corrected(np.abs(x)) <= 3 * student


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(v) for v in (0.03, 0.06, 0.06)]
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ci95", "p", "outcome"),
    [([0.6, 0.8], 0.01, 1), ([0.1, 0.4], 0.01, -1), ([0.4, 0.6], 0.01, 0), ([0.6, 0.8], 0.05, 0), (None, 0.01, 0)],
)
def test_direction_needs_interval_and_test(ci95, p, outcome):
    m = {"value": 0.5, "stderr": 0.1, "ci95": ci95, "n": 9}
    assert direction(m, p, 0.5) == outcome
    # With sides swapped, the outcome is the opposite one.
    swapped = ci95 and [1 - ci95[1], 1 - ci95[0]]
    assert direction({**m, "ci95": swapped}, p, 0.5) == -outcome
    if outcome == 0 and ci95:
        text = undecided(m, p, 0.5, "50%")
        assert ("not significant" in text) == (not p < 0.05) and ("contains 50%" in text) == (p < 0.05)


def test_bootstrap_by_group_equals_one_of_group_totals():
    """Every row three times, as pairs of one prompt: the interval is that of the rows once, not one of more data."""
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    once, prompts = bootstrap(values, 1), np.repeat(np.arange(40), 3).tolist()
    grouped = bootstrap(np.repeat(values, 3), 1, groups=prompts)
    assert grouped["n"] == 120 and grouped["value"] == pytest.approx(once["value"])
    assert grouped["ci95"] == pytest.approx(once["ci95"]) and grouped["stderr"] == pytest.approx(once["stderr"])
    assert bootstrap(np.repeat(values, 3), 1)["stderr"] < 0.7 * once["stderr"]
    # The same with a statistic, and for rows in any order.
    order = np.random.default_rng(1).permutation(120)
    mean = bootstrap(
        np.repeat(values, 3)[order], 1, statistic=lambda x: float(x.mean()), groups=np.array(prompts)[order]
    )
    assert mean["value"] == pytest.approx(once["value"]) and mean["stderr"] == pytest.approx(once["stderr"], rel=0.1)


def test_bootstrap_by_group_with_single_rows_is_the_ordinary_one():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values, 1, groups=[f"p{i}" for i in range(30)]) == bootstrap(values, 1)


def test_group_bootstrap_matches_theory():
    """Variance of a mean of unequal groups: sum over groups of (sum - n mean)^2 / rows^2."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 6, 200)
    prompts = np.repeat(np.arange(200), sizes)
    values = rng.normal(size=200)[prompts] + rng.normal(size=len(prompts))
    residuals = np.bincount(prompts, values - values.mean())
    assert bootstrap(values, 1, groups=prompts.tolist())["stderr"] == pytest.approx(
        np.sqrt((residuals**2).sum()) / len(values), rel=0.06
    )


def test_paired_tests_by_group():
    """12 prompts, each three times: the tests see 12 values."""
    right = np.array([1.0] * 10 + [0.0] * 2)
    prompts = np.repeat(np.arange(12), 3).tolist()
    assert sign_test(np.repeat(right, 3), prompts) == sign_test(right)
    assert mcnemar(np.repeat(right, 3), np.zeros(36), prompts) == mcnemar(right, np.zeros(12))
    differences = np.random.default_rng(0).normal(0.5, 1, 12)
    assert mean_test(np.repeat(differences, 3), prompts) == pytest.approx(mean_test(differences))


@pytest.mark.parametrize(("prompts", "rate", "agreement"), [(24, 0.5, 1.0), (40, 0.8, 0.7), (30, 0.5, 0.0)])
def test_share_by_group_covers_and_keeps_its_level(prompts, rate, agreement):
    """Four pairs per prompt; with probability `agreement` all have the outcome of the first."""
    rng, groups = np.random.default_rng(4), np.repeat(np.arange(prompts), 4).tolist()
    covered = claimed = naive = 0
    for _ in range(300):
        own = rng.random((prompts, 4)) < rate
        outcomes = np.where(rng.random((prompts, 1)) < agreement, own[:, :1], own).astype(float).ravel()
        m = share(outcomes, groups=groups)
        covered += m["ci95"][0] <= rate <= m["ci95"][1]
        claimed += direction(m, sign_test(outcomes, groups), rate) != 0
        low, high = share(outcomes)["ci95"]
        naive += low <= rate <= high
    assert covered >= 0.92 * 300 and m["n"] == 4 * prompts
    if rate == 0.5:
        assert claimed <= 0.07 * 300
    if agreement == 1:
        # Without groups, four copies of a row count as four rows.
        assert naive < 0.85 * 300


def test_equal_rows_in_groups_count_once():
    """Ten of ten, four times each: the interval is Wilson's for ten."""
    groups = np.repeat(np.arange(10), 4).tolist()
    wilson = reference.binomtest(10, 10).proportion_ci(method="wilson")
    low, high = share(np.ones(40), groups=groups)["ci95"]
    # Slightly wider, because the variance of ten groups is uncertain.
    assert 0.6 < low < wilson.low and high == pytest.approx(1.0)


def test_effective_rows_by_hand():
    """Two groups of two: rows 1, 1, 0, 0 have variance 1/3, so 1/12 for the mean; group means 1, 0 have 1/2 and 1/4.

    The design effect is 3, so 4 rows count as 4/3; times (t(3) / t(1))^2 = (3.18245 / 12.70620)^2, but at least as 1.
    """
    rows, groups = np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"]
    assert effective_rows(rows, independent_values(rows, groups)) == 1.0
    # Twenty groups of two equal rows: variances 0.2564 / 40 and 0.2632 / 20, and t(39), t(19) = 2.02269, 2.09302.
    rows, groups = np.repeat([1.0, 0.0] * 10, 2), np.repeat(np.arange(20), 2).tolist()
    by_hand = 40 * (0.25 * 40 / 39 / 40) / (0.25 * 20 / 19 / 20) * (2.02269 / 2.09302) ** 2
    assert effective_rows(rows, independent_values(rows, groups)) == pytest.approx(by_hand, rel=1e-5)
    # Unequal groups: cluster-robust variance of a ratio, the sum of (sum - size x mean)^2 times G / (G - 1) over n^2.
    rows, groups = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), ["a", "a", "b", "b", "c"]
    residuals = np.array([1 - 2 * 0.6, 2 - 2 * 0.6, 0 - 0.6])
    variance = 3 / 2 * (residuals**2).sum() / 25
    values = independent_values(rows, groups)
    assert values.var(ddof=1) / 3 == pytest.approx(variance) and values.mean() == pytest.approx(0.6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_differences_that_are_not_finite_support_no_claim(value):
    differences = [*np.linspace(1, 2, 60), value]
    with np.errstate(invalid="ignore"):
        assert mean_test(differences) == 1 and mean_test(differences, list(range(30)) * 2 + [99]) == 1
        assert direction(bootstrap(differences), mean_test(differences)) == 0
