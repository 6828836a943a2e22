"""Preference data: the pairs of a split, read (preflab.data.pair_rows), filtered and tokenized."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from preflab.data.chat_template import (
    ChatRenderer,
    TemplateRefused,
    encoded,
    lost_options,
    lost_parts,
    plain_texts,
    shared_prefix,
    spells_markers,
)
from preflab.data.messages import check_unicode
from preflab.data.pair_rows import Pair, to_pair
from preflab.data.prompt_format import AS_TEXT, PromptFormat
from preflab.data.row_fields import WIN_KEYS
from preflab.data.sources import SourceArguments, marked_as_held_out, read_sources, split_off
from preflab.data.split_data import SplitData, read_items
from preflab.data.tokenised_rows import IDS, Outcome, identity_of, lengths, tokenise
from utils.errors import UserError
from utils.provenance import sha256_of

PARTS = ("prompt", "chosen", "rejected")
# Further columns of a row with several answers: ids of those between the best (chosen) and the worst (rejected), one
# after the other, how many each of them has, and the scores of all answers from the best to the worst.
LIST_COLUMNS = {"others_ids": IDS, "others_lengths": IDS, "scores": pa.list_(pa.float64())}


@dataclass
class PairFilters(SourceArguments):
    """Flags that choose preference data and filters."""

    drop_ties: bool = field(default=False, metadata={"help": "Drop pairs with equal scores."})
    min_score_margin: float | None = field(default=None, metadata={"help": "Drop pairs with a smaller score margin."})
    keep_duplicate_prompts: bool = field(default=False, metadata={"help": "Keep pairs that share a prompt."})
    lists: bool = field(
        default=False,
        metadata={"help": "Read rows with several scored answers; losses on pairs take their best and worst answer."},
    )

    def _reading(self, columns: list[str] | None = None) -> dict:
        return {**super()._reading(columns), **({"lists": True} if self.lists else {})}

    def check(self) -> None:
        super().check()
        # Resolved, so that run.json names the split.
        if self.dataset_test_split is None:
            self.dataset_test_split = "none" if self.test_rows else self.default_test_split
        self.test_rows = self.test_rows or 0


@dataclass
class DataArguments(PairFilters):
    """PairFilters, and the chat template where TRL's config has no key for it."""

    chat_template_path: str | None = field(default=None, metadata={"help": "Jinja file that replaces the template."})


@dataclass(kw_only=True)
class PreferenceData(SplitData):
    """The pairs of one split.

    Attributes:
        pairs: the pairs that passed the filters.
        trained_on: which pairs were left out because their prompt was trained on, in evaluations; "" for none.
        not_held_out: why the pairs are no evidence, in evaluations; "" for held-out pairs.
    """

    pairs: list[Pair]
    trained_on: str = ""
    not_held_out: str = ""

    def summary(self) -> dict:
        """Counts and provenance for an artifact."""
        return {
            "rows": self.rows,
            "pairs": len(self.pairs),
            **self.left_out(),
            **{key: getattr(self, key) for key in ("trained_on", "not_held_out") if getattr(self, key)},
            "prompts": dict(Counter(pair.prompt_kind for pair in self.pairs)),
            "sources": self.sources,
            "text_sha256": sha256_of(
                *[text for p in self.pairs for text in (p.prompt_text, p.chosen, p.rejected)],
                # Win probabilities are targets of SPPO's loss; data without them keeps the hash of its texts alone.
                *[str((p.win_chosen, p.win_rejected)) for p in self.pairs if p.win_chosen is not None],
                *[json.dumps(p.keys, sort_keys=True) for p in self.pairs if any(p.keys)],
                *[json.dumps([p.others, p.scores]) for p in self.pairs if p.scores],
            ),
        }


# -------------------------------------------------------------------------------------------------------- filtering


def load_pairs(
    sources: list[dict],
    drop_ties: bool = False,
    min_score_margin: float | None = None,
    keep_duplicate_prompts: bool = False,
    prompt_format: PromptFormat = AS_TEXT,
    limit: int | None = None,
) -> PreferenceData:
    """Read, normalise and filter the rows of one or several sources, in order.

    Args:
        sources: as for `read_sources`.
        drop_ties: drop pairs with equal scores.
        min_score_margin: drop pairs whose chosen score is less than this above the rejected one.
        keep_duplicate_prompts: keep every pair of a prompt, not only the first.
        prompt_format: which text prompts become user turns.
        limit: number of pairs, spread evenly over the sources.
    """
    # Sources are read one after another, so of a prompt in two sources the first one's pair is used.
    seen = set()

    lists = any(source.get("lists") for source in sources)

    def read(row: dict, source: str, unused: Counter) -> Pair | str:
        pair = to_pair(row, source, prompt_format, unused, lists)
        # The filters run before the search for duplicates, so a dropped pair does not hide a later usable one of its
        # prompt.
        reason = pair if isinstance(pair, str) else _drop_reason(pair, drop_ties, min_score_margin)
        if reason is None and not keep_duplicate_prompts:
            # Exact text, unlike `prompt_key`: only the comparison of train and test folds case and spacing.
            prompt = pair.prompt_text
            reason = "duplicate_prompt" if prompt in seen else None
            seen.add(prompt)
        return reason or pair

    pairs, facts = read_items(sources, read, limit)
    return PreferenceData(pairs=pairs, **facts)


def hold_out_pairs(data: PreferenceData, count: int, sources: list[dict]) -> tuple[PreferenceData, list[dict]]:
    """Move about `count` pairs out of `data`, by prompt (preflab.data.sources.split_off).

    Args:
        sources: the sources that `data` was read from.

    Returns:
        (held-out pairs, their rows as they were read), in the same order.

    Raises:
        UserError: nothing would be left to train on.
    """
    held_out, data.pairs = split_off(data.pairs, count, "pairs")
    marked = marked_as_held_out(data.sources, len(held_out), "pairs")
    # Read again, since a pair does not hold all of its row; an evaluation reads these rows as training did.
    wanted = {pair.source for pair in held_out}
    rows = [row for part, _ in read_sources(sources) for source, row in part if source in wanted]
    # Rows that were dropped while reading are counted once, in the train part.
    return PreferenceData(pairs=held_out, sources=marked, rows=len(held_out)), rows


def _drop_reason(pair: Pair, drop_ties: bool, min_score_margin: float | None) -> str | None:
    """The name of the filter that drops `pair`, or None."""
    check_unicode([pair.prompt_text, pair.chosen, pair.rejected, *pair.others], pair.source)
    # An answer that only calls a tool has no text.
    if not (pair.chosen.strip() or pair.keys[0]) or not (pair.rejected.strip() or pair.keys[1]):
        return "empty_response"
    if pair.chosen == pair.rejected and pair.keys[0] == pair.keys[1]:
        return "identical_responses"
    if drop_ties or min_score_margin is not None:
        if pair.score_chosen is None or pair.score_rejected is None:
            raise UserError(
                f"{pair.source}: --drop_ties and --min_score_margin need 'score_chosen' and 'score_rejected'"
            )
        margin = pair.score_chosen - pair.score_rejected
        if drop_ties and margin == 0:
            return "tied_scores"
        if min_score_margin is not None and margin < min_score_margin:
            return "score_margin_below_threshold"
    return None


# ------------------------------------------------------------------------------------------------------- tokenising


def truncate(prompt: list[int], answers: Sequence[list[int]], max_length, max_prompt_length, bos_id):
    """Truncate a pair that is longer than `max_length`: first the prompt to `max_prompt_length`, then the answers.

    The prompt keeps exactly one BOS (its first id, if that is `bos_id`) and its end; the answers keep their start.
    `max_prompt_length < max_length`, so every answer keeps at least one token.

    Returns:
        (prompt, *answers) ids.
    """
    # The longest answer decides for all, so that all of them follow the same prompt tokens.
    if max_length is None or len(prompt) + max(map(len, answers)) <= max_length:
        return prompt, *answers
    if len(prompt) > max_prompt_length:
        keeps_bos = bos_id is not None and prompt[0] == bos_id and max_prompt_length > 1
        # The end of a prompt holds its question. Models such as Gemma need BOS at the first position.
        end = prompt[-(max_prompt_length - keeps_bos) :]
        # Where BOS opens every turn (SmolLM2's <|im_start|>), the end may begin with one already.
        prompt = prompt[:1] + end if keeps_bos and end[0] != bos_id else end
    room = max_length - len(prompt)
    return prompt, *(answer[:room] for answer in answers)


def tokenize(
    data: PreferenceData,
    tokenizer,
    max_length: int | None,
    max_prompt_length: int | None,
    desc: str = "",
    lists: bool = False,
):
    """Tokenize every pair, in order, and count what was truncated.

    As in TRL, the answer starts where the tokens of the rendered prompt and of the rendered conversation diverge. That
    is the end of the prompt for all but a few templates. Conversations that the template rejects, prompts without
    tokens and answers that are equal once truncated are counted in `data.dropped` and removed from `data.pairs`.

    Args:
        desc: the split's name, for progress and errors.
        lists: add the columns of the losses on lists (LIST_COLUMNS), in which a pair is a list of two.

    Returns:
        (dataset, counts): columns prompt_ids, chosen_ids, rejected_ids and `pair` (index into `data.pairs`), and
        win_chosen and win_rejected if every pair has them; counts of truncated parts for the preflight.

    Raises:
        UserError: no pair is left.
    """
    # Base models without a chat template can still train on plain text.
    chat = ChatRenderer(tokenizer) if any(p.messages is not None for p in data.pairs) else None
    ids, outcome = tokenise(
        data.pairs,
        partial(_tokenise_batch, chat=chat, tokenizer=tokenizer, lengths=(max_length, max_prompt_length), lists=lists),
        pa.schema([*((f"{part}_ids", IDS) for part in PARTS), *(LIST_COLUMNS.items() if lists else ())]),
        [*identity_of(tokenizer, tokenizer.chat_template), f"{max_length} {max_prompt_length}"],
        f"tokenizing {desc}",
    )
    hint = ""
    if outcome.dropped["identical_after_truncation"]:
        hint = f"; answers longer than --max_length {max_length} are cut to their equal beginnings: raise it"
    # Invariant: row k of the ids belongs to `data.pairs[k]`.
    data.pairs = data.usable(data.pairs, outcome, f"{desc} pairs", hint)
    ids = ids.add_column("pair", list(range(len(ids))))
    for name in WIN_KEYS:
        # A column needs a value in every row. Training with --loss_type sppo reports the first row without one.
        if all(getattr(pair, name) is not None for pair in data.pairs):
            ids = ids.add_column(name, [getattr(pair, name) for pair in data.pairs])
    return ids, dict(outcome.counts)


def drop_longer(data: PreferenceData, ids, max_length: int | None, desc: str = ""):
    """The token ids without pairs of which a sequence exceeds `max_length`; `data` loses those pairs too.

    A reward is read at the end of an answer, so a cut answer would be judged as if it ended there.

    Args:
        ids: from `tokenize`.
        desc: the split's name, for errors.

    Raises:
        UserError: no pair is left.
    """
    if max_length is None:
        return ids
    prompt, *answers = (lengths(ids, f"{part}_ids") for part in PARTS)
    fits = (prompt + np.maximum(*answers) <= max_length).nonzero()[0]
    if len(fits) == len(ids):
        return ids
    data.dropped["longer_than_max_length"] += len(ids) - len(fits)
    data.pairs = [data.pairs[i] for i in fits]
    if not data.pairs:
        raise UserError(f"{desc} pairs: all are longer than --max_length {max_length}: raise it")
    return ids.select(fits).remove_columns("pair").add_column("pair", list(range(len(fits))))


def _tokenise_batch(
    pairs: list[Pair], chat: ChatRenderer | None, tokenizer, lengths: tuple, lists: bool = False
) -> tuple[dict, Outcome]:
    """The columns of token ids of some pairs, and which of them are left."""
    columns, outcome = {f"{part}_ids": [] for part in PARTS} | {name: [] for name in LIST_COLUMNS if lists}, Outcome()
    positions, starts, texts, is_plain = [], [], [], []
    for position, pair in enumerate(pairs):
        try:
            # First the texts, then the pair: a refusal leaves all lists as they were.
            rendered = _texts(pair, chat, tokenizer)
            positions.append(position)
            starts.append(len(texts))
            texts += rendered
            is_plain += [pair.messages is None] * len(rendered)
        except TemplateRefused as error:
            outcome.refuse(pair.source, error)
    ids = encoded(texts, is_plain, tokenizer)["input_ids"]
    for position, start in zip(positions, starts, strict=True):
        pair = pairs[position]
        # Ids of the prompt, of prompt and chosen answer, of prompt and rejected answer, of prompt and each other one.
        prompt, *full = ids[start : start + 3 + len(pair.others)]
        # Tokens at the boundary may merge with the answer, so the prompt's own ids cannot be assumed to match.
        answer = min(shared_prefix(prompt, tokens) for tokens in full)
        outcome.counts["prompt_end_rendered_differently"] += answer < len(prompt)
        # The prompt's ids are those of the conversations, so that prompt and answer together are exactly their tokens.
        parts = (full[0][:answer], *(tokens[answer:] for tokens in full))
        cut = truncate(parts[0], parts[1:], *lengths, tokenizer.bos_token_id)
        thoughtless = _count_lost(outcome.counts, pair, texts[start : start + 3], chat)
        shorter = [len(after) < len(before) for before, after in zip(parts, cut, strict=True)]
        for name, is_cut in zip(PARTS, shorter, strict=False):
            outcome.counts[f"truncated_{name}"] += is_cut
        if pair.others:
            outcome.counts["truncated_other"] += any(shorter[len(PARTS) :])
        # Equal answers have a loss without gradient; an empty prompt leaves the first answer token without a context.
        if not cut[0] or cut[1] == cut[2]:
            outcome.dropped[_reason(parts, cut, thoughtless)] += 1
            continue
        for name, value in zip(PARTS, cut, strict=False):
            columns[f"{name}_ids"].append(value)
        if lists:
            others = cut[len(PARTS) :]
            columns["others_ids"].append([token for tokens in others for token in tokens])
            columns["others_lengths"].append([len(tokens) for tokens in others])
            columns["scores"].append(list(pair.scores or (1.0, 0.0)))
        outcome.usable.append(position)
    return columns, outcome


def _count_lost(counts: Counter, pair: Pair, texts: list[str], chat: ChatRenderer | None) -> bool:
    """Count what the chat template removes from a pair; whether it removes thoughts of an answer.

    Args:
        texts: the rendered prompt, prompt with chosen answer, prompt with rejected answer.
    """
    if pair.messages is None:
        return False
    texts_of_row = [*(turn["content"] for turn in pair.messages), pair.chosen, pair.rejected]
    counts["rows_with_markers"] += spells_markers(texts_of_row)
    in_prompt = {part for turn in pair.messages for part in lost_parts(turn, texts[0])}
    counts.update(f"prompts_without_{part}" for part in in_prompt)
    if len(pair.messages[0]) > 2:
        template = str(chat.tokenizer.chat_template)
        counts.update(f"prompts_without_{part}" for part in lost_options(pair.messages, texts[0], template))
    thoughtless = False
    for side, text, keys, rendered in zip(
        ("chosen", "rejected"), (pair.chosen, pair.rejected), pair.keys, texts[1:], strict=True
    ):
        lost = lost_parts({"content": text, **keys}, rendered)
        counts.update(f"{side}_without_{part}" for part in lost)
        thoughtless = thoughtless or "thoughts" in lost
    return thoughtless


def _reason(parts: tuple, cut: tuple, thoughtless: bool) -> str:
    """Why a pair without a difference to learn is dropped.

    Args:
        parts, cut: token ids of (prompt, chosen, rejected, *others), before and after truncation.
    """
    if not cut[0]:
        return "empty_prompt"
    if parts[1] != parts[2]:
        return "identical_after_truncation"
    return "identical_without_thoughts" if thoughtless else "identical_as_rendered"


def _texts(pair: Pair, chat: ChatRenderer | None, tokenizer) -> list[str]:
    """The rendered prompt, prompt with chosen answer, prompt with rejected answer, prompt with each other answer."""
    if pair.messages is not None:
        return [
            chat.prompt_text(pair.messages),
            chat.full_text(pair.messages, pair.chosen, pair.keys[0]),
            chat.full_text(pair.messages, pair.rejected, pair.keys[1]),
            *(chat.full_text(pair.messages, text, {}) for text in pair.others),
        ]
    return plain_texts(pair.text, (pair.chosen, pair.rejected, *pair.others), tokenizer)
