"""Work that is kept as it comes: a rerun, also after kill -9 and on another number of processes, does only the rest."""

import json
import os
import shutil
from pathlib import Path

from utils.artifacts import RowFile, dumps, write_json
from utils.provenance import sha256_of

EMPTIED: set[Path] = set()


class ResultCache:
    """Finished items below `<eval_out>/.cache/<kind>-<hash>/`, one JSON line each, one file a process.

    The folder's name hashes what the items depend on (`identity`: weights, data, settings), so that an item is never
    taken for that of another question; `identity.json` holds it in words. `before` holds what was finished when the
    cache was opened, alike on every process.
    """

    def __init__(self, eval_out: str | os.PathLike, kind: str, identity: dict, overwrite: bool = False):
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        self.state = PartialState()
        name = [f"{kind}-{sha256_of(dumps(identity))[:16]}"]
        if self.state.num_processes > 1:
            # Each process asks the hub for revisions by itself; all must mean the same folder.
            broadcast_object_list(name)
        self.folder = Path(eval_out) / ".cache" / name[0]
        if self.state.is_main_process:
            # Once a call: base and tuned may share a judge's cache, and the second must not undo the first.
            if overwrite and self.folder.resolve() not in EMPTIED:
                shutil.rmtree(self.folder, ignore_errors=True)
                EMPTIED.add(self.folder.resolve())
            write_json(self.folder / "identity.json", identity)
        self.state.wait_for_everyone()
        # Read before any process adds to it: all of them must see, and share out, the same rest.
        self.before = self.read()
        self.state.wait_for_everyone()
        self.mine = RowFile(self.folder / f"rows-{self.state.process_index}.jsonl", every_rank=True)

    def read(self) -> dict[str, dict]:
        """The items finished so far by any process, by key. A line that a crash cut off is left out."""
        found = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for row in RowFile(path).read():
                found[row.pop("key")] = row
        return found

    def add(self, key: str, item: dict) -> None:
        """Keep one finished item."""
        self.mine.append({"key": key, **item})

    def share(self, batches: list) -> list:
        """This process's share of the work: every n-th batch."""
        return batches[self.state.process_index :: self.state.num_processes]

    def gather(self) -> dict[str, dict]:
        """Every item, on every process, once all of them are through."""
        self.state.wait_for_everyone()
        return self.read()


def cache_key(*parts) -> str:
    """A short key of JSON values."""
    return sha256_of(*(json.dumps(part, sort_keys=True, ensure_ascii=False) for part in parts))[:24]
