"""How often a verdict claims a difference where there is none: rows are drawn under the null, and each script's own
verdict function is called. At most 5% of printed verdicts may claim something, whatever the distribution of the rows.

    python -m pytest tests/end_to_end/test_false_claims.py --slow -s -k table    # prints the table of docs/certainty.md
"""

from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import sppo_trait
from preflab.alpacaeval import metrics as alpacaeval_metrics
from preflab.alpacaeval import report as alpacaeval_report
from preflab.evaluation import perplexity_report, win_rate_report
from preflab.evaluation.perplexity import change_metrics
from preflab.evaluation.reward_slices import WIN_RATE_NAMES
from preflab.evaluation.rewards import reward_metrics, reward_rows
from preflab.harness import report as harness_report
from preflab.harness.metrics import paired
from preflab.harness.results import ModelResults
from preflab.human import metrics as human_metrics
from preflab.human import report as human_report
from preflab.judging import audit, battle_metrics, battle_report
from preflab.judging.judge_prompt import Verdict
from preflab.training import dpo_report, sft_report
from utils import stats
from utils.artifacts import metric

# ------------------------------------------------------------------------------------------------------ rows under null

PAIRS_PER_PROMPT = 4


def draw(kind: str, rng, prompts: int) -> tuple[np.ndarray, list[int]]:
    """Differences with mean 0, and the prompt of each row; four rows per prompt if they are clustered."""
    groups = np.arange(prompts)
    if kind == "clustered":
        # Most of the variance is the prompt's; every second prompt has half as many rows.
        groups = np.repeat(groups, np.where(groups % 2, PAIRS_PER_PROMPT // 2, PAIRS_PER_PROMPT))
        return 2 * rng.normal(size=prompts)[groups] + rng.normal(size=len(groups)), groups.tolist()
    size = (prompts,)
    values = {
        "binary": lambda: rng.choice([-1.0, 1.0], size),
        "normal": lambda: rng.normal(size=size),
        "skewed": lambda: rng.lognormal(size=size) - np.exp(0.5),
        "heavy tails": lambda: rng.standard_t(3, size),
    }[kind]()
    # Both directions, as a tail can be on either side.
    return values * rng.choice([-1, 1]), groups.tolist()


def signs(kind: str, rng, prompts: int) -> tuple[np.ndarray, list[int]]:
    """1 or -1 per row with equal probability, some 0 (ties) unless binary; clustered rows mostly share their sign."""
    _, groups = draw("clustered" if kind == "clustered" else "normal", rng, prompts)
    values = rng.choice([-1.0, 1.0], len(groups))
    if kind == "clustered":
        values = np.where(rng.random(len(groups)) < 0.8, rng.choice([-1.0, 1.0], prompts)[groups], values)
    elif kind != "binary":
        values *= rng.random(len(groups)) < 0.7
    return values, groups


# ------------------------------------------------------------------------------------------- does the verdict claim it?


def rewards(kind, rng, n) -> dict:
    """Metrics of pairs whose rewards and base likelihoods rank by chance, with log-probabilities that do not move."""
    (ranked, groups), (base, _) = signs(kind, rng, n), signs(kind, rng, n)
    size, (drift, _) = np.abs(draw(kind, rng, n)[0]) + 0.01, draw(kind, rng, n)
    scores = [
        {"row": i, "chosen": b / 2 + d + r * s / 2, "rejected": -b / 2 + d - r * s / 2}
        | {"ref_chosen": b / 2, "ref_rejected": -b / 2, "prompt": g}
        for i, (r, s, b, d, g) in enumerate(zip(ranked, size, base, drift, groups, strict=True))
    ]
    return reward_metrics(reward_rows(scores, 1.0))


def dpo_training(kind, rng, n) -> bool:
    return not dpo_report.verdict_of(rewards(kind, rng, n))[1].startswith("Inconclusive")


def displacement_warning(kind, rng, n) -> bool:
    return dpo_report.displacement(rewards(kind, rng, n)) is not None


def eval_win_rate(kind, rng, n) -> bool:
    metrics = {WIN_RATE_NAMES.get(name, name): m for name, m in rewards(kind, rng, n).items()}
    return not win_rate_report.verdict_of(metrics).startswith("Inconclusive")


def eval_perplexity(kind, rng, n) -> bool:
    """Four sections: answers, and prompts with answers, whose differences contain those of the answers."""
    metrics, (prompt, groups) = {}, draw(kind, rng, n)
    tokens = rng.integers(20, 200, len(groups)).astype(float)
    for side in ("chosen", "rejected"):
        answer = draw(kind, rng, n)[0]
        for part, change in (("response", answer), ("whole", answer + prompt)):
            units = np.stack([2 * tokens, 2 * tokens + change, tokens, 4 * tokens], 1)
            name = f"{part}_{side}"
            metrics |= {f"{name}_ppl_{model}": metric(1.0) for model in ("base", "tuned")}
            metrics |= change_metrics(name, units, 42, groups)
    verdict = perplexity_report.verdict_of(metrics)
    assert "No claim" not in verdict
    return "perplexity rose" in verdict or "perplexity fell" in verdict


def sft_training(kind, rng, n) -> bool:
    change, groups = draw(kind, rng, n)
    tokens = rng.integers(20, 200, len(groups)).astype(float)
    units = np.stack([2 * tokens, 2 * tokens + change, tokens, 4 * tokens], 1)
    metrics = {"heldout_ppl_base": metric(1.0)} | change_metrics("heldout", units, 42, groups)
    return not sft_report.verdict_of(metrics)[1].startswith("Inconclusive")


def battle_rows(y, a: str) -> list[dict]:
    answer = {"text": "x", "tokens": 10}
    return [
        {"prompt": i, "a": a, "b": "opponent", "consistent": (1 + x) / 2, "average": (1 + x) / 2, "flipped": False}
        | {"answer_a": answer, "answer_b": answer, "votes": [1 + x, 2], "probability": None, "category": None}
        | {"orders": [{"first": 0.5, "label": "", "mass": None}] * 2}
        for i, x in enumerate(y)
    ]


def battles(kind, rng, n) -> bool:
    m = battle_metrics.battle_metrics(battle_rows(signs(kind, rng, n)[0], "tuned"), 42)
    match = {"a": "tuned", "b": "base", "judges": {"judge": m}}
    return "prefers" in battle_report.verdict_of({"metrics": m, "matches": [match], "answers": {"tuned": {}}})


def battles_with_opponent(kind, rng, n) -> bool:
    rows = [row for a in ("base", "tuned") for row in battle_rows(signs(kind, rng, n)[0], a)]
    sections = {"metrics": battle_metrics.against_opponent(rows, 42), "matches": [{"a": "base", "b": "opponent"}]}
    return "prefers" in battle_report.verdict_of(sections)


def judge_audit(kind, rng, n) -> bool:
    """Both orders of every labelled pair have one verdict, by the judge and by `longer`."""
    judges = []
    for _ in range(2):
        y, groups = signs(kind, rng, n)
        judges.append([Verdict((1 + s * x) / 2, "") for x in y for s in (1, -1)])
    comparison = audit.against_longer(*judges, 42, [str(g) for g in groups])
    return audit.passes(comparison)


def run_alpacaeval(kind, rng, n) -> bool:
    """Preferences of a judge with probabilities: two models of one quality, on instructions of any difficulty."""
    base = rng.beta(0.5, 0.5 if kind != "skewed" else 2, n)
    other = rng.beta(0.5, 0.5 if kind != "skewed" else 2, n)
    if kind == "binary":
        base, other = base.round(), other.round()
    m = alpacaeval_metrics.win_rate_difference(1 + np.stack([other, base], 1), 42)
    # Without a length-controlled rate, which can only prevent a claim.
    results = {"metrics": m, "lc_name": "length_controlled_winrate"}
    return "prefers" in alpacaeval_report.verdict_of(results, {"passed": True})


def human_eval(kind, rng, n) -> bool:
    """Three annotators (one if binary) who mostly agree; sides of the page are independent of the votes."""
    voters, (y, _) = 1 if kind == "binary" else 3, signs("ties" if kind == "clustered" else kind, rng, n)
    rows = []
    for i, x in enumerate(y):
        for k in range(voters):
            vote = x if kind == "clustered" or rng.random() < 0.6 else rng.choice([-1.0, 1.0])
            row = {"prompt": i, "a": "tuned", "b": "base", "category": None, "annotator": k, "id": f"{i}"}
            row |= {"outcome": (1 + vote) / 2, "preference": vote, "both_bad": False, "repeat_of": None, "skip": None}
            rows.append(row | {"a_is_left": i % 2 == 0, "a_acceptable": None, "b_acceptable": None, "seconds": 1.0})
    texts = [{"prompt": "q", "answer_tuned": "x", "answer_base": "x", "tuned": "x", "base": "x"} for _ in range(n)]
    texts = [{**t, **dict.fromkeys(human_metrics.COLUMN_OF.values(), "x")} for t in texts]
    answers = {name: [{"tokens": 10}] * n for name in ("tuned", "base")}
    m = human_metrics.match_metrics(rows, human_metrics.by_prompt(rows), texts, answers, 42)
    m |= human_metrics.annotator_metrics(rows, {"items": [None] * n}, 42)
    verdict = human_report.verdict_of(m)
    return "prefer " in verdict or "Position bias" in verdict


TASKS = 6


def run_lm_eval(kind, rng, n) -> bool:
    """Six tasks, whose metrics are 0 or 1 if binary; of clustered rows a document has several, as IFEval's."""
    rows = []
    for k in range(TASKS):
        if kind == "binary":
            columns = [rng.integers(0, 2, n).tolist() for _ in range(2)]
        elif kind == "clustered":
            columns = [[[bool(x)] * 4 for x in rng.integers(0, 2, n)] for _ in range(2)]
        else:
            change, shared = draw(kind, rng, n)[0], rng.normal(size=n)
            columns = [shared.tolist(), (shared + change).tolist()]
        sides = []
        for values in columns:
            documents = {"document": "d", "prompt": "p", "options": None, "answer": ""}
            samples = {("none", i): {**documents, "values": {"acc": value}} for i, value in enumerate(values)}
            sides.append(ModelResults(samples={"t": samples}))
        reported = {
            name: metric(float(np.mean(values)), 0.1) for name, values in zip(("base", "tuned"), columns, strict=True)
        }
        figures = paired(*sides, ["t"], "acc", "none", reported, 42)
        rows.append({"task": f"t{k}", "metric": "acc", "top": True, "higher": True, **figures})
    verdict = harness_report.verdict_of(rows)
    assert "No claim" not in verdict
    return "better" in verdict or "worse" in verdict


def sppo_over_seeds(kind, rng, n) -> bool:
    """Three seeds whose training shifts all prompts together: a claim about training rests on the test over seeds."""
    curves = {}
    for label in sppo_trait.LABELS:
        noise = np.stack([[np.zeros(n), draw(kind, rng, n)[0][:n]] for _ in range(3)])
        curves[label] = noise + np.array([0, 1])[None, :, None] * rng.normal(size=(3, 1, 1))
    m, _ = sppo_trait.compare(curves, np.zeros(n))
    name = "scored_minus_shuffled_all_over_seeds"
    return stats.direction(m[name], m[f"p_{name}"]["value"]) != 0


VERDICTS = {
    "DPO training": dpo_training,
    "... warning of displacement": displacement_warning,
    "SFT training": sft_training,
    "eval_win_rate": eval_win_rate,
    "eval_win_rate --battle": battles,
    "... against an opponent": battles_with_opponent,
    "judge audit": judge_audit,
    "eval_perplexity (4 sections)": eval_perplexity,
    "run_alpacaeval_local": run_alpacaeval,
    "human_eval": human_eval,
    "run_lm_eval (6 tasks)": run_lm_eval,
    "sppo_trait (3 seeds)": sppo_over_seeds,
}
KINDS = ("binary", "normal", "skewed", "heavy tails", "clustered")
# Scripts whose rows have no clusters: one row per prompt, or prompts are averaged first.
WITHOUT_CLUSTERS = {battles, battles_with_opponent, run_alpacaeval, sppo_over_seeds}


WITH_POWER = ("evaluation.rewards", "judging.battle_metrics", "alpacaeval.metrics")


@pytest.fixture
def cheap(monkeypatch):
    """Intervals of means without resamples, which are narrower and claim more often, and fewer sign flips."""
    narrower, of_sums = partial(stats.bootstrap, resamples=0), partial(stats.of_sums, resamples=0)
    for module in ("evaluation.rewards", "judging.battle_metrics", "human.metrics", "harness.metrics"):
        monkeypatch.setattr(f"preflab.{module}.bootstrap", narrower)
    for module in ("evaluation.perplexity", "judging.battle_metrics", "harness.metrics"):
        monkeypatch.setattr(f"preflab.{module}.of_sums", of_sums)
    # The benchmark imports it when it is called, and share() uses it for outcomes between 0 and 1.
    monkeypatch.setattr(stats, "bootstrap", narrower)
    monkeypatch.setattr(stats, "FLIPS", 1999)
    monkeypatch.setattr(stats, "MOST_FLIPS", 9999)
    # No verdict reads these, and they take most of the time.
    for module in ("judging.battle_metrics", "human.metrics"):
        monkeypatch.setattr(f"preflab.{module}.style_controlled", lambda *args: metric(0.5))
    for module in WITH_POWER:
        monkeypatch.setattr(f"preflab.{module}.with_power", lambda m, *args, **kwargs: m)


def claims(name: str, kind: str, n: int, draws: int) -> int:
    rng = np.random.default_rng([n, KINDS.index(kind), list(VERDICTS).index(name)])
    return sum(VERDICTS[name](kind, rng, n) for _ in range(draws))


# Too many claims for a rate of 5%, with probability 1 in 1,000.
def most_claims(draws: int) -> int:
    return int(binom.ppf(0.999, draws, 0.05))


FAST = [("normal", 24, 60), ("skewed", 8, 60), ("skewed", 24, 60), ("clustered", 24, 40)]


@pytest.mark.parametrize("name", VERDICTS)
def test_few_false_claims_fast(name, cheap):
    settings = [s for s in FAST if not (s[0] == "clustered" and VERDICTS[name] in WITHOUT_CLUSTERS)]
    counts = {(kind, n): claims(name, kind, n, draws) for kind, n, draws in settings}
    assert sum(counts.values()) <= most_claims(sum(draws for *_, draws in settings)), counts


def test_simulation_detects_a_test_without_correction(monkeypatch, cheap):
    """The same count fails with a plain t test in place of the claim's own: the simulation can fail."""
    from scipy.stats import ttest_1samp

    monkeypatch.setattr("preflab.harness.metrics.mean_test", lambda x, seed: float(ttest_1samp(x, 0).pvalue))
    monkeypatch.setattr("preflab.harness.report.holm", lambda p: p)
    assert claims("run_lm_eval (6 tasks)", "normal", 24, 60) > most_claims(60)


@pytest.mark.slow
def test_false_claims_table(cheap):
    sizes, draws, rates = (8, 24, 60, 120), 200, {}
    print()
    for name, function in VERDICTS.items():
        kinds = [kind for kind in KINDS if not (kind == "clustered" and function in WITHOUT_CLUSTERS)]
        for n in sizes:
            rates[name, n] = {kind: claims(name, kind, n, draws) / draws for kind in kinds}
        cells = [" / ".join(f"{100 * rates[name, n][k]:.1f}" if k in kinds else "-" for k in KINDS) for n in sizes]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for place, of in rates.items():
        for kind, rate in of.items():
            assert rate * draws <= most_claims(draws), (place, kind)
