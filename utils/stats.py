"""Intervals and paired tests on per-row figures. Rows are the resampled unit.

Every interval is a 95% interval. `share` is for rates (accuracies, win rates, agreement) and their paired differences,
`bootstrap` for means, `of_sums` for ratios of sums and functions of them, `bootstrap` with a statistic for all other
figures. tests/utils/test_coverage.py measures their coverage, tests/end_to_end/test_false_claims.py how often a verdict
claims a difference where there is none.
"""

import math
import warnings

import numpy as np

from utils.artifacts import metric

# Efron & Tibshirani (1993) advise 1000 or more for percentile intervals.
RESAMPLES = 2000
# The normal distribution's 97.5% quantile.
Z95 = 1.959963984540054
# With more rows than this, the skewness correction equals the bootstrap-t interval, and percentile intervals equal BCa,
# whose jackknife computes the statistic once per row, within a few percent of the width.
MANY_ROWS = 1000
# Few rows of a skewed distribution have too small a skewness on average (at most about sqrt(n)); hence this factor. It
# and the next bound were chosen by the simulations of tests/utils/test_coverage.py.
SKEWNESS_FACTOR = 1.5
# Hall's correction widens the half of an interval on the side of the long tail, with this bound at most 2.4 times.
MOST_CORRECTION = 0.99
# Sign patterns of up to this many rows are enumerated; for more rows they are drawn, in two steps.
MOST_ROWS_ENUMERATED = 16
FLIPS, MOST_FLIPS = 9_999, 99_999


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
    """Mean of `values` with its standard error and the 95% interval of `of_sums`; or a statistic with its BCa interval.

    The interval of a statistic is BCa (Efron & Tibshirani 1993, section 14.3), or the percentile interval where BCa is
    undefined or too slow; its error is the bootstrap's.

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
        if _group_numbers(groups, len(rows))[1] == len(rows):
            return of_sums(rows[:, None], lambda sums: sums[..., 0] / len(rows), seed, resamples)
        return of_sums(np.stack([rows, np.ones(len(rows))], 1), ratio, seed, resamples, groups)
    value, result, n = _resampled(values, seed, resamples, statistic, groups=groups)
    if result is None:
        return metric(value, None, None, n)
    # A statistic can be NaN on some resamples (a correlation with a column that became constant, for example); its
    # quantiles are then NaN too, and no interval is reported.
    interval = result.confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        return metric(value, None, None, n)
    if bca and n <= MANY_ROWS:
        better = _resampled(values, seed, 0, statistic, "BCa", result, groups)[1].confidence_interval
        interval = better if np.isfinite([better.low, better.high]).all() else interval
    return metric(value, float(result.standard_error), (float(interval.low), float(interval.high)), n)


def ratio(sums):
    """First sum over second, shape (..., columns) to (...): nats over tokens, say, or a mean with a column of ones."""
    return sums[..., 0] / sums[..., 1]


def of_sums(values, figure=ratio, seed: int = 42, resamples: int = RESAMPLES, groups=None) -> dict:
    """A smooth function of the rows' sums with its standard error (delta method) and 95% interval.

    The interval is the smallest that holds three: Student's, which covers with heavy tails; the bootstrap-t interval
    (Efron & Tibshirani 1993, section 12.5; up to 1,000 rows), each resample studentised with its own error; and
    Student's after Hall's correction for skewness (1992, Journal of the Royal Statistical Society B 54, 221-228), which
    covers with few skewed rows.

    Args:
        values: shape (n, columns).
        figure: a function from sums over rows, shape (..., columns), to figures, shape (...); made of numpy functions
            that take complex numbers. Default: the first sum over the second.
        groups: as in `bootstrap`; rows are summed within their group first.

    Returns:
        A metric, as `bootstrap`.
    """
    from scipy.stats import t

    rows = np.asarray(values, dtype=np.float64)
    n_rows = len(rows)
    value = float(figure(rows.sum(0))) if n_rows else float("nan")
    rows = group_sums(rows, groups)
    n = len(rows)
    if n < 2:
        return metric(value, None, None, n_rows)
    linear = _linearised(rows, figure)
    spread = float(linear.std())
    stderr = float(linear.std(ddof=1)) / math.sqrt(n)
    # Rows that are equal up to rounding have no spread: their deviation would be the error of the sums.
    if not np.isfinite(stderr) or spread <= 1e-12 * max(abs(value), np.abs(linear).max()):
        return metric(value, stderr, (value, value), n_rows)
    student = float(t.ppf(0.975, n - 1))
    # The side of the long tail needs the wider half: few rows of the tail make the mean and its error small together.
    skewness = sample_skewness(linear)
    bend = min(SKEWNESS_FACTOR * abs(skewness) / math.sqrt(n), MOST_CORRECTION / student)
    wide = uncorrected(student, bend)
    low, high = (-wide, student) if skewness < 0 else (-student, wide)
    low, high = value + stderr * low, value + stderr * high
    # How many standard errors, each resample with its own, the figure of a resample is from that of all rows.
    rng, distances = np.random.default_rng(seed), []
    for start in range(0, resamples if n <= MANY_ROWS else 0, 256):
        # In batches, which bounds the memory.
        drawn = rows[rng.integers(0, n, (min(256, resamples - start), n))]
        spreads = _linearised(drawn, figure).std(1)
        # A resample of equal rows has no standard error.
        varied = spreads > 1e-9 * spread
        distances.append((figure(drawn[varied].sum(1)) - value) / spreads[varied])
    distances = np.concatenate([[], *distances])
    # Where many resamples have no standard error (few distinct rows), the quantiles mean nothing.
    if len(distances) >= max(1, 0.975 * resamples):
        far_left, far_right = np.quantile(distances, (0.025, 0.975)) * spread
        # A distribution with its long tail on the left has the true figure on the right: the ends change sides.
        low, high = min(low, value - float(far_right)), max(high, value - float(far_left))
    return metric(value, stderr, (low, high), n_rows)


def _linearised(rows: np.ndarray, figure) -> np.ndarray:
    """The contribution of each row to `figure` of the sums, shape (..., n), for rows of shape (..., n, columns).

    Up to a constant, n times the row's product with the gradient: their standard deviation over sqrt(n) is the figure's
    standard error by the delta method.
    """
    sums = rows.sum(-2)
    products = 0.0
    for k in range(rows.shape[-1]):
        # Complex-step derivative (Squire & Trapp 1998): exact, since nothing is subtracted.
        step = np.zeros(rows.shape[-1], complex)
        step[k] = 1e-30j
        products = products + rows[..., k] * (figure(sums + step).imag / 1e-30)[..., None]
    return rows.shape[-2] * products


def linearised_ratio(rows: np.ndarray) -> np.ndarray:
    """Values whose mean is the ratio of two columns' sums, with the spread of that ratio. Shape (n, 2) to (n,)."""
    return ratio(rows.sum(0)) + _linearised(rows, ratio)


def sample_skewness(x: np.ndarray) -> float:
    """The adjusted skewness G1 of x, shape (n,); 0 for fewer than three rows or without spread."""
    n, spread = len(x), x.std()
    if n < 3 or not spread > 0:
        return 0.0
    return float(((x - x.mean()) ** 3).mean() / spread**3) * math.sqrt(n * (n - 1)) / (n - 2)


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

    The mean is the ratio of the groups' sums and sizes, here linearised. Groups of equal sizes have their own means.
    Shape (groups,).
    """
    sums = group_sums(np.stack([rows, np.ones(len(rows))], 1), groups)
    return rows if len(sums) == len(rows) else linearised_ratio(sums)


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


def group_sums(rows: np.ndarray, groups=None) -> np.ndarray:
    """The sum of each group's rows, shape (groups, columns), ordered by first occurrence; `rows` without groups."""
    numbers, count = _group_numbers(groups, len(rows))
    if count == len(rows):
        return rows
    return np.stack([np.bincount(numbers, column, count) for column in rows.T], 1)


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


def mean_test(differences, groups=None, seed: int = 42) -> float:
    """Two-sided p-value of the test that paired differences have mean 0.

    The largest of three:
    - the sign-flip permutation test (Fisher 1935; exact for symmetric differences): the share of sign patterns whose
      sum is at least as far from 0 as the observed one; all patterns for up to 16 rows, else up to 99,999 random ones
      with p = (1 + count) / (1 + draws), so that Holm's correction over 100 tests can reach significance;
    - Student's t test after Hall's correction for skewness (1992), if that weakens the claim. Rows with a rare large
      value on the other side are where a permutation test and a t test claim too often (27% for lognormal rows);
    - 0.6^n, the chance that all of n rows are on one side of 0 if 60% of the distribution is.

    Args:
        differences: shape (n,).
        groups: the group of each row; the test is then over the sums of the groups.

    Returns:
        The p-value; 1 for differences that are all 0 or not all finite.
    """
    differences = group_sums(np.asarray(differences, dtype=np.float64)[:, None], groups)[:, 0]
    # Every comparison with NaN is false, so that a permutation would never count as far as the rows themselves.
    if not np.any(differences) or not np.isfinite(differences).all():
        return 1.0
    p = max(sign_flip(differences, seed), skewness_corrected(differences))
    return float(max(p, 0.6 ** len(differences)))


def sign_flip(x: np.ndarray, seed: int = 42) -> float:
    """Two-sided p-value of the sign-flip permutation test that x, shape (n,), is symmetric about 0."""
    # Without its zeros, whose sign does not matter, and scaled against under- and overflow.
    sizes, total = np.abs(x[x != 0]), abs(x.sum())
    n, largest = len(sizes), sizes.sum()
    # Sums that are equal in exact arithmetic count as equal.
    far = total - 1e-10 * largest

    def count(positive) -> int:
        """Of the sign patterns, shape (draws, n), 1 for positive, those whose sum is at least as far from 0."""
        return int((np.abs(2 * (positive.astype(np.float64) @ sizes) - largest) >= far).sum())

    if n <= MOST_ROWS_ENUMERATED:
        # The first sign is fixed: a pattern and its opposite are equally far from 0.
        patterns = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1
        return count(patterns) / len(patterns)
    rng, reached, drawn = np.random.default_rng(seed), 0, 0
    # The second step only refines small p-values. Fewer draws for many rows, which bounds the time.
    for draws in (FLIPS, MOST_FLIPS):
        draws = min(draws, max(FLIPS, 50_000_000 // n))
        while drawn < draws:
            batch = min(draws - drawn, max(1, 2_000_000 // n))
            bits = np.unpackbits(np.frombuffer(rng.bytes(batch * -(-n // 8)), np.uint8).reshape(batch, -1), axis=1)
            reached, drawn = reached + count(bits[:, :n]), drawn + batch
        if (1 + reached) / (1 + drawn) >= 0.01:
            break
    return (1 + reached) / (1 + drawn)


def skewness_corrected(x: np.ndarray) -> float:
    """Two-sided p-value of Student's t test that x, shape (n,), has mean 0, weakened for skewness as Hall (1992) does.

    Skewness against the claim (a long tail on the other side of 0) is taken 1.5 times, plus its standard error for
    normal rows: the sample's own is too small where the tail is missing from it. Skewness along the claim is ignored.
    """
    from scipy.stats import t

    n = len(x)
    if n < 3:
        return 1.0
    stderr = x.std(ddof=1) / math.sqrt(n)
    if not stderr > 1e-12 * np.abs(x).max():
        return 0.0
    distance, error = abs(x.mean()) / stderr, skewness_error(n)
    against = -math.copysign(1.0, x.mean()) * sample_skewness(x)
    against = max(0.0, SKEWNESS_FACTOR * against + error)
    return float(2 * t.sf(min(distance, corrected(distance, against / math.sqrt(n))), n - 1))


def corrected(distance: float, bend: float) -> float:
    """Hall's monotone cubic (1992): a distance in standard errors, corrected for the skewness `bend` times sqrt(n)."""
    z = bend * distance / 3
    return distance * (1 - z + z * z / 3)


def uncorrected(distance: float, bend: float) -> float:
    """The inverse of `corrected`."""
    return 3 * (1 - float(np.cbrt(1 - bend * distance))) / bend if bend > 1e-9 else distance


def skewness_error(n: int) -> float:
    """The standard error of `sample_skewness` for n normal rows."""
    return math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))


def critical_distance(n: int, level: float = 0.05) -> float:
    """How many standard errors from 0 the mean of n rows without skewness must be for `mean_test` to have p < level."""
    from scipy.stats import t

    if n < 3 or 0.6**n >= level:
        return math.inf
    return uncorrected(float(t.ppf(1 - level / 2, n - 1)), skewness_error(n) / math.sqrt(n))


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
