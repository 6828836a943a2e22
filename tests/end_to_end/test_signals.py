"""SIGTERM and SIGUSR1, as clusters send them: training saves a checkpoint; scripts end with a code to requeue on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, eval_args, make_pairs, train_args, write_jsonl
from drills import Fault
from helpers import ACCELERATE, CPU
from processes import Script, run_script

from preflab.evaluation.runs import checkpoints, is_complete
from utils.artifacts import RowFile, read_json

SCRIPT = "dpo_train_human_preference.py"
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138}


def log_rows(folder: Path) -> list[dict]:
    return [row for row in RowFile(folder / "out/r/train_log.jsonl").read() if row["split"] == "train"]


def wait_for_step(folder: Path, step: int, poll) -> None:
    start = time.monotonic()
    while len(log_rows(folder)) < step and poll() is None and time.monotonic() - start < 120:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_training_saves_and_exits(number, tiny, prefs, tmp_path):
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 40)
    process = Script(SCRIPT, *args)
    wait_for_step(tmp_path, 3, process.poll)
    process.send_signal(number)
    done = process.result()
    assert done.returncode == CODES[number] and "Traceback" not in done.stderr, done.stderr
    assert signal.Signals(number).name in done.stderr and "same command" in done.stdout
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint) and int(checkpoint.name.split("-")[1]) == log_rows(tmp_path)[-1]["step"]
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0 and str(checkpoint) in done.stdout, done.stderr
    assert [row["step"] for row in log_rows(tmp_path)] == list(range(1, 41))


def test_signal_during_the_reference_pass(tiny, prefs, tmp_path):
    """Before the first step there is nothing to save but the reference's cache."""
    args = train_args(tiny, prefs, tmp_path)
    fault = Fault(str(tmp_path), 3, "signal", signal.SIGTERM, only="rows-0.jsonl")
    done = Script(SCRIPT, *args, before=fault).result()
    assert done.returncode == 143, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "SIGTERM" in line]
    assert "same command" in line and "Traceback" not in done.stderr
    cached = [
        row for path in (tmp_path / "out/.cache").glob("reference-*/rows-*.jsonl") for row in RowFile(path).read()
    ]
    assert cached and not (tmp_path / "ck/r").exists()
    done = run_script(SCRIPT, *args)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out/r/train.json")["training"]["reference"]["read"] >= len(cached)


@pytest.mark.slow
def test_signal_of_one_rank_stops_all_at_the_same_step(tiny, prefs, tmp_path):
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [Script(SCRIPT, *args, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    wait_for_step(tmp_path, 3, ranks[0].poll)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.result().returncode for rank in ranks] == [138, 138]
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint) and (checkpoint / "rng_state_1.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_of_the_launcher(number, tiny, prefs, tmp_path):
    """accelerate's launcher gets it alone and passes it on; its own exit code is 1 whatever the processes return."""
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 60)
    handled = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
    command = [*ACCELERATE, "--config_file", str(CPU), SCRIPT, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **handled}, start_new_session=True, **pipes)
    wait_for_step(tmp_path, 3, process.poll)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and signal.Signals(number).name in err, err[-2000:]
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint), err[-2000:]


def test_two_evaluations_of_one_run(trained, tmp_path):
    """The second one names the process that works; a lock that kill -9 left does not block the third."""
    many = write_jsonl(tmp_path / "many.jsonl", make_pairs(400, 200))
    args = eval_args(trained, tmp_path / "out", "--dataset_name", many, "--batch_size", 1)
    first = Script("eval_win_rate.py", *args)
    lock, start = tmp_path / "out/r/.win_rate.lock", time.monotonic()
    while not (lock.exists() and lock.read_text()) and first.poll() is None and time.monotonic() - start < 60:
        time.sleep(0.01)
    second = run_script("eval_win_rate.py", *args)
    assert first.poll() is None
    assert second.returncode == 2 and f"process {first.process.pid} on" in second.stderr, second.stderr
    first.send_signal(signal.SIGKILL)
    first.result()
    assert lock.exists()
    third = run_script("eval_win_rate.py", *eval_args(trained, tmp_path / "out"))
    assert third.returncode == 0 and not lock.exists(), third.stderr


@pytest.mark.parametrize("number", [*CODES, signal.SIGINT])
def test_shell_script_passes_signals_on(number, tmp_path):
    """bash alone would end without its command, which would then train on, or ignore Ctrl-C."""
    python = tmp_path / "python"
    code = (
        "import pathlib, sys, time\nfrom utils.errors import run\n"
        f"def main():\n  pathlib.Path({str(tmp_path)!r}, 'ready').touch(); time.sleep(60)\nrun(main)"
    )
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nexec({code!r})\n")
    python.chmod(0o755)
    command = ["bash", "run_sppo_iteration.sh", "1", "--name", "quickstart-sppo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts background commands, such as a test run, with SIGINT ignored, and children inherit that.
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHON": str(python)}, **pipes, **default)
    start = time.monotonic()
    while not (tmp_path / "ready").exists() and time.monotonic() - start < 60:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and len(err.strip().splitlines()) == 1, err
    # The second command was not started.
    assert out.count("+ ") == 1 and "generate_preference_pairs.py" in out
