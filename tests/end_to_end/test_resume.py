"""kill -9 of every stage: the same command continues from what was finished and gives the uninterrupted figures.

More of training's (Ctrl-C, half-written checkpoints, changed data) is in tests/training/test_run_folder.py.
"""

import time

import pytest
from conftest import make_pairs, write_jsonl
from processes import Script
from stages import STAGES, assert_covers_all_scripts, run_stage

from utils.artifacts import RowFile, read_json


def cached_rows(folder, kind: str) -> int:
    """Rows of one kind in the caches below eval_out."""
    return sum(len(RowFile(path).read()) for path in (folder / "out/.cache").glob(f"{kind}-*/rows-0.jsonl"))


def values(path) -> dict:
    return {name: metric["value"] for name, metric in read_json(path)["metrics"].items()}


def logged(folder) -> list[tuple]:
    path = folder / "out/r/train_log.jsonl"
    rows = RowFile(path).read() if path.exists() else []
    return [(row["split"], row["step"], row["loss"]) for row in rows if row["split"] == "train"]


def check_training(killed, fresh):
    assert [row[:2] for row in logged(killed)] == [row[:2] for row in logged(fresh)]
    assert [row[2] for row in logged(killed)] == pytest.approx([row[2] for row in logged(fresh)], abs=1e-6)
    paths = (folder / "out/r/train.json" for folder in (killed, fresh))
    assert values(next(paths)) == pytest.approx(values(next(paths)), abs=1e-5, nan_ok=True)


def check_pairs(killed, fresh):
    for name in ("samples.jsonl", "train.jsonl", "test.jsonl"):
        assert (killed / "out/p" / name).read_text() == (fresh / "out/p" / name).read_text(), name


def check_metrics(name: str):
    def check(killed, fresh):
        before, after = (values(folder / "out/r" / name) for folder in (killed, fresh))
        assert before == pytest.approx(after, abs=1e-4, nan_ok=True)

    return check


EVERY_STEP = ("--max_steps", 6, "--save_steps", 1)
STEP_BY_STEP = ("--batch_size", 1)
MANY = ("--dataset_name", "MANY", *STEP_BY_STEP)
# Stage: further flags, the number of finished items (to kill after 3 of them), and the comparison with a fresh run.
CASES = {
    "dpo_train_human_preference.py": (EVERY_STEP, lambda f: len(logged(f)), check_training),
    "sft_train_instruction.py": (EVERY_STEP, lambda f: len(logged(f)), check_training),
    "generate_preference_pairs.py": (STEP_BY_STEP, lambda f: cached_rows(f, "answers"), check_pairs),
    "eval_win_rate.py": (MANY, lambda f: cached_rows(f, "win-rate"), check_metrics("win_rate.json")),
    "eval_perplexity.py": (MANY, lambda f: cached_rows(f, "perplexity"), check_metrics("perplexity.json")),
    "run_alpacaeval_local.py": (
        STEP_BY_STEP,
        lambda f: cached_rows(f, "answers"),
        check_metrics("alpacaeval/alpacaeval.json"),
    ),
}
ELSEWHERE = {
    "run_lm_eval.sh": "tests/harness/test_run_lm_eval.py: lm_eval has its own cache",
    "run_sppo_iteration.sh": "it calls two scripts of this table",
    "human_eval.py": "no test: its answers come from the code and cache of run_alpacaeval_local.py",
    "merge_adapter.py": "no test: it writes its folder under another name until it is complete",
}


def test_every_script_has_an_entry():
    assert_covers_all_scripts(CASES, ELSEWHERE)


@pytest.mark.parametrize("stage", CASES)
def test_killed_stage_resumes(stage, call, inputs, tmp_path):
    flags, finished, check = CASES[stage]
    flags = [str(write_jsonl(tmp_path / "many.jsonl", make_pairs(60, 200))) if f == "MANY" else f for f in flags]
    killed, fresh = tmp_path / "killed", tmp_path / "fresh"
    process = Script(stage, *STAGES[stage](inputs, killed), *flags)
    deadline = time.monotonic() + 240
    while finished(killed) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(9)
    assert process.result().returncode == -9, "killed before its end"
    assert finished(killed) >= 3
    for folder in (killed, fresh):
        code, _, err = run_stage(call, stage, *STAGES[stage](inputs, folder), *flags)
        assert code == 0, err
    check(killed, fresh)
