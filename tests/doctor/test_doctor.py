"""doctor.sh: every finding on a machine made to have the problem, and what --clean deletes."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_one_line, command
from filelock import FileLock

from preflab.doctor import checks, recipe
from preflab.doctor.checks import GIB, OK, PROBLEM, WARNING
from preflab.doctor.cleaning import leftovers
from utils.artifacts import TEMPORARY
from utils.errors import UserError


def states(findings) -> dict[str, str]:
    return {finding.topic: finding.state for finding in findings}


def doctor(*args, **env) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, **env}
    return subprocess.run(
        ["bash", str(ROOT / "doctor.sh"), *map(str, args)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_missing_and_other_versions_are_named(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy==0.0.1   # comment\nno-such-package==1.0\nPyYAML>=1\n")
    _, missing, other = checks.check_python(requirements)
    assert (missing.state, other.state) == (PROBLEM, WARNING)
    assert "no-such-package" in missing.text and "numpy" in other.text and "0.0.1" in other.text


def test_gpu_with_a_cpu_build_of_torch(tmp_path, monkeypatch):
    import torch

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA Test GPU, 575.00'\n")
    smi.chmod(0o755)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for build, words in ((None, "CPU build"), ("12.8", "CUDA 12.8")):
        monkeypatch.setattr(torch.version, "cuda", build)
        (finding,) = checks.check_gpu()
        assert finding.state == PROBLEM and "NVIDIA Test GPU" in finding.text and words in finding.text
    smi.unlink()
    monkeypatch.setattr(checks, "nvidia_gpus", lambda: [])
    (finding,) = checks.check_gpu()
    assert finding.state == WARNING


def test_quantisation_is_executed(monkeypatch):
    import bitsandbytes.nn
    import torch

    assert states(checks.check_quantisation()) == {"4 bits": OK}
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: torch.zeros(8, 64))
    assert states(checks.check_quantisation()) == {"4 bits": PROBLEM}


def test_memory_limit_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.machine.GROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{1 * GIB}\n")
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    finding, *_ = checks.check_memory()
    assert finding.state == PROBLEM and finding.text.startswith("1.0 of ")
    (tmp_path / "memory.max").write_text("max\n")
    finding, *_ = checks.check_memory()
    assert not finding.text.startswith("1.0 of ")


def test_disk_that_is_too_small_or_read_only(tmp_path, monkeypatch):
    folders = {"checkpoints": tmp_path / "new" / "checkpoints"}
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50 * GIB}))
    expected = {10 * GIB: OK, 45 * GIB: WARNING, 60 * GIB: PROBLEM}
    for needed, state in expected.items():
        (finding,) = checks.check_disk(folders, {"checkpoints": needed})
        assert finding.state == state and str(folders["checkpoints"]) in finding.text
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert states(checks.check_disk(folders, {})) == {"disk": PROBLEM}
    assert not folders["checkpoints"].parent.exists()


@pytest.mark.parametrize(
    ("content", "gpus", "state"),
    [
        ("num_processes: 8\nuse_cpu: false\n", 2, PROBLEM),
        ("num_processes: 16\nnum_machines: 2\n", 8, OK),
        ("num_processes: 2\nuse_cpu: true\n", 0, OK),
        ("num_processes: 2\nuse_cpu: true\n", 2, WARNING),
        ("- a list\n", 1, PROBLEM),
    ],
)
def test_accelerate_configuration_against_the_gpus(content, gpus, state, tmp_path, monkeypatch):
    import torch
    from accelerate.commands.config import config_args

    path = tmp_path / "default_config.yaml"
    path.write_text(content)
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert states(checks.check_accelerate()) == {"accelerate": state}


def test_disk_needs_of_a_recipe_by_hand(tiny):
    """Full training in bfloat16 of n parameters: 2 + 1 checkpoints of 2 + 8 bytes each, and the final weights."""
    from preflab.models.loading import load_model

    n = sum(p.numel() for p in load_model(str(tiny)).parameters())
    full = {"model_name_or_path": str(tiny), "dtype": "bfloat16", "save_total_limit": 2}
    assert recipe.needed_bytes(full)["checkpoints"] == 3 * n * 10 + 2 * n
    assert recipe.needed_bytes(full | {"save_strategy": "no"})["checkpoints"] == 2 * n
    lora = full | {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"]}
    assert 0 < recipe.needed_bytes(lora)["checkpoints"] < n
    # A local folder needs no room in the hub's cache, and the builtin model is not counted.
    assert recipe.needed_bytes(full)["models and data sets"] == 0
    assert recipe.needed_bytes({"model_name_or_path": "builtin:smollm2-135m-instruct"}) == {}


def test_repositories_of_a_recipe(tmp_path):
    content = {
        "model_name_or_path": "google/gemma-2b-it",
        "dataset_name": str(tmp_path),
        "start_adapter": "checkpoints/a/b",
        "datasets": [{"path": "owner/pairs"}],
    }
    assert recipe.repositories(content) == [("model", "google/gemma-2b-it"), ("dataset", "owner/pairs")]
    with pytest.raises(UserError, match="model_name_or_path"):
        recipe.read_recipe(str(ROOT / "configs" / "alpacaeval.yaml"))


def test_clean_deletes_caches_and_unused_locks_only(tmp_path):
    checkpoints, eval_out, cache = tmp_path / "checkpoints", tmp_path / "eval_out", tmp_path / "cache"
    for path in (eval_out / ".cache" / "reference-1" / "rows-0.jsonl", eval_out / "run" / "train.json",
                 checkpoints / "run" / "run.json", cache / "weights"):  # fmt: skip
        path.parent.mkdir(parents=True)
        path.write_text("x" * 5000)
    (checkpoints / ".ended.lock").touch()
    # The last one is deleted with its cache.
    for name, age in (("run/{}old", 7200), ("run/{}new", 0), (".cache/reference-1/{}identity", 7200)):
        half = eval_out / name.format(TEMPORARY)
        half.touch()
        os.utime(half, (time.time() - age,) * 2)
    places = ("--checkpoints", checkpoints, "--eval_out", eval_out)
    with FileLock(checkpoints / ".used.lock"):
        listed = doctor("--clean", *places, PREFERENCELAB_CACHE=str(cache))
        assert listed.returncode == 0 and "reference-1" in listed.stdout and ".ended.lock" in listed.stdout
        assert ".used.lock" not in listed.stdout and (cache / "weights").exists()
        assert listed.stdout.count("reference-1") == 1
        deleted = doctor("--clean", "--yes", *places, PREFERENCELAB_CACHE=str(cache))
        assert deleted.returncode == 0 and "10 KiB" in deleted.stdout
        assert not cache.exists() and not list((eval_out / ".cache").iterdir())
        remaining = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        # The newer half-written file may be another process's.
        assert remaining == {"train.json", "run.json", ".used.lock", f"{TEMPORARY}new"}
    # Its process has ended now.
    assert checkpoints / ".used.lock" in [item.path for item in leftovers(checkpoints, eval_out)]


def test_complete_report_of_this_machine(tmp_path):
    places = ("--checkpoints", tmp_path / "a", "--eval_out", tmp_path / "b")
    result = doctor("--offline", *places, "--config", "configs/quickstart.yaml")
    lines = result.stdout.splitlines()
    assert {line.split()[1] for line in lines if line.startswith(("ok", "warning", "problem"))} >= {
        "python", "packages", "memory", "disk", "recipe",
    }  # fmt: skip
    assert all(len(line) <= 100 for line in lines) and not list(tmp_path.iterdir())
    assert result.returncode == int("0 problems" not in lines[-1]) and result.stderr == ""


def test_bad_arguments_and_help():
    for args, words in (
        (("--config", "nope.yaml"), ("nope.yaml",)),
        (("--yes",), ("--yes", "--clean")),
        (("--frobnicate",), ("--frobnicate",)),
    ):
        result = doctor("--offline", *args)
        assert result.returncode == 2
        assert_one_line(result.stderr, *words)
    page = doctor("--help").stdout
    assert page.startswith("Check this machine") and "set -euo" not in page


def test_without_packages_it_says_how_to_install_them():
    """A fresh clone before the installation: the standard library has to be enough."""
    bare = command("-S", "-E", "-m", "preflab.doctor.run", "--offline")
    assert bare.returncode == 1 and "quickstart.sh" in bare.stdout and "Traceback" not in bare.stderr
