"""Sequential stopping: the confidence sequence against its definition, its error at any stopping time, resuming."""

import math

import numpy as np
import pytest
from conftest import write_jsonl

from preflab.judging.battle_judging import STOP_BATCH
from preflab.judging.battle_report import stopping_note
from utils.artifacts import RowFile, read_json
from utils.confidence_sequence import BETS, MOST_LOST, Betting, confidence_sequence


def capital(x, m: float) -> float:
    """The largest capital that bets against the mean m reach, by the definition: one loop per bet."""
    best = 0.0
    for direction, room in ((1, m), (-1, 1 - m)):
        wealth = np.ones(len(BETS))
        for outcome in x:
            for k, bet in enumerate(BETS):
                bounded = min(bet, MOST_LOST / room) if room > 0 else bet
                wealth[k] *= 1 + direction * bounded * (outcome - m)
            best = max(best, wealth.mean() / 2)
    return best


def test_sequence_by_its_definition():
    x = np.random.default_rng(0).choice([0, 0.5, 1], 40, p=[0.1, 0.2, 0.7])
    sequence = confidence_sequence(x)
    for m in np.linspace(0, 1, 21):
        if abs(m - sequence.low) > 0.002 and abs(m - sequence.high) > 0.002:
            assert (capital(x, m) < 20) == (sequence.low < m < sequence.high), m
    assert sequence.p == pytest.approx(min(1, 1 / capital(x, 0.5))) and sequence.n == 40


def test_sequence_only_narrows():
    x = np.random.default_rng(1).choice([0.0, 1.0], 120, p=[0.4, 0.6])
    widths = [confidence_sequence(x[:n]) for n in (0, 10, 40, 120)]
    assert (widths[0].low, widths[0].high, widths[0].p) == (0, 1, 1)
    for earlier, later in zip(widths, widths[1:], strict=False):
        assert earlier.low <= later.low and later.high <= earlier.high and later.p <= earlier.p
    # A win for a is a loss for b.
    mirrored = confidence_sequence(1 - x)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - widths[3].high, 1 - widths[3].low), abs=1e-9)


@pytest.mark.parametrize("x", [[2.0], [-0.1], [math.nan]])
def test_sequence_refuses_what_is_not_an_outcome(x):
    with pytest.raises(ValueError):
        confidence_sequence(x)


# Probabilities of a loss, a tie and a win.
KINDS = {
    "even, no ties": (0.5, 0.0, 0.5),
    "even, ties": (0.25, 0.5, 0.25),
    "even, few decided": (0.05, 0.9, 0.05),
    "60% wins": (0.3, 0.2, 0.5),
    "95% wins": (0.03, 0.04, 0.93),
}


def stopped(rng, kind: str, prompts: int, points: float) -> tuple[bool, bool, int]:
    """(whether the interval at the stop misses the mean, whether it excludes 50%, prompts judged) of one battle."""
    p = KINDS[kind]
    x, mean, betting = rng.choice([0, 0.5, 1], prompts, p=p), p[1] / 2 + p[2], Betting()
    for end in range(STOP_BATCH, prompts + STOP_BATCH, STOP_BATCH):
        sequence = betting.extend(x[end - STOP_BATCH : end]).sequence()
        if sequence.excludes_half or 100 * sequence.half_width <= points:
            break
    return not sequence.low <= mean <= sequence.high, sequence.excludes_half, min(end, prompts)


def test_error_of_stopping_is_bounded():
    """With an ordinary interval, looking after each of 16 batches excludes 50% in more than a fifth of even battles."""
    rng = np.random.default_rng(2)
    wrong = [stopped(rng, "even, no ties", 256, 3)[1] for _ in range(100)]
    assert np.mean(wrong) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 100)


@pytest.mark.slow
def test_table_of_stopping():
    print("\n| outcomes | prompts | interval misses, % | claims, % | mean judged | saved, % |")
    rng = np.random.default_rng(3)
    for kind in KINDS:
        for prompts in (200, 1000):
            draws = 1000 if prompts == 200 else 400
            misses, claims, judged = np.array([stopped(rng, kind, prompts, 3) for _ in range(draws)], float).T
            saved = 100 * (1 - judged.mean() / prompts)
            print(f"| {kind} | {prompts} | {100 * misses.mean():.1f} | {100 * claims.mean():.1f}"
                  f" | {judged.mean():.0f} | {saved:.0f} |")  # fmt: skip
            margin = 2 * math.sqrt(0.05 * 0.95 / draws)
            assert misses.mean() <= 0.05 + margin
            assert not kind.startswith("even") or claims.mean() <= 0.05 + margin


# --------------------------------------------------------------------------------------------------------- end to end


def test_judging_stops_and_resumes_its_decision(endpoint, call, tmp_path):
    """Tuned is always longer: 50% is excluded after the first batch of 64 prompts."""
    base = endpoint(lambda *_: "short")[0]
    tuned = endpoint(lambda *_: "a much longer answer")[0]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {k}"} for k in range(64)])
    args = ["--battle", "--base_model", base, "--tuned_model", tuned, "--prompts", prompts, "--judge", "longer"]
    args += ["--eval_out", tmp_path / "out", "--stop_when", 3]
    code, stdout, err = call("eval_win_rate", *args)
    assert code == 0, err
    summary = read_json(tmp_path / "out/m/battle.json")
    stopping = summary["stopping"]
    assert stopping["reason"] == "decided" and stopping["judged"] == STOP_BATCH and stopping["of"] == 64
    assert stopping["saved"] == pytest.approx(0.75) and "saved 75.0%" in " ".join(stdout.split())
    expected = confidence_sequence(np.ones(STOP_BATCH))
    assert summary["metrics"]["win_rate"]["ci95"] == pytest.approx([expected.low, expected.high])
    assert summary["metrics"]["p_win_rate_is_half"]["value"] == pytest.approx(expected.p)
    assert summary["claim"].startswith("The judge prefers tuned") and "confidence sequence" in summary["claim"]
    judged = [row["prompt"] for row in RowFile(tmp_path / "out/m/battle_rows.jsonl").read()]
    # A random sample, in the order of the prompts.
    assert len(judged) == STOP_BATCH and judged == sorted(judged) and judged != list(range(STOP_BATCH))
    # The decision is read again.
    (decision,) = (tmp_path / "out/.cache").glob("stopping-*/rows-0.jsonl")
    decision.write_text('{"key": "decision", "prompts": 32, "reason": "decided"}\n', encoding="utf-8")
    assert call("eval_win_rate", *args)[0] == 0
    assert read_json(tmp_path / "out/m/battle.json")["stopping"]["judged"] == 32


def test_note_of_judging_that_does_not_stop():
    sequence = {"points": 3.0, "of": 24, "judged": 24, "saved": 0.0, "low": 0.4, "high": 0.7}
    note = stopping_note({**sequence, "reason": None, "quantity": "rate"})
    assert note.startswith("NOT STOPPED EARLY: after all 24 prompts") and "+/- 15.0 points" in note and "50%" in note
    # Of a difference, from -1 to 1: half the width is in points of it.
    difference = {**sequence, "low": -0.02, "high": 0.03, "judged": 16, "saved": 1 / 3}
    note = stopping_note({**difference, "reason": "narrow", "quantity": "difference"})
    assert "after 16 of 24" in note and "within 3 points" in note and "+/- 2.5 points" in note and "33.3%" in note
