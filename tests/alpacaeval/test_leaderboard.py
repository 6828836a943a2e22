"""Audit of a judge on published judgements (--audit_annotations): agreement, correlations and refusals by hand."""

import json

import pytest
from conftest import assert_one_line
from scipy.stats import spearmanr

from preflab.alpacaeval.leaderboard import read_labels
from utils.artifacts import RowFile, read_json
from utils.errors import UserError

INSTRUCTIONS = [f"instruction {k}" for k in range(40)]
# How many of its answers the leaderboard's judge prefers to the reference.
WON = {"weak": 4, "middle": 20, "strong": 36}


def annotations(folder, model: str, won: int, **changed):
    """One model's judgements; the answers that win say so, and are shorter than the reference."""
    rows = []
    for k, instruction in enumerate(INSTRUCTIONS):
        wins = (7 * k) % 40 < won
        row = {"instruction": instruction, "output_1": "the reference with many words", "generator_1": "ref",
               "output_2": f"{'good' if wins else 'bad'} {k}", "generator_2": model, "annotator": "gpt4_turbo",
               "preference": 1.9 if wins else 1.2}  # fmt: skip
        rows.append({**row, **(changed if k == 0 else {})})
    path = folder / f"{model}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_agreement_and_ranks_of_a_judge(endpoint, call, tmp_path):
    """The judge prefers an answer that says good to the reference, and the reference to all others: all agree."""
    files = [annotations(tmp_path, model, won) for model, won in WON.items()]

    def judge(question, _):
        first, second = (question.index(f'"model_identifier": "{name}"') for name in "mM")
        shown = question[first:second]
        return "m" if "good" in shown or ("reference" in shown and "good" not in question) else "M"

    spec = endpoint(judge)[0]
    args = ["--audit_annotations", *files, "--judge", spec, "--audit_limit", 25, "--eval_out", tmp_path / "out"]
    code, stdout, err = call("run_alpacaeval_local", *args)
    assert code == 0, err
    summary = read_json(tmp_path / "out/leaderboard/alpacaeval/leaderboard_audit.json")
    m = summary["metrics"]
    assert m["agreement"]["value"] == 1 and m["rank_correlation"]["value"] == pytest.approx(1)
    assert m["longer_agreement"]["value"] == m["labels_for_reference"]["value"]
    assert summary["audit"]["passed"] and summary["claim"].startswith("Judge audit passed")
    rows = RowFile(tmp_path / "out/leaderboard/alpacaeval/leaderboard_audit_rows.jsonl").read()
    assert len(rows) == 75 and len({row["instruction"] for row in rows}) == 25
    for model in WON:
        own = [row for row in rows if row["model"] == model]
        assert summary["models"][model]["label"]["value"] == pytest.approx(sum(r["preference"] - 1 for r in own) / 25)
        assert summary["models"][model][spec]["value"] == pytest.approx(sum(r["preference"] > 1.5 for r in own) / 25)
    expected = spearmanr([row["judges"]["random"] for row in rows], [row["preference"] for row in rows]).statistic
    assert m["random_preference_correlation"]["value"] == pytest.approx(expected)
    # A path may be longer.
    table = [line for line in stdout.splitlines() if str(tmp_path) not in line]
    assert "rank correlation, models" in stdout and max(map(len, table)) <= 100


def test_ties_and_missing_judgements_are_counted(call, tmp_path):
    file = annotations(tmp_path, "weak", 4, preference=None)
    rows = json.loads(file.read_text())
    rows[1]["preference"], rows[2]["output_2"] = 1.5, rows[2]["output_1"]
    file.write_text(json.dumps(rows))
    args = ["--audit_annotations", file, "--judge", "longer", "--eval_out", tmp_path / "out"]
    code, stdout, err = call("run_alpacaeval_local", *args)
    assert code == 0, err
    data = read_json(tmp_path / "out/leaderboard/alpacaeval/leaderboard_audit.json")["data"]
    assert data["left_out"] == {"no_verdict": 1, "tie": 1, "identical": 1}
    assert "No correlation over models" in stdout and "JUDGE AUDIT FAILED" in stdout


def test_mixed_files_are_refused(tmp_path):
    weak, strong = (annotations(tmp_path, model, WON[model]) for model in ("weak", "strong"))
    again = annotations(tmp_path, "again", 3, generator_2="weak")
    with pytest.raises(UserError, match="judges weak"):
        read_labels([str(weak), str(again)], 10, 0)
    other = annotations(tmp_path, "middle", 3, annotator="someone else")
    with pytest.raises(UserError, match="several judges"):
        read_labels([str(strong), str(other)], 10, 0)


@pytest.mark.parametrize("flags", [("--annotations", "x.json"), ("--plan", "5"), ("--audit_limit", "0")])
def test_contradicting_flags_are_refused(call, tmp_path, flags):
    code, _, err = call("run_alpacaeval_local", "--audit_annotations", "x.json", "--judge", "longer", *flags)
    assert code == 2
    assert_one_line(err, "--audit_annotations")
