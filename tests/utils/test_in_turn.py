"""Scripts one after another in one process."""

import subprocess
import sys

from conftest import ROOT


def in_turn(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.in_turn", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_each_script_has_its_own_arguments(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.getpid())\nsys.exit(0)\n")
    done = in_turn(script, "--a", "1", "--then", script, "x y")
    lines = done.stdout.split("\n\n")
    assert done.returncode == 0 and lines[0].startswith("['--a', '1']") and lines[1].startswith("['x y']")
    assert lines[0].split("] ")[1] == lines[1].split("] ")[1].strip(), "one process"


def test_an_error_ends_the_row(tmp_path):
    fails, second = tmp_path / "fails.py", tmp_path / "second.py"
    fails.write_text("import sys\nsys.exit(2)\n")
    second.write_text("print('reached')\n")
    done = in_turn(fails, "--then", second)
    assert (done.returncode, done.stdout) == (2, "")
