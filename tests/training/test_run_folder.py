"""Killed and interrupted runs, full disks: no complete file is lost; a resumed run equals the uninterrupted one."""

import functools
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, interrupted_at, train_args
from processes import Script, run_script

from preflab.evaluation.runs import checkpoints, is_complete
from preflab.models.loading import _version
from preflab.training.run_folder import (
    Launch,
    RunFolders,
    checkpoint_to_resume,
    claim_run,
    launch_of,
    write_manifest,
)
from utils.artifacts import TEMPORARY, RowFile, atomic_write, read_json, write_json
from utils.errors import UserError

SCRIPT = "dpo_train_human_preference.py"


def log_rows(folder: Path) -> list[dict]:
    return RowFile(folder / "out" / "r" / "train_log.jsonl").read()


def run_args(model, prefs, folder, *extra):
    # Eight steps, a checkpoint and an evaluation at every second.
    every = ("--max_steps", 8, "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 4)
    return train_args(model, prefs, folder, *every, *extra)


@pytest.fixture(scope="module")
def uninterrupted(tiny, prefs, tmp_path_factory):
    """Rows and summary of the run without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_script(SCRIPT, *run_args(tiny, prefs, folder))
    assert done.returncode == 0, done.stderr
    return log_rows(folder), read_json(folder / "out/r/train.json")


def assert_same_run(folder: Path, uninterrupted) -> None:
    rows, summary = uninterrupted
    resumed_rows, resumed = log_rows(folder), read_json(folder / "out/r/train.json")
    assert [(r["split"], r["step"]) for r in resumed_rows] == [(r["split"], r["step"]) for r in rows]
    for a, b in zip(resumed_rows, rows, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm", "learning_rate"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6), (a["step"], key)
        assert a["num_tokens"] == b["num_tokens"]
    for name, figure in summary["metrics"].items():
        assert resumed["metrics"][name]["value"] == pytest.approx(figure["value"], abs=1e-6), name
    assert resumed["training"]["num_tokens"] == summary["training"]["num_tokens"]


def kill_when(args, condition, number=signal.SIGKILL, timeout=120):
    """Start the script, send the signal as soon as `condition()` holds, and return (code, stdout, stderr)."""
    process = Script(SCRIPT, *args)
    start = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - start < timeout:
        time.sleep(0.002)
    process.send_signal(number)
    done = process.result(timeout)
    return done.returncode, done.stdout, done.stderr


# The other moments are among those that test_drills.py draws at random.
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("between_saves", marks=pytest.mark.slow),
        "during_a_save",
        pytest.param("before_the_first_save", marks=pytest.mark.slow),
    ],
)
def test_kill_9_and_resume(tiny, prefs, tmp_path, uninterrupted, moment):
    ck = tmp_path / "ck" / "r"
    condition = {
        "between_saves": lambda: len(log_rows(tmp_path)) >= 5,
        "during_a_save": lambda: (ck / "checkpoint-4").exists() and not is_complete(ck / "checkpoint-4"),
        "before_the_first_save": lambda: len(log_rows(tmp_path)) >= 1,
    }[moment]
    args = run_args(tiny, prefs, tmp_path)
    code, _, _ = kill_when(args, condition)
    assert code == -signal.SIGKILL and not (tmp_path / "out/r/train.json").exists()
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0, done.stderr
    if moment == "during_a_save":
        assert "checkpoint-4" in done.stderr
    if moment != "before_the_first_save":
        assert re.search(r"resum.*checkpoint-", done.stdout)
    assert_same_run(tmp_path, uninterrupted)


def test_kill_9_after_last_step(tiny, prefs, tmp_path, uninterrupted):
    args = run_args(tiny, prefs, tmp_path)
    code, _, _ = kill_when(args, lambda: is_complete(tmp_path / "ck/r/checkpoint-8"))
    assert code == -signal.SIGKILL
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0 and "checkpoint-8" in done.stdout, done.stderr
    assert_same_run(tmp_path, uninterrupted)


def test_ctrl_c_saves_a_checkpoint(tiny, prefs, tmp_path, uninterrupted):
    args = run_args(tiny, prefs, tmp_path, "--save_steps", 100)
    code, out, err = kill_when(args, lambda: len(log_rows(tmp_path)) >= 3, signal.SIGINT)
    assert code == 130 and "--overwrite" in out and "Traceback" not in err, err
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint)
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0 and str(checkpoint) in done.stdout, done.stderr
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_new_checkpoint_survives_a_clock_that_was_set_back(train, tiny, prefs, tmp_path):
    args = run_args(tiny, prefs, tmp_path, "--save_total_limit", 1)
    with interrupted_at(5):
        assert train(*args)[0] == 130
    earlier = tmp_path / "ck/r/checkpoint-4"
    tomorrow = time.time() + 86400
    os.utime(earlier, (tomorrow, tomorrow))
    code, _, err = train(*args)
    assert code == 0, err
    assert checkpoints(tmp_path / "ck/r") == [tmp_path / "ck/r/checkpoint-8"]


def test_resume_from_named_checkpoint(train, tiny, prefs, tmp_path):
    args = run_args(tiny, prefs, tmp_path, "--save_total_limit", 5)
    code, _, _ = kill_when(args, lambda: is_complete(tmp_path / "ck/r/checkpoint-4"))
    named = tmp_path / "ck/r/checkpoint-2"
    code, out, err = train(*args, "--resume", named)
    assert code == 0 and str(named) in out, err
    assert [r["step"] for r in log_rows(tmp_path) if r["split"] == "train"] == list(range(1, 9))


def test_resume_refuses_bad_path_and_changed_data(train, tiny, prefs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(prefs, data)
    args = run_args(tiny, data, tmp_path)
    kill_when(args, lambda: is_complete(tmp_path / "ck/r/checkpoint-2"))
    code, _, err = train(*args, "--resume", tmp_path / "nowhere")
    assert code == 2
    assert_one_line(err, "--resume", "nowhere")
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[:-1]))
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "data", "--run_name")


@pytest.mark.parametrize(
    ("name", "words"),
    [("template.jinja", "template"), pytest.param("config.json", "configuration", marks=pytest.mark.slow)],
)
def test_resume_refuses_a_changed_model_or_template(name, words, train, tiny, smol_tokenizer, prefs, tmp_path):
    model, template = tmp_path / "model", tmp_path / "model/template.jinja"
    shutil.copytree(tiny, model)
    template.write_text(smol_tokenizer.chat_template)
    args = run_args(model, prefs, tmp_path, "--chat_template_path", template)
    with interrupted_at(3):
        assert train(*args)[0] == 130
    (model / name).write_text((model / name).read_text() + "\n")
    # The hashes of a folder are computed once per process, and this is another one.
    _version.cache_clear()
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, words, "--run_name")


def test_file_size_limit(tiny, prefs, tmp_path):
    """Under a file-size limit the optimizer state cannot be written: one error line, earlier files are kept."""
    # The optimizer state has 456 KiB, the next largest file of a checkpoint 261.
    small_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (350 * 1024, 350 * 1024))
    args = run_args(tiny, prefs, tmp_path, "--lora_r", 256)
    done = run_script(SCRIPT, *args, before=small_files)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert_one_line(done.stderr, "disk", "--output_dir")
    assert (tmp_path / "out/r/preflight.json").exists() and log_rows(tmp_path)
    assert not any(is_complete(c) for c in checkpoints(tmp_path / "ck/r"))
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_full_filesystem(tiny, prefs, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a filesystem")
    try:
        args = run_args(tiny, prefs, tmp_path, "--lora_r", 256, "--output_dir", mount)
        done = run_script(SCRIPT, *args)
        assert done.returncode == 2, done.stderr
        assert_one_line(done.stderr, "disk")
        assert log_rows(tmp_path)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_out_of_memory_names_flags(tiny, prefs, tmp_path):
    code = (
        "import sys; from utils.errors import run; import preflab.training.dpo_trainer as t; import torch\n"
        "t.ResumableDPOTrainer.train = lambda self, **k: torch.empty(1 << 50)\n"
        "import dpo_train_human_preference as s; run(s.main, s.OUT_OF_MEMORY)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *run_args(tiny, prefs, tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, "out of memory", "--per_device_train_batch_size", "--max_length")


ZERO2, ZERO3 = "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"


@pytest.mark.parametrize(
    ("saved", "now", "reads", "converts"),
    [
        ((None, 1), (None, 4), True, False),
        (("FSDP", 8), ("FSDP", 4), True, False),
        (("FSDP", 2), (None, 2), False, False),
        ((None, 2), (ZERO3, 2), False, False),
        ((ZERO3, 2), (ZERO3, 2), True, False),
        ((ZERO3, 8), (ZERO3, 4), True, True),
        ((ZERO3, 2), (ZERO2, 2), False, False),
        ((ZERO2, 2), (ZERO2, 2), True, False),
        ((ZERO2, 2), (ZERO2, 1), False, False),
    ],
)
def test_checkpoint_under_another_launch(tmp_path, saved, now, reads, converts):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    write_json(folder / "trainer_state.json", {"global_step": 2})
    write_manifest(folder, step=2, sharding=saved[0], processes=saved[1])
    saved, now, run = Launch(*saved), Launch(*now), RunFolders("r", tmp_path, tmp_path)
    assert launch_of(folder) == saved and now.converts(saved) == converts
    if reads:
        assert checkpoint_to_resume(run, "auto", now) == folder
    else:
        with pytest.raises(UserError, match=f"{saved}, and this call has {now}"):
            checkpoint_to_resume(run, "auto", now)
    # Earlier versions did not record it.
    write_manifest(folder, step=2)
    assert launch_of(folder) is None and checkpoint_to_resume(run, "auto", now) == folder


def test_incomplete_checkpoints_are_skipped(tmp_path, capsys):
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x" * step)
        write_json(folder / "trainer_state.json", {"global_step": step})
        if step < 6:
            write_manifest(folder, step=step)
    (tmp_path / "checkpoint-4" / "weights").write_text("x")
    run = RunFolders("r", tmp_path, tmp_path)
    assert checkpoint_to_resume(run, "auto") == tmp_path / "checkpoint-2"
    err = capsys.readouterr().err
    assert "checkpoint-6" in err and "checkpoint-4" in err and "checkpoint-2" not in err
    assert checkpoint_to_resume(run, "never") is None


def test_atomic_write(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan"), "y": 1})
    assert json.loads(path.read_text()) == {"x": None, "y": 1}

    def fails(p):
        p.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic_write(path, fails)
    assert json.loads(path.read_text())["y"] == 1 and list(tmp_path.iterdir()) == [path]


def test_row_file_drops_truncated_line(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    for i in range(3):
        rows.append({"i": i})
    with rows.path.open("a") as f:
        f.write('{"i": 3')
    assert [r["i"] for r in rows.read()] == [0, 1, 2]
    rows.keep(lambda r: r["i"] < 2)
    assert rows.path.read_text() == '{"i": 0}\n{"i": 1}\n'


def test_row_file_line_separators(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    for text in ("a\u2028b", "c\nd\x85e"):
        rows.append({"text": text})
    with rows.path.open("a") as f:
        f.write('{"text": "cut')
    rows.append({"text": "next"})
    assert [r["text"] for r in rows.read()] == ["a\u2028b", "c\nd\x85e", "next"]


def claim_here(tmp_path, beta=0.1, resume="auto", overwrite=False):
    run = claim_run("r", str(tmp_path / "ck"), str(tmp_path / "out"), {"beta": beta, "batch": 4}, resume, overwrite)
    run.lock.release()
    return run


def test_failed_first_try_does_not_claim_name(tmp_path):
    """A failed first try does not own the name, so another flag, the fix that its error names, works."""
    claim_here(tmp_path)
    run = claim_here(tmp_path, beta=0.2)
    RowFile(run.results / "train_log.jsonl").append({"step": 1})
    with pytest.raises(UserError, match="beta 0.2 -> 0.3"):
        claim_here(tmp_path, beta=0.3)
    assert claim_here(tmp_path, beta=0.2).weights == run.weights


def test_half_written_first_file_does_not_block(tmp_path):
    """kill -9 during the first write leaves its temporary file alone in the run's folder."""
    folder = tmp_path / "ck/r"
    folder.mkdir(parents=True)
    (folder / f"{TEMPORARY}run-x1.json").write_text("{")
    assert claim_here(tmp_path).weights == folder
    (folder / "run.json").unlink()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="ck/r"):
        claim_here(tmp_path)


def test_kill_while_a_folder_is_deleted(tmp_path, monkeypatch):
    """--overwrite that is killed at any file leaves folders that the same command takes up again."""
    names = ["a.bin", "run.json", "z.bin", "checkpoint-2/weights"]
    for deleted in range(8):
        run = claim_here(tmp_path)
        for folder, extra in ((run.weights, names), (run.results, ["a.png", "train_log.jsonl", "z.png"])):
            for name in extra:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("{}" if name != "run.json" else (folder / name).read_text())
        left, usual = [deleted], os.unlink

        def unlink(*args, left=left, usual=usual, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            usual(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            with suppress(KeyboardInterrupt):
                claim_here(tmp_path, overwrite=True)
        gc.collect()
        claim_here(tmp_path, overwrite=True)


def test_results_without_weights(tmp_path):
    """Only the same run may replace results whose weights are missing."""
    write_json(tmp_path / "out/r/train.json", {"args": {"beta": 0.1}})
    with pytest.raises(UserError, match="beta 0.1 -> 0.2"):
        claim_here(tmp_path, beta=0.2)
    assert not claim_here(tmp_path).finished and not (tmp_path / "out/r/train.json").exists()


def test_overwrite_keeps_foreign_files(tmp_path):
    (tmp_path / "out/r").mkdir(parents=True)
    (tmp_path / "out/r/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="out/r"):
        claim_here(tmp_path, overwrite=True)
    assert (tmp_path / "out/r/thesis.txt").exists()
    with pytest.raises(UserError, match="--overwrite"):
        claim_here(tmp_path, resume=str(tmp_path / "ck/r/checkpoint-4"), overwrite=True)


def test_run_is_locked(tmp_path):
    run = claim_run("r", str(tmp_path / "ck"), str(tmp_path / "out"), {"batch": 4}, "auto", False)
    code = (
        "from preflab.training.run_folder import claim_run; import sys; from utils.errors import run\n"
        "run(lambda: claim_run('r', sys.argv[1], sys.argv[2], {'batch': 4}, 'auto', False))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ck"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_line(done.stderr, f"process {os.getpid()} on", "--run_name")
    run.lock.release()
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_checkpoint_of_another_run_is_refused(tmp_path):
    other = tmp_path / "other" / "checkpoint-2"
    other.mkdir(parents=True)
    write_manifest(other, step=2)
    with pytest.raises(UserError, match="checkpoint-2"):
        checkpoint_to_resume(RunFolders("r", tmp_path / "r", tmp_path), str(other))


def test_batch_split_may_change_on_resume(train, tiny, prefs, tmp_path):
    args = run_args(tiny, prefs, tmp_path)
    kill_when(args, lambda: is_complete(tmp_path / "ck/r/checkpoint-4"))
    smaller = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4)
    code, out, err = train(*args, *smaller, "--per_device_eval_batch_size", 1, "--gradient_checkpointing", "true")
    assert code == 0 and "checkpoint-4" in out, err
    assert [r["step"] for r in log_rows(tmp_path) if r["split"] == "train"] == list(range(1, 9))


def test_nan_loss_stops_run(train, tiny, prefs, tmp_path):
    code, _, err = train(*run_args(tiny, prefs, tmp_path, "--learning_rate", "1e38"))
    assert code == 2
    assert_one_line(err, "loss at step", "--learning_rate")
