"""Calibration error beside the error that sampling alone gives."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom

from preflab.evaluation.reward_slices import calibration_error, calibration_error_if_calibrated


def test_error_of_calibrated_pairs_is_the_binomials():
    """Ten bins of 12 pairs at confidence 0.5: the mean distance of 12 coin flips from one half."""
    k = np.arange(13)
    exact = (binom.pmf(k, 12, 0.5) * abs(k / 12 - 0.5)).sum()
    expected = calibration_error_if_calibrated(np.zeros(120), 0)
    assert expected["value"] == pytest.approx(exact, abs=0.003)
    assert expected["ci95"][0] < expected["value"] < expected["ci95"][1] and expected["n"] == 120


def test_calibrated_rewards_have_the_expected_error():
    rng = np.random.default_rng(0)
    size = abs(rng.normal(0, 1, 4000))
    margin = np.where(rng.random(4000) < expit(size), size, -size)
    low, high = calibration_error_if_calibrated(margin, 0)["ci95"]
    assert low < calibration_error(margin)["value"] < high < 0.05
    # Overconfident: the same outcomes with ten times the margin.
    assert calibration_error(10 * margin)["value"] > 3 * calibration_error_if_calibrated(10 * margin, 0)["ci95"][1]


def test_no_margins():
    assert np.isnan(calibration_error(np.zeros(0))["value"])
    assert np.isnan(calibration_error_if_calibrated(np.zeros(0), 0)["value"])
