"""run_lm_eval.sh on tiny models and the quick suite: its figures equal those of a direct lm_eval call."""

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, command, made_once

from utils.artifacts import read_json

SCRIPT = ROOT / "run_lm_eval.sh"
TASKS = "quick_facts,quick_cloze,quick_sums"
PLANTED = {"HF_TOKEN": "hf_PlantedTokenOfTheHub0123456789", "WANDB_API_KEY": "planted0wandb0key0123456789"}


def shell(*args, cwd=ROOT, env=None) -> subprocess.CompletedProcess:
    """Run run_lm_eval.sh with this test's Python."""
    environment = {**os.environ, "PYTHON": sys.executable, **(env or {})}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def arguments_for(trained, out, *extra):
    # Spaces and a comma at the end, as people type lists.
    tasks = TASKS.replace(",", ", ") + ","
    return ("--checkpoints", trained / "ck", "--eval-out", out, "--tasks", tasks, "--limit", "12", *extra)


@pytest.fixture(scope="session")
def done(trained, tmp_path_factory):
    """A finished call on the newest run below ck/, from another folder: (results folder, its stdout, its stderr)."""

    def make(out):
        result = shell(*arguments_for(trained, out), cwd=out, env=PLANTED)
        assert result.returncode == 0, result.stderr[-3000:]
        (out / "stdout.txt").write_text(result.stdout)
        (out / "stderr.txt").write_text(result.stderr)

    out = made_once(tmp_path_factory, "lm_eval", make)
    (folder,) = (out / "r" / "lm_eval").iterdir()
    return folder, (out / "stdout.txt").read_text(), (out / "stderr.txt").read_text()


def results(folder: Path, side: str) -> dict:
    (path,) = folder.glob(f"{side}-*/results_*.json")
    return read_json(path)


def figures(report: dict) -> dict:
    """Every value and stderr that the harness reports."""
    return {task: {k: v for k, v in row.items() if "," in k} for task, row in report["results"].items()}


def test_compare_logged_samples(done, call, tmp_path):
    """Folders of lm_eval itself, moved elsewhere, give the table of the call that made them."""
    folder, *_ = done
    for side in ("base", "tuned"):
        (made,) = folder.glob(f"{side}-*")
        shutil.copytree(made, tmp_path / side / "model__name")
    result = shell("--compare", "base", "tuned", "--output-dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    summary, expected = read_json(tmp_path / "out/tuned-vs-base/lm_eval.json"), read_json(folder / "lm_eval.json")
    assert summary["metrics"] == expected["metrics"] and summary["claim"] == expected["claim"]
    assert (tmp_path / "out/tuned-vs-base/lm_eval.md").exists() and max(map(len, result.stdout.splitlines())) <= 100
    # The same folder twice: a table that says so.
    base = tmp_path / "base"
    code, out, err = call("preflab.harness.run", "--compare", base, base, "--output_dir", tmp_path / "same")
    assert code == 0 and "SAME ANSWERS" in out, err
    for words, bad in (("no such folder", "gone"), ("no results", "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, _, err = call("preflab.harness.run", "--compare", base, tmp_path / bad)
        assert code == 2
        assert_one_line(err, "--compare", bad, words)


def test_table_summary_and_figure(done):
    folder, stdout, stderr = done
    assert folder.name == "quick_facts-quick_cloze-quick_sums_LIMIT12"
    summary = read_json(folder / "lm_eval.json")
    assert summary["text"] in stdout and max(map(len, summary["text"].splitlines())) <= 100
    table = (folder / "lm_eval.md").read_text()
    assert (folder / "lm_eval.png").read_bytes()[:4] == b"\x89PNG"
    assert "Traceback" not in stderr
    assert summary["stage"] == "lm_eval" and summary["claim"] and summary["run"]["versions"]["lm_eval"]
    assert summary["settings"]["batch_size"] == "8" and summary["settings"]["tokenizer_bos"] == 0
    metrics = summary["metrics"]
    for side in ("base", "tuned"):
        harness = figures(results(folder, side))
        for task, row in harness.items():
            for key, value in row.items():
                if "_stderr" not in key:
                    ours = metrics[f"{task}/{key}/{side}"]
                    stderr = row[key.replace(",", "_stderr,")]
                    assert (ours["value"], ours["stderr"]) == (value, stderr if stderr != "N/A" else None)
    lines = [line for line in table.splitlines() if line.startswith("| quick_facts")]
    assert len(lines) == 2 and lines[0].split("|")[3].strip() == "none"
    assert set(summary["generated_characters"]["base"]) == {"quick_sums"}
    assert all(list(folder.glob(f"{side}-*/samples_quick_sums_*.jsonl")) for side in ("base", "tuned"))


def test_figures_equal_a_direct_call(done, trained, tiny, tmp_path):
    """A command typed by hand, and the printed one without its cache."""
    folder, *_ = done
    model = f"pretrained={tiny},dtype=float32,peft={trained / 'ck' / 'r'}"
    by_hand = [
        *("run", "--model", "hf", "--model_args", model, "--tasks", TASKS, "--batch_size", "8", "--device", "cpu"),
        *("--limit", "12", "--seed", "1234", "--include_path", "configs/lm_eval/tasks", "--log_samples"),
    ]
    (record,) = folder.glob("base-*/call.json")
    printed = shlex.split(read_json(record)["command"])
    assert printed[0] == "lm_eval"
    for flag in ("--output_path", "--use_cache"):
        at = printed.index(flag)
        del printed[at : at + 2]
    for side, arguments in (("tuned", by_hand), ("base", printed[1:])):
        direct = command("-m", "lm_eval", *arguments, "--output_path", tmp_path / f"{side}.json")
        assert direct.returncode == 0, direct.stderr[-2000:]
        (path,) = tmp_path.glob(f"{side}_*.json")
        assert figures(read_json(path)) == figures(results(folder, side))
    assert figures(results(folder, "tuned")) != figures(results(folder, "base"))


def test_no_file_has_a_secret_of_the_environment(done):
    """Results, samples, logs and printed text of both lm_eval calls."""
    files = [path for path in done[0].parents[2].rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in PLANTED.items() if secret.encode() in content], path


def test_second_call_runs_nothing(done, call, trained):
    folder, stdout, _ = done
    code, out, err = call("preflab.harness.run", *arguments_for(trained, folder.parents[2]))
    assert code == 0 and err.count("already finished") == 2, err
    assert out == stdout
    # Other settings of the same tasks do not overwrite it, also if they are given after the dashes.
    for other in (("--num-fewshot", "1"), ("--", "--gen_kwargs", "max_gen_toks=4")):
        code, _, err = call("preflab.harness.run", *arguments_for(trained, folder.parents[2]), *other)
        assert code == 2
        assert_one_line(err, "lm_eval.json", "--output_dir")


@pytest.mark.slow
def test_warm_cache_equals_a_cold_run(done, trained, tmp_path):
    folder, *_ = done
    shutil.copytree(folder.parents[2] / ".cache", tmp_path / ".cache")
    result = shell(*arguments_for(trained, tmp_path))
    assert result.returncode == 0 and "already finished" not in result.stderr, result.stderr[-2000:]
    warm = tmp_path / "r" / "lm_eval" / folder.name
    for side in ("base", "tuned"):
        assert figures(results(warm, side)) == figures(results(folder, side))
        (log,) = warm.glob(f"{side}-*/log.txt")
        assert "Checking cached requests" in log.read_text() and "Running loglikelihood" not in log.read_text()
    assert figures(results(warm, "base")) != figures(results(warm, "tuned"))


@pytest.mark.slow
def test_interrupted_call_continues_from_its_cache(done, trained, tmp_path):
    """kill -9 during the base's requests: cached responses are not computed again."""
    folder, *_ = done
    arguments = arguments_for(trained, tmp_path, "--batch-size", "1")
    running = subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, arguments)], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    responses = 0
    for _ in range(1200):
        databases = list((tmp_path / ".cache").glob("lm_eval-*/responses_rank0.db"))
        responses = responses_in(databases[0]) if databases else 0
        if responses >= 3 or running.poll() is not None:
            break
        time.sleep(0.05)
    harness = set(descendants(running.pid)) - {running.pid}
    running.kill()
    running.wait()
    assert responses >= 3 and harness, "killed while the harness was running"
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in harness):
        assert time.monotonic() < deadline, "the harness is still running after its stage was killed"
        time.sleep(0.1)
    result = shell(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "already finished" not in result.stderr
    (log,) = (tmp_path / "r" / "lm_eval" / folder.name).glob("base-*/log.txt")
    requested, computed = (
        int(re.search(rf"{bar}.*?/(\d+) \[", log.read_text())[1])
        for bar in ("Checking cached requests", "Running loglikelihood requests")
    )
    assert computed < requested, "cached responses are not computed again"
    resumed = [figures(results(tmp_path / "r" / "lm_eval" / folder.name, side)) for side in ("base", "tuned")]
    for ours, side in zip(resumed, ("base", "tuned"), strict=True):
        for task, row in figures(results(folder, side)).items():
            assert ours[task] == pytest.approx(row, rel=1e-5), "another batch size changes only the last digits"


def responses_in(path: Path) -> int:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1) as database:
            return database.execute("select count(*) from unnamed").fetchone()[0]
    except sqlite3.Error:
        return 0


def descendants(pid: int) -> list[int]:
    """A process and its children's children, in any session."""
    processes = [pid]
    for other in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(other.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            processes += descendants(int(other.parent.name))
    return processes


@pytest.mark.slow
def test_two_processes_give_the_same_figures(done, trained, tmp_path):
    folder, *_ = done
    result = shell(*arguments_for(trained, tmp_path, "--processes", "2"), env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / ".cache").glob("lm_eval-*/responses_rank1.db"))) == 2
    for side in ("base", "tuned"):
        ours = figures(results(tmp_path / "r" / "lm_eval" / folder.name, side))
        for task, row in figures(results(folder, side)).items():
            assert ours[task] == pytest.approx(row, rel=1e-5)


def test_no_run_to_evaluate(call, tmp_path):
    code, _, err = call("preflab.harness.run", "--checkpoints", tmp_path)
    assert code == 2
    assert_one_line(err, "quickstart.sh")


def test_python_without_lm_eval(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    result = shell(env={"PYTHON": str(bare)})
    assert result.returncode == 2
    assert_one_line(result.stderr, str(bare), "requirements.txt")


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt-get install shellcheck)"
)
def test_shellcheck():
    result = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
