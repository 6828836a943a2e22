"""Rows of a dataset: a local file, a folder with a file per split, one file on the hub, or a hub dataset."""

import gzip
import json
import re
import zlib
from pathlib import Path

from utils.errors import UserError
from utils.hub import fetch
from utils.provenance import hub_revision, sha256_of_files

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
HUB_FILE = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def _suffix(path: Path) -> str:
    return next((s for s in LOCAL_SUFFIXES if path.name.endswith(s)), "")


def _read_file(path: Path) -> list[tuple[str, dict]]:
    """Rows of a local file, each with the place to name in an error."""
    suffix = _suffix(path)
    if not suffix:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(LOCAL_SUFFIXES)}")
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            return [(f"{path} row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    opener = gzip.open if suffix.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            text = f.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or not UTF-8 text ({error}); save it again as UTF-8") from None
    if suffix.startswith(".jsonl"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"{path} line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(
                        f"{path} line {number}: not valid JSON ({error}); mend or delete the line"
                    ) from None
        return rows
    try:
        data = json.loads(text)
    except ValueError as error:
        hint = "; is it JSON lines? then name it .jsonl" if text.lstrip().startswith("{") else ""
        raise UserError(f"{path}: not valid JSON ({error}){hint}") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a JSON list of rows, found {type(data).__name__}")
    return [(f"{path} row {i}", row) for i, row in enumerate(data)]


def _read_local(path: Path, split: str) -> tuple[list[tuple[str, dict]], dict]:
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if _suffix(f) and re.split(r"[.\-]", f.name)[0] == split]
        if not files:
            names = sorted({re.split(r"[.\-]", f.name)[0] for f in path.iterdir() if _suffix(f)})
            raise UserError(
                f"{path}: no file of split {split!r} there (splits found: {', '.join(names) or 'none'}); set"
                " --dataset_train_split and --dataset_test_split (none: no evaluation), or --split in an evaluation"
            )
    else:
        files = [path]
    rows = [row for f in files for row in _read_file(f)]
    return rows, {"name": str(path), "split": split, "files": [f.name for f in files], "sha256": sha256_of_files(files)}


def _read_hub(name: str, split: str, config: str | None, revision: str | None) -> tuple[list[tuple[str, dict]], dict]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors as hub

    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except DatasetNotFoundError as error:
        mend = "run `hf auth login` after accepting its licence" if "gated" in str(error) else "check the spelling"
        raise UserError(f"dataset {name}: not found on the hub, and no such local file or folder; {mend}") from None
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError, hub.OfflineModeIsEnabled) as error:
        raise UserError(f"dataset {name}: the hub cannot be reached ({str(error).splitlines()[0]})") from None
    except ValueError as error:
        raise UserError(
            f"dataset {name}: {str(error).splitlines()[0]} (--dataset_config, --dataset_train_split and"
            " --dataset_test_split choose, in an evaluation --split; none as test split: no evaluation)"
        ) from None
    except Exception as error:
        raise UserError(
            f"dataset {name} split {split}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    source = {"name": name, "config": config, "split": split, "revision": hub_revision(name, "dataset", revision)}
    return [(f"{name} {split} row {i}", row) for i, row in enumerate(dataset)], source


def _read_hub_file(url: str) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of one file of a hub dataset, `hf://datasets/OWNER/NAME[@REVISION]/PATH`."""
    match = HUB_FILE.fullmatch(url)
    if match is None:
        raise UserError(f"{url}: expected hf://datasets/OWNER/NAME/PATH (after NAME perhaps @REVISION)")
    repo, file, revision = match["repo"], match["file"], match["revision"]
    path = fetch(repo, file, "dataset", revision)
    rows = [(where.replace(str(path), url), row) for where, row in _read_file(path)]
    commit = hub_revision(repo, "dataset", revision)
    return rows, {"name": url, "split": None, "revision": commit, "sha256": sha256_of_files([path])}


def read_rows(name: str, split: str, config: str | None = None, revision: str | None = None):
    """Rows of a local .jsonl, .json or .parquet file, a folder with a file per split, a hub dataset, or one hub file.

    Returns:
        (rows, source): rows as `(where, dict)`, and what identifies them in an artifact.
    """
    path = Path(name).expanduser()
    if name.startswith("hf://"):
        rows, source = _read_hub_file(name)
    elif path.exists():
        rows, source = _read_local(path, split)
    elif _suffix(path) or name.startswith((".", "/", "~")):
        raise UserError(f"dataset {name}: no such file or folder")
    else:
        rows, source = _read_hub(name, split, config, revision)
    if not rows:
        raise UserError(f"dataset {name} split {split}: no rows")
    return rows, {**source, "rows": len(rows)}
