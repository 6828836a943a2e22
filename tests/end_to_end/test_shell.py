"""Shell scripts: interpreter checks, installation failures, and reuse of an up-to-date environment."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["quickstart.sh", "run_tests.sh"]


def bash(command: str, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    env = {**os.environ, **env}
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("script", [*SCRIPTS, "run_sppo_iteration.sh", "run_lm_eval.sh", "utils/env.sh", ".ci/run"])
def test_scripts_parse(script):
    assert bash(f"bash -n {script}").returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_or_old_interpreter(script, tmp_path):
    done = bash(f"bash {script}", PYTHON="no-such-python")
    assert done.returncode == 2 and done.stderr.startswith("error: no interpreter 'no-such-python'")
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = bash(f"bash {script}", PYTHON=str(old))
    assert done.returncode == 2 and "Python 3.9.1" in done.stderr


def prepared(tmp_path, *files):
    """Call prepare_environment on a copy of the requirement files, where pip is a stub that installs nothing."""
    (tmp_path / "requirements").mkdir(exist_ok=True)
    for name in ("requirements.txt", "requirements/tests.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return bash(f"source {ROOT}/utils/env.sh; prepare_environment {' '.join(files)}", tmp_path, PYTHON=sys.executable)


def test_failed_install_names_its_log_and_is_repeated(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho no index; exit 1\n')
    python.chmod(0o755)
    done = prepared(tmp_path)
    assert done.returncode == 2 and "no index" in done.stderr and ".venv/install.log" in done.stderr
    assert not (tmp_path / ".venv/requirements.stamp").exists()


def test_prepared_environment_is_reused(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexit 0\n')
    python.chmod(0o755)
    assert "installing requirements.txt requirements/tests.txt" in prepared(tmp_path, "requirements/tests.txt").stdout
    for files in (("requirements/tests.txt",), ()):
        assert prepared(tmp_path, *files).stdout == "environment: .venv is up to date\n"
    (tmp_path / "requirements.txt").write_text("changed==1\n")
    done = bash(f"source {ROOT}/utils/env.sh; prepare_environment", tmp_path, PYTHON=sys.executable)
    assert "installing" in done.stdout


@pytest.mark.parametrize(
    ("env", "python"),
    [
        ({"PYTHON": "/opt/python"}, "/opt/python"),
        ({"VIRTUAL_ENV": "/opt/env"}, "python3"),
        ({"CONDA_PREFIX": "/opt/env"}, "python3"),
        ({}, ".venv/bin/python"),
    ],
)
def test_choose_python(tmp_path, env, python):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    env = {"PYTHON": "", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", **env}
    assert bash(f'source {ROOT}/utils/env.sh; choose_python; echo "$python"', tmp_path, **env).stdout == f"{python}\n"
