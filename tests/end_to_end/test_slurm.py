"""configs/slurm: the launch lines by a dry run, requeueing, and two nodes as processes of this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, train_args
from processes import run_script

from utils.artifacts import RowFile, read_json

# Starts the command once per node, each with its number, and passes signals on as Slurm's srun does.
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
children=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    children+=($!)
done
trap 'kill -USR1 "${children[@]}" 2>/dev/null' USR1
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM
code=0
for child in "${children[@]}"; do
    while :; do
        wait "$child"; last=$?
        kill -0 "$child" 2>/dev/null || break
    done
    [ "$last" -eq 0 ] || code=$last
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf '127.0.0.1\\nnode-2\\n' ;;
    *) echo "$@" >>"$CALLS" ;;
esac
"""
# Prints its arguments; with WAIT it runs until a signal, and ends with 1 as accelerate's launcher.
PYTHON = """#!/usr/bin/env bash
trap 'echo "got USR1" >>"$CALLS"; exit 1' USR1
echo "python $*"
[ -z "${WAIT:-}" ] || for _ in $(seq 100); do sleep 0.1; done
exit "${EXIT:-0}"
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder of stand-ins for Slurm's commands; the environment of a job on two nodes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fake-python", PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": "fake-python",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "70012",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
    }


def calls(env) -> list[str]:
    path = Path(env["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def sbatch(name: str, *args, env: dict) -> subprocess.CompletedProcess:
    # Slurm runs a copy of the script, in its own folder.
    script = shutil.copy(ROOT / "configs" / "slurm" / name, Path(env["CALLS"]).parent)
    return subprocess.run(["bash", script, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)


def test_training_on_two_nodes_launches_one_launcher_each(cluster):
    done = sbatch("train.sbatch", "dpo_train_human_preference.py", "--config", "a b.yaml", env=cluster)
    assert done.returncode == 0, done.stderr
    common = (
        "--config_file configs/accelerate/multi_gpu.yaml --num_machines 2 --num_processes 16"
        " --main_process_ip 127.0.0.1 --main_process_port 30012 dpo_train_human_preference.py --config a b.yaml"
    )
    expected = [f"python -m accelerate.commands.launch --machine_rank {rank} {common}" for rank in (0, 1)]
    assert sorted(done.stdout.splitlines()) == expected


def test_every_config_accepts_the_launch_line():
    from accelerate.commands.launch import launch_command_parser

    words = "--machine_rank 1 --num_machines 2 --num_processes 16 --main_process_ip h --main_process_port 1 s.py --x 1"
    for config in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        args = launch_command_parser().parse_args(["--config_file", str(config), *words.split()])
        assert (args.machine_rank, args.num_machines, args.num_processes) == (1, 2, 16)
        assert args.training_script_args == ["--x", "1"]


def test_sppo_iterations_in_order_until_one_fails(cluster, tmp_path):
    log = tmp_path / "bash-calls"
    # run_sppo_iteration.sh itself is tested in tests/pairs/test_sppo.py.
    (tmp_path / "tools" / "srun").write_text(f'#!/bin/sh\necho "$@" >>{log}\ncase "$4" in 2) exit 3 ;; esac\n')
    done = sbatch("sppo.sbatch", "gemma-2-9b-it-sppo", 3, "--pairs", "--n 2", env=cluster)
    assert done.returncode == 3 and calls(cluster) == []
    line = "--kill-on-bad-exit=1 bash run_sppo_iteration.sh {} --name gemma-2-9b-it-sppo --launch {} --pairs --n 2"
    config = "configs/accelerate/multi_gpu.yaml"
    assert log.read_text().splitlines() == [line.format(1, config), line.format(2, config)]


def test_evaluations_one_line_per_task(cluster, tmp_path):
    commands = tmp_path / "evaluations.txt"
    commands.write_text("# all\neval_win_rate.py --run_name 'a b'\n\neval_perplexity.py\n")
    cluster |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "1"}
    assert sbatch("eval.sbatch", commands, env=cluster).stdout == "python eval_win_rate.py --run_name a b\n"
    cluster["SLURM_ARRAY_TASK_ID"] = "2"
    assert sbatch("eval.sbatch", commands, env=cluster).stdout == "python eval_perplexity.py\n"
    cluster["SLURM_ARRAY_TASK_ID"] = "3"
    done = sbatch("eval.sbatch", commands, env=cluster)
    assert done.returncode == 2 and "no command 3" in done.stderr


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("train.sbatch", [], "no command"),
        ("sppo.sbatch", ["x"], "no recipe"),
        ("sppo.sbatch", ["x", "0"], "must be above 0"),
        ("eval.sbatch", ["nothing.txt"], "no file of commands"),
    ],
)
def test_wrong_arguments_end_the_job(cluster, name, args, message):
    done = sbatch(name, *args, env=cluster)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert calls(cluster) == []


def start(name: str, *args, env: dict) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", ROOT / "configs" / "slurm" / name, *map(str, args)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(("restarts", "requeued"), [("3", True), ("20", False)])
def test_a_signal_is_passed_on_and_requeues(cluster, restarts, requeued):
    job = start("train.sbatch", "x.py", env={**cluster, "WAIT": "1", "SLURM_RESTART_COUNT": restarts})
    lines = [job.stdout.readline(), job.stdout.readline()]
    assert all(line.startswith("python") for line in lines)
    job.send_signal(signal.SIGUSR1)
    rest, _ = job.communicate(timeout=30)
    assert calls(cluster).count("got USR1") == 2
    assert (calls(cluster)[-1] == "requeue 70012") == requeued
    assert job.returncode == (0 if requeued else 1) and "SIGUSR1" in rest


def test_an_error_is_not_requeued(cluster):
    done = sbatch("train.sbatch", "x.py", env={**cluster, "EXIT": "1"})
    assert done.returncode == 1 and calls(cluster) == []


@pytest.mark.slow
def test_two_nodes_stopped_and_requeued_equal_one_process(tiny, prefs, tmp_path, cluster):
    """The sbatch file itself: two launchers on loopback (gloo), SIGUSR1, the requeued job continues."""
    extra = ("--global_batch_size", 4, "--max_steps", 24, "--lora_dropout", 0, "--learning_rate", 1e-3)
    done = run_script("dpo_train_human_preference.py", *train_args(tiny, prefs, tmp_path / "one", *extra))
    assert done.returncode == 0, done.stderr
    config = tmp_path / "nodes.yaml"
    shipped = yaml.safe_load((ROOT / "configs/accelerate/cpu_2proc.yaml").read_text())
    config.write_text(yaml.safe_dump({**shipped, "num_machines": 2, "num_processes": 1}))
    port = 20000 + os.getpid() % 20000
    env = {
        **cluster, "PYTHON": sys.executable, "GPUS_PER_NODE": "1", "ACCELERATE_CONFIG": str(config),
        "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": str(port - 20000),
    }  # fmt: skip
    args = ["dpo_train_human_preference.py", *train_args(tiny, prefs, tmp_path / "two", *extra)]
    log = tmp_path / "two/out/r/train_log.jsonl"
    first = start("train.sbatch", *args, env=env)
    deadline = time.monotonic() + 600
    while not log.exists() or not log.read_text().strip():
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 0 and calls(env)[-1].startswith("requeue"), output
    second = sbatch("train.sbatch", *args, env={**env, "SLURM_RESTART_COUNT": "1"})
    assert second.returncode == 0, second.stderr
    assert "resuming from" in second.stdout
    one, two = (RowFile(tmp_path / name / "out/r/train_log.jsonl").read() for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert read_json(tmp_path / "two/out/r/train.json")["run"]["world_size"] == 2
