"""Intervals and paired tests on per-row figures. Rows are the resampled unit.

Every interval is a 95% interval. `share` is for rates (accuracies, win rates, agreement) and their paired differences,
`bootstrap` for all other figures. tests/utils/test_stats.py measures their coverage.
"""

import math
import warnings

import numpy as np

from utils.artifacts import metric

# Efron & Tibshirani (1993) advise 1000 or more for percentile intervals.
RESAMPLES = 2000
# The normal distribution's 97.5% quantile.
Z95 = 1.959963984540054
# BCa's jackknife computes the statistic once per row on all other rows; with more rows than this, percentile and BCa
# intervals hardly differ.
MOST_ROWS_FOR_BCA = 1000


# ------------------------------------------------------------------------------------------------------------- shares


def share(outcomes, seed: int = 42, scale: float = 1, groups=None) -> dict:
    """Mean of outcomes in [0, 1] (ties: 0.5), or of the paired difference of two such columns, with its interval.

    For outcomes 0, 0.5 and 1, the interval inverts Tango's score test (1998) of the difference between wins and losses;
    without ties this is Wilson's interval (1927). It never has zero width and never leaves the range. Other outcomes
    (probabilities, means over votes) have the interval of `bootstrap`, cut to the range.

    With groups, the score interval is that of the effective number of rows: n over the design effect, which is the
    variance between groups over that of independent rows (Korn & Graubard 1998, for surveys with clusters).

    Args:
        outcomes: shape (n,) in [0, 1], or two columns a and b, shape (n, 2), for the mean of a - b.
        scale: 100 for percent.
        groups: as in `bootstrap`.

    Returns:
        A metric: `{value, stderr, ci95, n}`; stderr and ci95 are None for fewer than two rows.
    """
    rows = np.asarray(outcomes, dtype=np.float64)
    paired, n = rows.ndim == 2, len(rows)
    # Differences are from -1 to 1 already; an outcome's distance from a tie is doubled, so that both have one scale.
    steps = rows[:, 0] - rows[:, 1] if paired else 2 * rows - 1
    value = scale * float((steps if paired else rows).mean()) if n else float("nan")
    if n < 2:
        return metric(value, None, None, n)
    values = independent_values(steps, groups)
    if len(values) < 2:
        return metric(value, None, None, n)
    stderr = float(values.std(ddof=1)) / math.sqrt(len(values))
    if np.ptp(steps) > 1e-12 and not np.isin(steps, (-1, -0.5, 0, 0.5, 1)).all():
        low, high = (min(max(x, -1.0), 1.0) for x in bootstrap(steps, seed, groups=groups)["ci95"])
    else:
        # Half a step counts as half a row: its variance is overstated, and the interval is wider than needed.
        rows_per_win = effective_rows(steps, values) / n
        wins, losses = steps[steps > 0].sum(), -steps[steps < 0].sum()
        low, high = score_interval(wins * rows_per_win, losses * rows_per_win, n * rows_per_win)
    # If all rows are equal their own spread is 0; the interval's is not.
    stderr = stderr or (high - low) / 2 / Z95
    if not paired:
        # Back from steps, -1 to 1, to outcomes, 0 to 1.
        stderr, low, high = stderr / 2, (1 + low) / 2, (1 + high) / 2
    return metric(value, scale * stderr, (float(scale * low), float(scale * high)), n)


def effective_rows(rows: np.ndarray, values: np.ndarray) -> float:
    """How many independent rows would have the variance that the groups' `independent_values` have.

    The number is lowered further for few groups, whose variance is uncertain, by the ratio of Student's quantiles.

    Args:
        rows: shape (n,).
        values: shape (groups,).
    """
    from scipy.stats import t

    n, count = len(rows), len(values)
    if count == n:
        return float(n)
    independent, between = rows.var(ddof=1) / n, values.var(ddof=1) / count
    # Without any variance nothing is known about the design: a group then counts as one row.
    effective = n * independent / between if independent > 0 and between > 0 else count
    few = (t.ppf(0.975, n - 1) / t.ppf(0.975, count - 1)) ** 2
    return float(min(n, max(1.0, effective * few)))


def score_interval(wins: float, losses: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Tango's score interval (1998) of (wins - losses) / n for n rows, of which n - wins - losses are ties.

    Args:
        z: the normal quantile of the level; 1.645 for a 90% interval.
    """
    from scipy.optimize import brentq

    estimate = (wins - losses) / n

    def excess(d: float, side: int) -> float:
        """The score statistic of the hypothesis that the difference is d, minus side * z; times its standard error."""
        # Maximum-likelihood share of losses under the hypothesis: 2n q^2 + b q - losses d (1 - d) = 0.
        b = (2 * n - wins + losses) * d - wins - losses
        q = (math.sqrt(max(0.0, b * b + 8 * n * losses * d * (1 - d))) - b) / (4 * n)
        return (wins - losses - n * d) - side * z * math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))

    # At the estimate itself, and at 1 and -1, the standard error can be 0, which is a root but not the interval's end.
    gap = 1e-9
    low = -1.0 if estimate <= gap - 1 else brentq(excess, gap / 2 - 1, estimate - gap, args=(1,))
    high = 1.0 if estimate >= 1 - gap else brentq(excess, estimate + gap, 1 - gap / 2, args=(-1,))
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------- means, statistics


def bootstrap(
    values, seed: int = 42, resamples: int = RESAMPLES, statistic=None, bca: bool = True, groups=None
) -> dict:
    """Mean of `values` with its standard error and 95% interval.

    The interval of a mean is the smallest that holds both Student's and the bootstrap-t interval (Efron & Tibshirani
    1993, section 12.5): the first covers with heavy tails, the second with skewed rows. The interval of a statistic is
    BCa (section 14.3), or the percentile interval where BCa is undefined or too slow; its error is the bootstrap's.

    Args:
        values: one figure per row, shape (n,), or two paired columns a and b, shape (n, 2), whose mean(a - b) is taken.
        statistic: replaces the mean; a function from resampled rows, shape (n, columns), to a number.
        bca: False for a statistic that is too slow for one more call per row.
        groups: the group of each row (its prompt), hashable, shape (n,). Rows of one group are not independent: groups
            are resampled, each with all of its rows (Davison & Hinkley 1997, section 3.8).

    Returns:
        A metric: `{value, stderr, ci95, n}`; stderr and ci95 are None for fewer than two rows or groups.
    """
    if statistic is None:
        rows = np.asarray(values, dtype=np.float64)
        # Paired columns become one column of differences: for a mean this equals resampling the pairs.
        rows = rows[:, 0] - rows[:, 1] if rows.ndim == 2 else rows
        # An artifact's n counts rows.
        return _mean(independent_values(rows, groups), seed, resamples) | {"n": len(rows)}
    value, result, n = _resampled(values, seed, resamples, statistic, groups=groups)
    if result is None:
        return metric(value, None, None, n)
    # A statistic can be NaN on some resamples (a correlation with a column that became constant, for example); its
    # quantiles are then NaN too, and no interval is reported.
    interval = result.confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        return metric(value, None, None, n)
    if bca and n <= MOST_ROWS_FOR_BCA:
        better = _resampled(values, seed, 0, statistic, "BCa", result, groups)[1].confidence_interval
        interval = better if np.isfinite([better.low, better.high]).all() else interval
    return metric(value, float(result.standard_error), (float(interval.low), float(interval.high)), n)


def _mean(x: np.ndarray, seed: int, resamples: int) -> dict:
    """Mean of the rows x, shape (n,), with the interval that `bootstrap` describes."""
    from scipy.stats import t

    n = len(x)
    value = float(x.mean()) if n else float("nan")
    if n < 2:
        return metric(value, None, None, n)
    stderr = float(x.std(ddof=1)) / math.sqrt(n)
    # Rows that are equal up to rounding have no spread: their deviation would be the error of the mean.
    if not np.isfinite(stderr) or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return metric(value, stderr, (value, value), n)
    half = float(t.ppf(0.975, n - 1)) * stderr
    low, high = value - half, value + half
    # How many standard errors, each resample with its own, the mean of a resample is from the mean of all rows.
    rng, distances = np.random.default_rng(seed), []
    for start in range(0, resamples, 256):
        # In batches, which bounds the memory.
        drawn = x[rng.integers(0, n, (min(256, resamples - start), n))]
        spread = drawn.std(1)
        # A resample of equal rows has no standard error.
        varied = spread > 1e-9 * x.std()
        distances.append((drawn.mean(1)[varied] - value) / spread[varied])
    distances = np.concatenate(distances)
    # Where many resamples have no standard error (few distinct rows), the quantiles mean nothing.
    if len(distances) >= 0.975 * resamples:
        far_left, far_right = np.quantile(distances, (0.025, 0.975)) * x.std()
        # A distribution with its long tail on the left has the true mean on the right: the ends change sides.
        low, high = min(low, value - float(far_right)), max(high, value - float(far_left))
    return metric(value, stderr, (low, high), n)


def bootstrap_test(values, statistic, seed: int = 42, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the bootstrap test that a statistic is 0 (Efron & Tibshirani 1993, section 16.4).

    It is the share of resamples at least as far from the figure as the figure is from 0. One is added to both counts
    (Davison & Hinkley 1997, section 4.2), so the p-value is never 0. Arguments as in `bootstrap`.
    """
    value, result, _ = _resampled(values, seed, resamples, statistic)
    if result is None or value == 0:
        return 1.0
    # Resamples are centred at the figure; shifting them by -value gives the distribution under the null.
    far = np.abs(result.bootstrap_distribution - value) >= abs(value)
    return float((1 + far.sum()) / (1 + far.size))


def _resampled(values, seed: int, resamples: int, statistic, method="percentile", earlier=None, groups=None):
    """(figure, scipy's bootstrap result or None for fewer than two rows, number of rows).

    Args:
        method: percentile or BCa.
        earlier: a result whose resamples are used instead of new ones, with `resamples` 0.
        groups: as in `bootstrap`.
    """
    from scipy.stats import bootstrap as scipy_bootstrap

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    table = values[:, None] if values.ndim == 1 else values
    # scipy wants one array per column, each of shape (n,); `paired` draws the same rows from all of them.
    columns = tuple(table.T)

    def function(*resampled):
        return statistic(np.stack(resampled, 1))

    # The figure comes from all rows, not from the mean of the resamples.
    value = float(function(*columns)) if n else float("nan")
    numbers, count = _group_numbers(groups, n)
    if count < n:
        columns, function = _grouped(table, statistic, numbers, count)
    if count < 2:
        return value, None, n
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        # If all resamples are equal, scipy warns and the interval has zero width (or is NaN); callers handle both.
        warnings.simplefilter("ignore")
        # A fresh generator per call: metrics over the same rows use the same resamples, and a rerun prints the same
        # intervals. `batch` bounds the memory to 256 resamples at a time.
        result = scipy_bootstrap(
            columns, function, n_resamples=resamples, method=method, paired=True, vectorized=False,
            rng=np.random.default_rng(seed), batch=256, bootstrap_result=earlier,
        )  # fmt: skip
    return value, result, n


def _group_numbers(groups, n: int) -> tuple[np.ndarray, int]:
    """(number of each row's group, in the order of first occurrence, shape (n,); number of groups)."""
    if groups is None:
        return np.arange(n), n
    order: dict = {}
    numbers = np.array([order.setdefault(group, len(order)) for group in groups], dtype=int)
    return numbers, len(order)


def independent_values(rows: np.ndarray, groups=None) -> np.ndarray:
    """One value per group, with the mean of all rows and the spread of a mean over groups; `rows` without groups.

    The value of a group is the overall mean plus its rows' summed deviations, scaled so that equal sizes give the
    groups' own means: the linearised ratio of the groups' sums and sizes. Shape (groups,).
    """
    numbers, count = _group_numbers(groups, len(rows))
    if count == len(rows):
        return rows
    mean = rows.mean()
    return mean + np.bincount(numbers, rows - mean, count) * count / len(rows)


def _grouped(table: np.ndarray, statistic, numbers: np.ndarray, count: int) -> tuple:
    """(columns, function) for a bootstrap of a statistic whose units are groups of rows, shape (n, columns)."""
    # Sorted by group: group g has the rows starts[g] to starts[g] + sizes[g].
    table, sizes = table[np.argsort(numbers, kind="stable")], np.bincount(numbers, minlength=count)
    starts = np.cumsum(sizes) - sizes

    def function(resampled):
        drawn = resampled.astype(int)
        ends = np.cumsum(sizes[drawn])
        # The places of all rows of the drawn groups, one group after the other.
        return statistic(table[np.arange(ends[-1]) + np.repeat(starts[drawn] - ends + sizes[drawn], sizes[drawn])])

    return (np.arange(count),), function


def group_means(values, groups=None) -> np.ndarray:
    """The mean of each group, in the order of first occurrence; `values` where every row is its own group.

    Paired tests assume independent rows: of a prompt with several pairs they see one value.
    """
    values = np.asarray(values, dtype=np.float64)
    numbers, count = _group_numbers(groups, len(values))
    return values if count == len(values) else np.bincount(numbers, values, count) / np.bincount(numbers)


# -------------------------------------------------------------------------------------------------------------- tests


def direction(m: dict, p: float, null: float = 0.0) -> int:
    """What a verdict may claim: 1 for above `null`, -1 for below, 0 for inconclusive.

    The 95% interval of the metric must exclude `null`, and the test must have p < 0.05: they can differ near the
    threshold, and intervals of few rows are approximate.
    """
    if m["ci95"] is None or not p < 0.05:
        return 0
    low, high = m["ci95"]
    return 1 if low > null else -1 if high < null else 0


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


def sign_test(right, groups=None) -> float:
    """Two-sided p-value of the exact sign test that `right` is above 0.5 as often as below; ties (0.5) are dropped.

    Args:
        groups: the group of each row; the test is then over the means of the groups.
    """
    from scipy.stats import binomtest

    right = group_means(right, groups)
    # Without a decided row there is no evidence against the null: p = 1.
    decided = right[right != 0.5]
    return float(binomtest(int((decided > 0.5).sum()), len(decided), 0.5).pvalue) if len(decided) else 1.0


def signed_rank(differences, groups=None) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that paired differences are symmetric about 0.

    Args:
        groups: the group of each row; the test is then over the means of the groups.
    """
    from scipy.stats import wilcoxon

    differences = group_means(differences, groups)
    # scipy drops zero differences and is undefined if none is left.
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def mcnemar(right_a, right_b, groups=None) -> float:
    """Two-sided p-value of the exact McNemar test on paired 1/0 figures; rows where either is a tie are dropped.

    Args:
        groups: the group of each row; the test is then a sign test on the mean differences of the groups.
    """
    a, b = np.asarray(right_a, dtype=np.float64), np.asarray(right_b, dtype=np.float64)
    keep = (a != 0.5) & (b != 0.5)
    # The exact test is a sign test on the discordant rows: 1 if only a is right, 0 if only b is, 0.5 if they agree.
    left = None if groups is None else [group for group, kept_row in zip(groups, keep, strict=True) if kept_row]
    return sign_test((a[keep] - b[keep] + 1) / 2, left)
