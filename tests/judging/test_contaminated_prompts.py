"""Battles and AlpacaEval without the prompts that overlap with training data (--contamination)."""

import json

import numpy as np
from conftest import assert_one_line, eval_args, write_jsonl
from helpers import alpaca_args
from scipy.stats import binomtest

from preflab.alpacaeval.metrics import instructions_without_overlap, summarise
from preflab.evaluation.contamination import TrainingText, overlap_table
from utils.artifacts import read_json

WORDS = "amber basil cedar delta ember fjord grove heath inlet jetty knoll larch mossy north ocean".split()
# No two of them share three words in a row.
PROMPTS = [" ".join(f"{word}{k}" for word in WORDS) for k in range(8)]


def test_battle_without_overlapping_prompts(endpoint, call, tmp_path):
    """The longer answer wins: tuned's on even prompts. Training data have prompt 0, and ten words of prompt 1."""
    base = endpoint(lambda *_: "five.")[0]
    tuned = endpoint(lambda question, _: "much longer" if int(question[-1]) % 2 == 0 else "no")[0]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    quotes = [{"messages": [{"role": "user", "content": f"Well: {PROMPTS[0]}"}]},
              {"messages": [{"role": "user", "content": " ".join(PROMPTS[1].split()[:10])}]}]  # fmt: skip
    data = write_jsonl(tmp_path / "data.jsonl", quotes)
    args = ["--battle", "--base_model", base, "--tuned_model", tuned, "--prompts", prompts, "--judge", "longer"]
    args += ["--eval_out", tmp_path / "out"]
    code, stdout, err = call("eval_win_rate", *args, "--contamination", data)
    assert code == 0, err
    (section,) = read_json(tmp_path / "out/m/battle.json")["contamination"]
    assert section["removed"] == {"13": 1, "8": 2} and section["documents"] == 8 and section["rows"] == 2
    assert section["all"]["win_rate"]["value"] == 0.5
    without = section["without"]["13"]
    assert without["win_rate"]["value"] == 3 / 7 and without["win_rate"]["n"] == 7
    assert without["p_win_rate_is_half"]["value"] == binomtest(3, 7).pvalue
    assert section["without"]["8"]["win_rate"]["value"] == 3 / 6
    assert "7 (-1)" in stdout and "6 (-2)" in stdout and "tuned vs base" in stdout
    assert max(map(len, stdout.splitlines())) <= 100
    # The flag changes no other figure, so the same evaluation may be printed with and without it.
    assert call("eval_win_rate", *args)[0] == 0


def test_contamination_is_for_battles_only(call, trained, tmp_path):
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--contamination", "r"))
    assert code == 2
    assert_one_line(err, "--contamination", "--battle")


def test_alpacaeval_without_overlapping_instructions(endpoint, call, trained, inputs, tmp_path):
    reference = write_jsonl(
        tmp_path / "ref.jsonl",
        [{"instruction": prompt, "output": "right", "generator": "ref", "dataset": "mine"} for prompt in PROMPTS],
    )
    base = endpoint(lambda *_: "no")[0]
    tuned = endpoint(lambda question, _: "much longer" if int(question[-1]) < 4 else "nope")[0]
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "x", "output": f"Well: {PROMPTS[0]}"}])
    args = list(map(str, alpaca_args(trained, tmp_path, reference, inputs.tiny, "--base_model", base)))
    for flag in ("--judge", "--run_name"):
        at = args.index(flag)
        args = [*args[:at], *args[at + 2 :]]
    args += ["--tuned_model", tuned, "--judge", "longer", "--audit_limit", "0", "--contamination", data]
    code, stdout, err = call("run_alpacaeval_local", *args)
    assert code == 0, err
    section = read_json(tmp_path / "out/m/alpacaeval/alpacaeval.json")["contamination"]
    assert section["removed"] == {"13": 1, "8": 1}
    folder = tmp_path / "out/m/alpacaeval"
    rows = {side: json.loads((folder / f"annotations_{side}.json").read_text()) for side in ("base", "tuned")}
    preferences = {side: {row["instruction"]: row["preference"] - 1 for row in rows[side]} for side in rows}
    for side, of_side in preferences.items():
        for figures, kept in ((section["all"], PROMPTS), (section["without"]["13"], PROMPTS[1:])):
            assert figures[f"{side}_win_rate"]["value"] == 100 * np.mean([of_side[prompt] for prompt in kept])
    assert section["without"]["13"]["tuned_win_rate"]["value"] == 100 * 3 / 7
    assert "without 13-grams" in stdout and "7 (-1)" in stdout


def test_given_judgements_without_overlapping_instructions(call, tmp_path):
    """--annotations: the rates of one model; preferences 1 to 2 as shares of a win."""
    preferences = [2, 1, 1.5, 1, 2, 1, 1, 2]
    rows = [
        {"instruction": prompt, "output_1": "a b", "generator_1": "ref", "output_2": "c " * k, "generator_2": "mine",
         "annotator": "judge", "preference": preference}
        for k, (prompt, preference) in enumerate(zip(PROMPTS, preferences, strict=True))
    ]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{PROMPTS[0]}?", "response": PROMPTS[7]}])
    flags = ("--contamination", data, "--eval_out", tmp_path / "out")
    code, stdout, err = call("run_alpacaeval_local", "--annotations", tmp_path / "annotations.json", *flags)
    assert code == 0, err
    section = read_json(tmp_path / "out/annotations/alpacaeval/alpacaeval.json")["contamination"]
    assert section["all"]["win_rate"]["value"] == 100 * np.mean(np.array(preferences) - 1)
    assert section["without"]["13"]["win_rate"]["value"] == 100 * np.mean(np.array(preferences[1:7]) - 1)
    assert "6 (-2)" in stdout


def test_no_verdict_on_the_instructions_that_are_left(tmp_path):
    """The judge failed on all instructions but those that overlap: their figures are absent, the others stay."""
    sides = {
        side: [
            {"instruction": prompt, "output_1": "a b", "generator_1": "ref", "output_2": "c " * k, "annotator": "judge",
             "generator_2": side, "preference": 1.5 + (k % 2) / 4 if k < 6 else None, "dataset": "mine"}
            for k, prompt in enumerate(PROMPTS)
        ]
        for side in ("base", "tuned")
    }  # fmt: skip
    training = TrainingText("mine", [{"text": prompt} for prompt in PROMPTS[:6]], [])
    results = summarise(sides, {}, str(tmp_path), 0, 2)
    section = instructions_without_overlap(sides, results, training, str(tmp_path), 0, 2)
    assert section["without"] == {"13": {}, "8": {}} and section["all"]["base_win_rate"]["n"] == 6
    assert "2 (-6)" in overlap_table(section, ["base, %"], lambda figures: [str(figures["base_win_rate"]["value"])])
