"""Read the rows of a dataset: a local file, a folder with one file per split, a file on the hub, or a hub dataset.

Every row comes with its source, e.g. `prefs.jsonl line 7`, so that an error can name the row to fix.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

import pyarrow.parquet
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors as hub
from huggingface_hub import parse_hf_uri

from utils.errors import UserError
from utils.hub import fetch
from utils.provenance import hub_revision, sha256_of_files

# Matched in this order with endswith, so no suffix may be the end of another one.
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def _suffix(path: Path) -> str:
    """The supported suffix of a file, "" if it has none."""
    # Not Path.suffix, which is only .gz for prefs.jsonl.gz.
    return next((s for s in LOCAL_SUFFIXES if path.name.endswith(s)), "")


def _read_file(path: Path) -> list[tuple[str, dict]]:
    """(source, row) of every row of a local file."""
    suffix = _suffix(path)
    if not suffix:
        raise UserError(f"{path}: unsupported file type; use one of {', '.join(LOCAL_SUFFIXES)}")
    if suffix == ".parquet":
        try:
            # Rows are numbered from 0, as indices of a data set; lines of a JSON lines file from 1, as in editors.
            return [(f"{path} row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    opener = gzip.open if suffix.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            text = f.read()
    # EOFError: a gzip file that was cut off, e.g. by an interrupted download. zlib.error: damage inside it.
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not UTF-8 text ({error}); save it again as UTF-8") from None
    if suffix.startswith(".jsonl"):
        rows = []
        # Not splitlines: a row's text may hold other line separators.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"{path} line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path} line {number}: invalid JSON ({error}); fix or remove this line") from None
        return rows
    try:
        data = json.loads(text)
    except ValueError as error:
        # JSON lines fail here: the first row is a complete document, and more data follow it.
        hint = "; if it holds JSON lines, name it .jsonl" if text.lstrip().startswith("{") else ""
        raise UserError(f"{path}: invalid JSON ({error}){hint}") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a JSON list of rows, not {type(data).__name__}")
    return [(f"{path} row {i}", row) for i, row in enumerate(data)]


def _read_local(path: Path, split: str) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of a file, or of a folder's files `<split>.*` and `<split>-*`."""
    if path.is_dir():
        # `train.jsonl`, and the shards `train-00000-of-00002.parquet` of a downloaded hub data set, in order.
        files = [f for f in sorted(path.iterdir()) if _suffix(f) and re.split(r"[.\-]", f.name)[0] == split]
        if not files:
            names = sorted({re.split(r"[.\-]", f.name)[0] for f in path.iterdir() if _suffix(f)})
            raise UserError(
                f"{path}: no file of split {split!r} (splits found: {', '.join(names) or 'none'}); set"
                " --dataset_train_split and --dataset_test_split (none: no evaluation), or --split in an evaluation"
            )
    else:
        files = [path]
    # The hash is over file names and contents, so that a moved folder is still the same data.
    rows = [row for f in files for row in _read_file(f)]
    return rows, {"name": str(path), "split": split, "files": [f.name for f in files], "sha256": sha256_of_files(files)}


def _read_hub(name: str, split: str, config: str | None, revision: str | None) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of a hub dataset."""
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except DatasetNotFoundError as error:
        # The hub raises the same error for a gated and for an unknown data set; only its text differs.
        fix = "run `hf auth login` after accepting its licence" if "gated" in str(error) else "check the spelling"
        raise UserError(f"dataset {name}: not found on the hub, and no such local file or folder; {fix}") from None
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError, hub.OfflineModeIsEnabled) as error:
        raise UserError(f"dataset {name}: the hub cannot be reached ({str(error).splitlines()[0]})") from None
    # `datasets` reports unknown configurations and splits as ValueError and lists the valid ones.
    except ValueError as error:
        raise UserError(
            f"dataset {name}: {str(error).splitlines()[0]} (set --dataset_config, --dataset_train_split and"
            " --dataset_test_split, or --split in an evaluation; --dataset_test_split none: no evaluation)"
        ) from None
    # Loading scripts and builders raise errors of many types; all of them become one line.
    except Exception as error:
        raise UserError(
            f"dataset {name} split {split}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    # The commit, not the branch: `main` may point to other data tomorrow.
    source = {"name": name, "config": config, "split": split, "revision": hub_revision(name, "dataset", revision)}
    return [(f"{name} {split} row {i}", row) for i, row in enumerate(dataset)], source


def _read_hub_file(url: str) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of one file of a hub dataset, `hf://datasets/OWNER/NAME[@REVISION]/PATH`."""
    try:
        # Unlike HfFileSystem.resolve_path, this needs no network.
        uri = parse_hf_uri(url)
    except ValueError:
        uri = None
    if uri is None or uri.type != "dataset" or not uri.path_in_repo:
        raise UserError(f"{url}: expected hf://datasets/OWNER/NAME/PATH or hf://datasets/OWNER/NAME@REVISION/PATH")
    path = fetch(uri.id, uri.path_in_repo, "dataset", uri.revision)
    # Errors name the URL that the user gave, not the file in the cache.
    rows = [(source.replace(str(path), url), row) for source, row in _read_file(path)]
    commit = hub_revision(uri.id, "dataset", uri.revision)
    return rows, {"name": url, "split": None, "revision": commit, "sha256": sha256_of_files([path])}


def read_rows(name: str, split: str, config: str | None = None, revision: str | None = None):
    """Read all rows of a dataset.

    Args:
        name: a local .jsonl, .json or .parquet file (.gz allowed), a folder with one file per split, a hub dataset, or
            one hub file as `hf://datasets/OWNER/NAME/PATH`.
        split: the split of a folder or a hub dataset.
        config, revision: of a hub dataset.

    Returns:
        (rows, about): rows as (source, dict), and what identifies them in an artifact.

    Raises:
        UserError: a missing, damaged or empty dataset; the message names file and line.
    """
    path = Path(name).expanduser()
    if name.startswith("hf://"):
        rows, about = _read_hub_file(name)
    elif path.exists():
        rows, about = _read_local(path, split)
    # Such a name is not a hub id; asking the hub would give a misleading error.
    elif _suffix(path) or name.startswith((".", "/", "~")):
        raise UserError(f"dataset {name}: no such file or folder")
    else:
        rows, about = _read_hub(name, split, config, revision)
    if not rows:
        raise UserError(f"dataset {name} split {split}: no rows")
    return rows, {**about, "rows": len(rows)}
