"""--plan: a pilot, the table of prompts against detectable difference and time, and nothing else."""

import shutil

import pytest
from conftest import ROOT, assert_one_line, eval_args
from helpers import alpaca_args

from preflab.evaluation.plan import seconds_per_prompt
from utils.artifacts import RowFile, metric, read_json, write_json
from utils.cache import COMPUTED, measured_work
from utils.power import pilot_of, with_power


def rows_of(plan: dict) -> dict:
    return {row["n"]: row for row in plan["plan"]["rows"]}


def test_win_rate_plans_from_its_first_pairs(call, trained, tmp_path):
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--plan", 6))
    assert code == 0, err
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert "win_rate_LIMIT6.json" in names and "win_rate.json" not in names
    plan, pilot = (read_json(tmp_path / f"r/win_rate_LIMIT6{end}.json") for end in ("_plan", ""))
    rows = RowFile(tmp_path / "r/win_rate_LIMIT6_rows.jsonl").read()
    by_hand = pilot_of([float(row["margin"] > 0) for row in rows], 0.5)
    assert rows_of(plan)[800]["detectable"] == pytest.approx(by_hand.detectable(800))
    # 12 sequences of 6 pairs were scored in this call.
    per_pair = pilot["scoring"]["seconds"] / 6
    assert rows_of(plan)[800]["seconds"] == pytest.approx(800 * per_pair, rel=1e-3)
    assert "plan from a pilot of 6 pairs" in out and out.index("plan from a pilot") > out.index("win rate by reward")


def test_battle_and_alpacaeval_plan_from_their_first_prompts(call, trained, tiny, inputs, tmp_path):
    extra = ("--battle", "--judge", "longer", "--prompts", inputs.prompts, "--max_new_tokens", 8, "--plan", 5)
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, *extra))
    assert code == 0, err
    plan = read_json(tmp_path / "r/battle_LIMIT5_plan.json")
    assert plan["plan"]["pilot"]["n"] <= 5 and plan["plan"]["seconds_per_unit"] > 0
    code, out, err = call("run_alpacaeval_local", *alpaca_args(trained, tmp_path, inputs.reference, tiny, "--plan", 5))
    assert code == 0, err
    folder = tmp_path / "out/r/alpacaeval_LIMIT5"
    plan, pilot = read_json(folder / "alpacaeval_plan.json"), read_json(folder / "alpacaeval.json")
    assert plan["plan"]["pilot"] == pilot["metrics"]["difference_win_rate"]["power"]
    assert plan["plan"]["seconds_per_unit"] == pytest.approx(seconds_per_prompt(pilot))
    assert not (tmp_path / "out/r/alpacaeval").exists()


def test_plan_from_an_earlier_result(call, tmp_path):
    shutil.copy(ROOT / "docs/example_run/win_rate.json", tmp_path / "win_rate.json")
    code, out, err = call("eval_win_rate", "--plan", tmp_path / "win_rate.json")
    assert code == 0, err
    rows = RowFile(ROOT / "docs/example_run/win_rate_rows.jsonl").read()
    by_hand = pilot_of([float(row["margin"] > 0) for row in rows], 0.5)
    table = rows_of(read_json(tmp_path / "win_rate_plan.json"))
    assert table[200]["detectable"] == pytest.approx(by_hand.detectable(200), rel=1e-4)
    assert by_hand.needed(by_hand.mean) in table and f"needs about {by_hand.needed(by_hand.mean)} pairs" in out
    code, _, err = call("eval_win_rate", "--battle", "--plan", tmp_path / "win_rate.json")
    assert code == 2
    assert_one_line(err, "--plan", "win_rate.json", "battle")


def test_human_evaluation_plans_from_a_scored_study(call, tmp_path):
    votes = [1, 0, 0.5, 1, 0.5, 0, 1, 1]
    rate = with_power(metric(0.625, 0.1, (0.3, 0.9), 8), votes, "prompts", 0.5)
    study = {"stage": "human_eval", "run": {"run_name": "r"}, "model": {}}
    study["metrics"] = {"win_rate": rate, "seconds_median": metric(30.0)}
    write_json(tmp_path / "human_eval.json", study)
    code, out, err = call("human_eval", "--plan", tmp_path / "human_eval.json")
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("400 "))
    assert "3.3 h" in row and "points" in row
    code, _, err = call("human_eval", "--plan", 20)
    assert code == 2
    assert_one_line(err, "--plan 20", "--limit 20", "score")


def test_refused_plans(call, trained, tmp_path):
    for extra, words in (
        (("--plan", "0"), ("--plan 0", "above 0")),
        (("--plan", "5", "--limit", "3"), ("--plan 5", "--limit 3")),
        (("--plan", tmp_path / "none.json"), ("--plan", "none.json", "neither a number")),
    ):
        code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, *extra))
        assert code == 2
        assert_one_line(err, *words)
    # A pilot that shows only ties says nothing about power.
    equal = {"stage": "win_rate", "run": {}, "metrics": {}}
    equal["metrics"]["win_rate_ties_half"] = with_power(metric(0.5, n=4), [0.5] * 4, "pairs", 0.5)
    write_json(tmp_path / "equal.json", equal)
    code, _, err = call("eval_win_rate", "--plan", tmp_path / "equal.json")
    assert code == 2
    assert_one_line(err, "equal.json", "larger pilot")


def test_time_is_scaled_to_what_was_not_cached():
    summary = {"stage": "battle", "metrics": {"win_rate": metric(0.5, n=10)}}
    work = {"answers": {"seconds": 6.0, "computed": 5, "of": 20}, "judging": {"seconds": 3.0, "computed": 20, "of": 20}}
    assert seconds_per_prompt(summary | {"work": work}) == pytest.approx((4 * 6.0 + 3.0) / 10)
    work["judging"]["computed"] = 0
    assert seconds_per_prompt(summary | {"work": work}) is None
    # A control judge computes nothing, and takes no time.
    work["judging"]["of"] = 0
    assert seconds_per_prompt(summary | {"work": work}) == pytest.approx(2.4)
    with measured_work("answers-") as entry:
        COMPUTED["answers-base"] += 3
        COMPUTED["judgements"] += 7
    assert entry["computed"] == 3


@pytest.mark.parametrize("plan", ["", "abc", "2.5", "--5", "\u00b2"])
def test_plan_that_is_neither_a_number_nor_a_file(call, plan):
    code, _, err = call("eval_win_rate", f"--plan={plan}")
    assert code == 2
    assert_one_line(err, f"--plan {plan}: ", "number of prompts")


@pytest.mark.parametrize("edited", [{"metrics": None}, {"metrics": {"win_rate_ties_half": "x"}}, {"run": []}])
def test_plan_from_an_edited_result(call, tmp_path, edited):
    write_json(tmp_path / "edited.json", {**read_json(ROOT / "docs/example_run/win_rate.json"), **edited})
    code, _, err = call("eval_win_rate", "--plan", tmp_path / "edited.json")
    assert code == 2
    assert_one_line(err, "--plan", "edited.json", "run the evaluation again")


def test_plan_fits_a_narrow_terminal(call, monkeypatch, tmp_path):
    shutil.copy(ROOT / "docs/example_run/win_rate.json", tmp_path / "win_rate.json")
    monkeypatch.setattr("utils.stage.terminal_width", lambda: 50)
    code, out, err = call("eval_win_rate", "--plan", tmp_path / "win_rate.json")
    assert code == 0, err
    assert max(map(len, out.partition("wrote")[0].splitlines())) <= 50
    # The artifact does not depend on the terminal.
    assert max(map(len, read_json(tmp_path / "win_rate_plan.json")["text"].splitlines())) > 50
