"""Faults in a running script: kill -9, a full disk or a read-only folder at the n-th time that it writes a file.

The faults come through Python's audit events, so they hit open(), renames and new folders wherever they are called,
reproducibly. What C++ and Rust write (tensors) has no event of its own; the events before and after it do.
"""

import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from processes import Script

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Fault:
    """Given to a Script as `before`: counts writes below a folder, and does harm at one of them.

    Attributes:
        folder: writes elsewhere do not count.
        at: the number of the write, from 0; None never.
        kind: "kill", "signal", or the errno of a failing write. After the first failing write all fail.
        number: of the signal.
        only: count only writes whose path holds this text.
    """

    folder: str
    at: int | None = None
    kind: str | int = "kill"
    number: int = signal.SIGKILL
    only: str = ""
    count: int = 0

    def __call__(self):
        # The number of writes is wanted even after kill -9, so each is a byte of this file.
        counter = os.open(f"{self.folder}.writes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        main_process = os.getpid()

        def hook(event, args):
            path = _written(event, args)
            if not path.startswith(self.folder + os.sep) or self.only not in path or os.getpid() != main_process:
                return
            os.write(counter, b".")
            self.count += 1
            late = self.at is not None and self.count > self.at
            if late and isinstance(self.kind, int):
                raise OSError(self.kind, os.strerror(self.kind), path)
            if late and self.count == self.at + 1:
                os.kill(main_process, signal.SIGKILL if self.kind == "kill" else self.number)

        sys.addaudithook(hook)


def _written(event: str, args: tuple) -> str:
    """The path that an audit event is about to write; "" for other events."""
    path = ""
    if event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & WRITING or isinstance(mode, str) and set(mode) & set("wxa+")
        path = path if writes else ""
    elif event in ("os.rename", "os.mkdir"):
        path = args[1] if event == "os.rename" else args[0]
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""


def writes_of(folder: Path) -> int:
    """How many writes a script with a Fault made below `folder`."""
    return os.stat(f"{folder}.writes").st_size


def run_with(fault: Fault, stage: str, args: list):
    """The result of a stage under a fault."""
    return Script(stage.split()[0], *args, before=fault).result()


def moments(count: int, number: int, seed: str) -> list[int]:
    """`number` different writes of `count`, in random order that is the same in every call of the test."""
    return random.Random(seed).sample(range(count), min(number, count))
