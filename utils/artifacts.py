"""Writing results: one envelope, atomic files, rows that are kept as they come.

Every stage's summary is `{stage, model, metrics: {name: {value, stderr, ci95, n}}, args, run}`. `run` holds what is
needed to repeat it (utils.provenance). Only rank 0 writes.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from utils.errors import UserError, is_main_process


def metric(
    value: float, stderr: float | None = None, ci95: Iterable[float] | None = None, n: int | None = None
) -> dict:
    """One figure with its standard error, 95% interval and number of rows (None where it has none)."""
    return {"value": value, "stderr": stderr, "ci95": None if ci95 is None else list(ci95), "n": n}


def envelope(stage: str, model: dict, metrics: dict, args: dict, run: dict, **extra) -> dict:
    """The result envelope that every stage's summary JSON has. `extra` adds named sections after it."""
    return {"stage": stage, "model": model, "metrics": metrics, "args": args, "run": run, **extra}


def _jsonable(value):
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return _jsonable(value.item())
    return str(value)


def dumps(value, indent: int | None = 2) -> str:
    """JSON text of `value`; NaN and infinities become null, paths and enums their text."""
    return json.dumps(_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)


def atomic_write(path: str | os.PathLike, write) -> None:
    """Call `write(temporary_path)`, then rename onto `path`, so that `path` is never half-written. Rank 0 only."""
    if not is_main_process():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(fd)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` atomically."""
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, dumps(value) + "\n")


def write_rows(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write `rows` to `path` as JSON lines, atomically."""
    write_text(path, "".join(dumps(row, indent=None) + "\n" for row in rows))


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON file. Raises UserError, naming the file, where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from None


class RowFile:
    """A `*_rows.jsonl` that is appended as rows come, so that a crash costs the row being written and no more."""

    def __init__(self, path: str | os.PathLike, every_rank: bool = False):
        self.path, self.writes = Path(path), every_rank or is_main_process()

    def read(self) -> list[dict]:
        """The rows written so far; a last line that a crash cut off is left out."""
        if not self.path.exists():
            return []
        rows = []
        # Not splitlines: a row's text may hold other line separators.
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            rows.append(json.loads(line))
        return rows

    def append(self, row: dict) -> None:
        """Append one row and flush it. Rank 0 only, unless `every_rank` has a file of its own."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - 1))
                if size and f.read() != b"\n":
                    f.seek(0)
                    f.truncate(f.read().rfind(b"\n") + 1)
                f.write((dumps(row, indent=None) + "\n").encode())

    def keep(self, wanted) -> None:
        """Drop the rows for which `wanted(row)` is false (a resumed run drops what came after its checkpoint)."""
        if is_main_process() and self.path.exists():
            write_rows(self.path, [row for row in self.read() if wanted(row)])


def with_limit_suffix(stem: str, limit: int | None) -> str:
    """`stem`, marked where a run saw only `limit` rows, so that a trial run cannot pass for a real one."""
    return stem if limit is None else f"{stem}_LIMIT{limit}"


def check_writable(folder: str | os.PathLike, flag: str) -> Path:
    """Make `folder` and prove that a file can be written there. Raises UserError naming `flag`."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = tempfile.NamedTemporaryFile(dir=folder, prefix=".probe")
        probe.close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there ({error.strerror}); choose another folder") from None
    return folder


def all_arguments(parts: list) -> dict:
    """Every argument of the run as JSON, for its artifacts; tokens and passwords are left out."""
    fields = {f.name: getattr(part, f.name, None) for part in parts for f in dataclasses.fields(part)}
    return json.loads(dumps({k: v for k, v in fields.items() if not k.endswith("token")}))


def read_yaml(path: str | os.PathLike, flag: str = "") -> dict:
    """Read a YAML file of `key: value` lines.

    Args:
        flag: the flag that names the file, for the error messages.

    Raises:
        UserError: naming flag and file, where it cannot be read or holds something else.
    """
    source = f"{flag} {path}".lstrip()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected `key: value` lines")
    return content


def read_published(path: str, kind: type = dict) -> dict:
    """A YAML file of published results: source, setting and rows. Raises UserError naming the file.

    Args:
        kind: dict for rows by name, list for rows in order.
    """
    published = read_yaml(path, "--published")
    if not {"source", "setting", "rows"} <= set(published):
        raise UserError(f"--published {path}: needs source, setting and rows")
    if not isinstance(published["rows"], kind):
        raise UserError(f"--published {path}: rows must be {'a list' if kind is list else 'given by name'}")
    return published
