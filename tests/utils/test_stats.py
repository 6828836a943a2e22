"""Bootstrap and tests against closed forms and hand counts."""

import math

import numpy as np
import pytest

from utils.stats import bootstrap, bootstrap_test, holm, mcnemar, pairwise_correct, sign_test, signed_rank


def test_bootstrap_of_a_mean_matches_normal_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    m = bootstrap(values)
    standard_error = values.std(ddof=1) / math.sqrt(400)
    assert m["n"] == 400 and m["value"] == pytest.approx(values.mean())
    assert m["stderr"] == pytest.approx(standard_error, rel=0.08)
    assert m["ci95"][0] == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.05)
    assert m["ci95"][1] == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.05)
    assert bootstrap(values) == m and bootstrap(values, seed=1) != m


def test_bootstrap_of_pairs_keeps_the_pairing():
    a = np.random.default_rng(0).normal(0, 5, 300)
    m = bootstrap(np.stack([a + 1, a], 1))
    assert m["value"] == pytest.approx(1) and m["stderr"] < 1e-9


def test_bootstrap_of_few_or_constant_rows():
    assert bootstrap([2.0]) == {"value": 2.0, "stderr": None, "ci95": None, "n": 1}
    constant = bootstrap([1.0] * 5)
    assert constant["value"] == 1 and constant["ci95"] == [1, 1]


def test_pairwise_correct_counts_ties_half():
    assert pairwise_correct([2, 1, 1], [1, 2, 1]).tolist() == [1, 0, 0.5]


def test_sign_test_and_mcnemar_by_hand():
    # 9 of 10 right: 2 (10 + 1) / 2^10; the tie is dropped.
    assert sign_test([1] * 9 + [0] + [0.5]) == pytest.approx(22 / 1024)
    # 5 rows where only a is right, none where only b is: 2 / 2^5; concordant rows do not count.
    assert mcnemar([1] * 5 + [1, 0], [0] * 5 + [1, 0]) == pytest.approx(2 / 32)
    assert mcnemar([1, 0], [1, 0]) == 1 and sign_test([0.5]) == 1


def test_signed_rank_by_hand():
    # All five differences positive: the most extreme of 2^5 sign patterns, two-sided.
    assert signed_rank([1, 2, 3, 4, 5]) == pytest.approx(2 / 32) and signed_rank([0, 0]) == 1


def test_bootstrap_test_keeps_its_level():
    rng = np.random.default_rng(1)
    p = [bootstrap_test(rng.normal(0, 1, 40), seed=k, resamples=400) for k in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.12
    assert bootstrap_test([0.0, 0.0, 0.0]) == 1.0 and bootstrap_test([1.0]) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(v) for v in (0.03, 0.06, 0.06)]
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
