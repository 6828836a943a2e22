"""Bootstrap intervals and paired tests on per-row figures. Rows are the resampled unit."""

import warnings

import numpy as np

from utils.artifacts import metric

# Efron & Tibshirani (1993) advise 1000 or more for percentile intervals.
RESAMPLES = 2000


def bootstrap(values, seed: int = 42, resamples: int = RESAMPLES, statistic=None) -> dict:
    """Mean of `values` with its bootstrap standard error and 95% percentile interval (Efron & Tibshirani 1993).

    Args:
        values: one figure per row, shape (n,), or two paired columns a and b, shape (n, 2), whose mean(a - b) is taken.
        statistic: replaces the mean; a function from resampled rows, shape (n, columns), to a number.

    Returns:
        A metric: `{value, stderr, ci95, n}`; stderr and ci95 are None for fewer than two rows.
    """
    value, result, n = _resampled(values, seed, resamples, statistic)
    if result is None:
        return metric(value, None, None, n)
    # A statistic can be NaN on some resamples (a correlation with a column that became constant, for example); its
    # quantiles are then NaN too, and no interval is reported.
    interval = result.confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        return metric(value, None, None, n)
    return metric(value, float(result.standard_error), (float(interval.low), float(interval.high)), n)


def bootstrap_test(values, seed: int = 42, resamples: int = RESAMPLES, statistic=None) -> float:
    """Two-sided p-value of the bootstrap test that the figure is 0 (Efron & Tibshirani 1993, section 16.4).

    It is the share of resamples at least as far from the figure as the figure is from 0. One is added to both counts
    (Davison & Hinkley 1997, section 4.2), so the p-value is never 0.
    """
    value, result, _ = _resampled(values, seed, resamples, statistic)
    if result is None or value == 0:
        return 1.0
    # Resamples are centred at the figure; shifting them by -value gives the distribution under the null.
    far = np.abs(result.bootstrap_distribution - value) >= abs(value)
    return float((1 + far.sum()) / (1 + far.size))


def _resampled(values, seed: int, resamples: int, statistic):
    """(figure, scipy's bootstrap result or None for fewer than two rows, number of rows)."""
    from scipy.stats import bootstrap as scipy_bootstrap

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if statistic is None:
        # Paired columns become one column of differences: for a mean this equals resampling the pairs.
        values = values[:, 0] - values[:, 1] if values.ndim == 2 else values
        columns, function, vectorized = (values,), np.mean, True
    else:
        # scipy wants one array per column, each of shape (n,); `paired` draws the same rows from all of them.
        columns, vectorized = tuple(values.reshape(n, -1).T), False

        def function(*resampled):
            return statistic(np.stack(resampled, 1))

    # The figure comes from all rows, not from the mean of the resamples.
    value = float(function(*columns)) if n else float("nan")
    if n < 2:
        return value, None, n
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        # If all resamples are equal, scipy warns and the interval has zero width (or is NaN); callers handle both.
        warnings.simplefilter("ignore")
        # A fresh generator per call: metrics over the same rows use the same resamples, and a rerun prints the same
        # intervals. scipy's default method, BCa, adds a jackknife over all rows and is undefined if all resamples
        # agree; the percentile method is not. `batch` bounds the memory to 256 resamples at a time.
        result = scipy_bootstrap(
            columns, function, n_resamples=resamples, method="percentile", paired=True, vectorized=vectorized,
            rng=np.random.default_rng(seed), batch=256,
        )  # fmt: skip
    return value, result, n


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given. Below 0.05: family-wise error below 5%."""
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        # The smallest p-value is multiplied by m, the next by m - 1, ...; the running maximum keeps their order.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def ratio_of_sums(rows) -> float:
    """Sum of the first column divided by the sum of the second, shape (n, 2) to a number (nats over tokens, say)."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def rank_correlation(rows) -> float:
    """Spearman's rank correlation of two columns, shape (n, 2); NaN if one is constant."""
    from scipy.stats import rankdata

    # Pearson's correlation of mid-ranks is Spearman's with ties. A constant column has no variance to divide by.
    a, b = (rankdata(column) for column in rows.T)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def pairwise_correct(chosen, rejected) -> np.ndarray:
    """Per row: 1 if chosen scores above rejected, 0 if below, 0.5 for a tie. Shape (n,)."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    # > and >= differ only on a tie, where one of them holds.
    return 0.5 * ((chosen > rejected).astype(float) + (chosen >= rejected).astype(float))


def sign_test(right) -> float:
    """Two-sided p-value of the exact sign test that `right` is above 0.5 as often as below; ties (0.5) are dropped."""
    from scipy.stats import binomtest

    right = np.asarray(right, dtype=np.float64)
    # Without a decided row there is no evidence against the null: p = 1.
    decided = right[right != 0.5]
    return float(binomtest(int((decided > 0.5).sum()), len(decided), 0.5).pvalue) if len(decided) else 1.0


def signed_rank(differences) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that paired differences are symmetric about 0."""
    from scipy.stats import wilcoxon

    differences = np.asarray(differences, dtype=np.float64)
    # scipy drops zero differences and is undefined if none is left.
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def mcnemar(right_a, right_b) -> float:
    """Two-sided p-value of the exact McNemar test on paired 1/0 figures; rows where either is a tie are dropped."""
    a, b = np.asarray(right_a, dtype=np.float64), np.asarray(right_b, dtype=np.float64)
    keep = (a != 0.5) & (b != 0.5)
    # The exact test is a sign test on the discordant rows: 1 if only a is right, 0 if only b is, 0.5 if they agree.
    return sign_test((a[keep] - b[keep] + 1) / 2)
