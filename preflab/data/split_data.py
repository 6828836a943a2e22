"""The usable items of one split (pairs or conversations), and what became of its other rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from preflab.data.sources import read_sources
from preflab.data.tokenised_rows import Outcome
from utils.errors import UserError


@dataclass(kw_only=True)
class SplitData:
    """What is known of a split beside its items.

    Attributes:
        sources: what identifies the data, per source (`read_rows`).
        rows: number of rows read.
        dropped: number of rows dropped, by reason.
        unused: number of rows by column that they hold and that is not used.
        first_bad_row: why the first row was skipped (--on_bad_row skip), None if none was.
    """

    sources: list[dict]
    rows: int
    dropped: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    first_bad_row: str | None = None

    def left_out(self) -> dict:
        """What was not used, for an artifact."""
        first = {"first_bad_row": self.first_bad_row} if self.first_bad_row else {}
        return {"dropped": dict(self.dropped), "unused": dict(self.unused), **first}

    def usable(self, items: list, outcome: Outcome, unit: str, hint: str = "") -> list:
        """The items that are left after tokenising; the others are counted in `dropped`.

        Args:
            unit: what an item is, in the plural.
            hint: what may help, behind the message.

        Raises:
            UserError: none is left.
        """
        self.dropped.update(outcome.dropped)
        if not outcome.usable:
            example = f"; the chat template rejected e.g. {outcome.refusal}" if outcome.refusal else ""
            raise UserError(f"0 {unit} are left of {self.rows} rows; dropped: {dict(self.dropped)}{example}{hint}")
        return [items[i] for i in outcome.usable]


def read_items(
    sources: list[dict], read: Callable[[dict, str, Counter], object | str], limit: int | None = None
) -> tuple[list, dict]:
    """Read the rows of one or several sources, in order.

    Args:
        sources: as for `read_sources`.
        read: gives the item of (row, source, counter of unused columns), or the reason to drop the row.
        limit: number of items, spread evenly over the sources.

    Returns:
        (items, facts): `facts` are the attributes of SplitData.

    Raises:
        UserError: a row that cannot be read, where its source does not skip them; no row can be read.
    """
    parts = read_sources(sources)
    items, dropped, unused, first_bad_row = [], Counter(), Counter(), None
    # Each source's share of the limit, rounded up, so that a trial run sees every data set of the mix.
    share = None if limit is None else -(-limit // len(parts))
    for origin, (rows, _) in zip(sources, parts, strict=True):
        taken = 0
        for source, row in rows:
            # Dropped rows do not count.
            if taken == share:
                break
            try:
                item = read(row, source, unused)
            except UserError as error:
                if not origin.get("skip_bad"):
                    raise
                item, first_bad_row = "bad_row", first_bad_row or str(error)
            if isinstance(item, str):
                dropped[item] += 1
            else:
                items.append(item)
                taken += 1
    count = sum(len(rows) for rows, _ in parts)
    if not items and first_bad_row:
        raise UserError(f"{dropped['bad_row']} of {count} rows cannot be read; the first: {first_bad_row}")
    facts = {"sources": [about for _, about in parts], "rows": count, "dropped": dropped, "unused": unused}
    return items, {**facts, "first_bad_row": first_bad_row}
