"""Two processes give the figures of one and share the work. DPO has its own file, test_distributed.py."""

import pytest
from conftest import ROOT
from helpers import assert_shared, two_processes
from processes import run_script
from stages import STAGES, assert_covers_all_scripts

from utils.artifacts import RowFile, read_json


def values(path) -> dict:
    return {name: metric["value"] for name, metric in read_json(path)["metrics"].items()}


def check_sft(one, two):
    def rows(folder):
        return [row for row in RowFile(folder / "out/r/train_log.jsonl").read() if row["split"] == "train"]

    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["num_tokens"] == b["num_tokens"]
    single, shared = (values(folder / "out/r/train.json") for folder in (one, two))
    for key in ("heldout_ppl_base", "heldout_ppl_tuned"):
        assert single[key] == pytest.approx(shared[key], rel=1e-4)


def check_pairs(one, two):
    for name in ("samples.jsonl", "scores.jsonl", "train.jsonl", "test.jsonl"):
        assert (one / "out/p" / name).read_text() == (two / "out/p" / name).read_text(), name


def check_win_rate(one, two):
    summary = read_json(two / "out/r/win_rate.json")
    assert summary["run"]["world_size"] == 2 and summary["expected"]["agrees"]
    single, shared = (values(folder / "out/r/win_rate.json") for folder in (one, two))
    assert single == pytest.approx(shared, abs=1e-4, nan_ok=True)
    assert_shared(two / "out", 16, "win-rate")


def check_rewards(one, two):
    single, shared = (RowFile(folder / "out/r/heldout_rows.jsonl").read() for folder in (one, two))
    assert len(single) == 8
    for a, b in zip(single, shared, strict=True):
        keys = ("reward_chosen", "reward_rejected", "base_logp_chosen", "base_logp_rejected")
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], abs=1e-3)
    logs = [RowFile(folder / "out/r/train_log.jsonl").read() for folder in (one, two)]
    losses = [[row["loss"] for row in log if row["split"] == "train"] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def check_scorer(one, two):
    single, shared = (RowFile(folder / "out/r/reward_model_rows.jsonl").read() for folder in (one, two))
    assert len(single) == 8
    assert [row["margin"] for row in single] == pytest.approx([row["margin"] for row in shared], abs=1e-3)
    assert_shared(two / "out", 16, "judgements")


def check_battle(one, two):
    single, shared = (RowFile(folder / "out/r/battle_rows.jsonl").read() for folder in (one, two))
    assert len(single) == 8
    assert_shared(two / "out", 8, "answers-base", "answers-tuned")
    for a, b in zip(single, shared, strict=True):
        assert (a["answer_a"], a["answer_b"], a["consistent"]) == (b["answer_a"], b["answer_b"], b["consistent"])
        for x, y in zip(a["orders"], b["orders"], strict=True):
            assert x["probability"] == pytest.approx(y["probability"], abs=1e-4)


def check_perplexity(one, two):
    single, shared = (values(folder / "out/r/perplexity.json") for folder in (one, two))
    assert single == pytest.approx(shared, rel=1e-4, abs=1e-4)
    assert_shared(two / "out", 16, "perplexity")


def check_alpacaeval(one, two):
    single, shared = (values(folder / "out/r/alpacaeval/alpacaeval.json") for folder in (one, two))
    assert single == pytest.approx(shared, abs=1e-3)
    assert_shared(two / "out", 8, "answers-base", "answers-tuned")


TEXT = ("--text_file", ROOT / "data/README.md", "--window", 64, "--batch_tokens", 200)
# Flags after those of tests/stages.py; TRAINED and TINY stand for the shared inputs.
BATTLE = ("--judge", "hf:TINY", "--max_new_tokens", 6, "--temperature")
CASES = [
    # Dropout masks differ between one process and two.
    ("sft_train_instruction.py", ("--global_batch_size", 4, "--lora_dropout", 0), check_sft),
    ("train_reward_model.py", ("--global_batch_size", 4), check_rewards),
    ("generate_preference_pairs.py", ("--also_score", "random"), check_pairs),
    ("eval_reward_model.py", (), check_scorer),
    ("eval_win_rate.py", ("--expected", "TRAINED/out/r/train_log.jsonl", "--batch_size", 3), check_win_rate),
    ("eval_win_rate.py --battle", (*BATTLE, 0), check_battle),
    ("eval_win_rate.py --battle", (*BATTLE, 1.0), check_battle),
    ("eval_perplexity.py", TEXT, check_perplexity),
    ("run_alpacaeval_local.py", (), check_alpacaeval),
]
# Their code for several processes is that of DPO's training (test_distributed.py) and of the battle's judgements.
SLOW = {"train_reward_model.py", "eval_reward_model.py"}
ELSEWHERE = {
    "dpo_train_human_preference.py": "test_distributed.py, under accelerate's launcher",
    "run_lm_eval.sh": "tests/harness/test_run_lm_eval.py: lm_eval starts its own processes",
    "run_online_iteration.sh": "tests/pairs/test_sppo.py: it launches two scripts of this table",
    "run_sppo_iteration.sh": "it is run_online_iteration.sh",
    "human_eval.py": "no test: its answers come from the code that run_alpacaeval_local.py shares out",
    "merge_adapter.py": "no test: one process merges",
    "export_gguf.py": "no test: one process exports",
    "release.py": "no test: one process copies files",
    "chat.py": "no test: one person types",
    "report.py": "no test: one process reads files",
}


def test_every_script_has_an_entry():
    assert_covers_all_scripts([stage for stage, *_ in CASES], ELSEWHERE)


@pytest.mark.parametrize(
    ("stage", "flags", "check"),
    [
        pytest.param(s, f, c, id=f"{s} {f[-1] if f else ''}", marks=[pytest.mark.slow] if s in SLOW else [])
        for s, f, c in CASES
    ],
)
def test_two_processes_equal_one(stage, flags, check, inputs, tmp_path):
    flags = [str(f).replace("TINY", str(inputs.tiny)).replace("TRAINED", str(inputs.trained)) for f in flags]
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [[*STAGES[stage](inputs, folder), *flags] for folder in (one, two)]
    done = run_script(stage.split()[0], *arguments[0])
    assert done.returncode == 0, done.stderr[-3000:]
    two_processes(stage.split()[0], *arguments[1])
    check(one, two)
