"""Drills: kill -9, a full disk, a read-only folder and stop signals at every kind of write of every stage.

After each fault the same command continues from what was finished; in the end its figures are those of a run without
faults. docs/reliability.md has the table of promises and the figures of the slow drills. More of training's (Ctrl-C
during a step, half-written checkpoints, changed data) is in tests/training/test_run_folder.py.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import assert_one_line, make_pairs, write_jsonl
from drills import Fault, moments, run_with, writes_of
from safetensors.numpy import load_file
from stages import STAGES, assert_covers_all_scripts, run_stage

from preflab.evaluation.runs import checkpoints, is_complete
from utils.artifacts import RowFile, read_json


def values(path) -> dict:
    return {name: metric["value"] for name, metric in read_json(path)["metrics"].items()}


def logged(folder) -> list[tuple]:
    path = folder / "out/r/train_log.jsonl"
    return [(row["split"], row["step"], row["loss"]) for row in RowFile(path).read() if row["split"] == "train"]


def check_training(broken, fresh):
    assert [row[:2] for row in logged(broken)] == [row[:2] for row in logged(fresh)]
    assert [row[2] for row in logged(broken)] == pytest.approx([row[2] for row in logged(fresh)], abs=1e-6)
    paths = (folder / "out/r/train.json" for folder in (broken, fresh))
    assert values(next(paths)) == pytest.approx(values(next(paths)), abs=1e-5, nan_ok=True)


def check_pairs(broken, fresh):
    for name in ("samples.jsonl", "train.jsonl", "test.jsonl"):
        assert (broken / "out/p" / name).read_text() == (fresh / "out/p" / name).read_text(), name


def check_metrics(name: str):
    def check(broken, fresh):
        before, after = (values(folder / "out/r" / name) for folder in (broken, fresh))
        assert before == pytest.approx(after, abs=1e-4, nan_ok=True)

    return check


def check_study(broken, fresh):
    """The candidates are equal, and the page is that of its key."""
    one, two = ((folder / "out/r/manual_eval_candidates.json").read_text() for folder in (broken, fresh))
    assert one == two
    key = read_json(broken / "out/r/human_eval_key.json")
    assert key["study"] in (broken / "out/r/human_eval.html").read_text()


def check_merge(broken, fresh):
    check_metrics("merge.json")(broken, fresh)
    one, two = (load_file(folder / "merged/model.safetensors") for folder in (broken, fresh))
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


EVERY_STEP = ("--max_steps", 6, "--save_steps", 1)
STEP_BY_STEP = ("--batch_size", 1)
MANY = ("--dataset_name", "MANY", *STEP_BY_STEP)
SHORT = ("--max_new_tokens", 6, *STEP_BY_STEP)
# Stage: further flags, and the comparison with a run without faults. MANY and TINY stand for shared inputs.
CASES = {
    "dpo_train_human_preference.py": (EVERY_STEP, check_training),
    "sft_train_instruction.py": (EVERY_STEP, check_training),
    "train_reward_model.py": (EVERY_STEP, check_training),
    "generate_preference_pairs.py": (STEP_BY_STEP, check_pairs),
    "merge_adapter.py": ((), check_merge),
    "eval_reward_model.py": (STEP_BY_STEP, check_metrics("reward_model.json")),
    "eval_win_rate.py": (MANY, check_metrics("win_rate.json")),
    "eval_win_rate.py --battle": (("--judge", "hf:TINY", *SHORT), check_metrics("battle.json")),
    "eval_perplexity.py": (MANY, check_metrics("perplexity.json")),
    "run_alpacaeval_local.py": (STEP_BY_STEP, check_metrics("alpacaeval/alpacaeval.json")),
    "human_eval.py": (("--sides_seed", 1, *SHORT), check_study),
}
ELSEWHERE = {
    "export_gguf.py": "tests/gguf/test_export.py, where llama.cpp is installed",
    "run_lm_eval.sh": "tests/harness/test_run_lm_eval.py: lm_eval has its own cache",
    "release.py": "tests/release/test_release.py: kill -9, full disk and Ctrl-C; a second push continues the first",
    "chat.py": "tests/chat/test_chat.py: kill -9 between votes; it has no summary to compare",
    "report.py": "no test: it reads files and has nothing to resume",
    "run_online_iteration.sh": "it calls two scripts of this table; its signals: tests/end_to_end/test_signals.py",
    "run_sppo_iteration.sh": "it is run_online_iteration.sh",
}
FULL, READ_ONLY, QUOTA = errno.ENOSPC, errno.EROFS, errno.EDQUOT
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


def test_every_script_has_an_entry():
    assert_covers_all_scripts(CASES, ELSEWHERE)


def arguments_of(stage: str, inputs, folder, tmp_path) -> list:
    """The arguments of a case's call with its output in `folder`."""
    many = str(write_jsonl(tmp_path / "many.jsonl", make_pairs(60, 200)))
    flags = [str(flag).replace("TINY", str(inputs.tiny)) if flag != "MANY" else many for flag in CASES[stage][0]]
    return [*STAGES[stage](inputs, folder), *flags]


@pytest.fixture
def drill(call, inputs, tmp_path):
    """drill(stage, faults): run the stage under one fault after the other, then without; returns what happened."""

    def drilling(stage: str, faults: list[tuple], per_kind: Counter) -> None:
        check = CASES[stage][1]
        broken, fresh = tmp_path / "broken", tmp_path / "fresh"
        for folder in (broken, fresh):
            folder.mkdir()
        arguments = {folder: arguments_of(stage, inputs, folder, tmp_path) for folder in (broken, fresh)}
        done = run_with(Fault(str(fresh)), stage, arguments[fresh])
        assert done.returncode == 0, done.stderr
        total = writes_of(fresh)
        for (kind, number), at in zip(faults, moments(total, len(faults), stage), strict=False):
            before = finished_work(broken)
            done = run_with(Fault(str(broken), at, kind, number), stage, arguments[broken])
            happened = assert_ended_well(done, kind, number)
            assert before <= finished_work(broken), "complete work is never lost"
            per_kind[happened] += 1
            if happened == "finished":
                # The fault's moment was after the end of this call, which had less left to do.
                check(broken, fresh)
                shutil.rmtree(broken)
                broken.mkdir()
        code, _, err = run_stage(call, stage, *arguments[broken])
        assert code == 0, err
        check(broken, fresh)
        per_kind["writes"] += total

    return drilling


def finished_work(folder: Path) -> set:
    """What an interruption must keep: cached items, and the newest complete checkpoint."""
    keys = {row["key"] for path in (folder / "out/.cache").glob("*/rows-*.jsonl") for row in RowFile(path).read()}
    steps = [int(path.name.split("-")[1]) for path in checkpoints(folder / "ck/r") if is_complete(path)]
    return keys | set(range(max(steps, default=0)))


def assert_ended_well(done, kind, number) -> str:
    """How a faulty call ended: its exit code and its message are those of its fault, without a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        return "finished"
    if kind == "kill":
        assert done.returncode == -signal.SIGKILL, done.stderr
        return "kill -9"
    if kind == "signal":
        assert done.returncode == STOPS[number], (done.returncode, done.stderr)
        return signal.Signals(number).name
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "full" in line or "permission" in line or "not writable" in line, line
    return os.strerror(kind)


# The others share their caches or their trainer with one of these, and are slow.
FAST = {"dpo_train_human_preference.py", "generate_preference_pairs.py", "merge_adapter.py", "eval_win_rate.py",
        "eval_win_rate.py --battle"}  # fmt: skip


@pytest.mark.parametrize("stage", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in CASES])
def test_killed_and_full_disk(stage, drill):
    happened = Counter()
    drill(stage, [("kill", 0), (FULL, 0)], happened)
    assert happened["kill -9"] == 1, happened


@pytest.mark.slow
@pytest.mark.parametrize("stage", CASES)
def test_many_faults(stage, drill):
    """The drill behind the figures of docs/reliability.md; they are printed as JSON lines (pytest -s)."""
    kinds = [("kill", 0), ("kill", 0), (FULL, 0), ("kill", 0), (READ_ONLY, 0), (QUOTA, 0)]
    kinds += [("signal", number) for number in STOPS]
    happened = Counter()
    drill(stage, kinds * 3, happened)
    print(json.dumps({"stage": stage, **happened}), file=sys.__stdout__, flush=True)
    assert happened["kill -9"] >= 3, happened


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
@pytest.mark.parametrize("stage", CASES)
def test_full_filesystem(stage, call, inputs, tmp_path):
    """A real one, which the C++ and Rust writers of tensors meet too: a third of the space that the stage needs."""
    fresh, broken = tmp_path / "fresh", tmp_path / "broken"
    code, _, err = run_stage(call, stage, *arguments_of(stage, inputs, fresh, tmp_path))
    assert code == 0, err
    broken.mkdir()
    needed = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={needed // 3}", "tmpfs", str(broken)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a filesystem")
    try:
        arguments = arguments_of(stage, inputs, broken, tmp_path)
        code, _, err = run_stage(call, stage, *arguments)
        assert code == 2, err
        assert_one_line(err, "disk is full")
        before = finished_work(broken)
        subprocess.run(["mount", "-o", f"remount,size={needed * 10}", str(broken)], check=True)
        code, _, err = run_stage(call, stage, *arguments)
        assert code == 0 and before <= finished_work(broken), err
        CASES[stage][1](broken, fresh)
    finally:
        subprocess.run(["umount", "-l", str(broken)], check=True)
