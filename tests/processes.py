"""The scripts as processes, forked from a server that has imported the libraries once.

A fresh interpreter spends 8 s of CPU time on imports before a script does anything; a fork of the server spends 0.2 s.
Each process still has its own memory, signals, environment and exit code, so kill -9, Ctrl-C and gloo are the real
ones. What a fork cannot show is left to `conftest.command`: import time, settings that libraries read at import, and
accelerate's launcher (tests/end_to_end/test_distributed.py).
"""

import atexit
import multiprocessing
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    *("torch", "accelerate", "datasets", "matplotlib.pyplot", "peft", "scipy.stats"),
    *("transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"),
]
forked_cpu_seconds = 0.0  # of all finished processes of this file; resource.getrusage knows direct children only

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


class Script:
    """A running script, with the part of subprocess.Popen's interface that tests need."""

    def __init__(self, script: str, *args, env: dict | None = None, before=None):
        self.args = [script, *map(str, args)]
        self.folder = Path(tempfile.mkdtemp(prefix="script-"))
        environment = {**os.environ, **(env or {})}
        self.process = _server.Process(target=_run, args=(self.args, str(self.folder), environment, before))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def result(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for the end; the exit code is negative after a signal, as subprocess has it."""
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        global forked_cpu_seconds
        if (self.folder / "cpu").exists():
            forked_cpu_seconds += float((self.folder / "cpu").read_text())
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.args, self.poll(), out, err)


def _run(args: list[str], folder: str, environment: dict, before) -> None:
    """In the child: what `python script.py arguments` does, with the output in files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), fd)
    random.seed()  # a fork continues its server's random numbers
    sys.argv, sys.path = args, [str(ROOT), *sys.path]
    if before:
        before()
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a child without them
        usage = resource.getrusage(resource.RUSAGE_SELF)
        Path(folder, "cpu").write_text(str(usage.ru_utime + usage.ru_stime))


def run_script(script: str, *args, **kwargs) -> subprocess.CompletedProcess:
    return Script(script, *args, **kwargs).result()


def launch_environment(config: Path) -> dict[str, str]:
    """The variables by which accelerate's launcher passes a config file's content to its ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    parsed = launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", "script.py"])
    args, defaults, _ = _validate_launch_command(parsed)
    if not (args.use_deepspeed or args.use_fsdp or args.multi_gpu):
        return prepare_simple_launcher_cmd_env(args)[1]
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def start_processes(count: int, script: str, *args, config: Path | None = None) -> list[Script]:
    """The script as ranks 0 to count - 1 on the CPU, in the environment that accelerate's launcher gives its ranks.

    Args:
        config: accelerate's config file (default: DDP).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = launch_environment(config) if config else {}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Script(script, *args, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]


def run_two_processes(script: str, *args, config: Path | None = None) -> subprocess.CompletedProcess:
    """The script on two processes, to its end."""
    return run_processes(2, script, *args, config=config)


def run_processes(count: int, script: str, *args, config: Path | None = None) -> subprocess.CompletedProcess:
    """The script on `count` processes, to its end (see `start_processes`)."""
    ranks = start_processes(count, script, *args, config=config)
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):  # like the launcher: after one rank failed, end the others
            time.sleep(1)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    results = [rank.result() for rank in ranks]
    code = next((done.returncode for done in results if done.returncode), 0)
    out, err = ("".join(getattr(done, stream) for done in results) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess([script, *args], code, out, err)
