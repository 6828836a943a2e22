"""Answers with a thumb up or down (rows prompt, completion, label): read, filtered and tokenised, for KTO."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from preflab.data.chat_template import ChatRenderer, TemplateRefused, encoded, plain_texts, shared_prefix
from preflab.data.messages import check_unicode
from preflab.data.pair_rows import Pair, to_pair
from preflab.data.preferences import PreferenceData, truncate
from preflab.data.prompt_format import AS_TEXT, PromptFormat
from preflab.data.row_fields import is_true
from preflab.data.sources import marked_as_held_out, read_sources, split_off
from preflab.data.split_data import read_items
from preflab.data.tokenised_rows import IDS, Outcome, identity_of, tokenise
from utils.errors import UserError
from utils.provenance import sha256_of


@dataclass
class Thumb(Pair):
    """One answer: `chosen` (and `rejected`, which is not read) with its label, True for a thumb up."""

    label: bool = True


@dataclass(kw_only=True)
class ThumbData(PreferenceData):
    """The answers of one split, under the attribute `pairs`."""

    def summary(self) -> dict:
        """Counts and provenance for an artifact."""
        up = sum(thumb.label for thumb in self.pairs)
        return {
            "rows": self.rows,
            "thumbs": len(self.pairs),
            "up": up,
            "down": len(self.pairs) - up,
            **self.left_out(),
            "prompts": dict(Counter(thumb.prompt_kind for thumb in self.pairs)),
            "sources": self.sources,
            "text_sha256": sha256_of(
                *[text for t in self.pairs for text in (t.prompt_text, t.chosen, str(t.label))],
                *[json.dumps(t.keys, sort_keys=True) for t in self.pairs if any(t.keys)],
            ),
        }


def load_thumbs(sources: list[dict], prompt_format: PromptFormat = AS_TEXT, limit: int | None = None) -> ThumbData:
    """Read the rows of one or several sources, in order.

    Empty answers and exact repetitions of a row are dropped; an answer that has both labels keeps both.

    Args:
        sources: as for `read_sources`.
        prompt_format: which text prompts become user turns.
        limit: number of rows, spread evenly over the sources.
    """
    seen = set()

    def read(row: dict, source: str, unused: Counter) -> Thumb | str:
        thumb = _to_thumb(row, source, prompt_format, unused)
        if isinstance(thumb, str):
            return thumb
        check_unicode([thumb.prompt_text, thumb.chosen], thumb.source)
        if not (thumb.chosen.strip() or thumb.keys[0]):
            return "empty_response"
        key = (thumb.prompt_text, thumb.chosen, thumb.label)
        if key in seen:
            return "repeated_row"
        seen.add(key)
        return thumb

    thumbs, facts = read_items(sources, read, limit)
    return ThumbData(pairs=thumbs, **facts)


def _to_thumb(row: dict, source: str, prompt_format: PromptFormat, unused: Counter) -> Thumb | str:
    """One row as a Thumb, or the reason to drop it."""
    missing = [key for key in ("completion", "label") if not isinstance(row, dict) or row.get(key) is None]
    if missing:
        columns = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{source}: key {missing[0]!r} is missing (keys: {columns}); --loss_type kto reads 'prompt', 'completion'"
            " and 'label' (true for a thumb up); name other columns, e.g. --columns completion=answer label=thumb"
        )
    label = row["label"]
    if not (isinstance(label, bool) or label in (0, 1) or str(label).strip().lower() in ("true", "false")):
        raise UserError(f"{source}: 'label' must be true or false, not {label!r}")
    # Read as a pair of twice the same answer, so that prompts and answers have the layouts of pairs.
    rest = {key: value for key, value in row.items() if key not in ("completion", "label")}
    pair = to_pair({**rest, "chosen": row["completion"], "rejected": row["completion"]}, source, prompt_format, unused)
    return pair if isinstance(pair, str) else Thumb(**vars(pair), label=is_true(label))


def hold_out_thumbs(data: ThumbData, count: int, sources: list[dict]) -> tuple[ThumbData, list[dict]]:
    """Move about `count` answers out of `data`, by prompt; returns (held-out answers, their rows as they were read)."""
    held_out, data.pairs = split_off(data.pairs, count, "thumbs")
    wanted = {thumb.source for thumb in held_out}
    rows = [row for part, _ in read_sources(sources) for source, row in part if source in wanted]
    marked = marked_as_held_out(data.sources, len(held_out), "thumbs")
    return ThumbData(pairs=held_out, sources=marked, rows=len(held_out)), rows


def shuffle(data: ThumbData, seed: int) -> None:
    """Put the answers of a split in a random order: KTO trains in the order of the rows, which often are sorted."""
    data.pairs = [data.pairs[i] for i in np.random.default_rng(seed).permutation(len(data.pairs))]


def tokenize(data: ThumbData, tokenizer, max_length: int | None, max_prompt_length: int | None, desc: str = ""):
    """Tokenize every answer, in order, truncated as pairs are, and count what was truncated.

    Returns:
        (dataset, counts): columns prompt_ids, completion_ids and label; counts of truncated parts for the preflight.

    Raises:
        UserError: no answer is left.
    """
    chat = ChatRenderer(tokenizer) if any(thumb.messages is not None for thumb in data.pairs) else None
    ids, outcome = tokenise(
        data.pairs,
        partial(_tokenise_batch, chat=chat, tokenizer=tokenizer, lengths=(max_length, max_prompt_length)),
        pa.schema([("prompt_ids", IDS), ("completion_ids", IDS), ("label", pa.bool_())]),
        [*identity_of(tokenizer, tokenizer.chat_template), "thumbs", f"{max_length} {max_prompt_length}"],
        f"tokenizing {desc}",
    )
    data.pairs = data.usable(data.pairs, outcome, f"{desc} thumbs")
    return ids, dict(outcome.counts)


def _tokenise_batch(thumbs: list[Thumb], chat: ChatRenderer | None, tokenizer, lengths: tuple) -> tuple[dict, Outcome]:
    """The columns of some answers, and which of them are left."""
    columns, outcome = {"prompt_ids": [], "completion_ids": [], "label": []}, Outcome()
    positions, texts, is_plain = [], [], []
    for position, thumb in enumerate(thumbs):
        try:
            if thumb.messages is None:
                texts += plain_texts(thumb.text, (thumb.chosen,), tokenizer)
            else:
                texts += [
                    chat.prompt_text(thumb.messages),
                    chat.full_text(thumb.messages, thumb.chosen, thumb.keys[0]),
                ]
        except TemplateRefused as error:
            outcome.refuse(thumb.source, error)
            continue
        positions.append(position)
        is_plain += [thumb.messages is None] * 2
    ids = encoded(texts, is_plain, tokenizer)["input_ids"] if texts else []
    for k, position in enumerate(positions):
        prompt, full = ids[2 * k : 2 * k + 2]
        # As for pairs: tokens at the boundary may merge with the answer.
        answer = shared_prefix(prompt, full)
        parts = full[:answer], full[answer:]
        cut = truncate(parts[0], parts[1:], *lengths, tokenizer.bos_token_id)
        for name, before, after in zip(("prompt", "answer"), parts, cut, strict=True):
            outcome.counts[f"truncated_{name}"] += len(after) < len(before)
        if not cut[0]:
            outcome.dropped["empty_prompt"] += 1
            continue
        for column, value in zip(columns.values(), (*cut, thumbs[position].label), strict=True):
            column.append(value)
        outcome.usable.append(position)
    return columns, outcome
