"""Result files: one envelope for all stages, atomic writes, rows appended as they are computed.

Every stage's summary is `{stage, model, metrics: {name: {value, stderr, ci95, n}}, args, run}`. `run` holds what is
needed to repeat it (utils.provenance). Only rank 0 writes.
"""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from utils.errors import UserError, is_main_process, undo_on_failure
from utils.parsing import parse_json, parse_yaml
from utils.provenance import local_path
from utils.secrets_in_text import without_secrets


def metric(
    value: float, stderr: float | None = None, ci95: Iterable[float] | None = None, n: int | None = None
) -> dict:
    """A figure with its standard error, 95% interval and number of rows; None for those it does not have."""
    return {"value": value, "stderr": stderr, "ci95": None if ci95 is None else list(ci95), "n": n}


def envelope(stage: str, model: dict, metrics: dict, args: dict, run: dict, **extra) -> dict:
    """The sections of every stage's summary JSON; `extra` adds further ones after them."""
    return {"stage": stage, "model": model, "metrics": metrics, "args": args, "run": run, **extra}


def _jsonable(value):
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        # JSON has no NaN and no infinity; Python's default output of them is rejected by other parsers.
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    # numpy scalars and arrays of one element, without importing numpy. Torch tensors are not handled: they become text.
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return _jsonable(value.item())
    return str(value)


def dumps(value, indent: int | None = 2) -> str:
    """JSON text of `value`; NaN and infinities become null, paths and enums strings."""
    text = json.dumps(_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (half of an emoji) has no UTF-8: escaped, it does not stop the writing of results.
    return text if _encodable(text) else json.dumps(json.loads(text), indent=indent)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# The beginning of the names of files that are being written; a killed process leaves such a file behind.
TEMPORARY = ".partial-"


def holds_files(folder: Path) -> bool:
    """Whether a folder exists and has files or folders, other than what an interrupted `atomic_write` left."""
    return folder.exists() and any(not path.name.startswith(TEMPORARY) for path in folder.iterdir())


def remove_folder(folder: Path, marks: Iterable[str]) -> None:
    """Delete a folder if it exists, and last the files that mark it as this project's.

    A call that is killed meanwhile thus never leaves a folder that the next call takes for the user's own.
    """
    for path in [path for path in folder.glob("*") if path.name not in set(marks)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def atomic_write(path: str | os.PathLike, write) -> None:
    """Call `write(temporary_path)`, then rename to `path`, so that `path` is never incomplete. Rank 0 only."""
    if not is_main_process():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system. The suffix stays, since some writers
    # infer the format from it.
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix)
    os.close(fd)
    try:
        write(Path(temporary))
        # Without fsync, a power failure after the rename may leave `path` empty.
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        # mkstemp creates files that only the owner can read; restore the permissions of an ordinary new file. The
        # umask can be read only by setting it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    # Ctrl-C and SystemExit too: they must not leave temporary files behind.
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` atomically."""
    # What has no UTF-8 becomes a question mark instead of stopping the writing of results.
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8", errors="replace"))


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, dumps(value) + "\n")


def write_rows(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write `rows` to `path` as JSON lines, atomically."""
    write_text(path, "".join(dumps(row, indent=None) + "\n" for row in rows))


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON file. Raises UserError, naming the file, if it is missing or damaged."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); fix it, or move it away and run the stage that writes it"
        ) from None


class RowFile:
    """A `*_rows.jsonl` file to which rows are appended one by one: a crash loses at most the row being written.

    Args:
        every_rank: let every rank write (each to a different path); default: rank 0 only.
    """

    def __init__(self, path: str | os.PathLike, every_rank: bool = False):
        self.path, self.writes = Path(path), every_rank or is_main_process()

    def read(self) -> list[dict]:
        """The rows written so far, without a last line that a crash cut off.

        Raises:
            UserError: a damaged line. Names file and line.
        """
        if not self.path.exists():
            return []
        rows = []
        # Not splitlines(), which also splits at U+2028 and other separators that JSON text may contain.
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{self.path} line {number}: damaged ({error}); remove this line") from None
        return rows

    def append(self, row: dict) -> None:
        """Append one row and flush it, after removing an incomplete last line."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Closed after every row: the operating system has it then, so it survives kill -9 (not a power failure; an
            # fsync per row would be slow). In append mode every write goes to the end, wherever the last read was.
            with self.path.open("ab+") as f:
                # Two evaluations may share a cache (the same base): a row of the other one that is half written must
                # not be taken for one that a crash cut off. Closing the file ends the lock.
                with suppress(OSError):
                    fcntl.flock(f, fcntl.LOCK_EX)
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - 1))
                if size and f.read() != b"\n":
                    # The last row of a killed process is cut back to the previous line break; rfind gives -1 + 1 = 0 if
                    # there is none.
                    f.seek(0)
                    f.truncate(f.read().rfind(b"\n") + 1)
                f.write((dumps(row, indent=None) + "\n").encode())

    def keep(self, wanted) -> None:
        """Drop the rows for which `wanted(row)` is false (a resumed run drops those after its checkpoint)."""
        if is_main_process() and self.path.exists():
            write_rows(self.path, [row for row in self.read() if wanted(row)])


def with_limit_suffix(stem: str, limit: float | None) -> str:
    """Mark the name of a run on only `limit` rows (below 1: their share), so that it is not mistaken for a full one."""
    return stem if limit is None else f"{stem}_LIMIT{limit}"


def check_writable(folder: str | os.PathLike, flag: str) -> Path:
    """Create `folder` and check that a file can be written there. Raises UserError naming `flag`.

    If the script fails before it has written there, the folder is removed again.
    """
    folder = Path(folder)
    remove_if_empty_on_failure(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not settle it (access lists, network file systems, a full disk), so a file is created.
        probe = tempfile.NamedTemporaryFile(dir=folder, prefix=".probe")
        probe.close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: not writable ({error.strerror}); choose another folder") from None
    return folder


def remove_if_empty_on_failure(folder: Path) -> None:
    """If the script fails, remove `folder` and those of its parents that do not exist yet, where they are empty."""
    if not is_main_process():
        return
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        # A folder with files, of this call or of another one, cannot be removed by rmdir.
        undo_on_failure(missing.rmdir)


def all_arguments(parts: list) -> dict:
    """All fields of the argument dataclasses as JSON values, without access tokens (`*token`) and logins of URLs."""
    # Through JSON and back, so that tuples and enums compare equal to those read from an earlier artifact.
    fields = {f.name: getattr(part, f.name, None) for part in parts for f in dataclasses.fields(part)}
    return json.loads(without_secrets(dumps({k: v for k, v in fields.items() if not k.endswith("token")})))


def changed_arguments(before: dict, now: dict, ignored: Iterable[str] = (), defaults: dict | None = None) -> list[str]:
    """Sorted keys of `now` whose value differs from that of an earlier call with the same output files.

    Args:
        before: the earlier call's arguments, as read from its artifact.
        now: this call's arguments, as `all_arguments` gives them.
        ignored: arguments that do not affect results.
        defaults: values of keys that `before` does not have, because an older version wrote it; `now` itself to
            treat such keys as unchanged.
    """
    defaults = defaults or {}
    return sorted(k for k in now if k not in set(ignored) and now[k] != before.get(k, defaults.get(k)))


def describe_changes(before: dict, now: dict, keys: list[str], most: int = 3) -> str:
    """`beta 0.1 -> 0.2, seed 42 -> 1`: the first `most` changed arguments, for an error message."""
    return ", ".join(f"{k} {before.get(k)!r} -> {now[k]!r}" for k in keys[:most])


def read_yaml(path: str | os.PathLike, flag: str = "") -> dict:
    """Read a YAML file of `key: value` lines.

    Args:
        flag: the flag that names the file, for the error messages.

    Raises:
        UserError: the file cannot be read or is not a mapping. Names flag and file.
    """
    source = f"{flag} {path}".lstrip()
    try:
        content = parse_yaml(local_path(path).read_text(encoding="utf-8-sig"))
    # ValueError: also of bytes that are not UTF-8.
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected `key: value` lines")
    return content


def read_published(path: str, kind: type = dict) -> dict:
    """Read a YAML file of published results: source, setting and rows. Raises UserError naming the file.

    Args:
        kind: dict for rows by name, list for rows in order.
    """
    published = read_yaml(path, "--published")
    if not {"source", "setting", "rows"} <= set(published):
        raise UserError(f"--published {path}: needs source, setting and rows")
    if not isinstance(published["rows"], kind):
        raise UserError(f"--published {path}: rows must be a {'list' if kind is list else 'mapping by name'}")
    return published
