"""Locks on what only one process may write. They name their holder and end with its process, also by kill -9."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError


def hold(path: Path, what: str, fix: str) -> FileLock:
    """Lock the file `path`, until the lock is released or this process ends.

    Args:
        what: what is locked, the beginning of the error message.
        fix: what to do instead, its end.

    Raises:
        UserError: another process holds it; the message has its process id, its machine and when it began.
    """
    # timeout=0: fail at once instead of waiting for the other process.
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{what} is in use by {_holder(path)}; {fix}") from None
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    # Only for the message above: a full disk must not stop the holder.
    with suppress(OSError):
        record = {"pid": os.getpid(), "machine": socket.gethostname(), "began": began}
        path.write_text(json.dumps(record), encoding="utf-8")
    return lock


def is_held(path: Path) -> bool:
    """Whether a process holds the lock `path` now."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except (Timeout, OSError) as error:
        # OSError: a file of another user, which cannot be locked either way.
        return isinstance(error, Timeout)


def let_go(lock: FileLock) -> None:
    """End a lock and delete its file."""
    # Deleted while it is held: afterwards it may be another process's.
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['machine']} since {holder['began']}"
    # Not written yet, or by an earlier version.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
