"""Contamination: which documents of an evaluation share an n-gram of words with training data (--contamination)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflab.data.ngrams import SHORTEST, SIZES, NgramIndex
from preflab.data.sources import read_sources
from preflab.evaluation.arguments import ULTRAFEEDBACK
from preflab.evaluation.runs import HELD_OUT_ROWS, data_of_run, read_manifest
from utils.artifacts import RowFile
from utils.errors import UserError
from utils.tables import render


@dataclass
class TrainingText:
    """The rows that models were trained on, as --contamination names them.

    Attributes:
        name: of the run, or of the dataset with its split.
        rows: as read; a row that a filter of the run dropped is among them.
        sources: what identifies the data in an artifact.
    """

    name: str
    rows: list[dict]
    sources: list[dict]

    @classmethod
    def read(cls, args, checkpoints: str) -> "TrainingText | None":
        """The rows of --contamination RUN|DATASET; None without it.

        Args:
            args: contamination, contamination_split.

        Raises:
            UserError: neither a run in `checkpoints` nor a dataset that can be read.
        """
        if args.contamination is None:
            return None
        folder = Path(checkpoints) / args.contamination
        if (folder / "run.json").exists():
            if args.contamination_split:
                raise UserError(f"--contamination_split: the run {args.contamination} names its own split; remove it")
            sources, held_out = _sources_of_run(folder)
            name = f"run {args.contamination}"
        else:
            default = "train_prefs" if args.contamination == ULTRAFEEDBACK else "train"
            split, held_out = args.contamination_split or default, set()
            sources, name = [{"name": args.contamination, "split": split}], f"{args.contamination} {split}"
        try:
            data = read_sources(sources)
        except UserError as error:
            raise UserError(f"--contamination {args.contamination}: {error}") from None
        rows = [row for part, _ in data for _, row in part if isinstance(row, dict)]
        # Without any text, "nothing overlaps" would say nothing.
        if not any(text.strip() for row in rows for text in _texts(row)):
            raise UserError(f"--contamination {args.contamination}: no row is an object that holds text")
        return cls(name, [row for row in rows if _content(row) not in held_out], [about for _, about in data])

    def texts(self) -> Iterator[str]:
        """Every distinct text of every row: prompts, answers and turns, whatever the format."""
        for row in self.rows:
            yield from dict.fromkeys(_texts(row))

    def overlap(self, documents: list[str]) -> "Overlap":
        """Which documents share an n-gram with these rows."""
        return self.overlaps({"": documents})[""]

    def overlaps(self, groups: dict) -> dict:
        """The `Overlap` of each group, a list of documents. The rows are searched once for all groups."""
        index = NgramIndex([document for documents in groups.values() for document in documents])
        overlapping, result, start = index.found_in(self.texts()), {}, 0
        for name, documents in groups.items():
            part = slice(start, start := start + len(documents))
            of_group = {size: hits[part] for size, hits in overlapping.items()}
            result[name] = Overlap(of_group, int(index.too_short[part].sum()))
        return result

    def describe(self) -> dict:
        """The artifact's record of the data and the rule."""
        return {
            "training_data": self.name,
            "rows": len(self.rows),
            "sources": self.sources,
            "ngram_sizes": list(SIZES),
            "shortest": SHORTEST,
        }


@dataclass
class Overlap:
    """`overlapping`: {n-gram size: which documents overlap}, shape (documents,); too_short: documents never counted."""

    overlapping: dict[int, np.ndarray]
    too_short: int

    def counts(self) -> dict[str, int]:
        """Overlapping documents by n-gram size."""
        return {str(size): int(overlapping.sum()) for size, overlapping in self.overlapping.items()}


def _sources_of_run(folder: Path) -> tuple[list[dict], set[str]]:
    """(the train sources of a run, the rows that it held out of them)."""
    own = folder / HELD_OUT_ROWS
    sources, _ = data_of_run(read_manifest(folder)["args"]).sources()
    return sources, {_content(row) for row in RowFile(own).read()} if own.exists() else set()


def _content(row: dict) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def without_overlap(training: TrainingText, overlap: Overlap, everything: dict, figures) -> dict:
    """The artifact's section of a stage whose documents are one prompt set: figures with and without the overlap.

    Args:
        overlap: of the prompts' texts.
        everything: the figures on all prompts.
        figures: a function of a list of positions among the prompts, the figures on these.

    Returns:
        `{training_data, rows, ..., documents, too_short, removed: {size: count}, all, without: {size: figures or
        None}}`; None where nothing overlaps, or where nothing would be left.
    """
    without = {}
    for size, overlapping in overlap.overlapping.items():
        clean = [place for place, hit in enumerate(overlapping) if not hit]
        without[str(size)] = figures(clean) if clean and len(clean) < len(overlapping) else None
    return {
        **training.describe(),
        "documents": len(next(iter(overlap.overlapping.values()))),
        "too_short": overlap.too_short,
        "removed": overlap.counts(),
        "all": everything,
        "without": without,
    }


def overlap_table(section: dict, head: list[str], cells) -> str:
    """The printed table of `without_overlap`: a line for all prompts, and one for each n-gram size that overlaps.

    Args:
        head: names of the columns of figures. cells: a function of figures, their cells.
    """
    title = f"overlap with {section['training_data']}, {section['rows']:,} rows"
    if not any(section["removed"].values()):
        return f"{title}: none of {section['documents']} prompts shares a 13-gram or an 8-gram of words."
    lines = [("prompts that share an n-gram", "prompts", *head)]
    lines.append(("all", str(section["documents"]), *cells(section["all"])))
    for size, removed in section["removed"].items():
        figures = section["without"][size]
        shown = cells(figures) if figures else ["-"] * len(head)
        lines.append((f"without {size}-grams", f"{section['documents'] - removed} (-{removed})", *shown))
    return render(title, lines)
