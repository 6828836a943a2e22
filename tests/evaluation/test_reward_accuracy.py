"""Figures of held-out rewards that no other test compares: slices by length, likelihoods of lists and of thumbs."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from preflab.evaluation.reward_accuracy import length_slices
from preflab.training.list_metrics import list_metrics
from preflab.training.thumb_metrics import thumb_metrics


def test_length_slices_by_hand():
    # Lengths within 10% of the longer one: the first two pairs. The better answer is shorter in pairs 2 and 3.
    lengths, correct = [(100, 91), (95, 100), (50, 100), (100, 50)], np.array([1.0, 0.0, 0.5, 1.0])
    rows = [{"chars_chosen": a, "chars_rejected": b, "prompt": k} for k, (a, b) in enumerate(lengths)]
    slices = {name.removeprefix("reward_accuracy_"): m for name, m in length_slices(rows, correct, 0).items()}
    expected = {"length_matched": 0.5, "better_is_shorter": 0.25, "better_is_longer": 1.0}
    assert {name: m["value"] for name, m in slices.items()} == expected and {m["n"] for m in slices.values()} == {2}


def test_likelihood_order_of_lists_by_hand():
    # Three pairs of different score in the first list, two in the second; base 2 and 1.5 of them, tuned 3 and 1.
    first = {"scores": [3, 2, 1], "ref_answers": [-1, -3, -2], "answers": [-1, -2, -3], "rewards": [0, 1, -1]}
    second = {"scores": [2, 1, 1], "ref_answers": [-2, -2, -4], "answers": [-2, -1, -4], "rewards": [0, 1, 0]}
    metrics = list_metrics([{**row, "prompt": k} for k, row in enumerate((first, second))])
    base, tuned = (2 / 3 + 1.5 / 2) / 2, (1 + 1 / 2) / 2
    assert metrics["list_ranking_base"]["value"] == pytest.approx(base)
    assert metrics["list_ranking_tuned"]["value"] == pytest.approx(tuned)
    assert metrics["list_ranking_difference"]["value"] == pytest.approx(tuned - base)


def test_likelihood_auc_of_thumbs_is_scipys():
    rng = np.random.default_rng(0)
    rows = [
        {"reward": rng.normal(), "tuned": rng.integers(5), "base": rng.integers(5), "label": k % 3 == 0, "prompt": k}
        for k in range(30)
    ]

    def area(key):
        up, down = ([row[key] for row in rows if row["label"] is label] for label in (True, False))
        return mannwhitneyu(up, down).statistic / (len(up) * len(down))

    metrics = thumb_metrics(rows)
    for side in ("base", "tuned"):
        assert metrics[f"likelihood_auc_{side}"]["value"] == pytest.approx(area(side))
    assert metrics["likelihood_auc_difference"]["value"] == pytest.approx(area("tuned") - area("base"))
