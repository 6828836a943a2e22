"""Errors a user can mend, told in one line: what is wrong, where, and the mend. Exit code 2, no traceback."""

import errno
import os
import sys
import time


class UserError(Exception):
    """Bad input or a machine that cannot do what was asked; the message names the file, row or flag and the mend."""


def is_main_process() -> bool:
    """Whether this process is rank 0 of the launch (always true without a launcher)."""
    return int(os.environ.get("RANK", "0")) == 0


TRAINING_MEMORY = (
    "lower --per_device_train_batch_size (raise --gradient_accumulation_steps to match) and"
    " --per_device_eval_batch_size, or set --gradient_checkpointing true, and the same run goes on; or begin another"
    " with a smaller --max_length or --load_in_4bit"
)


def run(main, memory: str = TRAINING_MEMORY) -> None:
    """Run a script's `main()`; turn what the user can mend into one line and exit code 2, Ctrl-C into 130.

    Args:
        memory: what the script's user can do where memory runs out.
    """
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: the same command (without --overwrite) goes on from what is there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error, memory)
        if message is None:
            raise
        fail(message)


def fail(message: str) -> None:
    """Print `error: message` on stderr as one line and leave with code 2.

    What stops every process of a launch is told by rank 0; another process speaks up only where it alone fails and
    the launcher has not ended it by then.
    """
    rank = ""
    if not is_main_process():
        rank = f"[process {os.environ['RANK']}] "
        time.sleep(5)
    print(f"error: {rank}" + " ".join(message.split()), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def explain(error: BaseException | None, memory: str = TRAINING_MEMORY) -> str | None:
    """The one-line explanation of a machine's limit (disk, memory, permissions) behind `error`, else None."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        text = f"{type(error).__name__}: {error}"
        number = getattr(error, "errno", None)
        name = getattr(error, "filename", None)
        at = f" ({name})" if name else ""
        full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        full_texts = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed")
        if number in full or any(t in text for t in full_texts):
            return (
                f"the disk is full or the file-size limit is reached{at}: free some space, or choose another"
                " --output_dir and --eval_out; complete checkpoints are kept, the same command resumes from the last"
            )
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission to write{at}: choose another --output_dir and --eval_out, or mend the permissions"
        memory_texts = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")
        if isinstance(error, MemoryError) or any(t in text for t in memory_texts):
            return f"out of memory: {memory}"
        error = error.__cause__ or error.__context__
    return None
