"""Limits of time and memory for chat templates, which come with a model and are programs in Jinja's sandbox.

The sandbox keeps a template from files and from Python's internals, but not from an endless loop or a text of a
hundred gigabytes. Both are stopped here: the time by a timer, the memory by the operating system (on Linux).
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError

# CPU seconds, so that a busy or suspended machine changes nothing. A conversation of 100 turns takes milliseconds.
SECONDS = 10.0
# Bytes beyond what the process has already.
MEMORY = 2**30


class _OutOfTime(BaseException):
    """Not an Exception: Jinja's optimizer swallows those of the constants that it computes."""


@contextmanager
def template_limits(name: str, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Stop what a chat template computes inside this context beyond `seconds` of CPU time or `memory` bytes.

    The timer needs the main thread, where every script renders; elsewhere only the memory is limited.

    Args:
        name: of the model, for the error message.

    Raises:
        UserError: the template exceeds a limit.
    """
    try:
        with _limited_memory(memory), _limited_time(seconds):
            yield
    except _OutOfTime:
        problem = f"takes more than {seconds:g} s for a conversation"
    except MemoryError:
        # Python's compiler raises it too, for expressions that are nested too deeply.
        problem = f"needs more than {memory / 2**30:g} GiB for a conversation, or is nested too deeply"
    else:
        return
    raise UserError(f"the chat template of {name} {problem}: give another one by --chat_template_path")


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise _OutOfTime

    previous = signal.signal(signal.SIGVTALRM, stop)
    # Repeated, since an exception inside a destructor is only printed.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextmanager
def _limited_memory(memory: int) -> Iterator[None]:
    used = _address_space()
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    finite = [limit for limit in (soft, hard, used + memory) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(finite), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of this process's address space; None where the system does not say (other than Linux)."""
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None
