"""Prediction-powered means: few outcomes that count, many predictions of them that may be biased.

Angelopoulos et al. 2023, "Prediction-powered inference" (Science 382, 669-674), with the power tuning of Angelopoulos,
Duchi & Zrnic 2023 ("PPI++", arXiv 2311.01453): the mean of the predictions, corrected by what they get wrong where the
outcome is known, weighted so that useless predictions have weight 0 and cost nothing.
"""

import math
from dataclasses import dataclass

import numpy as np

from utils.artifacts import metric

# Rows of each pair of an outcome and a prediction, 0 or 1, that are added for the interval: Agresti & Min (2005,
# Biometrics 61, 515-523) add half a row to each cell of matched pairs. Otherwise few rows on which all predictions are
# right would say that predictions are never wrong.
ADDED = 0.5


@dataclass
class Powered:
    """A prediction-powered mean.

    Attributes:
        rate: the metric, in [0, 1].
        p: two-sided p-value of the test that the mean is one half.
        weight: of the predictions, from 0 (useless) to 1 (as good as outcomes).
        as_precise_as: the number of outcomes alone that would give the same variance.
    """

    rate: dict
    p: dict
    weight: float
    as_precise_as: float


def prediction_powered(outcomes, predictions, further) -> Powered:
    """The mean of outcomes in [0, 1] with the help of predictions, and its t interval.

    Rows are independent units (prompts), drawn alike: which of them have an outcome must not depend on it.

    Args:
        outcomes: shape (n,). predictions: of the same rows, shape (n,), in [0, 1].
        further: predictions of rows without an outcome, shape (N,).

    Returns:
        The mean of the outcomes + weight × (mean of `further` - mean of `predictions`), whose variance is
        var(outcome - weight × prediction) / n + weight² var(prediction) / N. The weight is the one that minimises it,
        between 0 and 1. Variances of the n rows, and the interval's centre, include the rows of ADDED; the interval has
        Student's quantile with n - 2 degrees of freedom and is cut to [0, 1]. For fewer than four outcomes it is None.
    """
    from scipy.stats import t

    y, f, g = (np.asarray(x, dtype=np.float64) for x in (outcomes, predictions, further))
    n = len(y)
    if n < 4:
        value = metric(float(y.mean()) if n else None, None, None, n)
        return Powered(value, metric(1.0, n=n), 0.0, float(n))
    # The n rows and, with weight ADDED, one row for each pair of 0 and 1.
    rows = np.concatenate([np.stack([y, f], 1), [(0, 0), (0, 1), (1, 0), (1, 1)]])
    weights = np.concatenate([np.ones(n), np.full(4, ADDED)])
    covariance = np.cov(rows.T, aweights=weights, ddof=0) * n / (n - 2)
    weight, of_further = 0.0, 0.0
    if len(g):
        of_further = float(np.concatenate([g, [0, 1]]).var(ddof=1)) / len(g)
        best = covariance[0, 1] / (covariance[1, 1] * (1 + n / len(g)))
        weight = min(1.0, max(0.0, float(best)))
    of_rows = covariance[0, 0] - 2 * weight * covariance[0, 1] + weight**2 * covariance[1, 1]
    value = float(y.mean() + (weight * (g.mean() - f.mean()) if len(g) else 0.0))
    stderr = math.sqrt(of_rows / n + weight**2 * of_further)
    half = float(t.ppf(0.975, n - 2)) * stderr
    # The added rows move the interval's centre towards one half: that of a rate near 0 or 1 is skewed.
    mean_y, mean_f = np.average(rows, 0, weights)
    centre = float(mean_y + weight * ((g.mean() if len(g) else mean_f) - mean_f))
    # A correction may leave the range that a rate has.
    value = min(1.0, max(0.0, value))
    low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
    rate = metric(value, stderr, (low, high), n)
    p = 2 * float(t.sf(abs(centre - 0.5) / stderr, n - 2))
    return Powered(rate, metric(p, n=n), weight, float(covariance[0, 0] / stderr**2))
