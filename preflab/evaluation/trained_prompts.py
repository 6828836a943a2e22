"""Which prompts the compared models were trained on. Held out is a property of the prompt: other answers to a training
prompt, or the same answers swapped, are no evidence either.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from preflab.data.conversations import SFTArguments, hold_out, load_conversations
from preflab.data.messages import transcript
from preflab.data.preferences import DataArguments, load_pairs
from preflab.data.prompt_format import AS_CHAT
from preflab.data.sources import folded
from preflab.evaluation.comparison import Comparison
from preflab.evaluation.runs import HELD_OUT_ROWS, data_of_run, read_manifest, run_folder_of
from utils.errors import UserError, is_main_process

# The reason in `dropped`.
REASON = "prompt_trained_on"
ALL = "NOT HELD OUT: the run was trained on these prompts, so they are no evidence."


@dataclass
class PromptCheck:
    """Items to evaluate, pairs or prompts, after the comparison with the training prompts.

    Attributes:
        items: those that are evaluated.
        dropped: how many were left out because their prompt was trained on.
        note: which, for the report; "" for none.
        not_held_out: what precedes the verdict where items with training prompts are evaluated; "" for none.
    """

    items: list
    dropped: int = 0
    note: str = ""
    not_held_out: str = ""


def without_trained(comparison: Comparison, items: list, own: bool, what: str) -> PromptCheck:
    """Leave out the items whose prompt one of the compared models was trained on.

    If that is every item, all are evaluated, and the report says that they are no evidence. A run's own held-out rows
    are never left out: they share prompts with its train split only with --train_test_overlap keep.

    Args:
        items: pairs or `Prompt`s.
        own: whether these are the rows that the tuned run held out itself.
        what: what an item is: pairs or prompts.
    """
    trained = trained_prompts(comparison, own)
    seen = [item for item in items if key_of(item) in trained]
    if not seen:
        return PromptCheck(items)
    if len(seen) == len(items):
        return PromptCheck(items, not_held_out=ALL)
    count = f"{len(seen)} of {len(items)} {what}"
    named = f"the run was trained on {'the prompts of ' if what != 'prompts' else ''}{count} (first: {seen[0].source})"
    if own:
        return PromptCheck(items, not_held_out=f"PARTLY NOT HELD OUT: {named}.")
    fresh = [item for item in items if key_of(item) not in trained]
    return PromptCheck(fresh, len(seen), f"T{named[1:]}; they are left out.")


def key_of(item) -> str:
    """The prompt of a pair or of a `Prompt`, without case and spacing; plain text counts as a user turn."""
    messages = item.messages or [{"role": "user", "content": item.text}]
    return folded(transcript(messages))


def trained_prompts(comparison: Comparison, own: bool = False) -> set[str]:
    """The keys (`key_of`) of the prompts that the compared models were trained on, as far as their run.json says.

    Args:
        own: whether the rows to evaluate are those that the tuned run held out itself: its training has refused or
            dropped the prompts of both splits already, so its data are not read again, except for
            --train_test_overlap keep.
    """
    keys, unread = set(), []
    evaluated = comparison.adapter or comparison.tuned or comparison.base
    for place in dict.fromkeys([evaluated, comparison.base_adapter, comparison.base]):
        folder = Path(place or "").expanduser()
        home = run_folder_of(folder) if place and folder.is_dir() else None
        args = read_manifest(home)["args"] if home else {}
        if not args or (place == evaluated and own and args.get("train_test_overlap") != "keep"):
            continue
        try:
            keys |= prompts_of_run(args, home)
        except UserError as error:
            unread.append(f"{place}: {error}")
    if unread and is_main_process():
        print(f"note: not compared with the training prompts, which cannot be read: {'; '.join(unread)}",
              file=sys.stderr)  # fmt: skip
    return keys


def prompts_of_run(args: dict, folder: Path) -> set[str]:
    """The keys of the prompts that a run was trained on, without those that it held out."""
    data = data_of_run(args)
    train, test = data.sources()
    if isinstance(data, SFTArguments):
        conversations = load_conversations(train, data.limit)
        if not test and data.dataset_test_split is None:
            hold_out(conversations, data.held_out_rows)
        keys = {key for c in conversations.conversations for key in _answered(c.turns)}
        held_out = load_conversations(test, data.limit).conversations if test else []
        held_out_keys = {folded(transcript(c.turns[:-1])) for c in held_out}
    else:
        keys = {key_of(pair) for pair in _pairs(train, data)}
        own = folder / HELD_OUT_ROWS
        test = [{"name": str(own), "split": "test"}] if own.exists() else test
        held_out_keys = {key_of(pair) for pair in _pairs(test, data)} if test else set()
    # --train_test_overlap keep trains on the prompts of both splits.
    return keys if data.train_test_overlap == "keep" else keys - held_out_keys


def _pairs(sources: list[dict], data: DataArguments) -> list:
    """The pairs of these sources under a run's filters."""
    filters = {key: getattr(data, key) for key in ("drop_ties", "min_score_margin", "keep_duplicate_prompts", "limit")}
    return load_pairs(sources, **filters, prompt_format=AS_CHAT).pairs


def _answered(turns: list[dict]) -> list[str]:
    """The key of the prompt of every answer in a conversation."""
    return [folded(transcript(turns[:k])) for k, turn in enumerate(turns) if k and turn["role"] == "assistant"]
