"""Runs of a benchmark in their own processes, which print their figures as JSON."""

import json
import subprocess
import sys

from utils.errors import UserError


def figures_of_child(command: list[str], name: str) -> dict:
    """The JSON object that a command of this interpreter prints last.

    Args:
        command: without the interpreter. name: of the run, in errors.

    Raises:
        UserError: the command failed, or printed no figures. Its output is shown unless it ends with such an error.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    # A launcher prints lines of its processes too.
    figures = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and figures:
        return json.loads(figures[-1])
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it printed no figures")
    if not last.startswith("error: "):
        sys.stderr.write(done.stderr)
    raise UserError(f"{name} failed: {last.removeprefix('error: ')}")
