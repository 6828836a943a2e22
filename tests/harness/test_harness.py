"""lm-eval suites: averages against published ones, paired differences, published rows, the report, and calls."""

import json
import math
import sys
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import fake_vllm
import numpy as np
import pytest
from conftest import write_jsonl
from scipy.stats import binomtest, norm, ttest_ind

from preflab.evaluation.comparison import Comparison
from preflab.harness import calls
from preflab.harness.arguments import HarnessArguments, check, split_at_dashes
from preflab.harness.calls import PROGRESS, Call, batch_size, execute, model_arguments, plan
from preflab.harness.logged import compare_folders
from preflab.harness.metrics import (
    SuiteResults,
    degrees_of_freedom,
    ensure_answers_differ,
    leading_bos,
    normal,
    paired,
    rows,
    suite_averages,
)
from preflab.harness.report import (
    clock,
    differs,
    eq_bench,
    markdown,
    mean_lengths,
    render,
    table_lines,
    verdict_of,
)
from preflab.harness.results import ModelResults, add_results, leaves
from preflab.harness.suites import (
    Suite,
    averages,
    errors,
    load_reference,
    load_suite,
    on_harness_scale,
    published_averages,
    published_row,
    suite_of,
    suites,
)
from preflab.harness.tasks import expand, missing, task_manager
from preflab.models import vllm_environment
from utils.artifacts import metric, write_json
from utils.errors import UserError
from utils.progress import LineProgress
from utils.provenance import ROOT
from utils.tables import render as table

SUITES = ["eq_bench", "generated", "nous", "openllm_v1", "openllm_v2", "quick", "seed", "zeroshot"]


# ------------------------------------------------------------------------------------------------------------ suites


def test_suites_that_ship():
    assert suites() == SUITES


@pytest.fixture(scope="module")
def manager():
    return task_manager(str(ROOT / "configs" / "lm_eval" / "tasks"))


@pytest.mark.parametrize("name", SUITES)
def test_suite_tasks_exist_in_lm_eval(name, manager):
    suite = load_suite(name)
    for entry in suite.tasks:
        assert manager.match_tasks([entry["task"]]) == [entry["task"]]
    for average in suite.averages:
        for entry in average["of"]:
            if not isinstance(entry, str):
                assert manager.match_tasks([entry["task"]]) == [entry["task"]], entry
    for kind in suite.needs.values():
        assert set(kind) <= {entry["task"] for entry in suite.tasks}


@pytest.mark.parametrize("name", SUITES)
def test_suite_references_have_no_duplicates(name, manager):
    for stem in load_suite(name).references:
        reference = load_reference(stem)
        assert reference["name"] == stem and reference["source"] and reference["scale"] in (1, 100)
        keys = [(r["task"], r["metric"], r["filter"], r.get("choices"), r["shots"]) for r in reference["rows"]]
        assert len(set(keys)) == len(keys)
        for row in reference["rows"]:
            assert 0 <= row["value"] / row.get("scale", reference["scale"]) or row["metric"].startswith("bleu")


def published(reference):
    """Map an average's entry to its published figure, for 0-shot suites."""

    def value(entry):
        row = published_row(reference, entry, 0)
        return None if row is None else on_harness_scale(reference, row, "value")

    return value


def test_nous_averages_of_llama3_8b_alpaca():
    result = averages(load_suite("nous"), published(load_reference("llama3-8b-alpaca")))
    assert {name: round(value, 2) for name, value in result.items()} == {
        "AGIEval": 32.0,
        "GPT4All": 70.82,
        "TruthfulQA": 59.54,
        "Bigbench": 37.32,
        "Average": 49.92,
    }


def test_openllm_v2_average_of_sppo_iter2():
    suite, reference = load_suite("openllm_v2"), load_reference("sppo-iter2")
    # The figures that give the six published averages: the normalisation, inverted.
    figures = {}
    for average in suite.averages[:-1]:
        for entry in average["of"]:
            share, b = reference["averages"][average["name"]] / 100, float(Fraction(str(entry.get("baseline", 0))))
            figures[entry["task"], entry["metric"]] = b + share * (1 - b)
    result = averages(suite, lambda entry: figures[entry["task"], entry["metric"]])
    assert result["MuSR"] == pytest.approx(10.94) and round(result["Average"], 2) == 21.22
    assert published_averages(suite, reference)["Average"] == 21.22


def test_openllm_v2_normalisation():
    suite = load_suite("openllm_v2")
    # Guessing everywhere gives 0, all correct gives 100.
    guess = averages(suite, lambda entry: float(Fraction(str(entry.get("baseline", 0)))))
    assert all(value == pytest.approx(0, abs=1e-9) for value in guess.values())
    right = averages(suite, lambda entry: 1.0)
    assert all(value == pytest.approx(100) for value in right.values())
    # GPQA at 0.34: (0.34 - 0.25) / 0.75; below guessing counts as 0; MuSR is the mean of its three tasks.
    scores = {"leaderboard_gpqa": 0.34, "leaderboard_mmlu_pro": 0.05}
    musr = {"murder_mysteries": 0.6, "object_placements": 0.1, "team_allocation": 0.5}
    scores |= {f"leaderboard_musr_{k}": v for k, v in musr.items()}
    result = averages(suite, lambda entry: scores.get(entry["task"], 0.5))
    assert result["GPQA"] == pytest.approx(12.0) and result["MMLU-Pro"] == 0.0
    assert result["MuSR"] == pytest.approx(100 * ((0.6 - 0.5) / 0.5 + 0 + (0.5 - 1 / 3) / (2 / 3)) / 3)


def test_openllm_v1_averages_mmlu_subjects():
    entry = next(a for a in load_suite("openllm_v1").averages if a["name"] == "MMLU")["of"][0]
    sizes, right = {"mmlu_a": 10, "mmlu_b": 30}, {"mmlu_a": 10, "mmlu_b": 0}
    side = side_of({t: {"acc": [1] * right[t] + [0] * (n - right[t])} for t, n in sizes.items()})
    side.subtasks = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_a", "mmlu_b"]}
    suite = Suite("s", "", "", [], averages=[{"name": "MMLU", "scale": 100, "of": [entry]}])
    assert suite_averages(suite, side, side, 0)["MMLU"]["base"]["value"] == 50.0


def test_average_with_a_missing_task_is_none():
    suite = load_suite("nous")
    result = averages(suite, lambda entry: None if entry["task"] == "boolq" else 0.5)
    assert result["GPT4All"] is None and result["Average"] is None and result["AGIEval"] == 50.0


def test_errors_of_averages():
    suite = Suite("s", "", "", [], averages=[
        {"name": "A", "scale": 100, "of": [{"task": "x", "metric": "acc"}, {"task": "y", "metric": "acc"}]},
        {"name": "B", "scale": 100, "of": [{"task": "z", "metric": "acc", "baseline": "1/4"}]},
        {"name": "C", "of": ["A", "B"]},
        {"name": "same task", "of": [{"task": "x", "metric": "acc"}, {"task": "x", "metric": "acc_norm"}]},
        {"name": "below guessing", "of": [{"task": "w", "metric": "acc", "baseline": 0.5}]},
    ])  # fmt: skip
    value = {"x": 0.5, "y": 0.6, "z": 0.7, "w": 0.3}
    error = {"x": 0.03, "y": 0.04, "z": 0.02, "w": 0.02}
    result = errors(suite, lambda e: value[e["task"]], lambda e: error[e["task"]])
    assert result["A"] == pytest.approx(100 * math.hypot(0.03, 0.04) / 2)
    assert result["B"] == pytest.approx(100 * 0.02 / 0.75)
    assert result["C"] == pytest.approx(math.hypot(result["A"], result["B"]) / 2)
    assert result["same task"] == pytest.approx(0.03), "two metrics of one task count as correlated"
    assert result["below guessing"] is None, "the derivative is undefined below the baseline"


def test_unknown_names_suggest_similar_ones(tmp_path):
    with pytest.raises(UserError, match="--suite openlm_v1.*openllm_v1"):
        load_suite("openlm_v1")
    misspelt = suite_of(["hellaswagg"])
    with pytest.raises(UserError, match=r"--tasks hellaswagg\b.*\bhellaswag\b"):
        expand(misspelt, misspelt.include_path)
    globbed = suite_of(["quick_s*", "quick_sums"])
    expand(globbed, globbed.include_path)
    assert [entry["task"] for entry in globbed.tasks] == ["quick_sense", "quick_sums"]
    path = tmp_path / "mine.yaml"
    path.write_text("title: x\nsource: y\ntasks: [{task: arc_easy}]\nshotz: 3\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*shotz"):
        load_suite(str(path))
    path.write_text("title: x\nsource: y\ntasks: [{task: arc_easy}, {task: arc_easy}]\n")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_suite(str(path))
    for wrong in ("averages: [{name: A, of: [B]}]", "averages: [{name: A, of: [{task: x}]}]", "references: [nobody]"):
        path.write_text(f"title: x\nsource: y\ntasks: [{{task: arc_easy}}]\n{wrong}\n")
        with pytest.raises(UserError, match=r"mine\.yaml|nobody\.yaml"):
            load_suite(str(path))


def test_missing_packages_and_data():
    suite = suite_of(["leaderboard_math_hard", "arc_easy", "quick_facts"])
    suite.needs["packages"]["leaderboard_math_hard"] = ["no_such_package"]
    result, documents = missing(suite, suite.include_path, 0)
    assert documents == 48
    assert result["leaderboard_math_hard"].endswith('no_such_package: pip install "lm-eval[math]"')
    assert "arc_easy" in result, "the tests run offline"
    assert "quick_facts" not in result


def test_missing_nltk_data(monkeypatch):
    import nltk.data

    def find(name):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", find)
    suite = suite_of(["leaderboard_ifeval"])
    suite.needs["packages"] = {}
    assert "python -m nltk.downloader punkt_tab" in missing(suite, suite.include_path, 0)[0]["leaderboard_ifeval"]


def test_duplicate_task_is_refused():
    suite = suite_of(["quick_facts", str(ROOT / "configs" / "lm_eval" / "tasks" / "quick_facts.yaml")])
    with pytest.raises(UserError, match="quick_facts"):
        missing(suite, suite.include_path, 0)


# ------------------------------------------------------------------------------------------------- paired differences


def side_of(tasks: dict[str, dict[str, list]], prompts=None, results=None, filter="none") -> ModelResults:
    """A ModelResults as the harness reports it: `tasks` gives every metric's figure of every document."""
    side = ModelResults()
    for task, metrics in tasks.items():
        count = len(next(iter(metrics.values())))
        side.samples[task] = {
            (filter, k): {
                "document": f"d{k}",
                "prompt": (prompts or {}).get(k, "p"),
                "values": {name: figures[k] for name, figures in metrics.items()},
                "options": 4,
                "answer": json.dumps([figures[k] for figures in metrics.values()]),
            }
            for k in range(count)
        }
        side.results[task] = {"alias": task}
        for name, figures in metrics.items():
            if all(isinstance(v, (int, float)) for v in figures):
                side.results[task] |= {f"{name},{filter}": float(np.mean(figures)), f"{name}_stderr,{filter}": 0.1}
        side.higher[task] = dict.fromkeys(metrics, True)
        side.shots[task] = 0
    for name, value in (results or {}).items():
        side.results.setdefault(name, {}).update(value)
    return side


def compare(base: ModelResults, tuned: ModelResults, task="t", metric="acc", filter="none"):
    reported = {
        name: {
            kind: side.results[task].get(f"{metric}{suffix},{filter}")
            for kind, suffix in (("value", ""), ("stderr", "_stderr"))
        }
        for name, side in (("base", base), ("tuned", tuned))
    }
    return paired(base, tuned, leaves(base, task), metric, filter, reported, 0)


def test_binary_metrics_use_mcnemar():
    a = [1] * 20 + [1] * 3 + [0] * 9 + [0] * 8
    b = [1] * 20 + [0] * 3 + [1] * 9 + [0] * 8
    result = compare(side_of({"t": {"acc": a}}), side_of({"t": {"acc": b}}))
    assert result["test"] == "McNemar" and result["p"] == pytest.approx(binomtest(9, 12).pvalue)
    assert result["difference"]["value"] == pytest.approx(6 / 40) and result["n"] == 40
    d = np.subtract(b, a)
    assert result["difference"]["stderr"] == pytest.approx(d.std(ddof=1) / math.sqrt(40))
    # Paired errors are smaller.
    assert result["difference"]["stderr"] < math.hypot(0.1, 0.1)


def test_other_metrics_use_a_permutation_test():
    rng = np.random.default_rng(0)
    a = rng.normal(0.4, 0.2, 200)
    b = a + rng.normal(0.02, 0.05, 200)
    result = compare(side_of({"t": {"acc": list(a)}}), side_of({"t": {"acc": list(b)}}))
    assert result["test"] == "permutation" and result["difference"]["value"] == pytest.approx((b - a).mean())
    z = (b - a).mean() / ((b - a).std() / math.sqrt(200))
    assert result["p"] == pytest.approx(2 * norm.sf(abs(z)), abs=0.01)


def test_perplexity_from_log_likelihoods():
    a, b = [-1.0, -2.0, -3.0, -1.5], [-1.1, -2.3, -3.1, -1.4]
    base = side_of({"t": {"perplexity": a}}, results={"t": {"perplexity,none": math.exp(-np.mean(a))}})
    tuned = side_of({"t": {"perplexity": b}}, results={"t": {"perplexity,none": math.exp(-np.mean(b))}})
    result = compare(base, tuned, metric="perplexity")
    assert result["difference"]["value"] == pytest.approx(math.exp(-np.mean(b)) - math.exp(-np.mean(a)))
    assert result["test"] == "permutation" and result["note"] is None


def test_word_perplexity_weights_by_words():
    a, b = [[-10.0, 5], [-30.0, 10]], [[-12.0, 5], [-28.0, 10]]
    perplexity = [math.exp(40 / 15), math.exp(40 / 15)]
    base = side_of({"t": {"word_perplexity": a}}, results={"t": {"word_perplexity,none": perplexity[0]}})
    tuned = side_of({"t": {"word_perplexity": b}}, results={"t": {"word_perplexity,none": perplexity[1]}})
    result = compare(base, tuned, metric="word_perplexity")
    assert result["difference"]["value"] == pytest.approx(0) and result["n"] == 2 and result["note"] is None


def test_ifeval_is_resampled_by_document():
    a = [[True, False], [True], [False, False, True]]
    b = [[True, True], [True], [False, True, True]]
    base = side_of({"t": {"inst": a}}, results={"t": {"inst,none": 3 / 6}})
    tuned = side_of({"t": {"inst": b}}, results={"t": {"inst,none": 5 / 6}})
    result = compare(base, tuned, metric="inst")
    assert (
        result["difference"]["value"] == pytest.approx(2 / 6) and result["n"] == 3 and result["test"] == "permutation"
    )


def test_different_prompts_are_not_paired():
    base = side_of({"t": {"acc": [1, 0, 1]}})
    result = compare(base, side_of({"t": {"acc": [1, 1, 1]}}, prompts={1: "q"}))
    assert result["p"] is None and "1 documents have other prompts" in result["note"]
    assert result["difference"]["value"] == pytest.approx(1 / 3)
    assert result["difference"]["stderr"] == pytest.approx(math.hypot(0.1, 0.1))
    result = compare(base, side_of({"t": {"acc": [1, 1]}}))
    assert "1 documents" in result["note"]


def test_unknown_aggregation_is_unpaired():
    results = {"t": {"f1,none": 0.123}}
    base, tuned = (side_of({"t": {"f1": values}}, results=results) for values in ([0.5, 1.0], [1.0, 0.5]))
    result = compare(base, tuned, metric="f1")
    assert result["p"] is None and "own aggregation" in result["note"]


def group(name, weights, tasks):
    """A side with a group over `tasks`, whose figure is weighted by size or not."""
    side = side_of(tasks)
    values = [np.mean(t["acc"]) for t in tasks.values()]
    sizes = [len(t["acc"]) for t in tasks.values()]
    side.results[name] = {"acc,none": float(np.average(values, weights=sizes if weights else None)), "alias": name}
    side.subtasks = {name: list(tasks)}
    return side


def test_group_weighted_by_size():
    a = {"x": {"acc": [1] * 8 + [0] * 2}, "y": {"acc": [0] * 30}}
    b = {"x": {"acc": [1] * 6 + [0] * 4}, "y": {"acc": [1] * 9 + [0] * 21}}
    result = compare(group("g", True, a), group("g", True, b), task="g")
    assert result["n"] == 40 and result["test"] == "McNemar" and result["p"] == pytest.approx(binomtest(9, 11).pvalue)


def test_group_of_unweighted_means():
    a = {"x": {"acc": [1] * 8 + [0] * 2}, "y": {"acc": [0] * 30}}
    b = {"x": {"acc": [1] * 6 + [0] * 4}, "y": {"acc": [1] * 9 + [0] * 21}}
    base, tuned = group("g", False, a), group("g", False, b)
    result = compare(base, tuned, task="g")
    parts = [compare(base, tuned, task=t)["difference"]["stderr"] for t in "xy"]
    assert result["difference"]["stderr"] == pytest.approx(math.hypot(*parts) / 2)
    assert result["difference"]["value"] == pytest.approx((-0.2 + 0.3) / 2) and result["test"] == "t"
    # The mean of two independent means is Welch's comparison of one with the other's negative.
    first, second = (np.subtract(b[t]["acc"], a[t]["acc"]) for t in "xy")
    assert result["p"] == pytest.approx(ttest_ind(first, -second, equal_var=False).pvalue)


def test_false_claims_of_groups_of_small_tasks():
    """Eight tasks with six documents each and no difference: at most 5% of the tests are below 0.05, and noise."""
    rng, below = np.random.default_rng(0), 0
    for _ in range(400):
        errors, means = [], []
        for _ in range(8):
            d = rng.integers(0, 2, 6) - rng.integers(0, 2, 6)
            means.append(d.mean())
            errors.append((d.std(ddof=1) / math.sqrt(6), 6))
        stderr = math.sqrt(sum(error**2 for error, _ in errors)) / 8
        p = normal(float(np.mean(means)), stderr, degrees_of_freedom(errors))["p"]
        below += p is not None and p < 0.05
    # Three standard errors of a share of 5% in 400 draws are 3.3 points.
    assert below / 400 <= 0.05 + 0.033


def test_every_member_of_a_group_without_a_figure_is_tested():
    a = {"x": {"acc": [1, 0] * 10}, "y": {"acc": [0] * 30}, "v": {"acc": [0, 1]}}
    b = {"x": {"acc": [1, 0] * 10}, "y": {"acc": [1] * 30}, "v": {"acc": [0, 1]}}
    base, tuned = side_of(a), side_of(b)
    for side in (base, tuned):
        side.results |= {"g": {"alias": "g suite", " ": " "}, "h": {"alias": " - h"}}
        side.subtasks = {"g": ["x", "h"], "h": ["y"]}
    table = rows(base, tuned, Suite("s", "", "", [{"task": "g"}, {"task": "v"}]), 0)
    assert [(row["task"], row["top"], row["depth"]) for row in table] == [
        ("x", True, 1),
        ("y", True, 2),
        ("v", True, 0),
    ]
    assert table[1]["p"] == pytest.approx(binomtest(0, 30).pvalue)
    assert "better on y acc" in verdict_of(table)
    results = SuiteResults("t", load_suite("quick"), {"base": base, "tuned": tuned}, table, {}, [], SETTINGS)
    names = [line[0] for line in table_lines(results)]
    without = "(group without a figure)"
    assert names[1:4] == [f"g suite {without}", "  x, 0-shot", "    acc ↑"]
    assert names[4:6] == [f"  h {without}", "    y, 0-shot"]
    assert names[-2:] == ["v, 0-shot", "  acc ↑"]


def test_nan_log_likelihoods_stop_the_comparison(tmp_path):
    """A NaN compares as false, so that every document would count as wrong."""
    row = {"filter": "none", "doc_id": 3, "doc_hash": "d", "prompt_hash": "p", "metrics": ["acc"], "acc": 0.0,
           "resps": [[["-1.5", "False"]], [["nan", "False"]]], "arguments": {"gen_args_0": {"arg_0": "Q"}}}  # fmt: skip
    (tmp_path / "samples_t_1.jsonl").write_text(json.dumps(row) + "\n")
    results = {"results": {"t": {"alias": "t", "acc,none": 0.0}}, "configs": {"t": {"output_type": "multiple_choice"}},
               "config": dict.fromkeys(("model", "model_args", "gen_kwargs", "limit", "batch_size"), "x")}  # fmt: skip
    write_json(tmp_path / "results_1.json", results)
    with pytest.raises(UserError, match=r"samples_t_1\.jsonl: document 3: .*NaN"):
        add_results(ModelResults(), tmp_path / "results_1.json", 0, 1.0)
    row["resps"][1][0][0] = "-2.5"
    (tmp_path / "samples_t_1.jsonl").write_text(json.dumps(row) + "\n")
    side = ModelResults()
    add_results(side, tmp_path / "results_1.json", 0, 1.0)
    assert side.samples["t"]["none", 3]["values"] == {"acc": 0.0}


def logged_folder(folder, tasks, groups=None):
    """A folder of lm_eval with one document per task. tasks: its figures. groups: {group: [task]}."""
    for task, figures in tasks.items():
        row = {"filter": "none", "doc_id": 3, "doc_hash": "d", "prompt_hash": "p", "metrics": ["acc"], "resps": [["x"]],
               "acc": figures.get("acc,none"), "arguments": {"gen_args_0": {"arg_0": "Q"}}}  # fmt: skip
        write_jsonl(folder / f"samples_{task}_1.jsonl", [row])
    results = {task: {"alias": task, **figures} for task, figures in tasks.items()}
    results |= {
        group: {"alias": group, "acc,none": tasks[kids[0]]["acc,none"]} for group, kids in (groups or {}).items()
    }
    config = dict.fromkeys(("model", "model_args", "gen_kwargs", "limit", "batch_size"), "x")
    report = {"results": results, "configs": {task: {} for task in tasks}, "group_subtasks": groups or {}}
    write_json(folder / "results_1.json", {**report, "config": config})
    return str(folder)


@pytest.mark.parametrize("tuned", [{"acc,none": 1.0, "em,strict": 0.5}, {"em,strict": 0.5}])
def test_compared_folders_with_other_figures_of_a_task(tmp_path, tuned):
    """Logged by another version of lm_eval: figures of one folder only are named, the others compared."""
    base = logged_folder(tmp_path / "a", {"t": {"acc,none": 0.0, "acc_norm,none": 0.5}})
    args = SimpleNamespace(compare=[base, logged_folder(tmp_path / "b", {"t": tuned})], seed=1)
    if "acc,none" not in tuned:
        with pytest.raises(UserError, match="--compare: .*t/acc,none.*t/em,strict"):
            compare_folders(args)
        return
    results = compare_folders(args)
    assert [(row["metric"], row["difference"]["value"]) for row in results.rows] == [("acc", 1.0)]
    assert "LEFT OUT, in one folder only: t/acc_norm,none, t/em,strict." in results.suite.notes


@pytest.mark.parametrize("group_in", ["base", "tuned"])
def test_compared_folders_of_a_group_and_of_its_task(tmp_path, group_in):
    group = logged_folder(tmp_path / "a", {"t": {"acc,none": 0.0}, "u": {"acc,none": 0.0}}, {"g": ["t", "u"]})
    task = logged_folder(tmp_path / "b", {"t": {"acc,none": 1.0}})
    folders = [group, task] if group_in == "base" else [task, group]
    results = compare_folders(SimpleNamespace(compare=folders, seed=1))
    assert [(row["task"], row["top"], abs(row["difference"]["value"])) for row in results.rows] == [("t", True, 1.0)]
    assert "LEFT OUT, in one folder only: g, u." in results.suite.notes


def test_pooled_tasks_split_by_choices():
    side = side_of({"t": {"acc": [1, 0, 1, 1, 0, 0]}})
    for k, options in enumerate((3, 3, 5, 5, 5, 7)):
        side.samples["t"]["none", k]["options"] = options
    of = [{"task": "t", "metric": "acc", "choices": n} for n in (3, 5, 7)]
    suite = Suite("s", "", "", [], averages=[{"name": str(e["choices"]), "of": [e]} for e in of])
    result = suite_averages(suite, side, side, 0)
    assert [result[k]["base"]["value"] for k in "357"] == [pytest.approx(v) for v in (1 / 2, 2 / 3, 0)]


def test_row_order():
    side = group("g", True, {"b": {"acc": [1, 0]}, "a": {"acc": [1, 1]}})
    side.results["z"] = {"acc,none": 0.5, "alias": "z"}
    side.samples["z"] = {("none", 0): {**side.samples["a"]["none", 0]}}
    suite = Suite("s", "", "", [{"task": "z"}, {"task": "g"}])
    result = [(row["task"], row["depth"]) for row in rows(side, side, suite, 0)]
    assert result == [("z", 0), ("g", 0), ("b", 1), ("a", 1)]


def test_identical_models_are_refused():
    side = side_of({"t": {"acc": [1, 0]}})
    comparison = SimpleNamespace(args=SimpleNamespace(allow_identical=False), adapter="lora", servers={})
    with pytest.raises(UserError, match="2 requests.*adapter"):
        ensure_answers_differ(side, side_of({"t": {"acc": [1, 0]}}), comparison)
    ensure_answers_differ(side, side_of({"t": {"acc": [1, 1]}}), comparison)


# ------------------------------------------------------------------------------------------------------------ report

HARNESS = f"lm-eval {version('lm_eval')}"
SETTINGS = {"apply_chat_template": False, "limit": None, "num_fewshot": None, "missing": {}, "unquantised": None,
            "dtype": "float32"}  # fmt: skip
REFERENCE = {"name": "r", "source": "a paper", "apply_chat_template": False, "scale": 100, "averages": {},
    "harness": HARNESS, "dtype": "float32", "rows": [
    {"task": "t", "metric": "acc", "filter": "none", "shots": 0, "value": 40.0, "stderr": 1.0}]}  # fmt: skip


@pytest.mark.parametrize("reference, row, settings, reason", [
    ({}, {}, {}, None),
    ({}, {"shots": 5}, {}, "5 shots"),
    ({}, {"shots": None}, {}, "unknown shots"),
    ({}, {"how": "generated"}, {}, "generated"),
    ({"apply_chat_template": None}, {}, {}, "not published"),
    ({"apply_chat_template": True}, {}, {}, "chat template on"),
    ({}, {}, {"limit": 24}, "--limit"),
    ({}, {}, {"apply_chat_template": True}, "chat template off"),
    ({"harness": "a fork of lm-eval 0.3"}, {}, {}, "another harness"),
    ({"dtype": "float16"}, {}, {}, "dtype float16"),
])  # fmt: skip
def test_differences_of_settings(reference, row, settings, reason):
    row = {**REFERENCE["rows"][0], **row}
    result = differs({**REFERENCE, **reference}, row, 0, {**SETTINGS, **settings})
    assert result is None if reason is None else reason in result


def made(reference=REFERENCE, settings=(), suite=None):
    base, tuned = side_of({"t": {"acc": [1, 0, 0, 1]}}), side_of({"t": {"acc": [1, 1, 0, 1]}})
    for side in (base, tuned):
        side.headers, side.templates = ["hf (x)"], {False}
    suite = suite or Suite("s", "Title", "", [{"task": "t"}])
    sides = {"base": base, "tuned": tuned}
    averages = suite_averages(suite, **sides, seed=0)
    table = rows(**sides, suite=suite, seed=0)
    return SuiteResults("Title", suite, sides, table, averages, [reference], {**SETTINGS, **dict(settings)})


def texts(results) -> list[str]:
    """The printed report on one line, and the Markdown."""
    printed = render(results).text
    assert max(map(len, printed.splitlines())) <= 100
    return [" ".join(printed.split()), markdown(results)]


def test_published_row_of_the_same_setting_is_compared():
    results = made()
    printed, full = texts(results)
    assert "0.4000 ± 0.0100, tuned +0.3500" in full and "published: r 0.4000 ± 0.0100 +0.3500" in printed
    assert results.rows[0]["references"]["r"] == {
        "value": 0.4, "stderr": 0.01, "published_as": "t acc", "other_setting": None,
    }  # fmt: skip
    assert "base (template off)" in full and "chat template off" in printed
    for text in (printed, full):
        assert "(0.4000" not in text and "human preference" in text
        assert f"r: a paper; harness: {HARNESS}; dtype: float32; chat template off" in text


@pytest.mark.parametrize("name", SUITES)
def test_shipped_references_have_other_settings(name):
    """All come from older harnesses with other prompts, so none is compared."""
    for stem in load_suite(name).references:
        reference = load_reference(stem)
        for row in [*reference["rows"], None]:
            assert differs(reference, row, row and row["shots"], {**SETTINGS, "dtype": "float16"})


def test_published_row_of_another_setting():
    other = {**REFERENCE, "rows": [{**REFERENCE["rows"][0], "shots": 25}]}
    for text in texts(made(other)):
        assert "(0.4000 ± 0.0100)" in text and "+0.35" not in text and "25 shots (t)" in text


def test_published_row_with_equal_shots_is_preferred():
    several = [{**REFERENCE["rows"][0], "shots": s, "value": v} for s, v in ((25, 65.0), (0, 60.0))]
    reference = {**REFERENCE, "rows": several}
    entry = {"task": "t", "metric": "acc"}
    assert published_row(reference, entry, 0)["value"] == 60.0
    assert published_row(reference, entry, 25)["value"] == 65.0
    juanako = load_reference("juanako-7b-v1")
    result = published_averages(load_suite("openllm_v1"), juanako)
    assert (round(result["ARC"], 2), round(result["HellaSwag"], 2)) == (64.85, 85.13)
    assert result["Winogrande"] is None and result["Average"] is None, "its 5-shot Winogrande was not published"


def test_mixed_templates_are_flagged():
    results = made()
    assert render(results).warning is None
    results.sides["tuned"].templates = {True}
    assert "MIXED" in render(results).warning and all("MIXED" in text for text in texts(results))


def test_limit_shots_and_missing_tasks_are_noted():
    results = made(settings={"limit": 24, "num_fewshot": 3, "missing": {"boolq": "missing data"}}.items())
    for text in texts(results):
        for words in ("ONLY 24 DOCUMENTS", "--num-fewshot 3", "--skip-missing", "boolq: missing data"):
            assert words in text


def test_table_of_the_example_run_is_that_of_the_docs():
    example = json.loads((ROOT / "docs/example_run/lm_eval_quick.json").read_text())
    settings = example["settings"]
    results = SuiteResults("quickstart: " + example["suite"]["title"], load_suite("quick"), {}, example["rows"], {}, [],
                           settings)  # fmt: skip
    assert table(results.title, table_lines(results)) in (ROOT / "docs/lm_eval.md").read_text()


@pytest.mark.parametrize("name", SUITES)
def test_printed_tables_of_every_suite_fit(name):
    suite = load_suite(name)
    metrics = {entry["task"]: {"acc_norm": [1, 0, 1, 1], "exact_match": [0.0, 1.0, 1.0, 0.0]} for entry in suite.tasks}
    sides = {"base": side_of(metrics, filter="flexible-extract"), "tuned": side_of(metrics, filter="flexible-extract")}
    for side in sides.values():
        side.headers, side.templates = ["hf (x)"], {False}
    table = rows(**sides, suite=suite, seed=0)
    figure = {"value": 12.345, "stderr": 1.2, "ci95": None}
    kinds = ("base", "tuned", "difference")
    averages = {average["name"]: {**dict.fromkeys(kinds, figure), "p": 0.012} for average in suite.averages}
    references = [load_reference(stem) for stem in suite.references]
    results = SuiteResults(f"a run: {suite.title}", suite, sides, table, averages, references, SETTINGS)
    printed, full = texts(results)
    for entry in suite.tasks:
        assert entry["task"] in printed and entry["task"] in full
    for average in suite.averages:
        assert average["name"] in printed and average["name"] in full


def row_of(task, p, difference=0.1, higher=True, depth=0, ci95=(0.02, 0.18)):
    row = {"task": task, "metric": "acc", "p": p, "difference": metric(difference, 0.04, ci95, 50)}
    return {**row, "higher": higher, "depth": depth, "top": not depth}


def test_verdict_corrects_for_the_number_of_tasks():
    text = verdict_of([row_of("a", 0.03), row_of("b", 0.04), row_of("c", 0.9)])
    assert text.startswith("Inconclusive")
    result = [row_of("a", 0.001), row_of("ppl", 0.002, higher=False), row_of("c", 0.9), row_of("sub", 1e-9, depth=1)]
    text = verdict_of(result)
    assert "better on a acc (+0.1000)" in text and "worse on ppl acc (+0.1000)" in text and "3 paired tests" in text
    assert result[0]["significant"] and not result[2]["significant"] and "significant" not in result[3]
    assert verdict_of([row_of("sub", 0.01, depth=1)]).startswith("No claim")
    # The interval must agree with the test.
    assert verdict_of([row_of("a", 0.001, ci95=(-0.01, 0.2))]).startswith("Inconclusive")
    assert "worse on a acc" in verdict_of([row_of("a", 0.001, -0.1, ci95=(-0.18, -0.02))])


def test_eq_bench_average_of_parsed_answers():
    result = [
        {"task": "eq_bench", "metric": "eqbench", "base": {"value": 27.0}, "tuned": {"value": 20.0}},
        {"task": "eq_bench", "metric": "percent_parseable", "base": {"value": 90.0}, "tuned": {"value": 50.0}},
    ]
    (line,) = eq_bench(result)
    assert "base 30.00 (90.0% parsed)" in line and "tuned none" in line and "83.33%" in line
    assert eq_bench([]) == []


def test_clock():
    assert clock(751) == "00:12:31" and clock(8580) == "02:23:00"


# ------------------------------------------------------------------------------------------------------------- calls


def models_of(**overrides):
    args = SimpleNamespace(
        base_revision=None,
        tuned_revision=None,
        trust_remote_code=False,
        attn_implementation=None,
        chat_template_path=None,
    )
    c = Comparison(args, "r", "builtin:smollm2-135m-instruct", "ck/r", None, {}, None)
    return SimpleNamespace(**{"comparison": c, "dtype": "float32", "autocast": None, "quantized": None, **overrides})


def test_model_arguments_follow_training_precision():
    import torch

    base, tuned = (model_arguments(models_of(), side, "hf", None, 1) for side in ("base", "tuned"))
    assert tuned == {**base, "peft": tuned["peft"]} and "peft" not in base
    mixed = model_arguments(models_of(autocast=torch.bfloat16), "base", "hf", 512, 1)
    assert (mixed["dtype"], mixed["mixed_precision_dtype"], mixed["max_length"]) == ("float32", "bfloat16", 512)
    quantised = model_arguments(
        models_of(autocast=torch.bfloat16, quantized={"load_in_4bit": True}), "base", "hf", None, 1
    )
    assert quantised["dtype"] == "bfloat16" and "mixed_precision_dtype" not in quantised


def test_model_arguments_of_vllm(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 64}')
    models = models_of()
    models.comparison.adapter = str(tmp_path)
    result = model_arguments(models, "tuned", "vllm", 4096, 8)
    assert result["lora_local_path"] == str(tmp_path) and result["max_lora_rank"] == 64
    assert result["tensor_parallel_size"] == 8 and result["max_model_len"] == 4096 and "peft" not in result


OPTIONS = {
    "backend": "hf", "batch_size": "8", "limit": None, "seed": 1234, "num_fewshot": None, "apply_chat_template": False,
    "fewshot_as_multiturn": False, "include_path": None, "processes": 1, "device": "cpu", "extra": [],
    "tasks_sha256": "", "engine_versions": None,
}  # fmt: skip


def planned(tmp_path, side="base", arguments=None, identity=None, **options):
    suite = load_suite("openllm_v1")
    return plan(suite, side, arguments or {"pretrained": "m"}, identity or {"base": 1}, {**OPTIONS, **options},
                tmp_path / "out", tmp_path / "cache")  # fmt: skip


def test_suite_sets_the_room_for_generated_answers(tmp_path):
    suite = load_suite("generated")
    (call,) = plan(suite, "base", {"pretrained": "m"}, {}, {**OPTIONS, "gen_kwargs": suite.gen_kwargs},
                   tmp_path / "out", tmp_path / "cache")  # fmt: skip
    assert call.command[call.command.index("--gen_kwargs") + 1] == "max_gen_toks=1024"
    assert "--gen_kwargs" not in planned(tmp_path)[0].command


def test_mean_lengths_of_groups_count_documents():
    """A group's mean is that of its documents, not of its tasks; tasks of groups are not listed again."""
    sides = {}
    for side, lengths in (("base", (10.0, 40.0, 7.0)), ("tuned", (20.0, 80.0, 9.0))):
        sides[side] = side_of({"x": {"em": [1] * 3}, "y": {"em": [0]}, "z": {"em": [0]}})
        sides[side].subtasks = {"g": ["h"], "h": ["x", "y"]}
        sides[side].lengths = dict(zip("xyz", lengths, strict=True))
    assert mean_lengths(sides) == {
        "g (2 tasks)": {"base": (3 * 10 + 40) / 4, "tuned": (3 * 20 + 80) / 4},
        "z": {"base": 7.0, "tuned": 9.0},
    }


def cache_of(call) -> str:
    return call.command[call.command.index("--use_cache") + 1]


def test_tasks_with_equal_shots_share_a_call(tmp_path):
    calls = planned(tmp_path)
    assert [(c.shots, c.tasks) for c in calls] == [
        (25, ["arc_challenge"]), (10, ["hellaswag"]), (5, ["mmlu", "winogrande", "gsm8k"]), (0, ["truthfulqa_mc2"]),
    ]  # fmt: skip
    assert [c.shots for c in planned(tmp_path, num_fewshot=3)] == [3]
    command = planned(tmp_path)[0].command
    assert command[:4] == [sys.executable, "-m", "lm_eval", "run"]
    assert command[command.index("--num_fewshot") + 1] == "25" and "--apply_chat_template" not in command


def test_response_caches_are_separate(tmp_path):
    """lm-eval looks responses up by request alone: models that shared a cache would share responses."""
    variants = [
        planned(tmp_path),
        planned(tmp_path, side="tuned", arguments={"pretrained": "m", "peft": "a"}),
        planned(tmp_path, identity={"base": 1, "adapter_sha256": "x"}),
        planned(tmp_path, arguments={"pretrained": "m", "dtype": "bfloat16"}),
        planned(tmp_path, arguments={"pretrained": "m", "max_length": 512}),
        planned(tmp_path, backend="vllm"),
        planned(tmp_path, batch_size="4"),
        planned(tmp_path, processes=2),
        planned(tmp_path, device="cuda"),
        planned(tmp_path, extra=["--gen_kwargs", "temperature=1"]),
    ]
    assert len({cache_of(calls[0]) for calls in variants}) == len(variants)
    assert len({str(calls[0].folder) for calls in variants}) == len(variants)
    # A run on fewer documents uses the same responses.
    assert cache_of(planned(tmp_path, limit=8)[0]) == cache_of(planned(tmp_path)[0])
    assert planned(tmp_path, limit=8)[0].folder != planned(tmp_path)[0].folder
    changed = planned(tmp_path, tasks_sha256="other")[0]
    assert changed.folder != planned(tmp_path)[0].folder, "a changed task file needs another run"


def test_call_hash_ignores_unrelated_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = planned(tmp_path)[0]
    (tmp_path / "votes-ann.json").write_text("{}")
    assert planned(tmp_path)[0] == before
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    local = planned(tmp_path, arguments={"pretrained": str(model)})[0]
    (model / "tokenizer.json").write_text("[]")
    assert planned(tmp_path, arguments={"pretrained": str(model)})[0].folder != local.folder


def test_chat_template_flags(tmp_path):
    command = planned(tmp_path, apply_chat_template=True, fewshot_as_multiturn=True)[0].command
    at = command.index("--apply_chat_template")
    assert command[at + 1 : at + 3] == ["--fewshot_as_multiturn", "true"]
    own = planned(tmp_path, apply_chat_template=True, fewshot_as_multiturn=None)[0].command
    assert "--apply_chat_template" in own and "--fewshot_as_multiturn" not in own, "the harness's default"


def fake_call(tmp_path, code: str) -> Call:
    return Call("base", ["t"], 0, [sys.executable, "-c", code, "x"], tmp_path / "call")


def test_failed_call_is_one_line_with_its_log(tmp_path, capsys):
    call = fake_call(tmp_path, "raise ValueError('no such thing')")
    with pytest.raises(UserError, match=r"base 1/1: ValueError: no such thing .*\b1\b.*log\.txt"):
        execute(call, "base 1/1", tmp_path)
    assert "Traceback" not in capsys.readouterr().err and "Traceback" in (tmp_path / "call" / "log.txt").read_text()
    assert not call.finished
    with pytest.raises(UserError, match="out of memory.*--batch-size"):
        execute(fake_call(tmp_path, "raise RuntimeError('CUDA out of memory')"), "base 1/1", tmp_path)


def test_call_without_results_is_not_finished(tmp_path):
    with pytest.raises(UserError, match="base 1/1"):
        execute(fake_call(tmp_path, "pass"), "base 1/1", tmp_path)


def test_finished_call_is_not_repeated(tmp_path, capsys):
    write = f"open({str(tmp_path / 'call' / 'results_1.json')!r}, 'w').write('{{}}')"
    call = fake_call(tmp_path, write)
    execute(call, "base 1/1", tmp_path)
    assert call.finished
    call.command[2] = "raise SystemExit(9)"
    execute(call, "base 1/1", tmp_path)
    assert "base 1/1" in capsys.readouterr().err


def test_progress_shows_request_bars_only():
    assert PROGRESS.match("Running loglikelihood requests:  50%|#####     | 5/10 [00:01<00:01, 5it/s]")
    assert not PROGRESS.match("2026-01-01 WARNING [evaluator] 5%| something")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_without_a_terminal_is_lines(terminal, tmp_path, monkeypatch, capsys):
    """The harness's bars are redrawn on a terminal; a log file gets plain lines without carriage returns."""
    bar = "Running loglikelihood requests:  {0}%|##   | {0}/100 [00:01<00:01, 5it/s]"
    code = f"import sys; [print({bar!r}.format(k), end='\\r', file=sys.stderr, flush=True) for k in (0, 50, 100)]"
    code += f"; open({str(tmp_path / 'call' / 'results_1.json')!r}, 'w').write('{{}}')"
    monkeypatch.setattr(calls.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(calls, "LineProgress", partial(LineProgress, seconds=0))
    execute(fake_call(tmp_path, code), "base 1/1", tmp_path)
    err = capsys.readouterr().err
    if terminal:
        assert "\rRunning loglikelihood requests:  50%|##" in err
    else:
        assert "\r" not in err and "Running loglikelihood requests: 50/100 requests (50%)" in err


def test_auto_batch_size_is_detected_once(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nowhere = tmp_path / "batch_size.json"
    assert batch_size("auto", "hf", {}, nowhere) == "8" and batch_size("16", "hf", {}, nowhere) == "16"
    assert batch_size("auto", "vllm", {}, nowhere) == "auto", "vLLM chooses its batches"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    write_json(nowhere, {"batch_size": "32", "arguments": "{}"})
    assert batch_size("auto", "hf", {}, nowhere) == "32", "a detected size is reused"


def test_lm_eval_still_detects_batch_sizes():
    from lm_eval.models.huggingface import HFLM

    assert callable(HFLM._detect_batch_size)


@pytest.mark.parametrize("overrides, extra, words", [
    ({"suite": "quick", "tasks": "a"}, [], "--suite and --tasks"),
    ({"batch_size": "0"}, [], "--batch-size 0"),
    ({"batch_size": "some"}, [], "--batch-size some"),
    ({"processes": 0}, [], "--processes 0"),
    ({"num_fewshot": -1}, [], "--num-fewshot -1"),
    ({"output_json": "x"}, [], "--output-dir"),
    ({"load_in_4bit": True}, [], "--load-in-4bit|--load_in_4bit"),
    ({}, ["--use_cache", "x"], "-- --use_cache"),
    ({}, ["-L", "10"], "-- -L"),
    ({}, ["--lim=10"], "-- --lim"),
    ({}, ["--apply_chat_template"], "-- --apply_chat_template"),
])  # fmt: skip
def test_bad_options(overrides, extra, words):
    with pytest.raises(UserError, match=words):
        check(HarnessArguments(**overrides), extra)


def test_vllm_backend_needs_its_environment(tmp_path, monkeypatch):
    """The harness runs under the interpreter there; its versions are part of the cache's key."""
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_environment, "FOLDER", tmp_path / "none")
    with pytest.raises(UserError, match="--backend vllm: vLLM is not installed; run bash install_vllm.sh"):
        check(HarnessArguments(backend="vllm"), [])
    python = fake_vllm.make(tmp_path / "fake")
    monkeypatch.setenv("VLLM_PYTHON", str(python))
    check(HarnessArguments(backend="vllm"), [])
    (first, *_), (second, *_) = (
        planned(tmp_path, backend="vllm", engine_versions={"vllm": number}) for number in ("1", "2")
    )
    assert first.command[:3] == [str(python), "-m", "lm_eval"] and first.folder != second.folder
    assert vllm_environment.versions()["torch"] == version("torch")


@pytest.mark.parametrize(
    ("flags", "tasks", "limit"),
    [
        ({"tasks": "a, b,,c ,"}, "a,b,c", None),
        ({"limit": 12.0}, None, 12),
        ({"limit": 1.0}, None, 1),
        ({"limit": 0.1}, None, 0.1),
    ],
)
def test_tasks_and_limit_in_one_form(flags, tasks, limit):
    args = HarnessArguments(**flags)
    check(args, [])
    assert args.tasks == tasks and args.limit == limit and type(args.limit) is type(limit)


def test_a_share_of_the_documents_is_counted_as_lm_eval_does(monkeypatch):
    from lm_eval.evaluator_utils import get_sample_size

    from preflab.harness import tasks

    suite = SimpleNamespace(tasks=[{"task": "a"}], include_path=None)
    monkeypatch.setattr(tasks, "missing", lambda *_: ({}, 45))
    for limit in (0.1, 0.5, 12, 99, None):
        _, documents = tasks.drop_missing(suite, HarnessArguments(limit=limit))
        expected = get_sample_size(SimpleNamespace(eval_docs=range(45)), limit)
        assert documents == min(45, expected if expected is not None else 45)
    assert "ONLY 0.1 OF THE DOCUMENTS OF EACH TASK" in texts(made(settings={"limit": 0.1}.items()))[0]


def test_split_at_dashes():
    assert split_at_dashes(["--suite", "x", "--", "--gen_kwargs", "a=1"]) == (["--suite", "x"], ["--gen_kwargs", "a=1"])
    assert split_at_dashes(["--suite", "x"]) == (["--suite", "x"], [])


def test_leading_bos(smol_tokenizer, gemma_like_tokenizer):
    assert leading_bos(smol_tokenizer, "Question: x") == 0
    text = gemma_like_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert leading_bos(gemma_like_tokenizer, text) == 1
