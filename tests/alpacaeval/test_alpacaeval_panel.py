"""A panel of judges in AlpacaEval: who has a vote, the panel's preferences, and each judge's own figures."""

import json

import pytest
from conftest import assert_one_line, write_jsonl

from utils.artifacts import read_json


def shown_first(question: str) -> str:
    """The part of alpaca-eval's prompt with the output called m."""
    first, second = (question.index(f'"model_identifier": "{name}"') for name in "mM")
    return question[first:second]


def prefers(word: str):
    """A judge's server that prefers an output with a word; where both or none has it, the first in either order."""

    def reply(question, _):
        has = [word in part for part in (shown_first(question), question.split('"model_identifier": "M"')[1])]
        return "M" if has == [False, True] else "m"

    return reply


@pytest.fixture
def study(endpoint, tmp_path):
    """Arguments: tuned beats the reference on 9 of 12 instructions, base on 3; and labelled pairs for the audit."""
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    rows = [{"instruction": f"Say {w}.", "output": "neither, in detail", "generator": "ref", "dataset": "mine"}
            for w in words]  # fmt: skip
    reference = write_jsonl(tmp_path / "reference.jsonl", rows)

    def answers(count: int):
        return lambda question, _: "good" if words.index(question.split()[1].strip(".")) < count else "bad"

    pairs = [{"prompt": f"pair {k}", "chosen": f"good {k}", "rejected": f"bad {k} in detail"} for k in range(30)]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", pairs)
    args = ["--base_model", endpoint(answers(3))[0], "--tuned_model", endpoint(answers(9))[0], "--reference", reference]
    args += ["--audit_dataset", labelled, "--audit_split", "train", "--eval_out", tmp_path / "out", "--order", "both"]
    return [*args, "--judge_attempts", 0, "--lc_resamples", 2]


def test_panel_of_alpacaeval(study, endpoint, call, tmp_path):
    judges = [endpoint(prefers(word))[0] for word in ("good", "good", "detail")]
    code, stdout, err = call("run_alpacaeval_local", *study, "--judge", *judges)
    assert code == 0, err
    folder = tmp_path / "out/m/alpacaeval"
    summary = read_json(folder / "alpacaeval.json")
    members = summary["panel"]["members"]
    assert [members[name]["votes"] for name in judges] == [True, True, False]
    # Both judges agree: 9 wins, and 3 losses against "neither, in detail" that count as flips, half a win each.
    assert summary["metrics"]["tuned_win_rate"]["value"] == pytest.approx(100 * (9 + 1.5) / 12)
    assert members[judges[0]]["tuned"]["value"] == pytest.approx(100 * (9 + 1.5) / 12)
    assert members[judges[2]]["tuned"]["value"] == 0 and members[judges[2]]["difference"]["value"] == 0
    assert members[judges[0]]["without"]["difference"]["value"] == pytest.approx(50 * 6 / 12)
    assert members[judges[0]]["cost"]["of"] == 48 and members[judges[0]]["cost"]["computed"] > 0
    assert summary["audit"]["judge"] == "panel of 2 judges" and summary["claim"].endswith(f"failed: {judges[2]}.")
    assert "FAILED, no vote" in stdout and max(map(len, stdout.splitlines())) <= 100
    annotations = json.loads((folder / "annotations_tuned_judge3.json").read_text())
    assert {row["annotator"] for row in annotations} == {judges[2]}


def test_an_evaluator_of_the_package_judges_alone(study, call):
    code, _, err = call("run_alpacaeval_local", *study, "--judge", "longer", "weighted_alpaca_eval_gpt4_turbo")
    assert code == 2
    assert_one_line(err, "weighted_alpaca_eval_gpt4_turbo", "alone")
