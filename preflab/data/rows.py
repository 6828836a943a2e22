"""Read the rows of a dataset: a local file, a folder with one file per split, a file on the hub, or a hub dataset.

Every row comes with its source, e.g. `prefs.jsonl line 7`, so that an error can name the row to fix.
"""

import re
from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors as hub
from huggingface_hub import parse_hf_uri

from preflab.data.files import read_file, suffix_of
from utils.errors import UserError, first_line
from utils.hub import fetch, why_unreachable
from utils.provenance import hub_revision, local_path, sha256_of_files


def _read_local(path: Path, split: str, config: str | None, keep_bad: bool) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of a file, of a folder's files of the split, or of a folder that `save_to_disk` wrote."""
    if path.is_dir():
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            return _read_saved(path, split)
        files = _files_of_split(path, split, config)
        if not files:
            names = sorted({_split_of(f) for folder in (path, path / "data") for f in _data_files(folder)})
            raise UserError(
                f"{path}: no file of split {split!r} (splits found: {', '.join(names) or 'none'}); set"
                " --dataset_train_split and --dataset_test_split (none: no evaluation), or --split in an evaluation"
            )
    else:
        files = [path]
    # The hash is over file names and contents, so that a moved folder is still the same data.
    rows = [row for f in files for row in read_file(f, keep_bad)]
    return rows, {
        "name": str(path),
        "split": split,
        "files": [str(f.relative_to(path)) if path.is_dir() else f.name for f in files],
        "sha256": sha256_of_files(files),
    }


def _data_files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.is_file() and suffix_of(f)] if folder.is_dir() else []


def _split_of(file: Path) -> str:
    return re.split(r"[.\-]", file.name)[0]


def _files_of_split(path: Path, split: str, config: str | None) -> list[Path]:
    """The files of a split, in order, in the layouts of folders and of downloaded hub data sets.

    `train.jsonl`, `train-00000-of-00002.parquet`, both also in `data/` or in the folder of a configuration, and a
    folder per split (`train/0.parquet`).
    """
    folders = [path / config, path / "data" / config] if config else [path, path / "data"]
    for folder in folders:
        files = [f for f in _data_files(folder) if _split_of(f) == split]
        if files:
            return files
    return next((files for folder in folders if (files := _data_files(folder / split))), [])


def _read_saved(path: Path, split: str) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of a folder that `save_to_disk` of the `datasets` library wrote."""
    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable data set of save_to_disk ({first_line(error)})") from None
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(
                f"{path}: has no split {split!r} (splits: {', '.join(data)}); set --dataset_train_split and"
                " --dataset_test_split (none: no evaluation), or --split in an evaluation"
            )
        data, folder = data[split], path / split
    else:
        folder = path
    files = sorted(folder.glob("*.arrow"))
    rows = [(f"{path} {split} row {i}", row) for i, row in enumerate(data)]
    return rows, {
        "name": str(path),
        "split": split,
        "files": [str(f.relative_to(path)) for f in files],
        "sha256": sha256_of_files(files),
    }


def _read_hub(name: str, split: str, config: str | None, revision: str | None) -> tuple[list[tuple[str, dict]], dict]:
    """Rows of a hub dataset."""
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except DatasetNotFoundError as error:
        # The hub raises the same error for a gated and for an unknown data set; only its text differs.
        fix = "run `hf auth login` after accepting its licence" if "gated" in str(error) else "check the spelling"
        raise UserError(f"dataset {name}: not found on the hub, and no such local file or folder; {fix}") from None
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError, hub.OfflineModeIsEnabled) as error:
        raise UserError(f"dataset {name} is not in the local cache, and {why_unreachable(error)}") from None
    # `datasets` reports unknown configurations and splits as ValueError and lists the valid ones.
    except ValueError as error:
        raise UserError(
            f"dataset {name}: {first_line(error)} (set --dataset_config, --dataset_train_split and"
            " --dataset_test_split, or --split in an evaluation; --dataset_test_split none: no evaluation)"
        ) from None
    # Loading scripts and builders raise errors of many types; all of them become one line.
    except Exception as error:
        raise UserError(f"dataset {name} split {split}: {type(error).__name__}: {first_line(error)}") from error
    # The commit, not the branch: `main` may point to other data tomorrow.
    source = {"name": name, "config": config, "split": split, "revision": hub_revision(name, "dataset", revision)}
    return [(f"{name} {split} row {i}", row) for i, row in enumerate(dataset)], source


def _read_hub_file(url: str, keep_bad: bool) -> tuple[list[tuple[str, dict]], dict]:
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
    rows = [(source.replace(str(path), url), row) for source, row in read_file(path, keep_bad)]
    commit = hub_revision(uri.id, "dataset", uri.revision)
    return rows, {"name": url, "split": None, "revision": commit, "sha256": sha256_of_files([path])}


def read_rows(name: str, split: str, config: str | None = None, revision: str | None = None, keep_bad: bool = False):
    """Read all rows of a dataset.

    Args:
        name: a local file of a type in LOCAL_SUFFIXES (preflab.data.files), a folder, a hub dataset, or one hub file as
            `hf://datasets/OWNER/NAME/PATH`.
        split: the split of a folder or a hub dataset.
        config, revision: of a hub dataset.
        keep_bad: give a BadRow for a line that is not JSON, instead of an error.

    Returns:
        (rows, about): rows as (source, dict), and what identifies them in an artifact.

    Raises:
        UserError: a missing, damaged or empty dataset; the message names file and line.
    """
    path = local_path(name)
    if name.startswith("hf://"):
        rows, about = _read_hub_file(name, keep_bad)
    elif path.exists():
        rows, about = _read_local(path, split, config, keep_bad)
        if path != Path(name).expanduser():
            # A shipped file has one name in artifacts, wherever the command was typed.
            about["name"] = name
    # Such a name is not a hub id; asking the hub would give a misleading error.
    elif suffix_of(path) or name.startswith((".", "/", "~")):
        raise UserError(f"dataset {name}: no such file or folder")
    else:
        rows, about = _read_hub(name, split, config, revision)
    if not rows:
        raise UserError(f"dataset {name} split {split}: no rows")
    return rows, {**about, "rows": len(rows)}
