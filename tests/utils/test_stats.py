"""Statistics against closed forms and hand counts."""

import math

import numpy as np
import pytest

from preflab.evaluation.rewards import reward_metrics, reward_rows
from preflab.training.dpo_report import displacement, verdict_of
from utils.stats import bootstrap, mcnemar, pairwise_correct, sign_test, signed_rank


def test_bootstrap_of_a_mean_matches_the_normal_theory():
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


def test_bootstrap_of_too_little():
    assert bootstrap([2.0]) == {"value": 2.0, "stderr": None, "ci95": None, "n": 1}
    constant = bootstrap([1.0] * 5)
    assert constant["value"] == 1 and constant["ci95"] == [1, 1]


def test_ranked_right_gives_ties_a_half():
    assert pairwise_correct([2, 1, 1], [1, 2, 1]).tolist() == [1, 0, 0.5]


def test_sign_test_and_mcnemar_by_hand():
    # 9 of 10 right: 2 (10 + 1) / 2^10; the tie is left out.
    assert sign_test([1] * 9 + [0] + [0.5]) == pytest.approx(22 / 1024)
    # 5 pairs where only a is right, none where only b is: 2 / 2^5; equal pairs carry nothing.
    assert mcnemar([1] * 5 + [1, 0], [0] * 5 + [1, 0]) == pytest.approx(2 / 32)
    assert mcnemar([1, 0], [1, 0]) == 1 and sign_test([0.5]) == 1


def test_rewards_by_hand():
    scores = [
        {"row": 0, "chosen": -10.0, "rejected": -20.0, "ref_chosen": -12.0, "ref_rejected": -19.0},
        {"row": 1, "chosen": -10.0, "rejected": -8.0, "ref_chosen": -10.0, "ref_rejected": -8.0},
        {"row": 2, "chosen": -10.0, "rejected": -12.0, "ref_chosen": -9.0, "ref_rejected": -12.0},
    ]
    rows = reward_rows(scores, beta=0.1)
    assert [r["margin"] for r in rows] == pytest.approx([0.3, 0.0, -0.1])
    m = reward_metrics(rows, surface=np.array([1.0, -1.0, 0.0]))
    value = {name: figure["value"] for name, figure in m.items()}
    assert value["reward_accuracy"] == 0.5 and value["reward_accuracy_strict"] == pytest.approx(1 / 3)
    assert value["exact_ties"] == 1 and value["reward_margin"] == pytest.approx(0.2 / 3)
    assert value["likelihood_ranking_base"] == value["likelihood_ranking_tuned"] == pytest.approx(2 / 3)
    assert value["logps_chosen_difference"] == pytest.approx(1 / 3)
    assert value["surface_classifier_accuracy"] == 0.5


def test_the_claim_needs_the_interval_above_one_half():
    def told(low, p, n=120):
        accuracy = {"value": 0.6, "stderr": 0.04, "ci95": low and [low, 0.69], "n": n}
        return verdict_of({"reward_accuracy": accuracy, "p_reward_accuracy_is_half": {"value": p}})

    assert told(0.51, 0.03) == (True, told(0.51, 0.03)[1]) and told(0.51, 0.03)[1].startswith("Training helped:")
    assert not told(0.5, 0.03)[0] and not told(None, 0.03, 1)[0]
    # Two pairs, both right: the bootstrap interval is a point at 100%, the sign test says p = 0.5.
    assert not told(1.0, 0.5, 2)[0] and told(1.0, 0.5, 2)[1].startswith("No claim")


def test_signed_rank_by_hand():
    # All five differences positive: the most extreme of 2^5 sign patterns, on two sides.
    assert signed_rank([1, 2, 3, 4, 5]) == pytest.approx(2 / 32) and signed_rank([0, 0]) == 1


def test_displacement_only_where_both_fell_beyond_chance():
    def told(chosen, rejected):
        sides = {"chosen": chosen, "rejected": rejected}
        return displacement({f"logps_{k}_difference": {"value": sum(v) / 2, "ci95": v} for k, v in sides.items()})

    assert "-2.00 nats" in told((-3, -1), (-5, -4))
    assert told((-3, 0.1), (-5, -4)) is None and told((1, 3), (-5, -4)) is None and told((-3, -1), (-1, 2)) is None
