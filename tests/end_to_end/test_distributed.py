"""Two CPU processes, DDP and FSDP2 with LoRA: the single process's losses at the same global batch."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, made_once, train_args
from helpers import ACCELERATE, CPU
from processes import run_script, run_two_processes

from preflab.evaluation.runs import checkpoints, is_complete
from utils.artifacts import RowFile, read_json

SCRIPT = "dpo_train_human_preference.py"


def launch(config: Path, *args) -> subprocess.CompletedProcess:
    """Train under accelerate's launcher, which takes 13 s of CPU time more than `run_two_processes`."""
    command = [*ACCELERATE, "--config_file", str(config), SCRIPT, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


@pytest.fixture
def shipped_config(tmp_path):
    """A config of configs/accelerate, changed only to run on two CPU processes."""

    def make(name: str) -> Path:
        config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True}))
        return path

    return make


def rows(folder, split):
    return [r for r in RowFile(folder / "out/r/train_log.jsonl").read() if r["split"] == split]


@pytest.fixture(scope="session")
def single(tiny, prefs, tmp_path_factory):
    """The single-process run: global batch 4."""

    def make(folder):
        extra = ("--global_batch_size", 4, "--eval_strategy", "steps", "--eval_steps", 4)
        done = run_script(SCRIPT, *train_args(tiny, prefs, folder, *extra))
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "single", make)


# multi_gpu launches as cpu_2proc does.
@pytest.mark.parametrize("name", ["cpu_2proc", pytest.param("multi_gpu", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_equal_one(tiny, prefs, tmp_path, single, shipped_config, name):
    extra = ("--global_batch_size", 4, "--eval_strategy", "steps", "--eval_steps", 4)
    done = launch(shipped_config(name), *train_args(tiny, prefs, tmp_path, *extra))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_json(tmp_path / "out/r/train.json")
    assert summary["run"]["world_size"] == 2 and summary["plan"]["batch"]["processes"] == 2
    assert summary["plan"]["global_batch_size"] == 4
    for split in ("train", "eval"):
        for a, b in zip(rows(tmp_path, split), rows(single, split), strict=True):
            for key in ("loss", "rewards/margins", "logps/chosen", "num_tokens"):
                if split == "train" or key != "num_tokens":
                    assert a[key] == pytest.approx(b[key], abs=1e-4), (split, a["step"], key)
    alone = read_json(single / "out/r/train.json")
    for key in ("reward_accuracy", "reward_margin", "logps_chosen_tuned", "logps_chosen_base"):
        assert summary["metrics"][key]["value"] == pytest.approx(alone["metrics"][key]["value"], abs=1e-4), key
    assert (tmp_path / "ck/r/adapter_model.safetensors").exists()
    step0 = read_json(tmp_path / "out/r/preflight.json")["step0"]
    assert step0["largest_reward"] <= 1e-3
    assert ("first micro-batch" in step0["checked"]) == (name == "fsdp2")


def test_changed_global_batch_is_noted(tiny, prefs, tmp_path):
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, "--max_steps", 1))
    assert done.returncode == 0, done.stderr[-3000:]
    (note,) = read_json(tmp_path / "out/r/preflight.json")["notes"]
    assert note in done.stdout and {"8", "4"} <= set(re.findall(r"\d+", note))


def test_precomputed_reference_is_shared(tiny, prefs, tmp_path, single):
    args = train_args(tiny, prefs, tmp_path, "--global_batch_size", 4, "--precompute_ref_log_probs", "true")
    done = run_two_processes(SCRIPT, *args, "--sample_prompts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path, "train"), rows(single, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert (tmp_path / "out/r/samples.md").exists()


def test_error_is_printed_once(tiny, prefs, tmp_path):
    (tmp_path / "ck/r").mkdir(parents=True)
    (tmp_path / "ck/r/thesis.txt").write_text("mine")
    done = launch(CPU, *train_args(tiny, prefs, tmp_path))
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "run.json" in done.stderr


def test_indivisible_global_batch_is_refused(tiny, prefs, tmp_path):
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, "--global_batch_size", 3))
    assert done.returncode != 0 and "error: --global_batch_size 3:" in done.stderr


def test_ctrl_c_under_the_launcher(tiny, prefs, tmp_path):
    """The terminal sends Ctrl-C to launcher and processes, and the launcher forwards it to the processes again."""
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 40)
    command = [*ACCELERATE, "--config_file", str(CPU), SCRIPT, *args]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = RowFile(tmp_path / "out/r/train_log.jsonl")
    start = time.monotonic()
    while len(log.read()) < 3 and process.poll() is None and time.monotonic() - start < 120:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint), err[-2000:]
    done = run_two_processes(SCRIPT, *args)
    assert done.returncode == 0 and str(checkpoint) in done.stdout, done.stderr[-2000:]
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 41))
