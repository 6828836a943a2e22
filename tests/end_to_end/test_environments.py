"""Other folders, locales, terminals and networks than the developer's."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line, eval_args, write_jsonl
from stages import ITERATIONS, STAGES

from utils.artifacts import read_json
from utils.provenance import local_path

# Flags that keep the builtin judge and long answers out of the small calls.
SHORT = {
    "eval_win_rate.py --battle": ("--judge", "longer", "--max_new_tokens", 4),
    "human_eval.py": ("--max_new_tokens", 4),
    "run_lm_eval.sh": ("--limit", 1, "--tasks", "quick_facts"),
}


def test_shipped_files_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = "data/eval_prompts/reference.jsonl"
    assert local_path(shipped) == ROOT / shipped and local_path("nowhere.jsonl").name == "nowhere.jsonl"
    # A file of the user's own under this name wins.
    write_jsonl(tmp_path / shipped, [{}])
    assert local_path(shipped).resolve() == tmp_path / shipped


def test_defaults_from_another_folder(call, inputs, tmp_path, monkeypatch):
    """The shipped judge prompt, prompts and template; artifacts name them as they do in the repository."""
    folder = tmp_path / "wörk dir"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shipped = "data/eval_prompts/reference.jsonl"
    battle = ("--battle", "--judge", f"hf:{inputs.tiny}", "--prompts", shipped, "--limit", 2, "--max_new_tokens", 4)
    code, _, err = call("eval_win_rate", *eval_args(inputs.trained, "aus gabe", *battle))
    assert code == 0, err
    data = read_json(folder / "aus gabe/r/battle_LIMIT2.json")["data"]
    assert str(ROOT) not in json.dumps(data) and shipped in json.dumps(data)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ITERATIONS])
def test_hostile_environment(stage, inputs, tmp_path):
    """No HOME, an ASCII locale, 60 columns, no terminal, another folder, spaces and umlauts; logs stay readable."""
    folder = tmp_path / "Ordner für Läufe"
    folder.mkdir()
    script = stage.split()[0]
    start = ["bash", str(ROOT / script)] if script.endswith(".sh") else [sys.executable, str(ROOT / script)]
    arguments = [*STAGES[stage](inputs, folder), *SHORT.get(stage, ())]
    cache = os.environ.get("PREFERENCELAB_CACHE") or os.path.expanduser("~/.cache/preferencelab")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    env |= {"LANG": "C", "LC_ALL": "C", "COLUMNS": "60", "PREFERENCELAB_CACHE": cache, "PYTHON": sys.executable}
    done = subprocess.run([*start, *map(str, arguments)], cwd=folder, env=env, capture_output=True, timeout=600)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err, err[-3000:]
    # Progress bars redraw with carriage returns, which make a log file unreadable.
    assert "\r" not in out + err
    for log in folder.rglob("*.txt"):
        assert b"\r" not in log.read_bytes(), log
    assert max(map(len, out.splitlines())) < 400


@pytest.mark.slow
def test_proxy_that_fails(tmp_path):
    """A hub that cannot be reached is one line, within a minute."""
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "eval_perplexity.py", "--base_model", "nobody/nothing", "--tuned_model", "nobody/other"]
    command += ["--eval_out", str(tmp_path / "out"), "--skip_pairs", "--text_file", "README.md"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, "nobody/")
