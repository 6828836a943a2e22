"""`--help` of every script is a page that names a flag of the stage and its real defaults, without heavy imports."""

import os
import re
import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import ARGUMENTS, assert_covers_all_scripts

from utils.keys import Key, keys_of

# Per script: what its page must name.
PAGES = {
    "dpo_train_human_preference.py": ("accelerate launch", "--beta"),
    "sft_train_instruction.py": ("accelerate launch", "--loss_on"),
    "train_reward_model.py": ("accelerate launch", "--margin_per_point"),
    "generate_preference_pairs.py": ("accelerate launch", "--scorer"),
    "merge_adapter.py": ("--merged_dir",),
    "export_gguf.py": ("bash install_gguf.sh", "--types"),
    "eval_reward_model.py": ("accelerate launch", "--best_of"),
    "eval_win_rate.py": ("accelerate launch", "--battle"),
    "eval_perplexity.py": ("accelerate launch", "--text_file"),
    "run_alpacaeval_local.py": ("--reference", "--judge"),
    "human_eval.py": ("--score", "--prompts"),
    "release.py": ("--push", "--license"),
    "chat.py": ("--system", "--vote"),
    "report.py": ("--compare", "--status"),
    "run_lm_eval.sh": ("bash run_lm_eval.sh", "--skip-missing"),
    "run_online_iteration.sh": ("bash run_online_iteration.sh", "--scorer SCORER"),
    "run_sppo_iteration.sh": ("bash run_sppo_iteration.sh", "--launch YAML"),
}
SHELL_PAGES = {
    "quickstart.sh": ("bash quickstart.sh", "--overwrite"),
    "run_tests.sh": ("bash run_tests.sh", "--fast"),
    "doctor.sh": ("bash doctor.sh", "--clean"),
    "install_gguf.sh": ("bash install_gguf.sh", "requirements/gguf.txt"),
    "install_vllm.sh": ("bash install_vllm.sh", "--cpu", "requirements/vllm-env.txt"),
}
# Flags that are answered before the keys are read.
BEFORE_PARSING = {"list", "help_all", "config"}


def call(script: str, flag: str) -> subprocess.CompletedProcess:
    command = ["bash" if script.endswith(".sh") else sys.executable, script, flag]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_every_script_has_a_page():
    assert_covers_all_scripts(PAGES)


@pytest.mark.parametrize("script", PAGES | SHELL_PAGES)
def test_help(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call(script, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for word in (PAGES | SHELL_PAGES)[script]:
        assert word in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 65 and max(map(len, lines)) <= 100 and "set -euo" not in done.stdout
    # CPU time does not depend on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize("script", PAGES | SHELL_PAGES)
def test_version(script):
    done = call(script, "--version")
    assert done.returncode == 0 and re.match(r"PreferenceLab \d+\.\d+\.\d+", done.stdout), done.stderr
    assert "trl 1." in done.stdout and len(done.stdout.splitlines()) == 2


def shown_flags(page: str) -> list[tuple[str, str]]:
    """(name, what follows up to the next flag) of every flag that a page's section on keys names."""
    section = page.split("those about WORD):")[-1]
    return [
        (name.replace("-", "_"), rest)
        for name, rest in re.findall(r"--([a-z][\w-]*)((?:(?!--[a-z]).)*)", section, re.S)
    ]


def equal(shown: str, key: Key) -> bool:
    """Whether a page's text in brackets is the dataclass's default."""
    if isinstance(key.default, (int, float)) and not isinstance(key.default, bool):
        return float(shown) == key.default
    return shown == key.default_text


@pytest.mark.parametrize("script", ARGUMENTS)
def test_defaults_on_the_page(script):
    """`[x]` behind a flag is the dataclass's default; no other value follows a flag, so none looks like a default."""
    keys, page = keys_of(ARGUMENTS[script]()), call(script, "--help").stdout
    flags = shown_flags(page)
    assert len(flags) >= 8
    # Within a text (in parentheses), a flag is only mentioned.
    mentioned = {
        name.replace("-", "_")
        for text in re.findall(r"\(([^()]*)\)", page)
        for name in re.findall(r"--([a-z][\w-]*)", text)
    }
    for name, rest in flags:
        if name in BEFORE_PARSING or (name in mentioned and name.removeprefix("no_") in keys):
            continue
        assert name in keys, f"{script}: --{name} on the help page is not a flag"
        key, shown = keys[name], re.match(r"[^\[(]*\[([^\]]+)\]", rest)
        # A switch is off, and a limit of -1 is no limit: both need no value on the page.
        if key.default_text and key.default is not False and key.default != -1:
            assert shown, f"{script}: --{name} without its default {key.default_text}"
        if shown:
            assert equal(shown[1], key), f"{script}: --{name} [{shown[1]}], but the default is {key.default_text!r}"
        assert not re.match(r" [\d.]", rest), f"{script}: --{name}{rest} looks like a default"
