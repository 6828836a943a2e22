"""Tokenised rows of a split: written to Arrow batch by batch, and cached on disk by their content.

The token ids of 61,135 pairs are 50 million integers: as Python lists 1.8 GB, in a memory-mapped Arrow file a few
hundred MB on disk. The cache's key hashes the rows' content, the tokenizer, the template with its date, the truncation,
this room's source code and the libraries' versions, so that an entry is never read for other ids.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock

from preflab.data.template_date import with_fixed_date
from utils.artifacts import read_json, write_json
from utils.cache import user_cache
from utils.progress import progress
from utils.provenance import sha256_of_files

# Rows per call of the tokenizer, whose library divides them over all cores.
BATCH = 1024
# Smaller splits are tokenised in seconds and not cached.
SMALLEST = 2000
# Entries in the cache; the ones that were not read for the longest time are deleted.
ENTRIES = 16
IDS = pa.list_(pa.int32())


@dataclass
class Outcome:
    """What became of the rows.

    Attributes:
        usable: positions of the rows that are left, in order.
        dropped: number of rows dropped, by reason.
        counts: what was counted on the way (truncation and the like).
        refusal: the first row that the template refused and why, or None.
    """

    usable: list[int] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)
    refusal: str | None = None

    def refuse(self, source: str, error: Exception) -> None:
        """Count a row that the chat template refused."""
        self.refusal = self.refusal or f"{source}: {error}"
        self.dropped["template_refused"] += 1

    def add(self, other: "Outcome", start: int) -> None:
        """Append the outcome of the batch that begins at row `start`."""
        self.usable += [start + i for i in other.usable]
        self.dropped += other.dropped
        # Not `+=`, which removes counts of 0.
        self.counts.update(other.counts)
        self.refusal = self.refusal or other.refusal


def tokenise(
    items: list, of_batch: Callable[[list], tuple[dict, Outcome]], schema: pa.Schema, identity: list[str], desc: str
) -> tuple[Dataset, Outcome]:
    """Tokenise rows in batches, or read them from the cache.

    Safe for concurrent runs and for the processes of one: the first one writes, the others wait and read.

    Args:
        items: dataclass instances; all their attributes but `source` are content.
        of_batch: gives the columns of `schema` and the outcome of some items, positions counted from 0.
        identity: everything beside the items' content that the ids depend on.
        desc: what is tokenised, for the progress.
    """
    root = user_cache() / "tokenised"
    if len(items) < SMALLEST or not _is_writable(root):
        outcome = Outcome()
        tables = list(_tables(items, of_batch, schema, outcome, desc))
        return Dataset(pa.concat_tables(tables) if tables else schema.empty_table()), outcome
    key = _content_key(items, [*identity, str(schema)])
    folder = root / key
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _write(folder, items, of_batch, schema, desc)
            _delete_oldest(folder.parent)
        # The time of the last reading, for the choice of what is deleted.
        os.utime(folder)
    stored = read_json(folder / "outcome.json")
    outcome = Outcome(stored["usable"], Counter(stored["dropped"]), Counter(stored["counts"]), stored["refusal"])
    return Dataset.from_file(str(folder / "rows.arrow")), outcome


def _is_writable(root: Path) -> bool:
    """Whether entries can be written to `root`, which is made. Without a cache, every run tokenises."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _tables(items: list, of_batch, schema: pa.Schema, outcome: Outcome, desc: str):
    """Yield the table of each batch, and add to `outcome`."""
    bar = progress(len(items), desc, leave=False)
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        columns, part = of_batch(batch)
        outcome.add(part, start)
        yield pa.table(columns, schema=schema)
        bar.update(len(batch))
    bar.close()


def _write(folder: Path, items: list, of_batch, schema: pa.Schema, desc: str) -> None:
    """Write an entry of the cache; its folder appears, complete, by a rename."""
    staging, outcome = Path(f"{folder}.part"), Outcome()
    # Left by an interrupted call.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with pa.OSFile(str(staging / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in _tables(items, of_batch, schema, outcome, desc):
            writer.write_table(table)
    write_json(staging / "outcome.json", vars(outcome))
    os.replace(staging, folder)


def _delete_oldest(root: Path) -> None:
    """Delete the entries beyond the newest ones. A process that has one open keeps its files until it ends."""
    entries = sorted((p for p in root.iterdir() if (p / "outcome.json").exists()), key=lambda p: -p.stat().st_mtime)
    for folder in entries[ENTRIES:]:
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.lock").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ identity


def _content_key(items: list, identity: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([*identity, _code()]).encode())
    for item in items:
        # Lone surrogates can be in keys that are not rendered; they have no UTF-8.
        content = {name: value for name, value in vars(item).items() if name != "source"}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]


@cache
def _code() -> str:
    """This room's source code and the versions of the libraries that make token ids from rows."""
    libraries = [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2", "trl")]
    return " ".join([sha256_of_files(sorted(Path(__file__).parent.glob("*.py"))), *libraries])


def identity_of(tokenizer, template: str | None) -> list[str]:
    """What token ids depend on in a tokenizer and the chat template in use."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = with_fixed_date(template) if isinstance(template, str) else json.dumps(template)
    tokens = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return [type(tokenizer).__name__, hashlib.sha256(vocabulary.encode()).hexdigest(), tokens, template]


# ------------------------------------------------------------------------------------------------------------- columns


def lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The number of ids in each row of a column, shape (rows,)."""
    return pc.list_value_length(_arrow(dataset, column)).to_numpy().astype(np.int64)


def largest_id(dataset: Dataset, column: str) -> int:
    """The largest id in a column."""
    return pc.max(pc.list_flatten(_arrow(dataset, column))).as_py() or 0


def ends_of(dataset: Dataset, column: str, first: int | None = None, last: int | None = None) -> list[list[int]]:
    """The `first` or the `last` ids of each row of a column."""
    ids = pc.list_flatten(_arrow(dataset, column)).to_numpy()
    ends = lengths(dataset, column).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    bounds = (starts, np.minimum(starts + first, ends)) if first else (np.maximum(ends - last, starts), ends)
    return [ids[a:b].tolist() for a, b in zip(*bounds, strict=True)]


def count_other_than(dataset: Dataset, column: str, ignored: int) -> int:
    """The number of ids in a column that are not `ignored`."""
    return pc.sum(pc.not_equal(pc.list_flatten(_arrow(dataset, column)), ignored)).as_py() or 0


def _arrow(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """A column without Python lists of its ids, which take about ten times the memory."""
    return dataset.select_columns([column]).with_format("arrow")[:][column]
