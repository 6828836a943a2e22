"""Statistics on per-row figures: the one bootstrap, and the tests. Rows are the unit that is resampled."""

import warnings

import numpy as np

from utils.artifacts import metric

RESAMPLES = 2000


def bootstrap(values, seed: int = 42, resamples: int = RESAMPLES, statistic=None) -> dict:
    """Mean of `values` with its bootstrap standard error and 95% percentile interval (Efron & Tibshirani 1993).

    Args:
        values: one figure per row, shape (n,); two columns (n, 2) are resampled together and give mean(a - b).
        statistic: another figure than the mean: a function of the resampled rows, shape (n, columns) to a number.

    Returns:
        A metric: `{value, stderr, ci95, n}`; stderr and ci95 are None for fewer than two rows.
    """
    from scipy.stats import bootstrap as scipy_bootstrap

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if statistic is None:
        values = values[:, 0] - values[:, 1] if values.ndim == 2 else values
        columns, function, vectorized = (values,), np.mean, True
    else:
        columns, vectorized = tuple(values.reshape(n, -1).T), False

        def function(*resampled):
            return statistic(np.stack(resampled, 1))

    value = float(function(*columns)) if n else float("nan")
    if n < 2:
        return metric(value, None, None, n)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        # Resamples that are all alike are told by what comes out: an interval of no width, or none.
        warnings.simplefilter("ignore")
        result = scipy_bootstrap(
            columns, function, n_resamples=resamples, method="percentile", paired=True, vectorized=vectorized,
            rng=np.random.default_rng(seed), batch=256,
        )  # fmt: skip
    interval = result.confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        return metric(value, None, None, n)
    return metric(value, float(result.standard_error), (float(interval.low), float(interval.high)), n)


def ratio_of_sums(rows) -> float:
    """Sum of the first column over sum of the second: a mean weighted by the second, shape (n, 2) to a number."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def rank_correlation(rows) -> float:
    """Spearman's rank correlation of two columns, shape (n, 2); NaN where one is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(column) for column in rows.T)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def ranked_right(chosen, rejected) -> np.ndarray:
    """Per row: 1 where chosen scores above rejected, 0 where below, 0.5 where they tie. Shape (n,)."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    return 0.5 * ((chosen > rejected).astype(float) + (chosen >= rejected).astype(float))


def sign_test(right) -> float:
    """Two-sided p-value of the exact sign test that `right` (1, 0, ties 0.5 left out) is 50% on average."""
    from scipy.stats import binomtest

    right = np.asarray(right, dtype=np.float64)
    decided = right[right != 0.5]
    return float(binomtest(int(decided.sum()), len(decided), 0.5).pvalue) if len(decided) else 1.0


def signed_rank(differences) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that paired differences are symmetric about 0."""
    from scipy.stats import wilcoxon

    differences = np.asarray(differences, dtype=np.float64)
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def mcnemar(right_a, right_b) -> float:
    """Two-sided p-value of the exact McNemar test on paired 1/0 figures (rows where either ties are left out)."""
    a, b = np.asarray(right_a, dtype=np.float64), np.asarray(right_b, dtype=np.float64)
    keep = (a != 0.5) & (b != 0.5)
    return sign_test((a[keep] - b[keep] + 1) / 2)
