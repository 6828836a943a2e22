"""Pieces of the preflight as text: decoded rows, excerpts, and lines that fit the terminal."""

import textwrap

from preflab.data.reading_report import unit_of
from utils.tables import terminal_width

# Columns of a line before its text; further lines of the same text begin there.
LABEL = 12


def wrapped(line: str) -> str:
    """A line of the report, wrapped to the terminal, with its further lines below its text."""
    return textwrap.fill(line, terminal_width(), subsequent_indent=" " * LABEL, break_on_hyphens=False)


def decoded_pair(dataset, tokenizer) -> dict:
    """The first pair decoded, with its loss mask: which part is context and which is scored."""
    row = dataset[0]
    return {
        "prompt_not_scored": tokenizer.decode(row["prompt_ids"]),
        "chosen_scored": tokenizer.decode(row["chosen_ids"]),
        "rejected_scored": tokenizer.decode(row["rejected_ids"]),
        "tokens": {k: len(row[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")},
    }


def decoded_conversation(dataset, tokenizer) -> list[dict]:
    """The first conversation decoded in pieces, each with whether it is trained on."""
    row, pieces = dataset[0], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        # A new piece starts where the loss mask changes.
        if not pieces or pieces[-1]["trained_on"] != (label != -100):
            pieces.append({"trained_on": label != -100, "ids": []})
        pieces[-1]["ids"].append(token)
    return [
        {"trained_on": p["trained_on"], "tokens": len(p["ids"]), "text": tokenizer.decode(p["ids"])} for p in pieces
    ]


def excerpt(text: str, end: bool = False) -> str:
    """`text` on one line, shortened to its first or last 300 characters."""
    text = text.replace("\n", "⏎")
    return text if len(text) <= 300 else ("… " + text[-300:] if end else text[:300] + " …")


def dropped_rows(split: dict) -> str:
    """The rows that the filters dropped from a split, as text, from its summary."""
    count = split[unit_of(split)]
    # Rows beyond --limit, or moved to the test split.
    rest = split["rows"] - count - sum(split["dropped"].values())
    text = ", ".join(f"{k} {v}" for k, v in split["dropped"].items()) or "nothing"
    return f"{text} ({rest} set aside)" if rest > 0 else text
