"""Which rows a training script reads: one dataset or a mix of several, and what is held out."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from preflab.data.rows import read_rows
from utils.errors import UserError
from utils.provenance import sha256_of


@dataclass
class DatasetSource:
    """One entry of a `datasets:` mix."""

    path: str
    name: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None
    fraction: float | None = None


@dataclass
class SourceArguments:
    """Where the rows come from. Each training script adds the keys of its own kind of data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local file, or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default="test", metadata={"help": "Split to evaluate on; none for none."})
    test_dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the test split, if another."})
    datasets: list[DatasetSource] = field(default_factory=list, metadata={"help": "A mix of datasets, in YAML."})
    train_test_overlap: str = field(
        default="refuse",
        metadata={"help": "What to do with train prompts of the test split.", "choices": ["refuse", "drop", "keep"]},
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first rows; marks every name."})

    def check(self) -> None:
        """Raise UserError for keys that no data can be read with."""
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"--limit {self.limit}: must be above 0")
        if not self.datasets and self.dataset_name is None:
            raise UserError("--dataset_name is missing: a hub id, a local file or a folder (see --help)")

    def sources(self) -> tuple[list[dict], list[dict]]:
        """The train and the test sources that `read_sources` reads. Raises UserError for an unusable mix."""
        if self.datasets:
            mix = [_dataset_source(entry) for entry in self.datasets]
            common = [{"name": d.path, "config": d.name, "revision": d.revision} for d in mix]
            train = [{**c, "split": d.split, "fraction": d.fraction} for c, d in zip(common, mix, strict=True)]
            test = [{**c, "split": d.test_split} for c, d in zip(common, mix, strict=True) if d.test_split]
        else:
            one = {"name": self.dataset_name, "config": self.dataset_config, "revision": self.dataset_revision}
            train = [{**one, "split": self.dataset_train_split}]
            test = [{**one, "split": self.dataset_test_split}]
        if self.test_dataset_name:
            test = [{"name": self.test_dataset_name, "split": self.dataset_test_split or "test"}]
        unnamed = self.dataset_test_split is None and not (self.test_dataset_name or self.datasets)
        if unnamed or (self.dataset_test_split or "").lower() == "none":
            return train, []
        for held_out in test:
            same = [s for s in train if all(s.get(k) == held_out.get(k) for k in ("name", "config"))]
            if any(s["split"] == held_out["split"] or Path(s["name"]).is_file() for s in same):
                raise UserError(
                    f"{held_out['name']} would be both train and test data: name held-out rows with"
                    " --test_dataset_name or --dataset_test_split, or pass --dataset_test_split none"
                )
        return train, test


def _dataset_source(entry) -> DatasetSource:
    """One checked entry of a `datasets:` mix."""
    if isinstance(entry, DatasetSource):
        return entry
    known = DatasetSource.__dataclass_fields__
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= set(known):
        raise UserError(f"datasets: {entry!r} is no entry; one has path and perhaps {', '.join(list(known)[1:])}")
    for key, value in entry.items():
        kind = (int, float) if key == "fraction" else str
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UserError(
                f"datasets: {key} of {entry['path']!r} must be a {'number' if key == 'fraction' else 'text'}"
            )
    return DatasetSource(**entry)


def read_sources(sources: list[dict]) -> list[tuple[list[tuple[str, dict]], dict]]:
    """(rows, source) of each source, as `read_rows` has them; of a mix each source's share.

    Args:
        sources: `{"name", "split"}` each, with optional "config", "revision" and "fraction" (its share of the mix;
            the first rows of each are taken, so many that none is used twice).
    """
    read = [read_rows(s["name"], s["split"], s.get("config"), s.get("revision")) for s in sources]
    fractions = [s.get("fraction") for s in sources]
    if all(f is None for f in fractions):
        return read
    if not all(f is not None and f > 0 for f in fractions):
        raise UserError("datasets: give every dataset of the mix a fraction above 0, or none of them")
    total = min(len(rows) * sum(fractions) / f for (rows, _), f in zip(read, fractions, strict=True))
    return [
        (rows[: round(total * f / sum(fractions))], {**source, "fraction": f})
        for (rows, source), f in zip(read, fractions, strict=True)
    ]


def folded(text: str) -> str:
    """Equal for prompts that differ in nothing but case and spacing."""
    return " ".join(text.lower().split())


def by_hash(sizes: dict[str, int], count: int) -> set[str]:
    """Keys that together hold about `count` rows (`sizes`: rows of each), told by a hash of their text alone."""
    chosen, taken = set(), 0
    for key in sorted(sizes, key=sha256_of):
        if taken >= count:
            break
        chosen.add(key)
        taken += sizes[key]
    return chosen


def without_overlap(train: list, test: list, policy: str, dropped: Counter) -> list:
    """`train` with its prompts that also stand in `test` dealt with, counted in `dropped`.

    Args:
        train, test: items with `prompt_key` and `where`.
        policy: "refuse" them (UserError), "drop" them from train, or "keep" them.
    """
    held_out = {item.prompt_key for item in test}
    shared = [item for item in train if item.prompt_key in held_out]
    if not shared:
        return train
    if policy == "refuse":
        raise UserError(
            f"{len(shared)} train prompts also stand in the test split (first: {shared[0].source}): pass"
            " --train_test_overlap drop to train without them, or keep to leave them in"
        )
    dropped["prompt_in_test_split" if policy == "drop" else "prompt_in_test_split_kept"] += len(shared)
    return train if policy == "keep" else [item for item in train if item.prompt_key not in held_out]
