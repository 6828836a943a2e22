"""Caches and leftovers of this project: what they are, how large, and their removal."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.runs import folder_size
from utils.artifacts import TEMPORARY
from utils.cache import user_cache
from utils.locks import is_held

SECONDS_OF_A_WRITE = 3600


@dataclass
class Leftover:
    """A file or folder that can be deleted.

    Attributes:
        costs: what is lost with it.
    """

    path: Path
    costs: str

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return folder_size(self.path) if self.path.is_dir() else self.path.stat().st_size

    def remove(self) -> None:
        """Delete it; no error if it is gone already."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def leftovers(checkpoints: Path, eval_out: Path) -> Iterator[Leftover]:
    """Everything that --clean may delete. Runs, results and locks in use are never part of it."""
    caches = eval_out / ".cache"
    for folder in sorted(caches.glob("*")):
        yield Leftover(folder, "recomputed by the next evaluation or training that needs it")
    if user_cache().exists():
        yield Leftover(user_cache(), "the builtin model and tokenised rows, made again when they are used")
    # Evaluations lock the files that they write.
    for lock in sorted([*checkpoints.glob(".*.lock"), *eval_out.rglob(".*.lock")]):
        # Files in a cache are deleted with it.
        if caches not in lock.parents and not is_held(lock):
            yield Leftover(lock, "nothing: its process has ended")
    for path in sorted([*checkpoints.rglob(f"{TEMPORARY}*"), *eval_out.rglob(f"{TEMPORARY}*")]):
        # A file that is being written has its final name within seconds.
        if caches not in path.parents and path.stat().st_mtime < time.time() - SECONDS_OF_A_WRITE:
            yield Leftover(path, "nothing: its process was killed while it wrote the file")
