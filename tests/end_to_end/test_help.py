"""`--help` of every script is a page that names a flag of the stage, without heavy imports."""

import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import assert_covers_all_scripts

# Per script: what its page must name.
PAGES = {
    "dpo_train_human_preference.py": ("accelerate launch", "--beta"),
    "sft_train_instruction.py": ("accelerate launch", "--loss_on"),
    "generate_preference_pairs.py": ("accelerate launch", "--scorer"),
    "merge_adapter.py": ("--merged_dir",),
    "eval_win_rate.py": ("accelerate launch", "--battle"),
    "eval_perplexity.py": ("accelerate launch", "--text_file"),
    "run_alpacaeval_local.py": ("--reference", "--judge"),
    "human_eval.py": ("--score", "--prompts"),
    "run_lm_eval.sh": ("bash run_lm_eval.sh", "--skip-missing"),
    "run_sppo_iteration.sh": ("bash run_sppo_iteration.sh", "--launch YAML"),
}


def test_every_script_has_a_page():
    assert_covers_all_scripts(PAGES)


@pytest.mark.parametrize("script", PAGES)
def test_help(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["bash" if script.endswith(".sh") else sys.executable, script, "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    for word in PAGES[script]:
        assert word in done.stdout
    assert len(done.stdout.splitlines()) < 60 and "set -euo" not in done.stdout
    # CPU time does not depend on what else the machine does. run_lm_eval.sh first looks for a Python with lm_eval.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < (10 if script == "run_lm_eval.sh" else 2)
