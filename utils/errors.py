"""User-facing errors: one line on stderr with the problem, its location and the fix. Exit code 2, no traceback."""

import errno
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from utils.markdown import plain
from utils.secrets_in_text import without_secrets

RESUME_HINT = "use a smaller batch, model or precision, then run the same command again: finished work is kept"


class UserError(Exception):
    """Invalid input, or a request this machine cannot serve. The message names the file, row or flag and the fix."""


class Stopped(BaseException):
    """A signal of STOP_SIGNALS. Like KeyboardInterrupt no Exception, so that no `except Exception` swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


# What ends a script from outside: `kill`, a cluster's preemption, and the warning before a job's time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# What to undo if the script fails, in the order in which it was done.
_undo: list[Callable[[], None]] = []
# What to do when the script ends, however it ends.
_at_end: list[Callable[[], None]] = []


def undo_on_failure(action: Callable[[], None]) -> None:
    """Call `action` if this script fails, so that a failed start leaves nothing behind; the last one first."""
    _undo.append(action)


def at_end(action: Callable[[], None]) -> None:
    """Call `action` when this script ends, with or without an error; the last one first."""
    _at_end.append(action)


def exit_code(number: int) -> int:
    """The exit code of a script that a signal stopped: 128 + its number, the shell's convention.

    130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.
    """
    return 128 + number


def is_main_process() -> bool:
    """Whether this process is rank 0 of the launch (always true without a launcher)."""
    return int(os.environ.get("RANK", "0")) == 0


def run(main, out_of_memory: str = RESUME_HINT) -> None:
    """Run a script's `main()`; turn errors that the user can fix into one line and exit code 2.

    Ctrl-C, SIGTERM and SIGUSR1 become one line and `exit_code`.

    Args:
        out_of_memory: the fix that the error suggests when host or GPU memory runs out.
    """
    # Tests run several scripts in one process, and parts of them without this function.
    _undo.clear()
    _call(_at_end)
    _prepare_streams()
    try:
        with _stop_signals():
            _undone_on_failure(main)
            # Here, so that a reader who is gone is noticed now and not when Python ends.
            sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except (KeyboardInterrupt, Stopped) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        if is_main_process():
            cause = "interrupted" if number == signal.SIGINT else f"stopped by {stop}"
            print(f"\n{cause}: run the same command again (without --overwrite) to continue", file=sys.stderr)
        sys.exit(exit_code(number))
    except ModuleNotFoundError as error:
        # Also of the project's own modules, whose absence is a defect: that keeps its traceback.
        if (error.name or "").split(".")[0] in ("", "utils", "preflab"):
            raise
        fail(
            f"{sys.executable} has no package {error.name}: run `source .venv/bin/activate` (bash quickstart.sh creates"
            " .venv), or pip install -r requirements.txt"
        )
    except BrokenPipeError:
        discard_output()
        sys.exit(exit_code(signal.SIGPIPE))
    except Exception as error:
        # Anything unexpected is a defect of the program, and its traceback is needed.
        message = explain(error, out_of_memory)
        if message is None:
            raise
        fail(message)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Raise Stopped where a signal of STOP_SIGNALS arrives; ignored ones (`nohup`, `trap \'\'`) stay ignored."""
    owner, received = os.getpid(), []

    def stop(number, frame):
        if os.getpid() != owner:
            # A forked worker: it ends as it would without this handler.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A repeated signal must not interrupt what the first one cleans up.
        elif not received:
            received.append(number)
            raise Stopped(number)

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Give a script that was started without stdout or stderr (`>&-`) the null device in their place.

    Otherwise the next file that is opened gets their number, and what a library prints is written into it. In a locale
    without a character of a report (±, é), it is printed as a question mark.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def discard_output() -> None:
    """Send stdout to the null device, because its reader (`| head`) is gone. Python would fail again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _undone_on_failure(main) -> None:
    """Run `main`; call the actions of `undo_on_failure` if it raises, Ctrl-C and exits with an error included."""
    try:
        main()
    except BaseException as error:
        # First, since a folder that holds a lock is not empty.
        _call(_at_end)
        if not (isinstance(error, SystemExit) and not error.code):
            _call(_undo)
        raise
    _call(_at_end)


def _call(actions: list[Callable[[], None]]) -> None:
    """Call the actions, the last one first, and empty the list."""
    while actions:
        # What cannot be undone must not hide the error.
        with suppress(OSError):
            actions.pop()()


def fail(message: str) -> None:
    """Print `error: message` on stderr, as one line where that is not a terminal, and exit with code 2.

    Rank 0 prints errors common to all ranks. Other ranks wait 5 s, so they print only if they alone failed: after an
    error on rank 0 the launcher has ended them by then.
    """
    rank = ""
    if not is_main_process():
        rank = f"[process {os.environ['RANK']}] "
        time.sleep(5)
    print(for_terminal(f"error: {rank}" + plain(without_secrets(" ".join(message.split())))), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def for_terminal(line: str) -> str:
    """A line for stderr: on a terminal wrapped between words, in a file one line, as it is searched for there."""
    if not sys.stderr.isatty():
        return line
    # Of stderr: stdout may be a pipe. A terminal may report 0 columns.
    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    # Words longer than a line (paths) stay whole, so that they can be copied.
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# EFBIG is the shell's `ulimit -f`, EDQUOT a user's quota, EROFS a read-only mount.
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
PERMISSION_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
# torch.save and the CUDA allocator raise RuntimeErrors without an errno, so their texts are matched.
DISK_FULL_TEXTS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "unexpected pos",  # the same, where the last write of a small file fails
)
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")


def explain(error: BaseException | None, out_of_memory: str = RESUME_HINT) -> str | None:
    """One line for a full disk, missing permissions or exhausted memory anywhere in the chain of `error`, else None."""
    seen = []
    # Libraries wrap the OSError that explains a failure, so walk the causes; `seen` guards against a cycle.
    while error is not None and error not in seen:
        seen.append(error)
        text = f"{type(error).__name__}: {error}"
        number = getattr(error, "errno", None)
        name = getattr(error, "filename", None)
        place = f" ({name})" if name else ""
        if number in DISK_FULL_ERRORS or any(t in text for t in DISK_FULL_TEXTS):
            return (
                f"the disk is full or the file-size limit is reached{place}: free some space, or choose another"
                " --output_dir and --eval_out; complete checkpoints are kept; the same command resumes"
            )
        if number in PERMISSION_ERRORS:
            return f"no permission to write{place}: choose another --output_dir and --eval_out, or fix the permissions"
        if isinstance(error, MemoryError) or any(t in text for t in MEMORY_TEXTS):
            return f"out of memory: {out_of_memory}"
        # `raise ... from` names the cause; otherwise the exception that was being handled is the best guess.
        error = error.__cause__ or error.__context__
    return None
