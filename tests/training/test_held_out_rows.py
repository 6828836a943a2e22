"""Rows held out of the train split (--test_rows), and the end of a run that holds none out."""

import json

import pytest
from conftest import assert_one_line, make_pairs, train_args, write_jsonl
from helpers import instructions, sft_args

from preflab.data.preferences import hold_out_pairs, load_pairs
from preflab.training.training_table import first_and_last_tenth
from utils.artifacts import read_json


@pytest.fixture
def pairs_file(tmp_path):
    """20 pairs in one file, the first prompt twice."""
    rows = make_pairs(19)
    return write_jsonl(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "rejected": rows[1]["rejected"]}])


def test_pairs_are_held_out_and_evaluated_again(call, train, tiny, pairs_file, tmp_path):
    """The run's own figures, and those of eval_win_rate.py, are of the same rows, which were not trained on."""
    args = train_args(tiny, pairs_file, tmp_path, "--test_rows", 6, "--max_steps", 2)
    code, out, err = train(*args)
    assert code == 0, err
    summary = read_json(tmp_path / "out/r/train.json")
    train_part, test_part = summary["data"]["train"], summary["data"]["test"]
    assert test_part["pairs"] == 6 and train_part["pairs"] == 13
    assert test_part["sources"][0]["held_out"] == "6 pairs, by hash"
    held_out = [json.loads(line) for line in (tmp_path / "ck/r/held_out_rows.jsonl").read_text().splitlines()]
    places = {json.loads(line)["where"] for line in (tmp_path / "out/r/heldout_rows.jsonl").read_text().splitlines()}
    lines = pairs_file.read_text().splitlines()
    # The rows' places in artifacts are those of the user's file.
    assert len(places) == 6 and all(json.dumps(row) in lines for row in held_out)
    assert "held_out_rows.jsonl" in out and "train_log.jsonl" in out and "preflight.json" in out

    code, out, err = call(
        "eval_win_rate", "--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out"
    )
    assert code == 0, err
    again = read_json(tmp_path / "out/r/win_rate.json")["metrics"]["avg_margin"]
    assert again["value"] == pytest.approx(summary["metrics"]["reward_margin"]["value"], abs=1e-5)
    assert again["n"] == 6


def test_held_out_prompts_do_not_depend_on_order(tmp_path):
    """All pairs of a prompt move together, whatever the order of the rows."""
    held_out = []
    for name, rows in (("a", make_pairs(19)), ("b", make_pairs(19)[::-1])):
        rows += [{**row, "rejected": [*row["rejected"][:1], {"role": "assistant", "content": "No."}]} for row in rows]
        sources = [{"name": str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "split": "train"}]
        data = load_pairs(sources, keep_duplicate_prompts=True)
        part, raw = hold_out_pairs(data, 6, sources)
        assert len(part.pairs) == len(raw) == 6 and len(data.pairs) == 32
        assert not {pair.prompt_key for pair in part.pairs} & {pair.prompt_key for pair in data.pairs}
        assert [row["prompt"] for row in raw] == [pair.messages[0]["content"] for pair in part.pairs]
        held_out.append({pair.prompt_key for pair in part.pairs})
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("dpo", ("--dataset_test_split", "test"), ("--test_rows 4", "--dataset_test_split test", "only one")),
        ("sft", ("--dataset_test_split", "test"), ("--test_rows 4", "--dataset_test_split test", "only one")),
        ("dpo", ("--test_dataset_name", "other"), ("--test_rows 4", "--test_dataset_name other")),
        ("dpo", ("--test_rows", "-1"), ("--test_rows -1",)),
        ("dpo", ("--test_rows", "900"), ("--test_rows 900", "all 19 pairs")),
    ],
)
def test_held_out_rows_in_two_ways(script, flags, words, call, tiny, pairs_file, tmp_path):
    args = train_args if script == "dpo" else sft_args
    name = "dpo_train_human_preference" if script == "dpo" else "sft_train_instruction"
    code, _, err = call(name, *args(tiny, pairs_file, tmp_path / "x", "--test_rows", 4, *flags))
    assert code == 2
    assert_one_line(err, *words)
    assert not (tmp_path / "x").exists()


def test_dpo_without_held_out_rows_ends_with_its_training(train, tiny, pairs_file, tmp_path):
    args = train_args(tiny, pairs_file, tmp_path, "--dataset_test_split", "none", "--max_steps", 20)
    code, out, err = train(*args, "--sample_prompts", 1, "--max_length", 64)
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "out/r/train_log.jsonl").read_text().splitlines()]
    # Two of twenty steps are a tenth.
    losses = [row["loss"] for row in log]
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    assert f"loss per pair {first:.4f} {last:.4f} {last - first:+.4f}" in " ".join(out.split())
    for label in ("reward accuracy, % (ties half)", "reward margin", "first 2 logged steps", "--test_rows N"):
        assert label in " ".join(out.split()), out
    # samples.md has a prompt of the train split, and says so.
    assert "Prompts of the train split" in (tmp_path / "out/r/samples.md").read_text()
    assert read_json(tmp_path / "out/r/train.json")["claim"].startswith("No claim: no test split")


def test_sft_without_held_out_rows_ends_with_its_training(call, tiny, tmp_path):
    data = write_jsonl(tmp_path / "d/train.jsonl", instructions(12)).parent
    code, out, err = call("sft_train_instruction", *sft_args(tiny, data, tmp_path, "--test_rows", 0, "--max_steps", 2))
    assert code == 0, err
    for label in ("loss, nats per token", "token ranked first, %", "first step", "--test_rows N"):
        assert label in " ".join(out.split()), out


def test_first_and_last_tenth():
    rows = [{"split": "train", "loss": float(i)} for i in range(30)] + [{"split": "eval", "loss": 99.0}]
    assert first_and_last_tenth(rows, "loss") == (1.0, 28.0)
    assert first_and_last_tenth(rows, "rewards/margins") is None
    assert first_and_last_tenth(rows[:3], "loss") == (0.0, 2.0)
