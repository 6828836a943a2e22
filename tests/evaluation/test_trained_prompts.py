"""Held out is checked by prompt: other or swapped answers to a training prompt are not held-out data."""

import pytest
from conftest import eval_args, make_pairs, write_jsonl
from helpers import instructions

from preflab.data.preferences import to_pair
from preflab.data.prompts import Prompt
from preflab.evaluation.trained_prompts import key_of, prompts_of_run
from utils.artifacts import read_json


def swapped(rows: list[dict]) -> list[dict]:
    """The same prompts, in capitals and with more spaces, with the answers swapped."""
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        question = {"role": "user", "content": f"  {row['prompt'].upper()}  "}
        row["chosen"], row["rejected"] = [question, rejected[1]], [question, chosen[1]]
    return rows


@pytest.fixture
def mixed(tmp_path):
    """Five training prompts of the run `trained` with swapped answers, between four new pairs."""
    rows = [*make_pairs(2, 200), *swapped(make_pairs(5, 3)), *make_pairs(2, 210)]
    return write_jsonl(tmp_path / "data/mixed.jsonl", rows)


def test_swapped_training_pairs_are_left_out_of_the_win_rate(call, trained, mixed, tmp_path):
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--dataset_name", mixed))
    assert code == 0, err
    summary = read_json(tmp_path / "r/win_rate.json")
    assert summary["metrics"]["evaluated_examples"]["value"] == 4
    assert summary["data"]["dropped"] == {"prompt_trained_on": 5}
    note = "The run was trained on the prompts of 5 of 9 pairs"
    assert note in out.replace("\n", " ") and "mixed.jsonl line 3" in out.replace("\n", " ")
    assert "NOT HELD OUT" not in out and "on 4 held-out pairs" in out


def test_training_pairs_alone_are_not_called_held_out(call, trained, tmp_path):
    only = write_jsonl(tmp_path / "data/only.jsonl", swapped(make_pairs(6, 2)))
    for script, name in (("eval_win_rate", "win_rate"), ("eval_perplexity", "perplexity")):
        code, out, err = call(script, *eval_args(trained, tmp_path, "--dataset_name", only))
        assert code == 0, err
        assert read_json(tmp_path / f"r/{name}.json")["claim"].startswith("NOT HELD OUT"), name
        assert "held-out pairs" not in out


def test_prompts_of_the_training_are_left_out_of_battles_and_human_evaluation(call, trained, mixed, tmp_path):
    extra = ("--prompts", mixed, "--max_new_tokens", 4)
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--battle", "--judge", "longer", *extra))
    assert code == 0, err
    data = read_json(tmp_path / "r/battle.json")["data"]
    assert data["left_out"] == {"prompts that the run was trained on": 5}
    assert "The run was trained on 5 of 9 prompts" in out and "mixed.jsonl line 3" in out.replace("\n", " ")
    code, out, err = call("human_eval", *eval_args(trained, tmp_path, *extra))
    assert code == 0, err
    assert len(read_json(tmp_path / "r/manual_eval_candidates.json")) == 4 and "trained on" in out


def test_keys_do_not_depend_on_the_form_of_a_prompt():
    text = {"prompt": "What is  a LAMP?", "chosen": "A light.", "rejected": "A lemon."}
    turns = [{"role": "user", "content": "what is a lamp?"}]
    assert key_of(to_pair(text, "row 1")) == key_of(Prompt(turns, "row 1"))
    assert key_of(Prompt([{"role": "system", "content": "Rhyme."}, *turns], "")) != key_of(Prompt(turns, ""))


def test_prompts_of_a_run_are_those_it_trained_on(tmp_path):
    """Not those beyond --limit, and not those that it held out, unless --train_test_overlap keep."""
    write_jsonl(tmp_path / "d/train.jsonl", make_pairs(10))
    write_jsonl(tmp_path / "d/test.jsonl", make_pairs(4, 8))
    args = {"dataset_name": str(tmp_path / "d"), "dataset_test_split": "test", "train_test_overlap": "drop"}

    def numbers(**changed) -> set[int]:
        return {int(key.rstrip(".").split()[-1]) for key in prompts_of_run(args | changed, tmp_path)}

    assert numbers() == set(range(8))
    assert numbers(train_test_overlap="keep") == set(range(10))
    assert numbers(limit=3) == {0, 1, 2}
    # --test_rows: the run's folder has the rows that it held out.
    write_jsonl(tmp_path / "held_out_rows.jsonl", make_pairs(2))
    assert numbers(dataset_test_split="none", test_rows=2) == set(range(2, 10))


def test_prompts_of_an_sft_run(tmp_path):
    write_jsonl(tmp_path / "d/train.jsonl", instructions(6))
    args = {"dataset_name": str(tmp_path / "d"), "dataset_test_split": None, "test_rows": 2, "loss_on": "responses"}
    keys = prompts_of_run(args, tmp_path)
    everything = prompts_of_run(args | {"test_rows": 0}, tmp_path)
    assert (len(keys), len(everything)) == (4, 6) and keys < everything
    row = instructions(6)[0]
    asked = Prompt([{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}], "")
    assert key_of(asked) in everything


def test_kept_overlap_is_named_in_the_verdict():
    from preflab.training.training_table import with_kept_overlap

    assert with_kept_overlap("Training helped.", 0) == "Training helped."
    assert with_kept_overlap("Training helped.", 3).startswith("PARTLY NOT HELD OUT: 3 train rows")
