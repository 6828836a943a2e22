"""Prompts with labelled answers: pairs of any format, and RewardBench 2's lists of correct and incorrect answers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preflab.data.messages import check_unicode
from preflab.data.pair_rows import to_pair
from preflab.data.prompt_format import AS_CHAT
from preflab.data.prompts import Prompt, prompt_messages
from preflab.data.split_data import read_items
from preflab.evaluation.runs import HELD_OUT_ROWS, data_of_run, read_manifest, run_folder_of
from preflab.evaluation.trained_prompts import ALL, key_of, prompts_of_run
from preflab.pairs.scorers import Candidates
from utils.errors import UserError

# Columns that may hold the category of a row, in order of preference.
CATEGORY_KEYS = ("subset", "category")


@dataclass
class Labelled:
    """A prompt with its answers, the better ones first.

    Attributes:
        correct: how many of the answers are right: 1 in a pair.
        category: of the row, None where it names none.
        uid: of the row, which RewardBench 2's Ties need.
    """

    prompt: Prompt
    answers: list[str]
    correct: int
    category: str | None
    uid: str

    @property
    def messages(self) -> list[dict]:
        """The prompt's messages."""
        return self.prompt.messages

    @property
    def prompt_key(self) -> str:
        """Equal for prompts that count as duplicates."""
        return self.prompt.prompt_key

    @property
    def source(self) -> str:
        """File and row."""
        return self.prompt.source

    def candidates(self) -> Candidates:
        """The answers as a scorer takes them."""
        return Candidates(self.prompt, self.answers, [1] * len(self.answers))


@dataclass
class LabelledData:
    """What is evaluated.

    Attributes:
        facts: counts and provenance, for the artifact.
        note: which rows were left out because the scorer was trained on their prompts; "" for none.
        not_held_out: why the rows are no evidence; "" where they are.
    """

    items: list[Labelled]
    facts: dict
    note: str = ""
    not_held_out: str = ""


def load_labelled(sources: list[dict], category_key: str | None, limit: int | None) -> LabelledData:
    """Read pairs, or rows whose `chosen` and `rejected` are lists of texts.

    Args:
        sources: as for `read_sources`.
        category_key: the column of the category (default: the first of CATEGORY_KEYS that a row has).

    Raises:
        UserError: a row that cannot be read, or nothing is left.
    """

    def read(row: dict, source: str, unused: Counter) -> Labelled | str:
        keys = (category_key,) if category_key else CATEGORY_KEYS
        category = next((str(row[key]) for key in keys if row.get(key) is not None), None)
        uid = str(row["id"]) if row.get("id") is not None else source
        if _holds_lists(row):
            return _from_lists(row, source, category, uid)
        pair = to_pair(row, source, AS_CHAT, unused)
        if isinstance(pair, str):
            return pair
        if not pair.chosen.strip() or not pair.rejected.strip():
            return "empty_response"
        if pair.chosen == pair.rejected:
            return "identical_responses"
        check_unicode([pair.prompt_text, pair.chosen, pair.rejected], source)
        messages = pair.messages or [{"role": "user", "content": pair.text}]
        return Labelled(Prompt(messages, source), [pair.chosen, pair.rejected], 1, category, uid)

    items, facts = read_items(sources, read, limit)
    if not items:
        named = ", ".join(f"{s['name']} split {s.get('split')}" for s in sources)
        raise UserError(f"{named}: no row is left; dropped: {dict(facts['dropped'])}")
    facts = {**facts, "dropped": dict(facts["dropped"]), "unused": dict(facts["unused"]), "pairs": len(items)}
    return LabelledData(items, facts)


def _holds_lists(row: dict) -> bool:
    """Whether chosen and rejected are lists of texts, as in RewardBench 2; message lists hold dictionaries."""
    return all(
        isinstance(row.get(key), list) and row[key] and all(isinstance(text, str) for text in row[key])
        for key in ("chosen", "rejected")
    )


def _from_lists(row: dict, source: str, category: str | None, uid: str) -> Labelled | str:
    messages = prompt_messages({key: value for key, value in row.items() if key not in ("chosen", "rejected")}, source)
    if isinstance(messages, str):
        return messages
    answers = [*row["chosen"], *row["rejected"]]
    check_unicode(answers, source)
    if not all(answer.strip() for answer in answers):
        return "empty_response"
    return Labelled(Prompt(messages, source), answers, len(row["chosen"]), category, uid)


# ------------------------------------------------------------------------------------------------------------ held out


def run_of_scorer(spec: str) -> tuple[Path, dict] | None:
    """(folder, arguments) of the run that a rm: or implicit: scorer comes from; None for other scorers."""
    kind, _, name = spec.partition(":")
    if kind not in ("rm", "implicit") or not name:
        return None
    places = [Path(name).expanduser(), Path("checkpoints") / name]
    folder = next((place for place in places[: 1 + (kind == "implicit")] if place.is_dir()), None)
    home = run_folder_of(folder) if folder else None
    return (home, read_manifest(home)["args"]) if home else None


def held_out_sources(spec: str) -> list[dict]:
    """The test split of the run that trained the scorer. Raises UserError where there is none."""
    run = run_of_scorer(spec)
    if run is None:
        raise UserError(f"--dataset_name is missing: {spec} does not come from a run, whose test split would be read")
    folder, args = run
    own = folder / HELD_OUT_ROWS
    if own.exists():
        return [{"name": str(own), "split": "test"}]
    sources = data_of_run(args).sources()[1]
    if not sources:
        raise UserError(f"--dataset_name is missing: {folder} held no rows out; give data that it was not trained on")
    return sources


def leave_out_trained(data: LabelledData, specs: list[str]) -> None:
    """Leave out the rows whose prompt a scorer's run was trained on; if that is every row, say so instead.

    A run's own test split has none of them: training refuses or drops prompts of both splits.
    """
    seen: set[str] = set()
    for run in filter(None, map(run_of_scorer, specs)):
        folder, args = run
        seen |= prompts_of_run(args, folder)
    trained = [item for item in data.items if key_of(item) in seen]
    if not trained:
        return
    if len(trained) == len(data.items):
        data.not_held_out = ALL
        return
    data.note = (
        f"{len(trained)} of {len(data.items)} rows have prompts that the scorer was trained on (first:"
        f" {trained[0].source}); they are left out."
    )
    data.items = [item for item in data.items if key_of(item) not in seen]
    data.facts["dropped"]["prompt_trained_on"] = len(trained)
