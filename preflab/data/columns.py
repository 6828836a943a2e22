"""--columns: names for columns that no rule knows, e.g. `chosen=output_a rejected=output_b prompt=task`."""

from collections.abc import Collection

from preflab.data.messages import OPTIONS
from preflab.data.row_fields import JOINED, PROMPTS, SCORES, SYSTEM, WIN_KEYS
from preflab.data.schemas import LISTS, PAIRS, SCORED
from utils.errors import UserError

NONE = "none"
# What a column may be called: every column that a rule reads.
KNOWN = {
    *(name for schema in (*PAIRS, *LISTS, *SCORED) for name in schema.columns),
    *(name for names in (PROMPTS, JOINED, SYSTEM, OPTIONS, *SCORES, *WIN_KEYS.values()) for name in names),
    *("completion", "response", "output", "answer", "answers", "scores", "turns", "label", "uid", "category"),
}


def parse_columns(columns: list[str] | None) -> dict[str, str | None]:
    """`{known name: column, or None}` of --columns. Raises UserError for what is not KNOWN=COLUMN."""
    mapping = {}
    for entry in columns or []:
        name, sign, column = str(entry).partition("=")
        if not sign or not name or not column:
            raise UserError(f"--columns {entry}: expected NAME=COLUMN, e.g. --columns prompt=task chosen=good")
        if name not in KNOWN:
            raise UserError(
                f"--columns {entry}: {name!r} is not a name that a layout has; use {', '.join(sorted(KNOWN))}"
            )
        mapping[name] = None if column.lower() == NONE else column
    return mapping


def rename_columns(
    rows: list[tuple[str, object]], columns: list[str] | None, dataset: str, required: Collection[str] = KNOWN
) -> list[tuple[str, object]]:
    """(source, row) of every row with its columns under the names that --columns gives them.

    A column that gets another's name is read no more; it stays in the row as `NAME (replaced)`, so that it is counted
    as unused. NAME=none removes a column the same way.

    Args:
        required: the other names are given only where a row has the column.

    Raises:
        UserError: a required column that no row has.
    """
    mapping = parse_columns(columns)
    if not mapping:
        return rows
    present = {key for _, row in rows if isinstance(row, dict) for key in row}
    mapping = {k: v for k, v in mapping.items() if k in required or v is None or v in present}
    sources = {column for column in mapping.values() if column is not None}
    for name, column in mapping.items():
        if column is not None and column not in present:
            names = ", ".join(sorted(map(str, present)))
            raise UserError(f"{dataset}: --columns {name}={column}: no such column (columns: {names})")

    def renamed(row):
        if not isinstance(row, dict):
            return row
        new = {f"{k} (replaced)" if k in mapping else k: v for k, v in row.items() if k not in sources}
        for name, column in mapping.items():
            if column is not None:
                new[name] = row.get(column)
            else:
                new[f"{name} ({NONE})"] = True
        return new

    return [(source, renamed(row)) for source, row in rows]
