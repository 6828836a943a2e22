"""The preflight's warnings in words: what stops a run, what allows it, and that a failed start leaves nothing."""

import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, assert_one_line, make_pairs, train_args, write_jsonl
from helpers import instructions, sft_args

from preflab.training.preflight_checks import RATES, check_flight, rate_kind, repetition
from utils.artifacts import read_json


def checked(*args) -> list[str]:
    """Arguments of a run that fatal findings stop."""
    return [arg for arg in args if arg != "--allow_fatal"]


# A flight without findings.
FLIGHT = {
    "train": {"pairs": 100, "rows": 100, "dropped": {}},
    "truncation": {"truncated_prompt": 0, "truncated_chosen": 0, "truncated_rejected": 0},
    "special_tokens": {"chosen_with_end_token": 1.0, "rejected_with_end_token": 1.0, "leading_bos_max": 1},
    "parameters": {"trainable": 10, "total": 100},
    "plan": {"steps": 20},
    "repetition": {"rows": 100, "distinct_prompts": 100, "most_common_prompt": 1, "repeated_rows": 0},
}


@pytest.mark.parametrize(
    ("change", "config", "severity", "words"),
    [
        ({}, {}, None, ()),
        ({"truncation": {"truncated_chosen": 95}}, {}, "fatal", ("95%", "chosen", "--max_length 64")),
        ({"truncation": {"truncated_prompt": 20}}, {}, "warning", ("20%", "prompt", "--max_length 64")),
        ({"truncation": {"truncated_prompt": 9}}, {}, None, ()),
        # 5 pairs are left of 100: the others were equal once truncated.
        (
            {"train": {"pairs": 5, "dropped": {"identical_after_truncation": 95}}},
            {},
            "fatal",
            ("95 of 100 pairs", "--max_length 64"),
        ),
        ({"special_tokens": {"chosen_with_end_token": 0.0}}, {}, "fatal", ("no chosen answer", "end token")),
        ({"special_tokens": {"rejected_with_end_token": 0.3}}, {}, "warning", ("30% of rejected", "end token")),
        ({"parameters": {"trainable": 0}}, {}, "fatal", ("no parameter", "--lora_target_modules")),
        ({"plan": {"steps": 20}}, {"warmup_steps": 20}, "fatal", ("20 steps", "--warmup_steps 20")),
        ({"plan": {"steps": 1}}, {"warmup_steps": 1}, "fatal", ("is 0 in the only step",)),
        ({}, {"warmup_steps": 0.5}, None, ()),
        ({}, {"learning_rate": 0.05}, "fatal", ("factor 250 above", "DPO, LoRA", "quickstart.yaml", "lower")),
        ({}, {"learning_rate": 1e-9}, "fatal", ("factor 500 below", "raise")),
        ({}, {"learning_rate": 1e-2}, None, ()),
        (
            {"train": {"pairs": 10, "dropped": {"duplicate_prompt": 90}}, "repetition": {"rows": 10}},
            {},
            "fatal",
            ("90 of 100 rows", "--keep_duplicate_prompts"),
        ),
        ({"repetition": {"most_common_prompt": 60}}, {}, "fatal", ("60 of 100 rows have the same prompt",)),
        ({"repetition": {"repeated_rows": 20}}, {}, "warning", ("20 of 100 rows are exact copies",)),
    ],
)
def test_findings_in_words(change, config, severity, words):
    flight = {key: {**section, **change.get(key, {})} for key, section in FLIGHT.items()}
    arguments = {"max_length": 64, "warmup_steps": 0, "learning_rate": 1e-4, "beta": 0.1, "objectives": ["sigmoid"]}
    findings = check_flight(flight, SimpleNamespace(**{**arguments, **config}), SimpleNamespace(use_peft=True), False)
    assert {key: len(sentences) for key, sentences in findings.items()} == {
        "fatal": int(severity == "fatal"),
        "warning": int(severity == "warning"),
    }
    for word in words:
        assert word in findings[severity][0]


def test_warmup_of_a_trial_is_a_warning():
    config = SimpleNamespace(max_length=64, warmup_steps=500, learning_rate=2e-6, beta=0.1, objectives=["sigmoid"])
    findings = check_flight(FLIGHT, config, SimpleNamespace(use_peft=True), trial=True)
    assert findings["fatal"] == [] and "--warmup_steps 500" in findings["warning"][0]


def test_recipes_are_within_the_range_of_their_kind():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if "learning_rate" in recipe:
            losses = recipe.get("loss_type", "reward" if "rm" in path.stem.split("-") else "sft")
            objective = {"objectives": [losses] if isinstance(losses, str) else losses}
            preference = {} if "loss_type" not in recipe else {"beta": recipe.get("beta", 0.1)}
            kind = rate_kind(SimpleNamespace(**objective, **preference), recipe.get("use_peft", False))
            lowest, highest, _ = RATES[kind]
            assert lowest <= float(recipe["learning_rate"]) <= highest, (path.name, kind)


def test_repetition_counts_prompts_and_rows():
    counts = repetition(["a", "a", "b", "c"], ["ax", "ax", "bx", "cx"])
    assert counts == {"rows": 4, "distinct_prompts": 3, "most_common_prompt": 2, "repeated_rows": 1}


def test_fatal_finding_stops_the_run_and_leaves_nothing(train, tiny, prefs, tmp_path):
    """--max_length 16 cuts every prompt and every answer."""
    args = checked(*train_args(tiny, prefs, tmp_path, "--max_length", 16))
    code, out, err = train(*args)
    assert code == 2
    assert_one_line(err, "truncated", "--max_length 16", "--allow_fatal")
    assert all(len(line) <= 100 for line in out.splitlines())
    assert "fatal     no chosen answer keeps its end token" in " ".join(out.split("\n"))
    # Neither folders nor the lock.
    assert list(tmp_path.iterdir()) == []

    code, out, err = train(*args, "--preflight_only")
    assert code == 2 and (tmp_path / "out/r/preflight.json").exists()
    assert len(read_json(tmp_path / "out/r/preflight.json")["fatal"]) >= 2

    code, out, err = train(*args, "--allow_fatal", "--max_steps", 1)
    assert code == 0, err
    assert "  fatal     " in out and (tmp_path / "out/r/train.json").exists()


def test_fatal_finding_of_sft(call, tiny, tmp_path):
    rows = instructions(20)
    for row in rows:
        row["instruction"], row["input"] = "Write something.", ""
    write_jsonl(tmp_path / "d/train.jsonl", rows)
    args = checked(*sft_args(tiny, tmp_path / "d", tmp_path / "x", "--test_rows", 0, "--preflight_only"))
    code, out, err = call("sft_train_instruction", *args)
    assert code == 2
    assert_one_line(err, "20 of 20 rows have the same prompt", "--allow_fatal")


def test_preflight_only_says_what_it_left(train, tiny, prefs, tmp_path):
    code, out, err = train(*checked(*train_args(tiny, prefs, tmp_path)), "--preflight_only")
    assert code == 0, err
    left = " ".join(out.split("\n\n")[-1].split())
    assert str(tmp_path / "out/r/preflight.json") in left and str(tmp_path / "ck/r/run.json") in left
    assert {p.name for p in (tmp_path / "ck/r").iterdir()} == {"run.json"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset_name", "NOWHERE"),
        ("--resume", "nowhere/checkpoint-1"),
        ("--lora_target_modules", "no_such_layer"),
        ("--model_name_or_path", "nowhere"),
        ("--beta", "-1"),
    ],
)
def test_failed_start_leaves_no_folder(flags, train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path), *flags)
    assert code == 2
    assert_one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_failed_start_deletes_nothing_of_others(train, tiny, prefs, tmp_path):
    for place in ("ck/other/run.json", "out/other/train.json", "out/.cache/x"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps({"finished": True}))
    before = sorted(tmp_path.rglob("*"))
    assert train(*train_args(tiny, prefs, tmp_path), "--dataset_name", "NOWHERE")[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_evaluation_leaves_no_empty_folder(call, trained, tmp_path):
    run = ("--run_name", "r", "--checkpoints", trained / "ck", "--eval_out", tmp_path / "new/out")
    for script in ("eval_win_rate", "eval_perplexity"):
        code, _, err = call(script, *run, "--dataset_name", tmp_path / "nowhere.jsonl")
        assert code == 2, err
        assert list(tmp_path.iterdir()) == []


def test_answers_equal_up_to_max_length_get_the_hint(train, tiny, tmp_path):
    rows = make_pairs(6)
    for row in rows:
        start = "The same long beginning of both answers, word by word, sentence by sentence. " * 8
        row["chosen"][1]["content"], row["rejected"][1]["content"] = f"{start} Yes.", f"{start} No."
    write_jsonl(tmp_path / "d/train.jsonl", rows)
    args = train_args(tiny, tmp_path / "d", tmp_path, "--max_length", 64, "--dataset_test_split", "none")
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "identical_after_truncation", "--max_length 64")
