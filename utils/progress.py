"""Progress of long work: a bar on a terminal, plain lines in a log file."""

import sys
import time

from utils.errors import is_main_process

SECONDS_BETWEEN_LINES = 30.0


class LineProgress:
    """The part of tqdm's interface that this project uses, for output that is not a terminal.

    It prints plain lines without carriage returns, the first after `SECONDS_BETWEEN_LINES`, so short work prints
    nothing.

    Attributes:
        n: finished units, as in tqdm.
    """

    def __init__(self, total: int, desc: str, unit: str, seconds: float = SECONDS_BETWEEN_LINES, initial: int = 0):
        self.total, self.desc, self.unit, self.seconds, self.initial = total, desc, unit, seconds, initial
        self.n, self.printed, self.details = initial, None, ""
        self.started = self.printed_at = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def update(self, count: int = 1) -> None:
        """Count finished units; print a line if the last one is old enough."""
        self.n += count
        if time.monotonic() - self.printed_at >= self.seconds:
            self._print()

    def set_postfix(self, details: dict) -> None:
        """Set the figures at the end of the next line."""
        self.details = "".join(f", {name} {value}" for name, value in details.items())

    def close(self) -> None:
        """Print the final state, if any line was printed before and it was not the final one."""
        # None: no line was printed, so the work was short and stays silent.
        if self.printed not in (None, self.n):
            self._print()

    def _print(self) -> None:
        self.printed_at, self.printed = time.monotonic(), self.n
        share = f" ({self.n / self.total:.0%})" if self.total else ""
        seconds = self.printed_at - self.started
        done = self.n - self.initial
        left = f", about {seconds / done * (self.total - self.n):.0f} s left" if done and self.n < self.total else ""
        # stderr, as tqdm: stdout holds the report only.
        print(
            f"{self.desc}: {self.n}/{self.total} {self.unit}s{share} after {seconds:.0f} s{left}{self.details}",
            file=sys.stderr,
            flush=True,
        )


def progress(total: int, desc: str, unit: str = "row", scale: bool = False, leave: bool = True, initial: int = 0):
    """Create a progress display, a context manager with `update(count)`. Only rank 0 shows it.

    Args:
        total: units of work; 0 shows nothing.
        scale: show counts with SI prefixes (1.2M tok).
        leave: keep the finished bar on the terminal.
        initial: units that were finished before, which do not count for the time left.
    """
    from tqdm import tqdm

    # tqdm redraws its bar with carriage returns, which fill a log file with copies of it.
    if total and is_main_process() and not sys.stderr.isatty():
        return LineProgress(total, desc, unit, initial=initial)
    silent = not (total and is_main_process())
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=scale, leave=leave, initial=initial, disable=silent)
