"""SFT data: the conversations of a split, read (preflab.data.conversation_rows), held out, tokenized and labelled."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa

from preflab.data.chat_template import (
    ChatRenderer,
    TemplateRefused,
    encoded,
    lost_options,
    lost_parts,
    plain_texts,
    spells_markers,
    training_template,
)
from preflab.data.conversation_rows import Conversation, to_conversation
from preflab.data.messages import WEIGHT, transcript
from preflab.data.prompt_format import AS_CHAT, PromptFormat
from preflab.data.sources import SourceArguments, marked_as_held_out, split_off
from preflab.data.split_data import SplitData, read_items
from preflab.data.tokenised_rows import IDS, Outcome, identity_of, tokenise
from utils.provenance import sha256_of

# The label of tokens without a loss, as in PyTorch's cross entropy.
IGNORED = -100


@dataclass
class SFTArguments(SourceArguments):
    """Flags that choose SFT data, its held-out part, and the tokens with a loss."""

    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on, or none (default: --test_rows of the train split)."},
    )
    test_rows: int | None = field(
        default=None,
        metadata={"help": "Conversations held out of the train split if no test split is named (default: 200)."},
    )
    loss_on: str = field(
        default="responses",
        metadata={"help": "Tokens with a loss: the assistant's, or all.", "choices": ["responses", "everything"]},
    )

    default_test_split = None

    def check(self) -> None:
        super().check()
        # `none` beside a number of rows: no split, but these rows.
        if self.test_rows:
            self.dataset_test_split = None
        self.test_rows = 200 if self.test_rows is None else self.test_rows


@dataclass(kw_only=True)
class ConversationData(SplitData):
    """The conversations of one split.

    Attributes:
        conversations: the usable conversations.
    """

    conversations: list[Conversation]

    def summary(self) -> dict:
        """Counts and provenance for an artifact."""
        texts = [transcript([m]) for c in self.conversations for m in c.turns]
        return {
            "rows": self.rows,
            "conversations": len(self.conversations),
            **self.left_out(),
            "prompts": dict(Counter(c.prompt_kind for c in self.conversations)),
            "sources": self.sources,
            # The same texts are other tokens without the chat template.
            "text_sha256": sha256_of(*texts, *[f"text {i}" for i, c in enumerate(self.conversations) if c.is_text]),
        }


# ---------------------------------------------------------------------------------------------------------- reading


def load_conversations(
    sources: list[dict], limit: int | None = None, prompt_format: PromptFormat = AS_CHAT
) -> ConversationData:
    """Read and normalise the rows of one or several sources, in order.

    Args:
        sources: as for `read_sources`.
        limit: number of conversations, spread evenly over the sources.
        prompt_format: which text prompts become user turns.
    """
    items, facts = read_items(sources, partial(to_conversation, prompt_format=prompt_format), limit)
    return ConversationData(conversations=items, **facts)


def hold_out(data: ConversationData, count: int) -> ConversationData | None:
    """Move about `count` conversations out of `data`, by prompt (preflab.data.sources.split_off); None if `count` is 0.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not count:
        return None
    held_out, data.conversations = split_off(data.conversations, count, "conversations")
    marked = marked_as_held_out(data.sources, len(held_out), "conversations")
    # Rows that were dropped while reading are counted once, in the train part.
    return ConversationData(conversations=held_out, sources=marked, rows=len(held_out))


# ------------------------------------------------------------------------------------------------------- tokenising


def tokenize(data: ConversationData, tokenizer, loss_on: str, max_length: int | None, desc: str = ""):
    """Tokenize every conversation, in order, label the tokens to train on, and count what was truncated.

    Conversations that the template rejects, or that have no labelled token left once truncated, are counted in
    `data.dropped` and removed from `data.conversations`.

    Args:
        loss_on: "responses" labels the answers' tokens including their end-of-turn token; "everything" all but the
            first token.
        max_length: longer conversations are truncated at the end.
        desc: the split's name, for progress and errors.

    Returns:
        (dataset, counts): columns input_ids, labels (-100 on tokens without a loss) and `bytes` of the labelled text.

    Raises:
        UserError: no conversation is left.
    """
    # With a template that rewrites earlier answers (without their thoughts), only the last one could be trained on.
    needs_chat = not all(conversation.is_text for conversation in data.conversations)
    template = training_template(tokenizer) if loss_on == "responses" and needs_chat else None
    # Base models without a chat template can still train on plain text.
    chat = ChatRenderer(tokenizer, template) if needs_chat else None
    dataset, outcome = tokenise(
        data.conversations,
        partial(_tokenise_batch, chat=chat, tokenizer=tokenizer, loss_on=loss_on, max_length=max_length),
        pa.schema([("input_ids", IDS), ("labels", IDS), ("bytes", pa.int64())]),
        [*identity_of(tokenizer, template or tokenizer.chat_template), loss_on, str(max_length)],
        f"tokenizing {desc}",
    )
    # Without truncation, what has no labelled token is excluded by its weights.
    cut_off = outcome.dropped["nothing_left_to_train_on"] and outcome.counts["truncated"]
    hint = f"; no answer to train on begins within --max_length {max_length}: raise it" if cut_off else ""
    # Invariant: row k of the dataset belongs to `data.conversations[k]`.
    data.conversations = data.usable(data.conversations, outcome, f"{desc} conversations", hint)
    return dataset, {**outcome.counts, "training_template": int(template is not None)}


def _tokenise_batch(
    conversations: list[Conversation], chat: ChatRenderer | None, tokenizer, loss_on: str, max_length: int | None
) -> tuple[dict, Outcome]:
    """The columns of ids, labels and bytes of some conversations, and which of them are left."""
    columns, outcome = {"input_ids": [], "labels": [], "bytes": []}, Outcome()
    positions, texts, spans, excluded = [], [], [], []
    for position, conversation in enumerate(conversations):
        if conversation.is_text:
            prompt, answer = (turn["content"] for turn in conversation.turns)
            prompt, text = plain_texts(prompt, (answer,), tokenizer)
            positions.append(position)
            texts.append(text)
            spans.append([(len(prompt), len(text))])
            excluded.append([])
            outcome.counts.update(("answers", "answers_trained"))
            continue
        turns = conversation.turns_for(chat)
        try:
            text, answer_spans = chat.answers(turns)
            # Found only where a weight excludes an answer: it costs two renderings per turn.
            has_weights = any(WEIGHT in turn for turn in turns)
            excluded.append(chat.answers(turns, trained=False)[1] if has_weights else [])
        except TemplateRefused as error:
            outcome.refuse(conversation.source, error)
            continue
        positions.append(position)
        texts.append(text)
        spans.append(answer_spans)
        _count_answers(outcome.counts, turns, answer_spans, text, chat.template or str(tokenizer.chat_template))
    if not texts:
        return columns, outcome
    is_plain = [conversations[position].is_text for position in positions]
    # Offsets are (first character, end) per token; only fast tokenizers return them.
    all_ids, all_offsets = encoded(texts, is_plain, tokenizer, return_offsets_mapping=True).values()
    for k, position in enumerate(positions):
        # Truncated here, not by the tokenizer, so that the truncated conversations can be counted below.
        ids, offsets = all_ids[k][:max_length], all_offsets[k][:max_length]
        parts = [slice(1, None)] if loss_on == "everything" else _answer_tokens(offsets, spans[k])
        row = _row(ids, parts, loss_on, tokenizer, _answer_tokens(offsets, excluded[k]))
        outcome.counts["truncated"] += len(row["input_ids"]) < len(all_ids[k])
        # The first token is never predicted, so its label does not count.
        if not any(label != IGNORED for label in row["labels"][1:]):
            outcome.dropped["nothing_left_to_train_on"] += 1
            continue
        for name, values in columns.items():
            values.append(row[name])
        outcome.usable.append(position)
    return columns, outcome


def _count_answers(counts: Counter, turns: list[dict], spans: list, text: str, template: str) -> None:
    """Count a conversation's answers: all, those to train on, those excluded by a weight of 0, and what is lost."""
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    counts["answers"] += len(answers)
    counts["rows_with_markers"] += spells_markers([turn["content"] for turn in turns])
    counts["answers_trained"] += len(spans)
    counts["answers_weight_0"] += sum(turn.get(WEIGHT) == 0 for turn in answers)
    counts.update(f"answers_without_{part}" for turn in answers for part in lost_parts(turn, text))
    if len(turns[0]) > 2:
        counts.update(f"conversations_without_{part}" for part in lost_options(turns, text, template))


def _answer_tokens(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[slice]:
    """The tokens of each answer: from the first to the last one inside its character span.

    A token in between may have an empty span, e.g. a lone space under tokenizers that trim offsets.

    Args:
        offsets: (first character, end) of each token.
        spans: (first character, end) of each answer.
    """
    # A token that crosses the border of the span belongs to the template as well and gets no label; `a < b` skips
    # tokens without characters. An answer that truncation removed has no token inside its span.
    inside = [[k for k, (a, b) in enumerate(offsets) if start <= a < b <= end] for start, end in spans]
    return [slice(tokens[0], tokens[-1] + 1) for tokens in inside if tokens]


def _row(ids: list[int], parts: list[slice], loss_on: str, tokenizer, excluded: list[slice]) -> dict:
    """input_ids, labels, and the number of bytes of the labelled text without special tokens.

    Args:
        parts: the tokens to label.
        excluded: tokens of answers that the data exclude, also under --loss_on everything.
    """
    # "everything" also labels the first token; transformers' shift by one removes it from the loss.
    labels = list(ids) if loss_on == "everything" else [IGNORED] * len(ids)
    for part in parts:
        labels[part] = ids[part]
    for part in excluded:
        labels[part] = [IGNORED] * len(ids[part])
    # UTF-8 bytes, the denominator of bits per byte, which unlike loss per token is comparable across tokenizers.
    size = sum(len(tokenizer.decode(ids[part], skip_special_tokens=True).encode()) for part in parts)
    return {"input_ids": ids, "labels": labels, "bytes": size}
