"""Coverage of the 95% intervals: shares by exact enumeration, means and ratios by simulation.

python -m pytest tests/utils/test_coverage.py --slow -s -k table     # prints the table of docs/certainty.md
"""

import math

import numpy as np
import pytest
from scipy import stats as reference

from utils.stats import bootstrap, of_sums, score_interval, share

SIZES = (10, 20, 40, 120)


def coverage_of_shares(n: int, p: float) -> float:
    """Exact: all outcomes, weighted by their probability."""
    inside = [low <= p <= high for low, high in (share([1] * k + [0] * (n - k))["ci95"] for k in range(n + 1))]
    return float(reference.binom.pmf(np.flatnonzero(inside), n, p).sum())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.97])
def test_exact_coverage_of_shares(n, p):
    """93% at least; more than 97% only where counts are too coarse."""
    assert 0.9297 <= coverage_of_shares(n, p) <= (0.98 if n < 40 else 0.972)


@pytest.mark.parametrize(("win", "loss"), [(0.25, 0.25), (0.5, 0.1), (0.45, 0.05), (0.9, 0.05)])
@pytest.mark.parametrize("n", [10, 20, pytest.param(40, marks=pytest.mark.slow)])
def test_exact_coverage_of_paired_differences(win, loss, n):
    coverage = 0.0
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            low, high = score_interval(wins, losses, n)
            if low <= win - loss <= high:
                coverage += reference.multinomial.pmf([wins, losses, n - wins - losses], n, [win, loss, 1 - win - loss])
    assert 0.93 <= coverage <= 0.975


def ratio_rows(rng, size):
    """Negative log-likelihoods and tokens of answers of very different lengths, shape (*size, 2)."""
    tokens = np.ceil(rng.lognormal(3.5, 0.8, size))
    return np.stack([tokens * rng.lognormal(1, 0.4, size) + 60 * rng.exponential(1, size), tokens], -1)


# Draw rows of a shape, and the true mean or ratio.
MEANS = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "heavy tails (t, 3 df)": (lambda rng, size: rng.standard_t(3, size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "lognormal, sigma 0.5": (lambda rng, size: rng.lognormal(0, 0.5, size), math.exp(0.125)),
    "lognormal, sigma 1": (lambda rng, size: rng.lognormal(size=size), math.exp(0.5)),
}
RATIO = "nats per token"


def coverage(name: str, n: int, draws: int) -> float:
    rng = np.random.default_rng(n)
    if name == RATIO:
        # E[nll] / E[tokens] of `ratio_rows`; the mean of ceil() is close to that of the lognormal plus a half.
        samples = ratio_rows(rng, (draws, n))
        big = ratio_rows(np.random.default_rng(0), (2_000_000,))
        truth, interval = float(big[:, 0].sum() / big[:, 1].sum()), of_sums
    else:
        draw, truth = MEANS[name]
        samples, interval = draw(rng, (draws, n)), bootstrap
    ends = [interval(x, seed=k, resamples=1000)["ci95"] for k, x in enumerate(samples)]
    return float(np.mean([low <= truth <= high for low, high in ends]))


@pytest.mark.parametrize(("name", "n"), [("normal", 20), ("lognormal, sigma 1", 10), (RATIO, 20)])
def test_coverage_of_means_and_ratios_fast(name, n):
    # 600 draws: 93% less 2.5 standard errors.
    assert 0.904 <= coverage(name, n, 600) <= 0.985


@pytest.mark.slow
def test_coverage_table():
    rows = {f"share, p = {p}": [coverage_of_shares(n, p) for n in SIZES] for p in (0.5, 0.9, 0.97)}
    rows |= {name: [coverage(name, n, 4000) for n in SIZES] for name in [*MEANS, RATIO]}
    print()
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{100 * x:.1f}" for x in values) + " |")
    for name, values in rows.items():
        for n, x in zip(SIZES, values, strict=True):
            # Four standard errors of 4,000 draws are 1.5 percentage points.
            assert 0.93 - 0.012 <= x <= 0.981, (name, n)
