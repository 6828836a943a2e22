"""Verdict and likelihood displacement of a DPO run."""

from preflab.training.dpo_report import displacement, verdict_of


def test_verdict_needs_an_interval_above_one_half():
    def verdict(low, p, n=120):
        accuracy = {"value": 0.6, "stderr": 0.04, "ci95": low and [low, 0.69], "n": n}
        return verdict_of({"reward_accuracy": accuracy, "p_reward_accuracy_is_half": {"value": p}})

    assert verdict(0.51, 0.03) == (True, verdict(0.51, 0.03)[1]) and verdict(0.51, 0.03)[1].startswith(
        "Training helped:"
    )
    assert not verdict(0.5, 0.03)[0] and not verdict(None, 0.03, 1)[0]
    # Two pairs, both right: the bootstrap interval is a point at 100%, the sign test says p = 0.5.
    assert not verdict(1.0, 0.5, 2)[0] and verdict(1.0, 0.5, 2)[1].startswith("Inconclusive")


def test_accuracy_below_one_half_is_harmful():
    accuracy = {"value": 0.3, "stderr": 0.04, "ci95": [0.22, 0.38], "n": 120}
    for p, sentence in ((1e-5, "Training hurt:"), (0.2, "Inconclusive:")):
        metrics = {"reward_accuracy": accuracy, "p_reward_accuracy_is_half": {"value": p}}
        assert verdict_of(metrics)[0] is False and verdict_of(metrics)[1].startswith(sentence)


def test_displacement_needs_both_intervals_and_tests_below_zero():
    def text(chosen, rejected, p=0.001):
        sides = {"chosen": chosen, "rejected": rejected}
        changes = {f"logps_{k}_difference": {"value": sum(v) / 2, "ci95": v} for k, v in sides.items()}
        return displacement(changes | {f"p_logps_{k}_difference": {"value": p} for k in sides})

    assert "-2.00 nats" in text((-3, -1), (-5, -4)) and text((-3, -1), (-5, -4), 0.2) is None
    assert text((-3, 0.1), (-5, -4)) is None and text((1, 3), (-5, -4)) is None and text((-3, -1), (-1, 2)) is None


def test_gain_that_words_and_lengths_explain_is_named():
    accuracy = {"value": 0.9, "stderr": 0.04, "ci95": [0.8, 0.95], "n": 60}
    metrics = {"reward_accuracy": accuracy, "p_reward_accuracy_is_half": {"value": 1e-5}}
    surface = {"surface_classifier_accuracy": {"value": 0.88}}
    for interval, p, named in (([-0.1, 0.14], 0.7, True), ([0.2, 0.4], 1e-4, False), ([-0.3, -0.1], 1e-3, True)):
        tested = {"reward_accuracy_minus_surface": {"ci95": interval}, "p_reward_accuracy_is_surface": {"value": p}}
        assert ("surface features" in verdict_of(metrics | surface | tested)[1]) == named
    assert "surface" not in verdict_of(metrics)[1]
