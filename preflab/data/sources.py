"""Choose the rows of a training run: one dataset or a mix of several, its test split, and held-out prompts."""

from collections import Counter
from dataclasses import dataclass, field

from preflab.data.columns import parse_columns, rename_columns
from preflab.data.prompt_format import FORMATS
from preflab.data.rows import read_rows
from utils.errors import UserError
from utils.provenance import local_path, sha256_of


@dataclass
class DatasetSource:
    """One entry of a `datasets:` mix; the keys of TRL's DatasetConfig, plus the test split and the revision."""

    path: str
    name: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None
    fraction: float | None = None
    columns: list[str] | None = None


@dataclass
class SourceArguments:
    """Flags that choose the rows; each training script adds those of its kind of data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local file, or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, or none (default: test, or none with --test_rows)."}
    )
    test_rows: int | None = field(
        default=None, metadata={"help": "Rows of the train split to hold out, by prompt, instead of a test split."}
    )
    test_dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the test split, if it differs."})
    datasets: list[DatasetSource] = field(default_factory=list, metadata={"help": "A mix of datasets (YAML only)."})
    train_test_overlap: str = field(
        default="refuse",
        metadata={
            "help": "Train prompts that are also in the test split: fail, drop or keep them.",
            "choices": ["refuse", "drop", "keep"],
        },
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns under other names: chosen=output_a rejected=output_b prompt=task."}
    )
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "Text prompts as user turns: auto (plain ones, if the model has a chat template), chat, text.",
            "choices": list(FORMATS),
        },
    )
    on_bad_row: str = field(
        default="refuse",
        metadata={"help": "Rows that cannot be read: fail, or skip and count them.", "choices": ["refuse", "skip"]},
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first rows; adds _LIMIT<n> to every name."})

    # The test split where neither a split nor --test_rows is given.
    default_test_split = "test"

    def check(self) -> None:
        """Raise UserError for flags that select no data, or the held-out rows in two ways."""
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"--limit {self.limit}: must be above 0")
        parse_columns(self.columns)
        if not self.datasets and self.dataset_name is None:
            raise UserError("--dataset_name is missing: give a hub id, a local file or a folder (see --help)")
        if self.test_rows is not None and self.test_rows < 0:
            raise UserError(f"--test_rows {self.test_rows}: must be at least 0")
        if self.test_rows:
            self._check_held_out_once()

    def _check_held_out_once(self) -> None:
        """Raise UserError where both --test_rows and a test split are given."""
        named = {"--dataset_test_split": self.dataset_test_split, "--test_dataset_name": self.test_dataset_name}
        for flag, value in named.items():
            if value is not None and value.lower() != "none":
                raise UserError(
                    f"--test_rows {self.test_rows} holds rows out of the train split, but {flag} {value} names test"
                    " rows too: give only one of them"
                )
        mix = [_dataset_source(entry) for entry in self.datasets]
        if any(entry.test_split for entry in mix):
            raise UserError(
                f"--test_rows {self.test_rows}: the datasets of the mix name a test_split; remove one of them"
            )

    @property
    def held_out_rows(self) -> int:
        """About how many rows are held out of the train split; a trial run holds out at most a quarter of its rows."""
        rows = self.test_rows or 0
        return min(rows, self.limit // 4) if self.limit else rows

    def sources(self) -> tuple[list[dict], list[dict]]:
        """The train and the test sources, as `read_sources` reads them.

        Raises:
            UserError: an invalid mix, or rows that would be both train and test data.
        """
        split = self.dataset_test_split
        if split is None and not self.test_rows:
            split = self.default_test_split
        if self.datasets:
            mix = [_dataset_source(entry) for entry in self.datasets]
            # TRL's DatasetConfig calls the configuration `name` and the data set `path`, after load_dataset's
            # parameters.
            common = [
                {"name": d.path, "config": d.name, "revision": d.revision, **self._reading(d.columns)} for d in mix
            ]
            train = [{**c, "split": d.split, "fraction": d.fraction} for c, d in zip(common, mix, strict=True)]
            # The test parts are used completely: fractions weigh the training data only.
            test = [{**c, "split": d.test_split} for c, d in zip(common, mix, strict=True) if d.test_split]
        else:
            dataset = {
                "name": self.dataset_name,
                "config": self.dataset_config,
                "revision": self.dataset_revision,
                **self._reading(),
            }
            train = [{**dataset, "split": self.dataset_train_split}]
            test = [{**dataset, "split": split}]
        # It replaces the test parts of a mix too.
        if self.test_dataset_name:
            test = [{"name": self.test_dataset_name, "split": split or "test", **self._reading()}]
        # SFT's default is no split, so that --test_rows decides; a mix or a test data set names its own.
        unnamed = split is None and not (self.test_dataset_name or self.datasets)
        if unnamed or (split or "").lower() == "none":
            return train, []
        for held_out in test:
            # A single file has no splits, so naming it for both would train on the test rows.
            same = [s for s in train if all(s.get(k) == held_out.get(k) for k in ("name", "config"))]
            # Only the same source: two data sets that share prompts are the subject of `without_overlap`.
            if any(s["split"] == held_out["split"] or local_path(s["name"]).is_file() for s in same):
                raise UserError(
                    f"{held_out['name']} would be both train and test data: hold rows out with --test_rows N, name"
                    " others with --test_dataset_name or --dataset_test_split, or pass --dataset_test_split none"
                )
        return train, test

    def _reading(self, columns: list[str] | None = None) -> dict:
        """How the rows of a source are read. `columns`: of one entry of a mix."""
        return reading(columns or self.columns, self.on_bad_row)


def reading(columns: list[str] | None, on_bad_row: str | None) -> dict:
    """The keys of a source that say how its rows are read, for `read_source`; none of them by default."""
    return {**({"columns": columns} if columns else {}), **({"skip_bad": True} if on_bad_row == "skip" else {})}


def _dataset_source(entry) -> DatasetSource:
    """One entry of a `datasets:` mix, validated."""
    if isinstance(entry, DatasetSource):
        return entry
    keys = DatasetSource.__dataclass_fields__
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= set(keys):
        raise UserError(f"datasets: invalid entry {entry!r}: needs path; optional: {', '.join(list(keys)[1:])}")
    for key, value in entry.items():
        # YAML reads an unquoted `1e-1` as text and `yes` as a boolean; neither may pass for a number.
        kind, name = {"fraction": ((int, float), "number"), "columns": (list, "list")}.get(key, (str, "text"))
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UserError(f"datasets: {key} of {entry['path']!r} must be a {name}")
    return DatasetSource(**entry)


def read_source(source: dict) -> tuple[list[tuple[str, dict]], dict]:
    """(rows, about) of one source, as from `read_rows`, with the column names of --columns.

    Args:
        source: `{"name", "split"}`, optionally "config", "revision", "columns" and "skip_bad" (lines that are not JSON
            are given as BadRow).
    """
    keys = source["name"], source["split"], source.get("config"), source.get("revision")
    rows, about = read_rows(*keys, keep_bad=source.get("skip_bad", False))
    columns = source.get("columns")
    return rename_columns(rows, columns, source["name"]), {**about, **({"columns": columns} if columns else {})}


def read_sources(sources: list[dict]) -> list[tuple[list[tuple[str, dict]], dict]]:
    """Read several sources; with fractions, take each source's share of the mix.

    Args:
        sources: each as for `read_source`, optionally with a "fraction". Fractions are relative: the
            mix is as large as it can be without using a row twice, and takes the first rows of each source.

    Returns:
        (rows, about) of each source, as from `read_rows`.

    Raises:
        UserError: fractions for some sources only, or not above 0.
    """
    data = [read_source(source) for source in sources]
    fractions = [s.get("fraction") for s in sources]
    if all(f is None for f in fractions):
        return data
    if not all(f is not None and f > 0 for f in fractions):
        raise UserError("datasets: give every dataset of the mix a fraction above 0, or none of them")
    # The mix is limited by the source whose rows run out first.
    total = min(len(rows) * sum(fractions) / f for (rows, _), f in zip(data, fractions, strict=True))
    return [
        # The first rows, not a random sample, so that the mix is the same for every seed.
        (rows[: round(total * f / sum(fractions))], {**about, "fraction": f})
        for (rows, about), f in zip(data, fractions, strict=True)
    ]


def folded(text: str) -> str:
    """`text` in lower case with single spaces: equal for prompts that count as duplicates."""
    # The only normalisation: punctuation can change a question's meaning.
    return " ".join(text.lower().split())


def select_by_hash(sizes: dict[str, int], count: int) -> set[str]:
    """Select keys that together have about `count` rows, by the hash of each key's text alone.

    Args:
        sizes: number of rows of each key.
    """
    selected, rows = set(), 0
    # Ordered by hash: the choice depends neither on the rows' order nor on a seed.
    for key in sorted(sizes, key=sha256_of):
        if rows >= count:
            break
        selected.add(key)
        rows += sizes[key]
    return selected


def split_off(items: list, count: int, unit: str) -> tuple[list, list]:
    """Split off about `count` items; all items of a prompt are on the same side.

    The choice depends only on a hash of each prompt's text, not on the rows' order, on other rows or on a seed: runs
    with other seeds or further rows are evaluated on the same prompts.

    Args:
        items: with `prompt_key`.
        unit: what an item is, in the plural.

    Returns:
        (held out, remaining).

    Raises:
        UserError: nothing would be left to train on.
    """
    # Grouped by prompt: with the same prompt on both sides, the held-out figures would measure memorisation.
    prompts = Counter(item.prompt_key for item in items)
    chosen = select_by_hash(prompts, count)
    if len(chosen) == len(prompts):
        raise UserError(
            f"--test_rows {count}: would hold out all {len(items)} {unit}; lower it, set --dataset_test_split, or pass"
            " --test_rows 0"
        )
    held_out = [item for item in items if item.prompt_key in chosen]
    return held_out, [item for item in items if item.prompt_key not in chosen]


def marked_as_held_out(sources: list[dict], count: int, unit: str) -> list[dict]:
    """What identifies the held-out part of these sources, so that artifacts distinguish it from a test split."""
    return [{**source, "held_out": f"{count} {unit}, by hash"} for source in sources]


def without_overlap(train: list, test: list, policy: str, dropped: Counter) -> list:
    """`train` after applying `policy` to the prompts that are also in `test`; the number is counted in `dropped`.

    Args:
        train, test: items with `prompt_key` and `source`.
        policy: "refuse" (UserError), "drop" them from train, or "keep" them.
    """
    held_out = {item.prompt_key for item in test}
    # Train rows are removed, never test rows, so that the test split stays comparable across runs.
    shared = [item for item in train if item.prompt_key in held_out]
    if not shared:
        return train
    if policy == "refuse":
        raise UserError(
            f"{len(shared)} train prompts are also in the test split (first: {shared[0].source}): pass"
            " --train_test_overlap drop to remove them from training, or keep to train on them"
        )
    # Kept overlaps are counted too, so that the artifact shows that the test figures are contaminated.
    dropped["prompt_in_test_split" if policy == "drop" else "prompt_in_test_split_kept"] += len(shared)
    return train if policy == "keep" else [item for item in train if item.prompt_key not in held_out]
