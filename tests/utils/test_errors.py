"""How scripts end: stop signals, a reader of the output that is gone, missing streams, and locks of other processes."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from utils import errors
from utils.errors import Stopped, UserError
from utils.locks import hold


def started(body: str, **kwargs) -> subprocess.Popen:
    """A script whose main() has this body and has printed `ready`."""
    lines = ["print('ready', flush=True)", *body.splitlines()]
    code = "import time\nfrom utils.errors import *\nfrom utils.errors import run\ndef main():\n"
    code += "".join(f"    {line}\n" for line in lines) + "run(main)"
    # A shell starts background commands, such as a test run, with SIGINT ignored, and children inherit that.
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, **kwargs)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=lambda v: str(v)
)
def test_stop_signal_is_one_line_and_its_code(number, code, tmp_path):
    """The exit codes are those of the shell, 128 + signal; what a failure undoes is undone."""
    made = tmp_path / "half"
    made.touch()
    body = (
        f"import pathlib\nundo_on_failure(pathlib.Path({str(made)!r}).unlink)\nprint('.', flush=True)\ntime.sleep(60)"
    )
    process = started(body)
    assert process.stdout.readline() == ".\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code and len(err.strip().splitlines()) == 1, err
    assert "same command" in err and (number == signal.SIGINT or signal.Signals(number).name in err)
    assert not made.exists()


def test_ignored_signal_stays_ignored():
    """As under `nohup` or `trap ''`: what the user's shell ignores does not stop a script."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        process = started("time.sleep(0.5)\nprint('end')")
    finally:
        signal.signal(signal.SIGUSR1, before)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == "end\n" and process.returncode == 0


def test_forked_worker_ends_as_usual():
    """A pool ends its workers with SIGTERM; they print nothing and leave the script's files alone."""
    body = "import os, signal\npid = os.fork()\nif not pid: time.sleep(60)\ntime.sleep(0.2)\n"
    body += "os.kill(pid, signal.SIGTERM)\nprint(os.waitpid(pid, 0)[1])"
    out, err = started(body).communicate(timeout=20)
    assert (out, err) == (f"{int(signal.SIGTERM)}\n", "")


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in errors.STOP_SIGNALS]
    with pytest.raises(Stopped), errors._stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert [signal.getsignal(number) for number in errors.STOP_SIGNALS] == before


@pytest.mark.parametrize("ending", ["", "; sys.exit(0)"], ids=["returns", "exits"])
def test_little_output_without_a_reader_ends_quietly(ending):
    """Output below the size of a buffer is written when Python ends, where an error could not be caught."""
    code = (
        f"import sys, time; from utils.errors import run\ndef main():\n  time.sleep(.3); print('x'){ending}\nrun(main)"
    )
    piped = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 141)


def test_results_are_written_without_a_reader(tmp_path):
    """A report that nobody reads any more must not prevent what follows it."""
    code = (
        "from utils.errors import run; from utils.stage import print_main; import pathlib, time\n"
        "def main():\n  time.sleep(.3)\n  for i in range(3): print_main('x' * 100000)\n"
        f"  pathlib.Path({str(tmp_path / 'end')!r}).touch()\nrun(main)"
    )
    piped = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0) and (tmp_path / "end").exists()


def test_closed_streams_are_not_files(tmp_path):
    """`>&- 2>&-`: otherwise the first file that is opened becomes stdout, and gets what libraries print."""
    path = tmp_path / "results"
    code = (
        "import os, sys; from utils.errors import run\n"
        f"def main():\n  f = open({str(path)!r}, 'w'); os.write(1, b'library'); print('report')\n"
        "  sys.stderr.write('x'); f.write('results')\nrun(main)"
    )
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c {shlex.quote(code)} >&- 2>&-"], cwd=ROOT)
    assert done.returncode == 0 and path.read_text() == "results"


def test_characters_outside_the_locale():
    code = "from utils.errors import run\ndef main(): print('1.0 \xb1 0.5')\nrun(main)"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 ? 0.5\n", "")


def test_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / ".r.lock"
    body = f"from pathlib import Path\nfrom utils.locks import hold\nlock = hold(Path({str(path)!r}), 'a', 'b')\n"
    process = started(body + "print('held', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"^out/r is in use by process {process.pid} on .*; wait$"):
        hold(path, "out/r", "wait")
    process.kill()
    process.communicate()
    # Left by kill -9, without its process: it does not block.
    assert path.exists()
    hold(path, "out/r", "wait").release()
    # A lock of an earlier version has no record of its holder.
    lock = hold(path, "out/r", "wait")
    path.write_text("")
    with pytest.raises(UserError, match="another process"):
        hold(path, "out/r", "wait")
    lock.release()
