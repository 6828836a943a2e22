"""human_eval.py --score --judge: votes of a SYNTHETIC annotator on some pairs, and a judge's verdicts on all."""

import json
import re

import numpy as np
import pytest
from conftest import assert_one_line, write_jsonl

from preflab.human import powered
from preflab.human.page import FORMAT, checksum
from preflab.human.report import verdict_of
from utils.artifacts import metric, read_json
from utils.prediction_powered import prediction_powered

UNJUDGED = {"left_acceptable": None, "right_acceptable": None, "skip": None, "comment": "", "ms": 4000}


def number(text: str) -> int:
    return int(re.search(r"question (\d+)", text)[1])


@pytest.fixture
def study(endpoint, call, tmp_path):
    """A study of 30 prompts, on two of which the answers are identical: (arguments, key)."""
    base = endpoint(lambda *_: "answer of base")[0]
    tuned = endpoint(lambda question, _: "answer of base" if number(question) >= 28 else "tuned")[0]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {k}"} for k in range(30)])
    code, _, err = call(
        "human_eval", "--base_model", base, "--tuned_model", tuned, "--prompts", prompts, "--eval_out", tmp_path / "out"
    )
    assert code == 0, err
    return ["--eval_out", tmp_path / "out"], read_json(tmp_path / "out/m/human_eval_key.json")


def votes(key, folder, count: int):
    """Exported votes on the first `count` pairs of the page: tuned is better but on every fourth prompt."""
    first = [item for item in key["items"] if item["repeat_of"] is None][:count]
    prefers = {item["id"]: "base" if item["prompt"] % 4 == 0 else "tuned" for item in first}
    rows = [{"id": item["id"], "choice": "left" if item["left"] == prefers[item["id"]] else "right", **UNJUDGED}
            for item in first]  # fmt: skip
    export = {"format": FORMAT, "study": key["study"], "annotator": "SYNTHETIC", "items": len(key["items"])}
    export |= {"exported_utc": "2026-01-01T00:00:00Z", "votes": rows}
    export["checksum"] = checksum(key["study"], "SYNTHETIC", rows)
    path = folder / "votes.json"
    path.write_text(json.dumps(export), encoding="utf-8")
    return path, {item["prompt"]: float(prefers[item["id"]] == "tuned") for item in first}


def test_votes_and_verdicts_of_a_study(study, call, endpoint, tmp_path):
    """The judge prefers tuned but on every sixth prompt, in either order."""
    args, key = study

    def judge(question, _):
        tuned_first = "tuned" in question.split("# Answer B")[0]
        return "A" if tuned_first == (number(question) % 6 != 0) else "B"

    path, outcomes = votes(key, tmp_path, 12)
    spec = endpoint(judge)[0]
    code, stdout, err = call("human_eval", "--score", path, "--judge", spec, *args)
    assert code == 0, err
    summary = read_json(tmp_path / "out/m/human_eval.json")
    predicted = {k: float(k % 6 != 0) for k in range(28)}
    expected = prediction_powered(
        list(outcomes.values()),
        [predicted[k] for k in outcomes],
        [predicted[k] for k in predicted if k not in outcomes],
    )
    m = summary["metrics"]
    assert m["win_rate_prediction_powered"]["value"] == pytest.approx(expected.rate["value"])
    assert m["win_rate_prediction_powered"]["ci95"] == pytest.approx(expected.rate["ci95"])
    assert m["win_rate"]["value"] == pytest.approx(np.mean(list(outcomes.values())))
    assert m["win_rate_of_judge"]["value"] == pytest.approx(np.mean(list(predicted.values())))
    section = summary["powered"]
    assert (section["voted"], section["judged"], section["unparsed"]) == (12, 28, 0)
    assert section["as_precise_as"] == pytest.approx(expected.as_precise_as) and list(section["judges"]) == [spec]
    assert "prediction-powered" in stdout and max(map(len, stdout.splitlines())) <= 100
    # The claim rests on the rate of both; without a judge the figures of the votes are the same.
    assert "votes with a judge's verdicts" in summary["claim"]
    assert call("human_eval", "--score", path, *args, "--overwrite")[0] == 0
    alone = read_json(tmp_path / "out/m/human_eval.json")
    assert alone["metrics"] == {k: v for k, v in m.items() if k in alone["metrics"]} and "powered" not in alone


def test_judge_needs_votes_and_prompts(study, call, tmp_path):
    args, key = study
    code, _, err = call("human_eval", "--judge", "longer", *args)
    assert code == 2
    assert_one_line(err, "--judge", "--score")
    path, _ = votes(key, tmp_path, 12)
    code, _, err = call("human_eval", "--score", path, "--judge", "oracle", *args)
    assert code == 2
    assert_one_line(err, "--judge oracle")
    about = tmp_path / "out/m/manual_eval_candidates.about.json"
    content = read_json(about)
    content["prompts"] = [{k: v for k, v in row.items() if k != "messages"} for row in content["prompts"]]
    about.write_text(json.dumps(content), encoding="utf-8")
    code, _, err = call("human_eval", "--score", path, "--judge", "longer", *args)
    assert code == 2
    assert_one_line(err, "messages")


def test_prompts_without_a_verdict_are_left_out():
    rows = [{"annotator": "a", "id": str(k), "prompt": k, "category": None, "a": "tuned", "b": "base",
             "outcome": float(k % 2), "preference": k % 2, "repeat_of": None} for k in range(10)]  # fmt: skip
    sections = {"metrics": {}}
    scores = {k: 0.5 + 0.4 * (k % 2) for k in range(2, 40)}
    powered.add(sections, rows, {"judges": {}, "cost": {}, "scores": scores, "unparsed": 2}, 0)
    assert sections["powered"]["voted"] == 8 and sections["powered"]["judged"] == 38
    # Votes on other pairings only: nothing to correct.
    nothing = {"metrics": {}}
    powered.add(nothing, [{**row, "a": "other"} for row in rows], {"scores": dict(scores)}, 0)
    assert nothing == {"metrics": {}}


def test_verdict_rests_on_both():
    figures = {
        "win_rate": metric(0.6, 0.1, (0.4, 0.8), 20),
        "p_win_rate_is_half": metric(0.4),
        "win_rate_prediction_powered": metric(0.6, 0.04, (0.52, 0.68), 20),
        "p_win_rate_prediction_powered_is_half": metric(0.01),
        "left_wins": metric(0.5, 0.1, (0.3, 0.7), 20),
        "p_left_wins_is_half": metric(1.0),
        "judged": metric(20, n=40),
        "skipped": metric(0, n=40),
    }
    assert verdict_of(figures).startswith("People prefer tuned: tuned wins 60.0 [52.0, 68.0]%")
    votes_alone = {k: v for k, v in figures.items() if "powered" not in k}
    assert verdict_of(votes_alone).startswith("Inconclusive")
