"""eval_reward_model.py: figures by hand and by sklearn, RewardBench's averages, best of n by enumeration, refusals."""

import itertools
import json
import math

import numpy as np
import pytest
from conftest import assert_one_line, make_pairs, write_jsonl
from sklearn.metrics import log_loss

from preflab.data.prompts import Prompt
from preflab.pairs.scorers import Scores, win_probabilities
from preflab.rewards.benchmarks import SECTIONS, best_of_credit, reward_bench, reward_bench_2, ties_score
from preflab.rewards.best_of_n import best_of_weights, curve, kl_of_best_of
from preflab.rewards.labelled import load_labelled
from preflab.rewards.metrics import margin_of, pair_metrics, score_rows
from utils.artifacts import read_json

SCORER = """
def score(prompt, answers):
    # The labels' own side wins by its number of vowels; some pairs are wrong.
    return [sum(a.count(v) for v in "aeiou") / 10 for a in answers]

def other(prompt, answers):
    return [-len(a) / 50 for a in answers]
"""


@pytest.fixture
def scorer(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCORER)
    return path


@pytest.fixture
def evaluate(call, tmp_path):
    """Run eval_reward_model.py in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: call("eval_reward_model", "--eval_out", tmp_path / "out", *args)


@pytest.fixture
def pairs(tmp_path):
    rows = [{**row, "category": "abc"[i % 3]} for i, row in enumerate(make_pairs(24))]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def summary_of(tmp_path, name) -> dict:
    return read_json(tmp_path / "out" / name / "reward_model.json")


def test_figures_equal_a_calculation_by_hand(evaluate, scorer, pairs, tmp_path):
    flags = ("--dataset_name", pairs, "--split", "train", "--run_name", "mine")
    code, out, err = evaluate("--scorer", f"{scorer}:score", "--against", f"{scorer}:other", *flags)
    assert code == 0, err
    metrics = summary_of(tmp_path, "mine")["metrics"]
    texts = [(r["chosen"][1]["content"], r["rejected"][1]["content"]) for r in map(json.loads, pairs.open())]
    vowels = np.array([[sum(a.count(v) for v in "aeiou") / 10 for a in pair] for pair in texts])
    margin = vowels[:, 0] - vowels[:, 1]
    right = np.where(margin == 0, 0.5, margin > 0)
    longer = np.array([(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in texts])
    assert metrics["reward_accuracy"]["value"] == pytest.approx(right.mean())
    assert metrics["longer_accuracy"]["value"] == pytest.approx(longer.mean())
    assert metrics["reward_accuracy_minus_longer"]["value"] == pytest.approx((right - longer).mean())
    assert metrics["other_accuracy"]["value"] == pytest.approx(1 - longer.mean())
    shorter = np.array([len(a) < len(b) for a, b in texts])
    assert metrics["reward_accuracy_better_is_shorter"]["value"] == pytest.approx(right[shorter].mean())
    chance = 1 / (1 + np.exp(-margin))
    expected = log_loss(np.ones(24), np.stack([1 - chance, chance], 1), labels=[0, 1])
    assert metrics["calibration_log_loss"]["value"] == pytest.approx(expected)
    for k, name in enumerate("abc"):
        assert metrics[f"category/{name}"]["value"] == pytest.approx(right[k::3].mean())
    rows = [json.loads(line) for line in (tmp_path / "out/mine/reward_model_rows.jsonl").open()]
    assert [row["margin"] for row in rows] == pytest.approx(margin.tolist())
    assert max(map(len, out.splitlines())) <= 100 and "labelled pairs" in out


def test_second_call_keeps_and_refuses(evaluate, pairs, tmp_path):
    flags = ("--scorer", "longer", "--dataset_name", pairs, "--split", "train")
    assert evaluate(*flags)[0] == 0
    first = summary_of(tmp_path, "longer")["metrics"]
    assert first["reward_accuracy_minus_longer"]["value"] == 0
    code, _, err = evaluate(*flags, "--seed", "1")
    assert code == 2
    assert_one_line(err, "seed", "--overwrite")
    assert evaluate(*flags, "--seed", "1", "--overwrite")[0] == 0
    again = summary_of(tmp_path, "longer")
    assert (
        again["args"]["seed"] == 1 and again["metrics"]["reward_accuracy"]["value"] == first["reward_accuracy"]["value"]
    )


@pytest.mark.slow
def test_rows_are_independent_of_order(evaluate, scorer, pairs, tmp_path):
    lines = pairs.read_text().splitlines(keepends=True)
    other = tmp_path / "reversed.jsonl"
    other.write_text("".join(reversed(lines)))
    for name, data in (("one", pairs), ("two", other)):
        flags = ("--dataset_name", data, "--split", "train", "--run_name", name)
        assert evaluate("--scorer", f"{scorer}:score", *flags)[0] == 0
    one, two = (summary_of(tmp_path, name)["metrics"] for name in ("one", "two"))
    for key in ("reward_accuracy", "reward_margin", "calibration_brier", "category/a"):
        assert one[key]["value"] == pytest.approx(two[key]["value"])


def test_margins_of_log_odds_and_of_win_probabilities():
    log_odds = Scores([2.0, 0.5], win_probabilities([2.0, 0.5], [1, 1]))
    assert margin_of(log_odds) == 1.5
    # A judge's scores are its win probabilities, half of which is the answer against itself.
    p = 0.8
    judged = Scores([0.25 + p / 2, 0.75 - p / 2], [0.25 + p / 2, 0.75 - p / 2])
    assert margin_of(judged) == pytest.approx(math.log(p / (1 - p)))


def test_pairs_without_scores_are_counted(tmp_path):
    data = load_labelled(
        [{"name": str(write_jsonl(tmp_path / "x.jsonl", make_pairs(4))), "split": "train"}], None, None
    )
    good = Scores([1.0, 0.0], [0.6, 0.4])
    rows = score_rows(data.items, [good, "too long", good, good])
    assert [row["row"] for row in rows] == [0, 2, 3]
    metrics = pair_metrics(rows, {0: {"margin": -1.0}}, 0)
    assert metrics["reward_accuracy"]["n"] == 3 and metrics["other_accuracy"]["n"] == 1


# ---------------------------------------------------------------------------------------------------------- RewardBench


def test_reward_bench_averages_as_the_package_does():
    """Each section weighted by the package's counts, then the plain mean of the sections."""
    rng, rows, accuracy = np.random.default_rng(0), [], {}
    for subsets in SECTIONS.values():
        for name in subsets:
            right = rng.random(7) < 0.7
            accuracy[name] = right.mean()
            rows += [{"category": name, "margin": 1.0 if r else -1.0} for r in right]
    result = reward_bench(rows, 0)
    sections = {}
    for section, weights in SECTIONS.items():
        sections[section] = sum(accuracy[n] * w for n, w in weights.items()) / sum(weights.values())
        assert result[section]["value"] == pytest.approx(sections[section])
    assert result["RewardBench"]["value"] == pytest.approx(sum(sections.values()) / 4)
    low, high = result["RewardBench"]["ci95"]
    assert low < result["RewardBench"]["value"] < high
    # A tie counts as wrong, as in the package.
    assert reward_bench([{"category": "hep-go", "margin": 0.0}] * 3, 0)["Reasoning"]["value"] == 0


def test_best_of_four_shares_its_credit_among_ties():
    assert best_of_credit([3.0, 1.0, 2.0, 0.0], 1) == 1
    assert best_of_credit([3.0, 3.0, 2.0, 0.0], 1) == 0.5
    assert best_of_credit([1.0, 3.0, 2.0, 0.0], 1) == 0
    assert best_of_credit([1.0, 1.0, 1.0, 1.0], 1) == 0.25


def test_ties_score_by_hand():
    rows = [
        # Reference right by 1; tied right by 0.5 with spread 0.4: preferred, and hard too.
        {"uid": "ref:1", "scores": [2.0, 1.0], "correct": 1},
        {"uid": "tied:1", "scores": [2.0, 1.6, 1.1, 0.0], "correct": 2},
        # Reference wrong; tied right by 0.2 with spread 0.6: not preferred.
        {"uid": "ref:2", "scores": [0.0, 1.0], "correct": 1},
        {"uid": "tied:2", "scores": [1.0, 0.4, 0.2], "correct": 2},
    ]
    parts = ties_score(rows)
    assert parts["ref_accuracy"] == 0.5 and parts["tied_accuracy"] == 1
    assert parts["preferred"] == 0.5 and parts["preferred_hard"] == 0.5
    margins = [math.tanh(0.5 / 0.4 - 1), math.tanh(-1.0 / 0.6 - 1)]
    assert parts["margin"] == pytest.approx(sum(margins) / 2)
    expected = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * sum(margins) / 2
    assert parts["score"] == pytest.approx(expected)


def test_reward_bench_2_end_to_end(evaluate, scorer, tmp_path):
    rows = []
    for i in range(6):
        answers = [f"An answer {'a' * k} number {i}." for k in (5, 1, 2, 3)]
        subset = ("Math", "Focus")[i % 2]
        rows.append({"id": str(i), "prompt": f"Question {i}?", "chosen": answers[:1], "rejected": answers[1:],
                     "subset": subset})  # fmt: skip
    for kind, right in (("ref", 1), ("tied", 3)):
        texts = ["aaaaaaaa", "aaaaaaa", "aaaaaaa b", "b", "bb"]
        rows.append({"id": f"{kind}:1", "prompt": f"{kind}?", "chosen": texts[:right], "rejected": texts[3:],
                     "subset": "Ties"})  # fmt: skip
    data = write_jsonl(tmp_path / "rb2.jsonl", rows)
    flags = ("--dataset_name", data, "--split", "train", "--run_name", "rb2", "--benchmark", "rewardbench2")
    code, out, err = evaluate("--scorer", f"{scorer}:score", *flags)
    assert code == 0, err
    metrics = summary_of(tmp_path, "rb2")["metrics"]
    assert metrics["benchmark/Math"]["value"] == metrics["benchmark/Focus"]["value"] == 1
    # Gaps 0.8 and 0.7, spread 0.1: every part is right, and the margin's tanh(0.7 / 0.1 - 1) is about 1.
    assert metrics["benchmark/Ties"]["value"] == pytest.approx(1 + 0.01 * math.tanh(6), abs=1e-6)
    assert metrics["benchmark/RewardBench 2"]["value"] == pytest.approx((2 + metrics["benchmark/Ties"]["value"]) / 3)
    assert "reward_accuracy" not in metrics and "RewardBench 2" in out
    code, _, err = evaluate("--scorer", "longer", *flags[:4], "--benchmark", "rewardbench")
    assert code == 2
    assert_one_line(err, "rewardbench2")


def test_interval_of_reward_bench_2_covers_its_value():
    rng = np.random.default_rng(1)
    rows = [{"category": "Math", "scores": rng.normal(size=4).tolist(), "correct": 1, "uid": str(i)} for i in range(40)]
    result = reward_bench_2(rows, 0)["Math"]
    p = result["value"]
    low, high = result["ci95"]
    # The normal interval of a share of 40 is about as wide.
    assert low < p < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 40), rel=0.2)


# ------------------------------------------------------------------------------------------------------------ best of n


@pytest.mark.parametrize(("samples", "n"), [(5, 1), (5, 2), (6, 4), (4, 4)])
def test_best_of_weights_by_enumeration(samples, n):
    counts = np.zeros(samples)
    for chosen in itertools.combinations(range(samples), n):
        counts[max(chosen)] += 1
    assert best_of_weights(samples, n) == pytest.approx(counts / counts.sum())


def test_curve_grows_and_starts_at_the_mean():
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(30):
        rewards = rng.normal(size=8)
        prompts.append({"rewards": rewards.tolist(), "chars": (100 * rewards + 500).tolist(), "other": None})
    points = curve(prompts, 16, 0)
    assert [p["n"] for p in points] == list(range(1, 9))
    assert points[0]["reward"]["value"] == pytest.approx(0, abs=1e-12) and points[0]["kl"] == 0
    values = [p["reward"]["value"] for p in points]
    assert values == sorted(values)
    # The expected maximum of two standard normals is 1 / sqrt(pi).
    assert points[1]["reward"]["value"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.15)
    assert kl_of_best_of(16) == pytest.approx(math.log(16) - 15 / 16)


def test_best_of_reads_samples_and_their_repetitions(evaluate, pairs, tmp_path):
    rows = []
    for i in range(4):
        prompt = [{"role": "user", "content": f"Say {i}."}]
        texts = ["a" * k for k in (10, 20, 20, 30)]
        answers = [{"text": text, "tokens": 3, "finish_reason": "stop", "seed": k} for k, text in enumerate(texts)]
        row = {"prompt_id": Prompt(prompt, "").key, "where": f"row {i}", "held_out": False, "messages": prompt}
        rows.append({**row, "answers": answers, "given": None})
    write_jsonl(tmp_path / "sampled/samples.jsonl", rows)
    flags = ("--dataset_name", pairs, "--split", "train", "--best_of", tmp_path / "sampled")
    code, out, err = evaluate("--scorer", "longer", "--against", "shorter", *flags)
    assert code == 0, err
    points = summary_of(tmp_path, "longer")["best_of"]
    assert [p["n"] for p in points] == [1, 2, 3, 4]
    # Of 10, 20, 20, 30: the mean; then the mean of the larger of every two.
    assert points[0]["chars"]["value"] == pytest.approx(20)
    larger = [max(pair) for pair in itertools.combinations((10, 20, 20, 30), 2)]
    assert points[1]["chars"]["value"] == pytest.approx(np.mean(larger))
    assert points[3]["chars"]["value"] == 30
    # `longer` counts 100 characters as 1; `shorter` is its negative.
    assert points[3]["reward"]["value"] == pytest.approx(0.1) and points[3]["other"]["value"] == pytest.approx(-0.1)
    assert "best of n" in out


# ------------------------------------------------------------------------------------------------------------- held out


def test_rows_of_the_scorers_own_training_are_left_out(evaluate, trained_reward, prefs, tmp_path):
    scorer = f"rm:{trained_reward / 'ck/r'}"
    code, out, err = evaluate("--scorer", scorer)
    assert code == 0, err
    metrics = summary_of(tmp_path, "r")["metrics"]
    trained = read_json(trained_reward / "out/r/train.json")["metrics"]
    # The run's own held-out pairs, and its own figures.
    for key in ("reward_accuracy", "longer_accuracy"):
        assert metrics[key]["value"] == pytest.approx(trained[key]["value"]) and metrics[key]["n"] == 8
    assert metrics["reward_margin"]["value"] == pytest.approx(trained["reward_margin"]["value"], abs=1e-4)
    # Both splits in one file: the train prompts are left out.
    rows = make_pairs(24) + make_pairs(8, 100)
    both = write_jsonl(tmp_path / "both.jsonl", rows)
    flags = ("--dataset_name", both, "--split", "train", "--run_name", "both")
    code, out, err = evaluate("--scorer", scorer, *flags)
    assert code == 0 and "24 of 32 rows" in out, err
    assert summary_of(tmp_path, "both")["metrics"]["reward_accuracy"]["n"] == 8
    code, out, _ = evaluate("--scorer", scorer, "--dataset_name", prefs, "--split", "train", "--run_name", "trained")
    assert code == 0 and "NOT HELD OUT" in out
