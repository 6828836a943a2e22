"""Results that are saved as they are computed, so that a rerun computes only the rest.

This holds after kill -9 and on another number of processes.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.artifacts import RowFile, dumps, write_json
from utils.provenance import sha256_of

# Folders that --overwrite has already emptied in this process.
# Process-wide, because a call opens the same cache several times (one judge for several models).
EMPTIED: set[Path] = set()
# How many items this process has computed, by kind.
COMPUTED: Counter[str] = Counter()


def user_cache() -> Path:
    """Where the builtin model and tokenised rows are: $PREFERENCELAB_CACHE, or a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PREFERENCELAB_CACHE") or Path(base) / "preferencelab")


class ResultCache:
    """Finished items below `<eval_out>/.cache/<kind>-<hash>/`: one JSON line per item, one file per process.

    The folder's name hashes everything the items depend on (`identity`: weights, data, settings), so an item is never
    read for another request. `identity.json` holds the same in readable form.

    Attributes:
        finished: items by key, as they were when the cache was opened; equal on every process.
        own_rows: the file that this process appends to.
    """

    def __init__(self, eval_out: str | os.PathLike, kind: str, identity: dict, overwrite: bool = False):
        # Inside the function: accelerate imports torch, and no module of utils imports torch at its top.
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        self.state, self.kind = PartialState(), kind
        # 16 hexadecimal digits are 64 bits, enough to make a collision between requests negligible.
        name = [f"{kind}-{sha256_of(dumps(identity))[:16]}"]
        if self.state.num_processes > 1:
            # Each process asks the hub for revisions separately and may get another answer; rank 0 decides.
            broadcast_object_list(name)
        self.folder = Path(eval_out) / ".cache" / name[0]
        if self.state.is_main_process:
            # Once per call: base and tuned may share a judge's cache, and the second must not delete the first's rows.
            if overwrite and self.folder.resolve() not in EMPTIED:
                shutil.rmtree(self.folder, ignore_errors=True)
                EMPTIED.add(self.folder.resolve())
            write_json(self.folder / "identity.json", identity)
        # Barrier: no process may read rows that rank 0 is about to delete.
        self.state.wait_for_everyone()
        # Read before any process appends: all of them must see, and divide, the same remaining work.
        self.finished = self.read()
        # Barrier: no process may append before all have read.
        self.state.wait_for_everyone()
        # One file per process, so that appends need no lock.
        self.own_rows = RowFile(self.folder / f"rows-{self.state.process_index}.jsonl", every_rank=True)

    def read(self) -> dict[str, dict]:
        """Items finished so far by any process, by key. Skips a line that a crash cut off."""
        items = {}
        # Every rows-*.jsonl, not one per current process: an earlier call may have had more processes. The order is
        # fixed, so that all processes resolve a duplicate key to the same row.
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for row in RowFile(path).read():
                items[row.pop("key")] = row
        return items

    def add(self, key: str, item: dict) -> None:
        """Save one finished item."""
        self.own_rows.append({"key": key, **item})
        COMPUTED[self.kind] += 1

    def own_share(self, batches: list) -> list:
        """This process's part of the work: every n-th batch, n the number of processes."""
        # A stride, not a contiguous block: batches usually come longest first, and a block would give one process all
        # long ones.
        return batches[self.state.process_index :: self.state.num_processes]

    def gather(self) -> dict[str, dict]:
        """Wait for all processes, then return every item on each of them."""
        # Every `add` closes its file, so after the barrier each process reads the rows of all others.
        self.state.wait_for_everyone()
        return self.read()


@contextmanager
def measured_work(kind: str) -> Iterator[dict]:
    """Measure what is computed inside: yields an entry `{seconds, computed, of}`, filled at the end.

    Args:
        kind: the start of the kinds of caches whose items count. The caller sets `of`, the items that would have been
            computed without a cache.
    """
    from accelerate import PartialState

    def computed() -> int:
        return sum(count for name, count in COMPUTED.items() if name.startswith(kind))

    entry, before, started = {"seconds": 0.0, "computed": 0, "of": 0}, computed(), time.monotonic()
    yield entry
    entry["seconds"] = round(time.monotonic() - started, 3)
    # The processes share the work evenly.
    entry["computed"] = (computed() - before) * PartialState().num_processes


def cache_key(*parts) -> str:
    """24 hexadecimal digits that identify a list of JSON values; the order of dictionary keys does not matter."""
    return sha256_of(*(json.dumps(part, sort_keys=True, ensure_ascii=False) for part in parts))[:24]
