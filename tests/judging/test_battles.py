"""Battles: two-order rules by hand, fits against sklearn and Hunter's MM, style control, intervals over prompts."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from scipy.special import expit
from scipy.stats import ttest_1samp

from preflab.data.prompts import Prompt
from preflab.judging.answers import ensure_answers_differ
from preflab.judging.battle_metrics import (
    against_opponent,
    answer_metrics,
    battle_metrics,
    bradley_terry,
    by_category,
    fit_logistic,
    style_controlled,
)
from preflab.judging.battle_report import render
from preflab.judging.battles import both_orders, combine_orders, judge_rows, pairings
from preflab.judging.judge_prompt import Verdict, unparsed
from preflab.judging.judges import LongerJudge
from preflab.judging.style import markdown_counts, scaled, style_differences
from utils.artifacts import read_json
from utils.errors import UserError

# `first` in both orders, `a` in the first slot of the first; UNPARSED has no verdict in one of them.
WIN, LOSS, TIE, UNPARSED = (1, 0), (0, 1), (0.5, 0.5), (None, 1)


def verdict(spec) -> Verdict:
    """A verdict from its `first`, or from (first, weight)."""
    first, weight = spec if isinstance(spec, tuple) else (spec, 1)
    return unparsed("no label") if first is None else Verdict(first, weight=weight)


def row(number, orders, a="tuned", b="base", tokens=(10, 10), texts=("x", "y"), category=None) -> dict:
    """One judged row: scores of the first slot in both orders, `a` in the first slot of the first."""
    sides = {f"answer_{s}": {"text": t, "tokens": n} for s, t, n in zip("ab", texts, tokens, strict=True)}
    return {"prompt": number, "a": a, "b": b, "category": category, **sides, **combine_orders(*map(verdict, orders))}


def values(metrics) -> dict:
    return {name: figure["value"] for name, figure in metrics.items()}


# ------------------------------------------------------------------------------------------------------ two-order rules


@pytest.mark.parametrize(
    "orders, consistent, average, flipped, votes",
    [
        ((1, 0), 1, 1, False, [2, 2]),
        ((0, 1), 0, 0, False, [0, 2]),
        ((1, 1), 0.5, 0.5, True, [1, 2]),
        ((0, 0), 0.5, 0.5, True, [1, 2]),
        ((0.5, 0.5), 0.5, 0.5, False, [1, 2]),
        ((1, 0.5), 0.5, 0.75, True, [1.5, 2]),
        ((0.5, 1), 0.5, 0.25, True, [0.5, 2]),
        (((1, 3), (0, 3)), 1, 1, False, [6, 6]),
        (((1, 3), (0, 1)), 1, 1, False, [4, 4]),
        (((1, 3), (1, 1)), 0.5, 0.5, True, [3, 4]),
        (((0, 3), (0, 1)), 0.5, 0.5, True, [1, 4]),
        (((0, 3), 0.5), 0.5, 0.25, True, [0.5, 4]),
    ],
)
def test_two_orders_combined_by_hand(orders, consistent, average, flipped, votes):
    combined = combine_orders(*map(verdict, orders))
    assert [combined[k] for k in ("consistent", "average", "flipped", "votes")] == [consistent, average, flipped, votes]
    assert combined["probability"] is None


@pytest.mark.parametrize("orders", [(None, 1), (0, None), (None, None)])
def test_one_missing_verdict_decides_nothing(orders):
    combined = combine_orders(*map(verdict, orders))
    assert [combined[k] for k in ("consistent", "average", "probability", "flipped", "votes")] == [None] * 5
    assert [v["first"] for v in combined["orders"]] == list(orders)


def test_probabilities_average_both_orders():
    assert combine_orders(Verdict(1, 0.8), Verdict(0, 0.3))["probability"] == pytest.approx((0.8 + 0.7) / 2)
    assert combine_orders(Verdict(1, 0.0), Verdict(0, 0.0))["probability"] == 0.5
    assert combine_orders(Verdict(1, 0.8), Verdict(0))["probability"] is None


def test_battle_metrics_by_hand():
    strong = ((1, 3), (0, 3))
    rows = [row(i, orders) for i, orders in enumerate([WIN, strong, LOSS, (1, 1), TIE, (None, 1), (None, None)])]
    m = battle_metrics(rows, 0)
    v = values(m)
    assert (v["prompts"], v["dropped"], v["unparsed_verdicts"]) == (7, 2, 3)
    assert m["dropped"]["n"] == 7 and m["unparsed_verdicts"]["n"] == 14
    assert (v["wins"], v["losses"], v["ties"]) == (2, 1, 2) and m["win_rate"]["n"] == 5
    assert v["win_rate"] == pytest.approx(3 / 5) and v["win_rate_average_of_orders"] == pytest.approx(3 / 5)
    # Votes of tuned: 2 + 6 + 0 + 1 + 1 of 2 + 6 + 2 + 2 + 2.
    assert v["win_rate_votes"] == pytest.approx(10 / 14)
    assert v["flip_rate"] == pytest.approx(1 / 5)
    # First slots: 1 of 2, 1 of 2, 1 of 2, 2 of 2, two halves.
    assert v["first_slot_wins"] == pytest.approx(6 / 10)
    # Two of three decided prompts won.
    assert v["p_win_rate_is_half"] == 1 and "win_rate_probability" not in v


def test_one_tied_order_separates_the_two_rules():
    v = values(battle_metrics([row(0, (1, 0.5)), row(1, (1, 0.5)), row(2, WIN)], 0))
    assert v["win_rate"] == pytest.approx(2 / 3) and v["win_rate_average_of_orders"] == pytest.approx(2.5 / 3)


def test_identical_answers_are_counted_ties(tmp_path):
    class First:
        name, instant = "first", False

        def identity(self):
            return {}

        def judge(self, items):
            yield from ((i, Verdict(1)) for i in range(len(items)))

    prompts = [Prompt([{"role": "user", "content": f"q{i}"}], "") for i in range(3)]
    texts = {"tuned": ["same", "x", "same"], "base": ["same", "y", "same"]}
    answers = {name: [{"text": t, "tokens": 1} for t in side] for name, side in texts.items()}
    items, rows = both_orders(prompts, answers, [("tuned", "base")])
    m = battle_metrics(judge_rows(First(), items, rows, str(tmp_path), False), 0)
    assert m["identical_answers"]["value"] == 2 and m["identical_answers"]["n"] == 3
    assert m["ties"]["value"] == 3 and m["flip_rate"]["value"] == pytest.approx(1 / 3)


def test_no_win_rate_without_verdicts():
    v = values(battle_metrics([row(0, UNPARSED), row(1, UNPARSED)], 0))
    assert v["dropped"] == 2 and v["unparsed_verdicts"] == 2 and "win_rate" not in v


def test_probability_and_label_mass_by_hand():
    rows = [
        {**row(0, WIN), **combine_orders(Verdict(1, 0.9, mass=0.8), Verdict(0, 0.3, mass=0.2))},
        {**row(1, WIN), **combine_orders(Verdict(1, 0.6, mass=0.4), Verdict(1, 0.8, mass=0.9))},
    ]
    m = values(battle_metrics(rows, 0))
    assert m["win_rate_probability"] == pytest.approx((0.8 + 0.4) / 2)
    assert m["verdict_mass_median"] == pytest.approx(0.6) and m["verdict_mass_below_half"] == 0.5


def test_intervals_resample_prompts():
    """Both orders of a prompt agree, so resampling single verdicts would give an error too small by sqrt(2)."""
    outcomes = (np.random.default_rng(3).random(300) < 0.7).astype(float)
    m = battle_metrics([row(i, WIN if y else LOSS) for i, y in enumerate(outcomes)], 5)
    p = outcomes.mean()
    analytic = math.sqrt(p * (1 - p) / 300)
    for name in ("win_rate", "win_rate_average_of_orders", "win_rate_votes"):
        assert m[name]["value"] == pytest.approx(p) and m[name]["stderr"] == pytest.approx(analytic, rel=0.08), name
        assert m[name]["ci95"] == pytest.approx([p - 1.96 * analytic, p + 1.96 * analytic], abs=0.012), name


def test_categories_by_hand():
    rows = [row(0, WIN, category="x"), row(1, LOSS, category="x"), row(2, WIN, category="y"), row(3, WIN)]
    categories = by_category([*rows, row(4, UNPARSED, category="z")], 0)
    assert {k: (c["n"], c["win_rate"]["value"]) for k, c in categories.items()} == {"x": (2, 0.5), "y": (1, 1.0)}


# ----------------------------------------------------------------------------------------------------------- pairings


def test_pairings():
    assert pairings(["base", "tuned"], None) == [("tuned", "base")]
    assert pairings(["base", "tuned", "x"], None) == [("tuned", "base"), ("x", "base"), ("x", "tuned")]
    assert pairings(["base", "tuned"], "gpt") == [("base", "gpt"), ("tuned", "gpt")]


def test_both_orders_skip_missing_answers(tmp_path):
    prompts = [Prompt([{"role": "user", "content": f"q{i}"}], f"line {i}") for i in range(3)]
    answers = {"tuned": ["long 0", None, "l2"], "base": ["b0", "b1", "base 2"]}
    answers = {k: [t and {"text": t, "tokens": len(t)} for t in v] for k, v in answers.items()}
    items, rows = both_orders(prompts, answers, [("tuned", "base")])
    assert [(i.prompt.text, i.first, i.second) for i in items] == [
        ("q0", "long 0", "b0"), ("q0", "b0", "long 0"), ("q2", "l2", "base 2"), ("q2", "base 2", "l2"),
    ]  # fmt: skip
    assert [(r["prompt"], r["where"], r["a"], r["b"]) for r in rows] == [
        (0, "line 0", "tuned", "base"),
        (2, "line 2", "tuned", "base"),
    ]
    judged = judge_rows(LongerJudge(), items, rows, str(tmp_path), False)
    assert [r["consistent"] for r in judged] == [1, 0] and not any(r["flipped"] for r in judged)


def test_identical_models_are_refused():
    a, b = [{"text": "x"}, {"text": "y"}], [{"text": "x"}, {"text": "z"}]
    comparison = SimpleNamespace(args=SimpleNamespace(allow_identical=False), adapter="lora", servers={})
    ensure_answers_differ({"base": a, "tuned": b}, comparison)
    with pytest.raises(UserError, match="2 prompts"):
        ensure_answers_differ({"base": a, "tuned": [dict(each) for each in a]}, comparison)


def test_opponent_scores_are_paired_by_prompt():
    rng = np.random.default_rng(2)
    base = rng.choice([LOSS, TIE, WIN], 40)
    tuned = [WIN if tuple(b) != LOSS or rng.random() < 0.5 else LOSS for b in base]
    rows = [row(i, o, "base", "gpt") for i, o in enumerate(map(tuple, base))]
    # Tuned's rows are in another order, one prompt is missing and one has no verdict: both prompts are left out.
    rows += [row(i, tuned[i] if i != 7 else UNPARSED, "tuned", "gpt") for i in range(39, -1, -1) if i != 3]
    score = {WIN: 1.0, LOSS: 0.0, TIE: 0.5}
    d = np.array([score[tuned[i]] - score[tuple(base[i])] for i in range(40) if i not in (3, 7)])
    m = against_opponent(rows, 0)
    assert m["win_rate_difference"]["value"] == pytest.approx(d.mean()) and m["win_rate_difference"]["n"] == 38
    assert m["win_rate_difference"]["stderr"] == pytest.approx(d.std() / math.sqrt(38), rel=0.08)
    # No more significant than the paired t test, whose correction for skewness can only raise the p-value.
    assert ttest_1samp(d, 0).pvalue <= m["p_win_rate_difference"]["value"] < 0.001


def test_opponent_without_shared_prompts():
    rows = [row(0, WIN, "base", "gpt"), row(0, UNPARSED, "tuned", "gpt"), row(1, UNPARSED, "base", "gpt")]
    assert against_opponent([*rows, row(1, WIN, "tuned", "gpt")], 0) == {}


def test_answer_lengths_and_truncated_share():
    answers = [
        {"text": "a", "tokens": 4, "finish_reason": "length"},
        {"text": "b", "tokens": 2, "finish_reason": "stop"},
        {"text": "c", "tokens": 3, "finish_reason": None},
        None,
    ]
    m = values(answer_metrics(answers, 0))
    assert m == {"answers": 3, "tokens": 3.0, "truncated_share": 0.5}
    assert "truncated_share" not in answer_metrics(answers[2:], 0)


# ------------------------------------------------------------------------------------------------------------- fits


PRIOR = 10.0  # standard deviation of the normal prior on each logit


def sklearn_fit(x, y, weights) -> np.ndarray:
    """Logistic regression under the same prior; an outcome y is y wins and 1 - y losses."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=PRIOR**2, fit_intercept=False, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    labels = np.repeat([1, 0], len(y))
    return model.fit(np.concatenate([x, x]), labels, np.concatenate([weights * y, weights * (1 - y)])).coef_[0]


@pytest.mark.parametrize("seed", range(4))
def test_logistic_fit_equals_sklearn_with_half_rows(seed):
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(120), rng.normal(size=(120, 3)) * [1, 0.2, 3]])
    y = (rng.random(120) < expit(x @ [0.5, -1, 2, 0.3])).astype(float)
    y[rng.random(120) < 0.2] = 0.5
    weights = rng.integers(0, 4, 120).astype(float)
    assert fit_logistic(x, y) == pytest.approx(sklearn_fit(x, y, np.ones(120)), abs=1e-5)
    assert fit_logistic(x, y, weights) == pytest.approx(sklearn_fit(x, y, weights), abs=1e-5)


def test_logistic_fit_of_a_constant_is_the_logit():
    y = np.tile([1, 1, 1, 0.5], 1000)
    assert fit_logistic(np.ones((4000, 1)), y)[0] == pytest.approx(math.log(7), abs=1e-4)


@pytest.mark.parametrize("seed", range(60))
def test_logistic_fit_has_zero_gradient(seed):
    """Also for (nearly) separable data, where plain Newton steps diverge."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 30))
    x = np.column_stack([np.ones(n), rng.normal(size=(n, rng.integers(1, 5))) * rng.choice([0.1, 1, 5])])
    y = np.where(rng.random(n) < 0.2, 0.5, x[:, 1] > rng.normal() * 0.3)
    beta = fit_logistic(x, y)
    assert x.T @ (y - expit(x @ beta)) - beta / PRIOR**2 == pytest.approx(np.zeros(len(beta)), abs=1e-5)


def hunters_mm(wins: np.ndarray) -> np.ndarray:
    """Bradley-Terry strengths in logits by Hunter's (2004) MM; wins[i, j] counts i over j, ties a half each."""
    n, w = wins + wins.T, np.ones(len(wins))
    for _ in range(20_000):
        w = wins.sum(1) / (n / (w[:, None] + w[None, :])).sum(1)
        w /= w[0]
    return np.log(w)


@pytest.fixture(scope="module")
def tournament():
    """Three models, every pairing over 60 prompts, some missing: (rows, wins, names)."""
    rng = np.random.default_rng(11)
    names, wins, rows = ["base", "tuned", "other"], np.zeros((3, 3)), []
    for b, a in ((0, 1), (0, 2), (1, 2)):
        for i in range(60):
            if rng.random() < 0.1:
                continue
            y = rng.choice([1, 0.5, 0], p=[0.6, 0.15, 0.25] if b == 0 else [0.35, 0.2, 0.45])
            wins[a, b] += y
            wins[b, a] += 1 - y
            rows.append(row(i, {1: WIN, 0.5: TIE, 0: LOSS}[y], names[a], names[b]))
    return rows, wins, names


def test_bradley_terry_equals_hunters_mm(tournament):
    rows, wins, names = tournament
    strengths, expected = bradley_terry(rows, names, 0), hunters_mm(wins)
    assert list(strengths) == names and strengths["base"]["value"] == 0
    # The weak prior shifts the strengths by less than 1e-3.
    assert [strengths[k]["value"] for k in names] == pytest.approx(list(expected), abs=1e-3)
    for name in names[1:]:
        low, high = strengths[name]["ci95"]
        assert low < strengths[name]["value"] < high and strengths[name]["n"] == 60


def test_bradley_terry_resamples_whole_prompts(tournament):
    """Against a direct bootstrap over prompts, each with all its pairings."""
    rows, _, names = tournament
    rows = [r for r in rows if {r["a"], r["b"]} == {"tuned", "base"}]
    # The third model scores exactly as tuned does against base, on the same prompts, and always ties with tuned.
    copies = [{**r, "a": "other"} for r in rows] + [row(r["prompt"], TIE, "other", "tuned") for r in rows]
    strengths = bradley_terry([*rows, *copies], names, 0)
    y = np.array([r["consistent"] for r in rows])
    rng = np.random.default_rng(0)
    resampled = [math.log(m / (1 - m)) for m in rng.choice(y, (2000, len(y))).mean(1)]
    for name in ("tuned", "other"):
        assert strengths[name]["value"] == pytest.approx(math.log(y.mean() / (1 - y.mean())), abs=1e-3)
        assert strengths[name]["stderr"] == pytest.approx(np.std(resampled), rel=0.1)


def test_undefeated_model_has_finite_strength():
    rows = [row(i, WIN) for i in range(8)] + [row(i, WIN, "other", "base") for i in range(8)]
    rows += [row(i, TIE if i % 2 else WIN, "other", "tuned") for i in range(8)]
    strengths = bradley_terry(rows, ["base", "tuned", "other"], 0)
    json.dumps(strengths, allow_nan=False)
    strength = values(strengths)
    assert 3 < strength["tuned"] < strength["other"] < 100
    m = battle_metrics([row(i, WIN, tokens=(5 + 3 * i, 15)) for i in range(40)], 0)
    json.dumps(m, allow_nan=False)
    assert m["win_rate"]["value"] == 1 and m["win_rate_style_controlled"]["value"] > 0.99


# ------------------------------------------------------------------------------------------------------------ style


def lengths(count, rng) -> tuple[np.ndarray, np.ndarray]:
    """Token counts of answers; the first side is always longer."""
    other = rng.integers(40, 200, count)
    return np.round(other * rng.uniform(1.02, 4, count)) + 1, other


def differences(tokens_a, tokens_b) -> np.ndarray:
    texts = ["plain"] * len(tokens_a)
    return style_differences(texts, texts, list(tokens_a), list(tokens_b))


def test_style_control_removes_length_effect():
    """Tuned is always longer and only length decides: its raw win rate is high, its controlled one is 50%."""
    rng = np.random.default_rng(6)
    a, b = lengths(1500, rng)
    y = (rng.random(1500) < expit(5 * (a - b) / (a + b))).astype(float)
    m = style_controlled(differences(a, b), y, 0)
    low, high = m["ci95"]
    # Over 60 seeds the controlled rate is 0.500 on average, with a standard deviation of 0.038.
    assert y.mean() > 0.75 and abs(m["value"] - 0.5) < 0.1 and low < 0.5 < high


def test_style_control_keeps_skill():
    """Tuned is always longer, but wins by skill only: P(win) = sigmoid(1)."""
    rng = np.random.default_rng(5)
    a, b = lengths(1500, rng)
    y = (rng.random(1500) < expit(1)).astype(float)
    assert style_controlled(differences(a, b), y, 0)["value"] == pytest.approx(expit(1), abs=0.08)


@pytest.mark.parametrize("outcomes", [[1, 1, 0.5, 0, 1], [0, 0, 0.5], [1, 0]], ids=str)
def test_equal_style_keeps_the_raw_rate(outcomes):
    y = np.tile(outcomes, 60)
    controlled = style_controlled(differences(np.full(len(y), 30), np.full(len(y), 30)), y, 0)
    assert controlled["value"] == pytest.approx(y.mean(), abs=1e-3)
    m = battle_metrics([row(i, {1: WIN, 0.5: TIE, 0: LOSS}[o]) for i, o in enumerate(y)], 0)
    assert m["win_rate_style_controlled"]["value"] == pytest.approx(y.mean(), abs=1e-3)
    # A bootstrap interval beside a score interval.
    assert m["win_rate_style_controlled"]["ci95"] == pytest.approx(m["win_rate"]["ci95"], abs=0.02)


def test_constant_style_difference_gives_nan():
    y = np.tile([1, 1, 0], 20)
    controlled = style_controlled(differences(np.full(60, 200), np.full(60, 100)), y, 0)
    assert math.isnan(controlled["value"]) and controlled["ci95"] is None


def test_style_differences_by_hand():
    features = style_differences(["# H\n- a\n- b\n**x**", ""], ["**x** and __y__", ""], [19, 0], [9, 0])
    d = [(1 / 20, 0), (2 / 20, 0), (1 / 20, 2 / 10)]
    assert features[0] == pytest.approx([10 / 28, *((p - q) / (p + q + 1) for p, q in d)])
    assert features[1].tolist() == [0, 0, 0, 0]


def test_scaling_keeps_mean_and_constant_zero():
    x = np.array([[3.0, 0], [4.0, 0]])
    assert scaled(x)[:, 0] == pytest.approx(np.array([3, 4]) / math.sqrt(12.5)) and scaled(x)[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "text, counts",
    [
        ("# One\n## Two\n#hashtag\nnot # here\n####### seven", (2, 0, 0)),
        ("- a\n* b\n+ c\n1. d\n  2) e\n-no\n1.no", (0, 5, 0)),
        ("**bold** and __bold__, *not* and _not_, ** no", (0, 0, 2)),
        ("```py\n# c\n- a\n**b**\n```\n# H\n- x\n**y**", (1, 1, 1)),
        ("~~~\n# c\n```\n- a\n~~~\n1. x", (0, 1, 0)),
        ("# H\n```\n# a\n```\n- x\n```\n# b\n```\n**y**", (1, 1, 1)),
        ("# H\n```\n# never closed\n- a", (1, 0, 0)),
        ("```\r\n# c\r\n```\r\n# H", (1, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_markdown_counts_skip_code_fences(text, counts):
    assert markdown_counts(text) == counts


@pytest.mark.parametrize(
    "text, counts",
    [
        ("````\n# c\n````\n# H\n- x", (1, 1, 0)),
        ("1. run\n\n   ```\n   - c\n   ```\n2. done", (0, 2, 0)),
        ("```f(x)``` is a call.\n# H", (1, 0, 0)),
    ],
    ids=["four backticks", "in a list", "inline"],
)
def test_markdown_counts_with_unusual_fences(text, counts):
    assert markdown_counts(text) == counts


# ------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def example():
    """The battle of the committed example run: every section, its data and its title."""
    summary = read_json(ROOT / "docs/example_run/battle.json")
    sections = {key: summary[key] for key in ("metrics", "matches", "answers", "bradley_terry")}
    return sections, summary["data"], summary["text"].splitlines()[0]


def test_tables_fit_100_columns_and_hold_all_rates(example):
    sections, data, title = example
    report = render(sections, None, title, data)
    tables = report.text.removesuffix(report.verdict)
    assert max(map(len, tables.splitlines())) <= 100
    # Judge, `longer` and `random` side by side.
    win_rates = next(line for line in tables.splitlines() if line.startswith("win rate, %"))
    assert [m["win_rate"]["value"] for m in sections["matches"][0]["judges"].values()] == pytest.approx(
        [float(number) / 100 for number in re.findall(r"(\d+\.\d) \[", win_rates)], abs=6e-4
    )


def test_verdict_names_an_unreliable_judge(example):
    sections, data, title = example
    verdict = render(sections, None, title, data).verdict
    assert verdict.startswith("Inconclusive") and "unreliable" in verdict and "95.0%" in verdict
    judge = next(iter(sections["matches"][0]["judges"].values()))
    judge["flip_rate"] |= {"value": 0.56, "ci95": [0.47, 0.65]}
    assert "unreliable" not in render(sections, None, title, data).verdict
