"""Implicit rewards and their metrics against hand counts."""

import numpy as np
import pytest

from preflab.evaluation.rewards import reward_metrics, reward_rows


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
