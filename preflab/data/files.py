"""Read the rows of one local file: JSON, JSON lines, CSV, TSV (also gzipped, with or without a BOM) and parquet."""

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from utils.errors import UserError, first_line
from utils.parsing import parse_json

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
# Matched in this order with endswith, so no suffix may be the end of another one.
LOCAL_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be parsed, in place of its row, where bad rows are skipped."""

    problem: str


def suffix_of(path: Path) -> str:
    """The supported suffix of a file, "" if it has none."""
    # Not Path.suffix, which is only .gz for prefs.jsonl.gz.
    return next((s for s in LOCAL_SUFFIXES if path.name.endswith(s)), "")


def read_file(path: Path, keep_bad: bool = False) -> list[tuple[str, dict]]:
    """(source, row) of every row of a local file.

    Args:
        keep_bad: give a BadRow for a line that is not JSON, instead of an error.

    Raises:
        UserError: an unknown or damaged file; the message names file and line.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise UserError(f"{path}: unsupported file type; use one of {', '.join(LOCAL_SUFFIXES)}")
    if suffix == ".parquet":
        try:
            # Rows are numbered from 0, as indices of a data set; lines of a JSON lines file from 1, as in editors.
            return [(f"{path} row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from None
    text = _text(path, suffix)
    if suffix.startswith((".csv", ".tsv")):
        return _csv_rows(path, text, "\t" if suffix.startswith(".tsv") else None)
    if suffix.startswith(".jsonl"):
        return _json_lines(path, text, keep_bad)
    try:
        data = parse_json(text)
    except ValueError as error:
        # Many `.json` files hold JSON lines; then the first line is a complete document, and more data follow it.
        if _is_json(text.lstrip().partition("\n")[0]):
            return _json_lines(path, text, keep_bad)
        raise UserError(f"{path}: invalid JSON ({error})") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a JSON list of rows, not {type(data).__name__}")
    return [(f"{path} row {i}", row) for i, row in enumerate(data)]


def _text(path: Path, suffix: str) -> str:
    opener = gzip.open if suffix.endswith(".gz") else open
    try:
        # utf-8-sig: editors on Windows and spreadsheets write a byte order mark, which is not text. newline="": a line
        # break inside a cell of a CSV file is data.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as f:
            return f.read()
    # EOFError: a gzip file that was cut off, e.g. by an interrupted download. zlib.error: damage inside it.
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not UTF-8 text ({error}); save it again as UTF-8") from None


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _json_lines(path: Path, text: str, keep_bad: bool) -> list[tuple[str, dict]]:
    rows = []
    # Not splitlines: a row's text may hold other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            source = f"{path} line {number}"
            try:
                rows.append((source, parse_json(line)))
            except ValueError as error:
                problem = f"{source}: invalid JSON ({error}); fix or remove this line"
                if not keep_bad:
                    raise UserError(problem) from None
                rows.append((source, BadRow(problem)))
    return rows


def _csv_rows(path: Path, text: str, delimiter: str | None) -> list[tuple[str, dict]]:
    """Rows of a CSV file with a header; its delimiter is the most frequent one of the header."""
    header = text.partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=header.count)
    # The module's limit of 131,072 characters per cell is below a long conversation.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names, rows, line = [], [], 1
    try:
        for cells in reader:
            # The line on which the row starts: a cell may span several.
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                continue
            if len(cells) != len(names):
                raise UserError(f"{path} line {start}: {len(cells)} cells, but the header has {len(names)} columns")
            rows.append((f"{path} line {start}", dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise UserError(
            f"{path} line {line}: not valid CSV ({error}); quote cells that hold quotes or line breaks"
        ) from None
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a column name occurs twice in the header ({', '.join(names)})")
    return rows
