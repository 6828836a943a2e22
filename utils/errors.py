"""User-facing errors: one line on stderr with the problem, its location and the fix. Exit code 2, no traceback."""

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from utils.secrets_in_text import without_secrets

RESUME_HINT = "use a smaller batch, model or precision, then run the same command again: finished work is kept"


class UserError(Exception):
    """Invalid input, or a request this machine cannot serve. The message names the file, row or flag and the fix."""


# What to undo if the script fails, in the order in which it was done.
_undo: list[Callable[[], None]] = []


def undo_on_failure(action: Callable[[], None]) -> None:
    """Call `action` if this script fails, so that a failed start leaves nothing behind; the last one first."""
    _undo.append(action)


def is_main_process() -> bool:
    """Whether this process is rank 0 of the launch (always true without a launcher)."""
    return int(os.environ.get("RANK", "0")) == 0


def run(main, out_of_memory: str = RESUME_HINT) -> None:
    """Run a script's `main()` and turn errors the user can fix into one line and exit code 2, Ctrl-C into 130.

    Args:
        out_of_memory: the fix that the error suggests when host or GPU memory runs out.
    """
    # Tests run several scripts in one process.
    _undo.clear()
    try:
        _undone_on_failure(main)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        # 128 + SIGINT, the shell's convention for an interrupted command.
        print("\ninterrupted: run the same command again (without --overwrite) to continue", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        # Also of the project's own modules, whose absence is a defect: that keeps its traceback.
        if (error.name or "").split(".")[0] in ("", "utils", "preflab"):
            raise
        fail(
            f"{sys.executable} has no package {error.name}: run `source .venv/bin/activate` (bash quickstart.sh creates"
            " .venv), or pip install -r requirements.txt"
        )
    except BrokenPipeError:
        # The reader of the output (`| head`) is gone. Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except Exception as error:
        # Anything unexpected is a defect of the program, and its traceback is needed.
        message = explain(error, out_of_memory)
        if message is None:
            raise
        fail(message)


def _undone_on_failure(main) -> None:
    """Run `main`; call the actions of `undo_on_failure` if it raises, Ctrl-C and exits with an error included."""
    try:
        main()
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            while _undo:
                # What cannot be undone must not hide the error.
                with suppress(OSError):
                    _undo.pop()()
        raise


def fail(message: str) -> None:
    """Print `error: message` as one line on stderr and exit with code 2.

    Rank 0 prints errors common to all ranks. Other ranks wait 5 s, so they print only if they alone failed: after an
    error on rank 0 the launcher has ended them by then.
    """
    rank = ""
    if not is_main_process():
        rank = f"[process {os.environ['RANK']}] "
        time.sleep(5)
    print(f"error: {rank}" + without_secrets(" ".join(message.split())), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


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
