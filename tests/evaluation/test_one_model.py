"""--base_model without a tuned model: figures of one model, no comparison and no claim."""

import json
import math

import pytest
from conftest import assert_one_line, write_jsonl

from preflab.harness.metrics import SuiteResults, metrics
from preflab.harness.report import markdown, render, rows_for_summary
from preflab.harness.results import ModelResults
from preflab.harness.suites import Suite
from utils.artifacts import RowFile, metric, read_json


def test_perplexity_of_one_model(call, trained, tiny, prefs, tmp_path):
    """The base's figures are those of the comparison."""
    (tmp_path / "a.txt").write_text("The river is quite plain. " * 40)
    data = ("--dataset_name", prefs, "--split", "test", "--max_length", "128", "--text_file", tmp_path / "a.txt")
    own = ("--eval_out", tmp_path, "--window", "32", "--dtype", "float32")
    code, out, err = call("eval_perplexity", "--base_model", tiny, *data, *own, "--checkpoints", trained / "ck")
    assert code == 0, err
    (folder,) = (path.parent for path in tmp_path.glob("*/perplexity.json"))
    alone = read_json(folder / "perplexity.json")
    assert alone["claim"].startswith("No claim: one model's perplexity")
    assert list(alone["model"]) == ["base"] and "tuned" not in out
    assert not [name for name in alone["metrics"] if "tuned" in name or "difference" in name or name.startswith("p_")]
    rows = RowFile(folder / "perplexity_rows.jsonl").read()
    text = [row for row in rows if row["set"] == "text"]
    by_hand = math.exp(sum(row["nll_base"] for row in text) / sum(row["tokens"] for row in text))
    assert alone["metrics"]["text_ppl_base"]["value"] == pytest.approx(by_hand)
    run = ("--run_name", "r", "--checkpoints", trained / "ck")
    code, _, err = call("eval_perplexity", *run, *data, *own)
    assert code == 0, err
    both = read_json(tmp_path / "r/perplexity.json")["metrics"]
    for name, m in alone["metrics"].items():
        if m["value"] is not None:
            assert m["value"] == pytest.approx(both[name]["value"], rel=1e-4), name


def test_battle_of_one_model(call, tiny, prefs, tmp_path):
    rows = [json.loads(line) for line in (prefs / "test.jsonl").read_text().splitlines()]
    given = [{"prompt": row["prompt"], "output": "A long answer. " * 30, "generator": "other"} for row in rows]
    answers = write_jsonl(tmp_path / "given.jsonl", given)
    args = ("--battle", "--base_model", tiny, "--judge", "longer", "--dataset_name", prefs, "--split", "test")
    args = (*args, "--max_new_tokens", 4, "--eval_out", tmp_path / "out")
    code, _, err = call("eval_win_rate", *args)
    assert code == 2
    assert_one_line(err, "--opponent_outputs", "--models")
    code, out, err = call("eval_win_rate", *args, "--opponent_outputs", answers)
    assert code == 0, err
    (summary,) = (read_json(path) for path in (tmp_path / "out").glob("*/battle.json"))
    assert summary["claim"].startswith("No claim: one model alone")
    assert summary["metrics"]["base_win_rate"]["value"] == 0 and "base vs other" in out


def test_lm_eval_table_of_one_model():
    row = {"task": "t", "alias": "t", "depth": 0, "top": True, "version": 1, "filter": "none", "shots": 0}
    row |= {"metric": "acc", "higher": True, "base": metric(0.25, 0.1), "tuned": metric(0.25, 0.1), "n": 20}
    row |= {"difference": metric(None), "p": None, "test": None, "note": None}
    side = ModelResults(headers=["hf (model)"], lengths={"t": 12.0}, seconds=61.0, templates={False})
    averages = {"mean": {"base": metric(0.25, 0.1), "tuned": metric(0.25, 0.1), "difference": metric(None), "p": None}}
    suite = Suite("s", "title", "", [{"task": "t"}], averages=[{"name": "mean", "of": []}])
    keys = ("apply_chat_template", "limit", "num_fewshot", "batch_size", "unquantised")
    settings = {**dict.fromkeys(keys), "missing": {}, "dtype": "float32"}
    results = SuiteResults("model alone", suite, {"base": side}, [row], averages, [], settings, alone=True)
    report, page = render(results), markdown(results)
    assert report.verdict.startswith("No claim: one model's figures")
    for text in (report.text, page):
        assert "0.2500 ± 0.1000" in text.replace(" | ", " ") and "tuned" not in text
    assert "00:01:01" in report.text and "Power" not in report.text
    assert set(metrics(results)) == {"t/acc,none/base", "mean/base"}
    assert not {"tuned", "difference", "p"} & set(rows_for_summary(results)[0])
