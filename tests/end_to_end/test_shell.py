"""Shell scripts: interpreter checks, installation failures, and reuse of an up-to-date environment."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line
from stages import ITERATIONS

SCRIPTS = ["quickstart.sh", "run_tests.sh"]


def bash(command: str, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    env = {**os.environ, **env}
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        *ITERATIONS,
        "run_lm_eval.sh",
        "doctor.sh",
        "install_gguf.sh",
        "install_vllm.sh",
        "utils/env.sh",
        ".ci/run",
        *(f"configs/slurm/{name}" for name in ("slurm.sh", "train.sbatch", "sppo.sbatch", "eval.sbatch")),
    ],
)
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


def stub_python(path, script: str):
    """An interpreter that runs `python -c` as the real one, and `script` for everything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n{script}\n')
    path.chmod(0o755)
    return path


def prepared(tmp_path, *files, **env):
    """Call prepare_environment on a copy of the requirement files, where pip is a stub that installs nothing."""
    (tmp_path / "requirements").mkdir(exist_ok=True)
    for name in ("requirements.txt", "requirements/tests.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return bash(
        f"source {ROOT}/utils/env.sh; prepare_environment {' '.join(files)}",
        tmp_path,
        **{"PYTHON": sys.executable, **env},
    )


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("WARNING: Retrying after NewConnectionError", ("index cannot be reached", "HTTPS_PROXY", "docs/install.md")),
        ("ERROR: ... (from versions: none)", ("index cannot be reached", "PIP_INDEX_URL")),
        ("OSError: [Errno 28] No space left on device", ("the disk is full", "3 GB")),
        (
            "(from versions: 1.0)\nERROR: No matching distribution found for torch==9.9",
            ("no torch==9.9 for", "PYTHON="),
        ),
        ("something else", ("something else", "pip could not install")),
    ],
)
def test_failed_install_names_its_cause_and_is_repeated(output, words, tmp_path):
    stub_python(tmp_path / ".venv/bin/python", f'[ "$3" = --version ] && exit 0\nprintf "{output}\\n"; exit 1')
    done = prepared(tmp_path)
    assert done.returncode == 2 and all(word in done.stderr for word in (*words, ".venv/install.log")), done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / ".venv/requirements.stamp").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("Error: [Errno 28] No space left on device", "the disk is full"),
        ("Error: [Errno 13] Permission denied: '.venv'", "is not writable"),
    ],
)
def test_failed_venv_is_one_line_and_leaves_nothing(output, words, tmp_path):
    """Debian's python3 without its venv package creates .venv with an interpreter that has no pip, then fails."""
    half = 'mkdir -p .venv/bin; printf "#!/bin/sh\nexit 1\n" >.venv/bin/python; chmod +x .venv/bin/python'
    python = stub_python(tmp_path / "python3", f'{half}; echo "{output}"; exit 1')
    for _ in range(2):
        done = prepared(tmp_path, PYTHON=str(python))
        assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / ".venv").exists()


def test_prepared_environment_is_reused(tmp_path):
    stub_python(tmp_path / ".venv/bin/python", "exit 0")
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
        ({"CONDA_PREFIX": "/opt/conda"}, ".venv/bin/python"),
        ({}, ".venv/bin/python"),
    ],
)
def test_choose_python(tmp_path, env, python):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    env = {"PYTHON": "", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", **env}
    done = bash(f'source {ROOT}/utils/env.sh; choose_python; echo "$python"', tmp_path, **env)
    assert done.stdout == f"{python}\n"
    # The one choice that could surprise is reported.
    assert ("/opt/conda" in done.stderr) == ("CONDA_PREFIX" in env and env["CONDA_PREFIX"] == "/opt/conda"), done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A folder with run_tests.sh, and stubs of its requirements and its Python that prints its arguments."""
    for name in ("run_tests.sh", "utils/env.sh", "requirements.txt", "requirements/tests.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "ran: $*"\n')
    python.chmod(0o755)
    return tmp_path


def test_run_tests_arguments(checkout):
    def pytest_call(arguments: str) -> str:
        done = bash(f"bash run_tests.sh {arguments}", checkout, PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("ran: -m pytest"))

    # Without a path pytest runs `testpaths`; with one, nothing else may be named.
    assert pytest_call("tests/utils/test_cli.py -x").endswith("--durations=10 tests/utils/test_cli.py -x")
    assert pytest_call("").endswith("--durations=10") and pytest_call("--fast").endswith("-m not e2e")
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()
    done = bash("bash run_tests.sh --help", checkout, PYTHON="no-such-python")
    assert done.returncode == 0 and "--fast" in done.stdout and "ran:" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("1 --name", ("--name", "needs a value")),
        ("1 --nome=x", ("--nome=x", "--name, --configs")),
        ("1 extra", ("'extra'", "quote")),
        ("1 --name=quickstart-sppo --launch=nowhere.yaml", ("nowhere.yaml",)),
        ("1 --name=quickstart-sppo --configs=/nowhere", ("/nowhere/quickstart-sppo-iter1.yaml",)),
    ],
)
def test_sppo_arguments(arguments, words):
    done = bash(f"bash run_sppo_iteration.sh {arguments}", PYTHON="true")
    assert done.returncode == 2
    assert_one_line(done.stderr, *words)


@pytest.mark.parametrize(
    ("flags", "folders"),
    [
        ("", ""),
        ("--learning_rate 1e-4", ""),
        ("--eval_out 'my out' --output_dir=runs", " --eval_out my out --checkpoints runs"),
    ],
)
def test_quickstart_ends_with_the_report_of_its_folders(flags, folders, tmp_path):
    (tmp_path / "utils").mkdir()
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    # With an environment whose Python prints its arguments.
    functions = 'answer_help_and_version() { :; }\nprepare_environment() { python="echo"; }\n'
    (tmp_path / "utils/env.sh").write_text(functions)
    done = bash(f"bash {tmp_path}/quickstart.sh {flags}")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("-m utils.in_turn dpo_train_human_preference.py --config configs/quickstart.yaml")
    assert last.endswith(f"--then report.py{folders}")


def test_vllm_environment_is_installed_once(tmp_path):
    """With a venv and a pip that do nothing: the stamp is written last, and a second call does nothing."""
    for name in ("install_vllm.sh", "utils/env.sh", "requirements/vllm-env.txt", "requirements/vllm-env-cpu.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"

    def install(flag: str, pip: str) -> subprocess.CompletedProcess:
        # As `python -m venv FOLDER`, `python -m pip install ...`, and what reads a program from stdin.
        inner = f'#!/bin/sh\ncase "$*" in *pip*install*) echo "$*" >> {tmp_path}/pip; {pip};; esac\n'
        (tmp_path / "inner").write_text(inner)
        (tmp_path / "inner").chmod(0o755)
        stub_python(python, f'[ "$2" != venv ] || {{ mkdir -p "$3/bin" && cp {tmp_path}/inner "$3/bin/python"; }}')
        return bash(f"bash install_vllm.sh {flag}", cwd=tmp_path, PYTHON=str(python))

    stamp = tmp_path / ".vllm/requirements.stamp"
    broken = install("--cpu", 'echo "ERROR: No space left on device" >&2; exit 1')
    assert broken.returncode == 2 and "the disk is full" in broken.stderr and "Traceback" not in broken.stderr
    assert len(broken.stderr.splitlines()) == 1 and not stamp.exists()
    done = install("--cpu", "true")
    assert done.returncode == 0 and stamp.read_text().startswith("cpu "), done.stderr
    calls = (tmp_path / "pip").read_text()
    assert "requirements/vllm-env-cpu.txt" in calls and "vllm-env.txt" not in calls
    assert "up to date (cpu)" in install("--cpu", "exit 1").stdout
    # What preflab.models.vllm_environment.outdated compares.
    assert stamp.read_text().partition("\n")[2] == (ROOT / "requirements/vllm-env-cpu.txt").read_text()
    with (tmp_path / "requirements/vllm-env-cpu.txt").open("a") as file:
        file.write("another\n")
    assert "making it again" in install("--cpu", "true").stdout
    # The other build replaces it.
    assert install("--gpu", "true").returncode == 0 and stamp.read_text().startswith("gpu ")
    assert "-r requirements/vllm-env.txt" in (tmp_path / "pip").read_text()
